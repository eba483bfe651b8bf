"""A residual in less memory: what is exact stays exact, what is rounded is rounded without bias."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol import Layout, forms
from protocol.layout import Entry
from protocol.ledger import sketch
from protocol.residual import Nothing, footprint, residual_for

MEMORIES = ("float32", "bfloat16", "int8", "sparse")
ROUNDING, EXACT = ("bfloat16", "int8"), ("float32", "sparse")
DTYPES = {"float32": torch.float32, "float64": torch.float64}

laws = settings(deadline=None, max_examples=80)
every_memory = pytest.mark.parametrize("memory", MEMORIES)
every_rounding = pytest.mark.parametrize("memory", ROUNDING)
every_exact = pytest.mark.parametrize("memory", EXACT)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def layout(*sizes, dtype="float32"):
    return Layout(tuple(Entry(f"w{n}", (size,), dtype, "parameter") for n, size in enumerate(sizes)))


def bits(tensor):
    return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)


def normal(numel, seed=0, dtype=torch.float32):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def put(residual, *parts, key=0):
    """Make these the residual, as a sender does: all segments, then adopted; what ``adopt`` says."""
    for number, values in enumerate(parts):
        residual.stage(number, residual.copy(number).copy_(values), key)
    return residual.adopt()


def kept(memory, values, key=0):
    """What a memory makes of a vector of one segment."""
    one = residual_for(memory, layout(values.numel(), dtype=str(values.dtype).removeprefix("torch.")))
    put(one, values, key=key)
    return one.load(0).clone()


def vectors(limit):
    """Every float32 and float64 up to a magnitude, denormal numbers and -0.0 too, in sizes around a block."""

    def of(dtype):
        top = float(np.float32(limit))
        elements = st.floats(-top, top, width=8 * np.dtype(dtype).itemsize, allow_subnormal=True)
        return arrays.arrays(dtype, st.sampled_from([0, 1, 3, 255, 256, 257, 600]), elements=elements)

    return st.sampled_from([np.float32, np.float64]).flatmap(of).map(torch.from_numpy)


# -- what is kept --------------------------------------------------------------------------------------


@every_exact
@laws
@given(values=vectors(3e38))
def test_an_exact_memory_keeps_every_bit(memory, values):
    assert torch.equal(bits(kept(memory, values)), bits(values))


@laws
@given(values=vectors(3.3e38), key=st.integers(0, 2**64 - 1))
def test_bfloat16_keeps_one_of_the_two_neighbours(values, key):
    near = values.float()
    lower = (bits(near) & ~0xFFFF).view(torch.float32)  # towards zero
    upper = ((bits(near) & ~0xFFFF) + 0x10000).view(torch.float32)
    upper = torch.where(near == lower, near, upper)
    found = kept("bfloat16", values, key).float()
    assert ((found == lower) | (found == upper)).all()


@laws
@given(values=vectors(3.4e38), key=st.integers(0, 2**64 - 1))
def test_int8_keeps_one_of_the_two_neighbours_and_never_more_than_the_largest(values, key):
    found = kept("int8", values, key)
    assert torch.isfinite(found).all()
    for first in range(0, values.numel(), 256):
        block, made = values[first : first + 256].double(), found[first : first + 256].double()
        largest = float(block.abs().max())
        coarse = 2.0**-1000 if values.dtype == torch.float64 else 2.0**-149
        spacing = max(largest / 127 * (1 + 2.0**-22), coarse)
        assert (made - block).abs().max() <= spacing * (1 + 2.0**-22)
        assert made.abs().max() <= max(largest * (1 + 2.0**-22), coarse)
        assert (made[block == 0] == 0).all()


@every_rounding
@every_dtype
def test_what_a_memory_can_hold_it_holds_exactly_whatever_the_key(memory, dtype):
    if memory == "bfloat16":
        values = (normal(1000) ** 5).bfloat16().to(DTYPES[dtype])
    else:
        whole = torch.randint(-127, 128, (1000,), generator=torch.Generator().manual_seed(0))
        whole[::256] = 127
        values = whole.to(DTYPES[dtype]) * 0.25
    for key in range(20):
        assert torch.equal(kept(memory, values, key), values)


@every_memory
@every_dtype
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 3.38e38, -3.38e38])
def test_constant_vectors_survive_zero_and_the_ends_of_the_range(memory, dtype, value):
    values = torch.full((300,), value, dtype=DTYPES[dtype])
    means = torch.stack([kept(memory, values, key).double() for key in range(200)]).mean(0)
    steps = {"bfloat16": max(abs(value) / 128, 2.0**-133), "int8": max(abs(value) / 127, 2.0**-149)}
    spacing = steps.get(memory, abs(value) * 1e-12) if value else 0.0
    assert (means - values.double()).abs().max() <= 0.3 * spacing


def test_float32_denormals_are_exact_in_int8():
    values = torch.arange(-127, 128).float() * 2.0**-149
    assert torch.equal(bits(kept("int8", values)), bits(values))


# -- rounding ------------------------------------------------------------------------------------------


@every_rounding
@every_dtype
def test_rounding_has_no_bias_and_no_more_variance_than_it_declares(memory, dtype):
    draws, values = 3000, normal(700, dtype=DTYPES[dtype]) ** 3
    one = residual_for(memory, layout(values.numel(), dtype=dtype))
    found = []
    for key in range(draws):
        bound = put(one, values, key=key * 2**40).expected
        found.append(one.load(0).clone().double())
    made = torch.stack(found)
    changes = made - values.double()
    squares = float((changes**2).sum() / draws)
    assert bound / 6 <= squares <= bound  # an idle bound would hide leaks
    low, high = made.amin(0), made.amax(0)
    share = (values - low) / (high - low).clamp(min=1e-300)  # how often it should go up
    sigma = (high - low) * (share * (1 - share) / draws).sqrt()
    off = changes.mean(0).abs()
    several = (high > low) & (share > 0.01) & (share < 0.99)
    assert several.sum() > 600
    assert (off <= 5 * sigma + 1e-7 * values.abs())[several].all()
    assert abs(float((changes.mean(0) / sigma)[several].mean())) < 5 / 600**0.5


@every_memory
@every_dtype
def test_what_rounding_takes_away_is_known(memory, dtype):
    parts = [normal(n, n, DTYPES[dtype]) ** 3 for n in (300, 0, 1, 2000)]
    one = residual_for(memory, layout(300, 0, 1, 2000, dtype=dtype))
    rounding = put(one, *parts)
    if memory in EXACT:
        assert rounding is None
        return
    taken = torch.cat(parts).double() - one.dense().double()
    assert np.allclose(rounding.changed, sketch(taken), rtol=0, atol=1e-12)
    assert 0.1 < float(taken.norm()) / rounding.expected**0.5 < 1.5


def nearest(memory):
    """The same memory, but rounding to nearest."""

    def store(values, key, position, room):
        tensor = torch.from_numpy(values)
        if memory == "bfloat16":
            near = tensor.bfloat16().to(tensor.dtype)
        else:
            scale = tensor.abs().max() / 127
            near = (tensor / scale).round() * scale
        return exact(near.numpy(), key, position, room)

    exact = forms.FORMS[memory].store
    return store


def drift(memory, rounds=2000):
    """Each round adds a thousandth of the spacing to values of 1; the share of that which arrives."""
    spacing = 2.0**-7 if memory == "bfloat16" else 1.5 / 127
    step = spacing / 1000
    values = torch.full((1024,), 1.0)
    values[::256] = 1.5  # the largest of each block
    one = residual_for(memory, layout(1024))
    put(one, kept(memory, values))
    start = one.load(0).double().clone()
    for key in range(rounds):
        residual = one.copy(0)
        residual += torch.where(values == 1.5, 0.0, step)
        one.stage(0, residual, key + 1)
        one.adopt()
    moved = (one.load(0).double() - start)[values != 1.5]
    return float(moved.mean() / (rounds * step))


@every_rounding
def test_updates_far_below_the_spacing_count_on_average(memory):
    assert drift(memory) == pytest.approx(1, abs=0.1)


@every_rounding
def test_with_rounding_to_nearest_they_would_all_be_lost(memory, monkeypatch):
    monkeypatch.setattr(type(forms.FORMS[memory]), "store", staticmethod(nearest(memory)))
    assert drift(memory) == pytest.approx(0, abs=1e-3)


@every_rounding
def test_rounding_depends_on_key_and_place_alone(memory, monkeypatch):
    values, found = normal(5000), {}
    for threads, parts in {1: [(0, 5000)], 2: [(0, 2560), (2560, 5000)]}.items():
        monkeypatch.setattr(forms, "spans", lambda size, grain, parts=parts: parts)
        found[threads] = [kept(memory, values, key) for key in (1, 1, 2)]
    first, again, other = found[1]
    assert torch.equal(first, again)
    assert torch.equal(first, found[2][0])
    assert not torch.equal(first, other)


@every_rounding
def test_changes_of_neighbours_and_of_following_keys_are_unrelated(memory):
    values = torch.full((1 << 16,), 1.0) + 0.6 * 2.0**-7
    values[::256] = 1.7
    changes = torch.stack([kept(memory, values, key) - values for key in range(4)]).double()
    changes = changes[:, (torch.arange(1 << 16) % 256) != 0]
    changes -= changes.mean()
    pairs = {
        "neighbours": (changes[0, 1:], changes[0, :-1]),
        "blocks": (changes[0, 255:], changes[0, :-255]),
        "keys": (changes[0], changes[1]),
        "keys, shifted": (changes[1, 1:], changes[2, :-1]),
    }
    for name, (a, b) in pairs.items():
        correlation = float((a * b).mean() / (a.std() * b.std()))
        assert abs(correlation) < 5 / a.numel() ** 0.5, name


# -- segments and halves -------------------------------------------------------------------------------


@every_memory
@every_dtype
def test_what_is_staged_counts_once_it_is_adopted(memory, dtype):
    one = residual_for(memory, layout(300, 0, 1, dtype=dtype))
    parts = [normal(n, dtype=DTYPES[dtype]) for n in (300, 0, 1)]
    put(one, *parts)
    before = one.dense().clone()
    assert before.abs().max() > 0
    for number, part in enumerate(parts):
        changed = one.copy(number)
        changed += 1
        one.stage(number, changed, 7)
        assert torch.equal(one.load(number), before[[0, 300, 300][number] :][: part.numel()])
    assert torch.equal(one.dense(), before)
    one.adopt()
    assert (one.dense() - before).sub(1).abs().max() < 0.05


@every_memory
@every_dtype
def test_a_compressor_is_given_the_sum_of_what_is_given_and_what_is_owed(memory, dtype):
    one = residual_for(memory, layout(700, dtype=dtype))
    put(one, normal(700, 1, DTYPES[dtype]))
    given_, owed = normal(700, 2, DTYPES[dtype]), one.load(0).clone()
    untouched = given_.clone()
    vector, residual, out = one.begin(0, given_)
    total = vector.clone() if residual is None else vector + residual
    assert torch.equal(total, owed + given_)
    out.copy_(total).mul_(0.5)
    assert torch.equal(given_, untouched)
    assert torch.equal(one.load(0), owed)


def test_without_feedback_a_compressor_sees_that_nothing_is_kept():
    nothing = Nothing(layout(5), "cpu")
    given_ = normal(5)
    assert nothing.begin(0, given_) == (given_, None, None)
    nothing.stage(0, None, 0)
    assert nothing.adopt() is None
    assert not nothing.dense().any()
    assert nothing.nbytes == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_memory
@every_dtype
def test_on_a_gpu_every_memory_holds_the_same_bits(memory, dtype):
    place = layout(3000, 5, dtype=dtype)
    found = []
    for device in ("cpu", "cuda"):
        one = residual_for(memory, place, device)
        parts = [normal(n, n, DTYPES[dtype]).to(device) for n in (3000, 5)]
        put(one, *parts, key=3)
        for number, part in enumerate(parts):
            vector, residual, out = one.begin(number, part)
            out.copy_(vector if residual is None else vector + residual).mul_(0.5)
            assert out.device.type == device
            one.stage(number, out, 4)
        one.adopt()
        found.append(one.dense().cpu())
    assert torch.equal(*found)


# -- memory --------------------------------------------------------------------------------------------

SIZES = (5000, 20_000, 0, 7, 20_000)


@every_memory
@every_dtype
def test_the_footprint_is_what_is_allocated(memory, dtype):
    place = layout(*SIZES, dtype=dtype)
    one = residual_for(memory, place)
    put(one, *(normal(n, dtype=DTYPES[dtype]) for n in SIZES))
    put(one, *(normal(n, dtype=DTYPES[dtype]) for n in SIZES))
    assert one.nbytes == footprint(memory, place)
    assert footprint(memory, layout()) == 0


@every_dtype
def test_compact_memories_are_compact(dtype):
    place = layout(*[20_480] * 50, dtype=dtype)
    size, itemsize = place.numel, place.dtype.itemsize
    halves = {memory: footprint(memory, place) - (memory != "float32") * 20_480 * itemsize for memory in MEMORIES}
    assert halves["float32"] == 2 * itemsize * size
    assert halves["bfloat16"] == 2 * 2 * size
    assert halves["int8"] == 2 * (1 + itemsize / 256) * size


def test_sparse_memory_grows_with_what_was_touched():
    place = layout(64_000, 100)
    one = residual_for("sparse", place)
    scratch = 64_000 * 4
    assert one.nbytes == scratch
    embedding = torch.zeros(64_000)
    for rows in (1, 10, 100):
        embedding[: rows * 320 : 320] = 1.5  # in as many blocks
        put(one, embedding, normal(100))
        put(one, embedding, normal(100))
        assert torch.equal(one.load(0), embedding)
        assert one.nbytes == scratch + 2 * (rows * (32 * 4 + 4) + 100 * 4)
    for _ in range(2):
        put(one, normal(64_000), torch.zeros(100))
    assert one.nbytes == scratch + 2 * 64_000 * 4
    for _ in range(2):
        put(one, torch.zeros(64_000), torch.zeros(100))
    assert one.nbytes == scratch
