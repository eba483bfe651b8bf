"""The laws that every compressor obeys: one suite over a table of specifications.

Conservation alone holds for any compressor, even a broken one, so contraction and exactness on easy
inputs stand beside it.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol import DecodeError, Norms, NotFiniteError, compressor, decode, segment
from protocol.compressors import TopK
from protocol.kernels import cpu

VALUES = ("none", "f64", "f32", "bf16", "int8", "int4", "sign")
DENSE = ("none", "f64", "f32", "bf16", "sign")
RATIOS = ("1", "0.3", "1e-9")
SPECS = (
    *DENSE,
    *(f"topk:0.3+{values}" for values in VALUES),
    *(f"topk:{ratio}+{values}" for ratio in ("1", "1e-9") for values in ("none", "int8", "int4", "sign")),
)

DTYPES = (torch.float32, torch.float64)
FEW = 6  # elements that hypothesis draws one by one
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
WIDTH = {torch.float32: 32, torch.float64: 64}
LARGEST = {torch.float32: 1e38, torch.float64: 1e152}  # a sum of two stays finite, and so does its square
NARROW_MAX = {"f32": float(np.finfo(np.float32).max), "bf16": torch.finfo(torch.bfloat16).max}

every_spec = pytest.mark.parametrize("spec", SPECS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def laws(max_examples):
    return settings(deadline=None, max_examples=max_examples)


def values_of(spec):
    return spec.rpartition("+")[2]


@st.composite
def _vectors(draw, dtype, numel):
    """Heavy tails, ties, zeros, denormals and the largest numbers; each drawn alone if they are few."""
    kind = NUMPY[dtype]
    info, largest = np.finfo(kind), float(kind(LARGEST[dtype]))
    special = [0.0, -0.0, 1.0, -1.0, 0.5, float(info.tiny), float(info.smallest_subnormal), largest, -largest]
    if numel <= FEW:
        element = st.sampled_from(special) | st.floats(-largest, largest, width=WIDTH[dtype])
        return torch.from_numpy(draw(arrays.arrays(kind, numel, elements=element)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    vector = random.normal(size=numel) ** 3 * 2.0 ** draw(st.sampled_from([0, -20, 60, -140, -1060]))
    ties, odd = random.random((2, numel)) < 0.2
    vector[ties] = random.integers(-3, 4, numel)[ties]
    if draw(st.booleans()):
        vector[odd] = random.choice(special, numel)[odd]
    return torch.from_numpy(vector.astype(kind))


@st.composite
def inputs(draw, max_numel=150):
    """A vector and, in half of the cases, a residual of the same shape and dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    numel = draw(st.integers(0, FEW) | st.integers(FEW + 1, max_numel))
    vector = draw(_vectors(dtype, numel))
    return vector, draw(st.none() | _vectors(dtype, numel))


def step(spec, vector, residual=None, norms=None):
    """What is sent as payload and as vector, what is left, and the sum that was compressed."""
    left = torch.full_like(vector, torch.nan)
    before = vector.clone(), None if residual is None else residual.clone()
    c = compressor(spec)
    payload, state = c.encode(vector, c.init(vector.numel()), 7, residual, left, norms)
    assert state == ()
    assert torch.equal(vector, before[0]), "the vector was altered"
    assert residual is None or torch.equal(residual, before[1]), "the old residual was altered"
    total = vector if residual is None else vector + residual
    return payload, decode(payload, vector.numel()), left, total


def scaled_square(vector, scale):
    return float((vector.double() / scale).square().sum()) if scale else 0.0


# --- conservation


@every_spec
@laws(12)
@given(given_=inputs())
def test_what_is_sent_and_what_is_left_add_up_to_what_was_given(spec, given_):
    _, sent, left, total = step(spec, *given_)
    room = torch.finfo(total.dtype).eps * (sent.abs().double() + left.abs().double())
    assert torch.all((sent.double() + left.double() - total.double()).abs() <= room)


@every_spec
@laws(12)
@given(given_=inputs())
def test_conservation_is_exact_where_the_arithmetic_is(spec, given_):
    _, sent, left, total = step(spec, *given_)
    limit = NARROW_MAX.get(values_of(spec), math.inf)  # beyond it a float64 is clamped, and left is rounded
    casts = values_of(spec) in ("none", "f64", "f32", "bf16")
    exact = (sent == 0) | (total.abs().double() <= limit if casts else total == sent)
    assert torch.equal((sent + left)[exact], total[exact])
    assert torch.equal(left[sent == 0], total[sent == 0])


@every_spec
@laws(12)
@given(given_=inputs())
def test_a_residual_altered_in_place_is_the_one_written_elsewhere(spec, given_):
    vector, residual = given_
    residual = torch.zeros_like(vector) if residual is None else residual
    payload, _, left, _ = step(spec, vector, residual)
    same, alias = residual.clone(), residual.clone()
    in_place, _ = compressor(spec).encode(vector, (), 7, same)
    aliased, _ = compressor(spec).encode(vector, (), 7, alias[:], alias[:])
    unkept, _ = compressor(spec).encode(vector, (), 7, residual.clone(), torch.empty_like(vector))
    assert torch.equal(same, left)
    assert torch.equal(alias, left)
    assert in_place.tobytes() == aliased.tobytes() == unkept.tobytes() == payload.tobytes()


# --- contraction


@every_spec
@laws(30)
@given(given_=inputs())
def test_what_is_left_is_smaller_by_the_declared_delta(spec, given_):
    _, _, left, total = step(spec, *given_)
    if bool((total.abs().double() > NARROW_MAX.get(values_of(spec), math.inf)).any()):
        return  # delta is declared up to overflow of a narrower value code
    delta = compressor(spec).delta(total.numel())
    assert 0.0 <= delta <= 1.0
    scale = float(total.abs().max()) if total.numel() else 0.0
    narrow = total.dtype == torch.float32 or values_of(spec) in ("f32", "bf16")
    tiny = torch.finfo(torch.float32 if narrow else torch.float64).tiny
    underflow = math.sqrt(total.numel()) * min(tiny / scale, 1e150) if scale else 0.0
    rounding = 8 * torch.finfo(total.dtype).eps
    allowed = (1 - delta + rounding) * scaled_square(total, scale) + underflow**2
    assert scaled_square(left, scale) <= allowed


@pytest.mark.parametrize(("values", "q"), [("int8", 2 ** (14 / 127)), ("int4", 4.0)])
def test_the_worst_case_of_a_geometric_code_is_just_within_its_delta(values, q):
    powers = q ** np.arange(round(14 / math.log2(q)))
    worst = torch.from_numpy(np.concatenate([powers * (1 + q) / 2, [1.0, 2.0**14]])).double()
    spec = f"topk:1+{values}"
    _, _, left, total = step(spec, worst)
    lost = float(left.square().sum() / total.square().sum())
    assert lost <= 1 - compressor(spec).delta(worst.numel())
    middle = slice(0, powers.size)
    assert float((left[middle].abs() / total[middle]).max()) == pytest.approx((q - 1) / (q + 1), rel=1e-3)


def test_a_value_in_the_middle_of_two_levels_goes_to_the_smaller():
    levels = [4.0**i for i in range(8)]
    middles = [-2.5 * level for level in levels[:-1]]
    _, sent, _, _ = step("topk:1+int4", torch.tensor(levels + middles))
    assert sent.tolist() == levels + [-level for level in levels[:-1]]


@pytest.mark.parametrize("numel", [1, 3, 40])
def test_the_worst_case_of_sign_loses_exactly_one_minus_delta(numel):
    worst = torch.zeros(numel)
    worst[numel // 2] = -1.0
    _, _, left, _ = step("sign", worst)
    assert float(left.square().sum()) == pytest.approx(1 - compressor("sign").delta(numel), abs=1e-6)


# --- exactness on easy inputs


@pytest.mark.parametrize("values", ["none", "f64", "f32"])
@pytest.mark.parametrize("ratio", RATIOS)
@laws(12)
@given(data=st.data())
def test_a_sparse_vector_is_sent_exactly(ratio, values, data):
    dtype, spec = data.draw(st.sampled_from(DTYPES)), f"topk:{ratio}+{values}"
    numel = data.draw(st.integers(1, 100))
    k = TopK(float(ratio), values).count(numel)
    vector = torch.zeros(numel, dtype=dtype)
    places = data.draw(st.lists(st.integers(0, numel - 1), max_size=min(k, FEW), unique=True))
    for place in places:
        vector[place] = data.draw(st.floats(-(2.0**99), 2.0**99, width=32))
    _, sent, left, _ = step(spec, vector)
    assert torch.equal(sent, vector)
    assert not left.any()


@pytest.mark.parametrize(
    "spec", ["sign", *(f"topk:{ratio}+{values}" for ratio in RATIOS for values in ("sign", "int4", "int8"))]
)
@laws(12)
@given(data=st.data())
def test_values_of_one_magnitude_are_sent_exactly(spec, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    numel = data.draw(st.integers(1, 40))
    magnitude = data.draw(st.floats(2.0**-140, 2.0**99, width=32))
    signs = data.draw(arrays.arrays(np.int8, numel, elements=st.sampled_from([-1, 1])))
    vector = torch.from_numpy(signs).to(dtype) * magnitude
    _, sent, left, _ = step(spec, vector)
    chosen = sent != 0
    assert int(chosen.sum()) == (numel if spec == "sign" else compressor(spec).count(numel))
    assert torch.equal(sent[chosen], vector[chosen])
    assert not left[chosen].any()


@every_dtype
@every_spec
@pytest.mark.parametrize("numel", [0, 1, 5, 300_000])
def test_zeros_cost_a_few_bytes_and_come_back_as_zeros(spec, dtype, numel):
    payload, sent, left, _ = step(spec, torch.zeros(numel, dtype=dtype))
    assert payload.size <= 2 + 3
    assert torch.equal(sent, torch.zeros(numel, dtype=dtype))
    assert not left.any()


@every_dtype
@every_spec
@pytest.mark.parametrize("value", [1.0, -0.75, 2.0**-120, -(2.0**90)])
def test_one_element_is_sent_exactly(spec, dtype, value):
    vector = torch.tensor([value], dtype=dtype)
    _, sent, left, _ = step(spec, vector)
    assert torch.equal(sent, vector)
    assert not left.any()


@every_spec
@laws(12)
@given(given_=inputs())
def test_signs_are_kept(spec, given_):
    _, sent, _, total = step(spec, *given_)
    assert torch.all((sent == 0) | (total == 0) | (torch.sign(sent) == torch.sign(total)))


# --- which elements


@pytest.mark.parametrize("values", VALUES)
@laws(30)
@given(given_=inputs(), ratio=st.floats(1e-6, 1.0))
def test_the_largest_magnitudes_are_sent_and_ties_go_to_the_lowest_index(values, given_, ratio):
    c = compressor(f"topk:{ratio!r}+{values}")
    payload, _, _, total = step(c.spec, *given_)
    order = sorted(range(total.numel()), key=lambda i: (-abs(float(total[i])), i))
    expected = sorted(i for i in order[: c.count(total.numel())] if total[i] != 0)
    indices = segment.unpack(payload, total.numel()).indices
    assert indices is not None
    assert indices.tolist() == expected


@laws(200)
@given(numel=st.integers(0, 10**9), ratio=st.floats(0, 1, exclude_min=True))
@example(numel=250, ratio=0.01)
@example(numel=10**6, ratio=5e-324)
def test_the_count_is_the_rounded_share_but_at_least_one(numel, ratio):
    assert TopK(ratio, "none").count(numel) == (max(1, round(ratio * numel)) if numel else 0)


def test_the_count_is_what_is_sent():
    for numel in (1, 2, 49, 50, 51, 149, 150, 151, 1000, 12345):
        payload, _, _, _ = step("topk:0.01", torch.ones(numel))
        indices = segment.unpack(payload, numel).indices
        assert indices is not None
        assert indices.size == max(1, round(0.01 * numel))


# --- shape, dtype, determinism


@every_spec
@laws(12)
@given(given_=inputs())
def test_the_payload_is_bytes_and_decodes_to_the_shape_and_dtype_given(spec, given_):
    payload, sent, left, total = step(spec, *given_)
    assert payload.dtype == np.uint8
    assert payload.ndim == 1
    assert payload.flags.c_contiguous
    assert sent.shape == left.shape == total.shape
    assert sent.dtype == total.dtype
    assert sent.device.type == "cpu"


@every_spec
@laws(12)
@given(given_=inputs(), offset=st.integers(1, 7))
def test_equal_keys_give_equal_bytes_wherever_the_vector_lies(spec, given_, offset):
    vector, residual = given_
    moved = torch.zeros(vector.numel() + offset, dtype=vector.dtype)[offset:].copy_(vector)
    first, second = step(spec, vector, residual), step(spec, moved, residual)
    assert first[0].tobytes() == second[0].tobytes()
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


@every_spec
@laws(12)
@given(given_=inputs(max_numel=20), other=st.integers(0, 2**40))
def test_decode_refuses_any_other_size(spec, given_, other):
    payload, _, _, total = step(spec, *given_)
    for numel in {0, total.numel() - 1, total.numel() + 1, 2 * total.numel(), other} - {total.numel()}:
        with pytest.raises(DecodeError, match="elements where the layout has"):
            decode(payload, numel)


# --- what is not finite


@every_spec
@laws(12)
@given(data=st.data(), place_residual=st.booleans(), out=st.sampled_from(["residual", "its alias", "another"]))
def test_an_update_that_is_not_finite_is_refused_and_nothing_changes(spec, data, place_residual, out):
    dtype = data.draw(st.sampled_from(DTYPES))
    numel = data.draw(st.integers(1, 40))
    vector, residual = data.draw(_vectors(dtype, numel)), data.draw(_vectors(dtype, numel))
    place = data.draw(st.integers(0, numel - 1))
    if data.draw(st.booleans()):
        bad = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        (residual if place_residual else vector)[place] = bad
    else:  # each is finite, the sum is not
        vector[place] = residual[place] = torch.finfo(dtype).max
    before, norms = (vector.numpy().tobytes(), residual.numpy().tobytes()), Norms(1.0, 2.0, 3.0)
    residual_out = {"residual": None, "its alias": residual[:], "another": torch.zeros_like(vector)}[out]
    with pytest.raises(NotFiniteError):
        compressor(spec).encode(vector, (), 7, residual, residual_out, norms)
    assert (vector.numpy().tobytes(), residual.numpy().tobytes()) == before
    assert norms == Norms(1.0, 2.0, 3.0)


@every_spec
def test_a_vector_whose_square_overflows_is_refused_as_not_finite(spec):
    with pytest.raises(NotFiniteError):
        compressor(spec).encode(torch.tensor([1e200, 1.0], dtype=torch.float64), (), 7)


@every_spec
def test_the_largest_float32_is_sent(spec):
    largest = torch.finfo(torch.float32).max
    _, sent, left, total = step(spec, torch.tensor([largest, -largest, largest, 1.0]))
    assert torch.isfinite(sent).all()
    assert torch.isfinite(left).all()
    assert float(sent.abs().max()) >= 0.7 * largest
    assert torch.all((sent.double() + left.double() - total.double()).abs() <= 1e-7 * total.abs().max())


@every_dtype
@every_spec
@laws(12)
@given(units=arrays.arrays(np.int64, st.integers(1, 30), elements=st.integers(-(2**20), 2**20)))
@example(units=np.array([100, 222]))
def test_denormal_numbers_neither_hang_nor_vanish(spec, dtype, units):
    smallest = float(np.finfo(NUMPY[dtype]).smallest_subnormal)
    vector = torch.from_numpy((units * smallest).astype(NUMPY[dtype]))
    _, sent, left, total = step(spec, vector)
    assert torch.equal(sent + left, total)  # sums of denormals are exact


# --- norms


@every_spec
@laws(12)
@given(given_=inputs())
def test_the_norms_are_those_of_what_was_given_sent_and_left(spec, given_):
    norms = Norms(1.0, 1.0, 1.0)
    _, sent, left, total = step(spec, *given_, norms=norms)
    before = float(total.double().square().sum())
    rounding = 1e-12 * (1 + before)
    assert norms.before == pytest.approx(1 + before, abs=rounding)
    assert norms.sent == pytest.approx(1 + float(sent.double().square().sum()), abs=rounding)
    assert norms.left == pytest.approx(1 + float(left.double().square().sum()), abs=rounding)


# --- vectors long enough that the threshold comes from a sample


@cache
def long_input(dtype):
    """Vector, residual, and the places of their sum from the largest magnitude to the smallest."""
    generator = torch.Generator().manual_seed(1)
    numel = 4 * cpu.SAMPLE + 1001
    vector = torch.randn(numel, generator=generator, dtype=dtype) ** 3
    residual = torch.randn(numel, generator=generator, dtype=dtype)
    return vector, residual, torch.sort((vector + residual).abs(), descending=True, stable=True).indices


@every_dtype
@pytest.mark.parametrize("spec", [*DENSE, *(f"topk:0.01+{values}" for values in VALUES), "topk:1e-9+int4"])
def test_a_long_vector_obeys_the_same_laws(spec, dtype):
    vector, residual, order = long_input(dtype)
    numel, norms = vector.numel(), Norms()
    payload, sent, left, total = step(spec, vector, residual, norms)
    chosen = torch.zeros(numel, dtype=torch.bool)
    chosen[order[: numel if spec in DENSE else compressor(spec).count(numel)]] = True
    assert torch.equal(sent != 0, chosen)
    assert torch.equal(left[~chosen], total[~chosen])
    assert torch.allclose(sent.double() + left.double(), total.double(), rtol=1e-6, atol=1e-6)
    square, left_square = float(total.double().square().sum()), float(left.double().square().sum())
    assert left_square <= (1 - compressor(spec).delta(numel)) * square * (1 + 1e-12)
    assert norms.before == pytest.approx(square)
    assert norms.left == pytest.approx(left_square)
    in_place = residual.clone()
    again, _ = compressor(spec).encode(vector, (), 7, in_place)
    assert again.tobytes() == payload.tobytes()
    assert torch.equal(in_place, left)
