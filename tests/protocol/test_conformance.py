"""The laws that every compressor obeys: one suite over a table of every specification.

Conservation alone holds for any compressor, even a broken one, so contraction stands beside it here, and
exactness and expectations in files of their own.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol import DecodeError, Norms, compressor, decode
from protocol.kernels.threads import WORTH

SELECTIONS = ("", "topk:0.3", "blocktopk:0.3,block=16", "randk:0.3", "threshold:0.7")
CASTS = ("none", "f64", "f32", "f16", "bf16")
VALUES = (*CASTS, "int8", "int4", "int2", "sign", "ternary", "natural", "qsgd:4,bucket=16")
OTHERS = ("topk:1", "topk:1e-9", "blocktopk:1e-9,block=5", "randk:1", "randk:1e-9", "threshold:1e-30", "threshold:1e30")
PLAIN = (
    *("+".join(filter(None, (selection, values))) for selection in SELECTIONS for values in VALUES),
    *(f"{selection}+{values}" for selection in OTHERS for values in ("none", "int4")),
    *("qsgd:1", "qsgd:127", "topk:1+sign", "topk:1e-9+int8"),
    *("lowrank:1", "lowrank:2", "lowrank:5", *(f"lowrank:2+{values}" for values in CASTS)),
)
CODED = tuple(f"{spec}+entropy" for spec in PLAIN)
SHAPE = (13, 2, 5)
N = math.prod(SHAPE)  # neither a multiple of a block nor of a bucket
RANDOM = ("randk", "ternary", "natural", "qsgd", "lowrank")

DTYPES = {"float32": torch.float32, "float64": torch.float64}
LARGEST = {"float32": float(np.finfo(np.float32).max), "float64": 1e150}

every_spec = pytest.mark.parametrize("spec", PLAIN)  # of the coded ones one law says that they do the same


pytestmark = pytest.mark.usefixtures("one_thread")


def made(spec, numel=N):
    """The compressor for the vectors here; ``lowrank`` sees a matrix."""
    return compressor(spec, SHAPE if numel == N else (numel,))


def is_random(spec):
    return any(stage.startswith(RANDOM) for stage in spec.split("+"))


# --- inputs


def signed(magnitudes, random):
    return magnitudes * random.choice([-1.0, 1.0], N)


def steps(ratio, random):
    """Clusters at the ends of cells of this ratio, as many as fit into 40 octaves: what a grid of cells likes least."""
    octaves = np.arange(N) % max(1, int(40 / math.log2(ratio)))
    return signed(ratio ** -octaves.astype(float) * np.where(random.random(N) < 0.5, 1.0, 0.999 / ratio), random)


SHAPES = {
    "normal": lambda random: random.normal(size=N),
    "heavy tail": lambda random: random.normal(size=N) ** 5,
    "uniform": lambda random: random.uniform(-1, 1, N),
    "ramp": lambda random: np.arange(N) - 40.0,
    "one spike": lambda random: np.where(np.arange(N) == 77, -3.0, 0.0),
    "a spike on grains": lambda random: np.where(np.arange(N) == 77, 1.0, signed(2.0**-14.1, random)),
    "constant magnitude": lambda random: signed(0.7123, random),
    "two magnitudes": lambda random: signed(random.choice([1.0, 1.5], N), random),
    "nine magnitudes": lambda random: signed(random.choice(1.37 ** np.arange(9), N), random),
    "halves": lambda random: signed(random.integers(0, 40, N) + 0.4999, random),
    "half a unit of bf16": lambda random: signed(1 + 2.0**-8 * random.choice([0.999, 2.999], N), random),
    "half a unit of f16": lambda random: signed(1 + 2.0**-11 * random.choice([0.999, 2.999], N), random),
    "half a unit of f32": lambda random: signed(1 + 2.0**-24 * random.choice([0.999, 2.999], N), random),
    "forty octaves": lambda random: signed(2.0 ** (-40 * np.arange(N) / N), random),
    "forty octaves of twos": lambda random: signed(2.0 ** -(np.arange(N) % 40.0), random),
    "cells of int8": lambda random: steps(3.44, random),
    "cells of int4": lambda random: steps(3.36, random),
    "cells of int2": lambda random: steps(128.0, random),
    "a rank-one matrix": lambda random: np.outer(random.normal(size=13), random.normal(size=10)).reshape(-1),
    "ties and zeros": lambda random: random.integers(-2, 3, N) * 1.0,
    "zeros of both signs": lambda random: np.copysign(0.0, random.normal(size=N)),
}
EXTREMES = {
    "largest": lambda random: signed(1.0, random),
    "near the largest": lambda random: random.uniform(-1, 1, N),
    "all orders": lambda random: signed(2.0 ** random.uniform(-200, 0, N), random),
}
TINY = {
    "denormal": lambda random: random.integers(-(2**18), 2**18, N) * 1.0,
    "the smallest": lambda random: random.integers(-2, 3, N) * 1.0,
    "just normal": lambda random: random.normal(size=N) * 2.0**26,
}
INPUTS = (*SHAPES, *EXTREMES, *TINY, "a residual", "a residual that cancels", "a residual of another size")


@cache
def inputs(name, dtype):
    """Vector and residual of a name, the latter None for most. They are not to be altered."""
    random = np.random.default_rng(INPUTS.index(name))
    kind = np.dtype(dtype).type
    values, residual = None, None
    if name in SHAPES:
        values = SHAPES[name](random)
    elif name in EXTREMES:
        values = EXTREMES[name](random) * LARGEST[dtype]
    elif name in TINY:
        values = TINY[name](random) * float(np.finfo(kind).smallest_subnormal)
    else:
        values, residual = random.normal(size=(2, N)) ** 3
        if name == "a residual that cancels":
            residual = np.where(np.arange(N) % 2, -values, residual)
        if name == "a residual of another size":
            residual *= 1e6
    return torch.from_numpy(values.astype(kind)), None if residual is None else torch.from_numpy(residual.astype(kind))


class Outcome(NamedTuple):
    """Of one encoding with error feedback, into a buffer of its own."""

    payload: bytes
    sent: torch.Tensor
    left: torch.Tensor
    total: torch.Tensor
    norms: Norms


def encode(spec, vector, residual=None, key=7):
    """An outcome, after all was checked that no call may do."""
    c, left, norms = made(spec, vector.numel()), torch.full_like(vector, torch.nan), Norms()
    before = vector.numpy().tobytes(), None if residual is None else residual.numpy().tobytes()
    payload, _ = c.encode(vector, c.init(vector.numel()), key, residual, left, norms)
    assert vector.numpy().tobytes() == before[0], "the vector was altered"
    assert residual is None or residual.numpy().tobytes() == before[1], "the old residual was altered"
    assert isinstance(payload, np.ndarray)
    assert payload.dtype == np.uint8
    assert payload.ndim == 1
    assert payload.flags.c_contiguous
    sent = decode(payload, vector.numel())
    assert sent.shape == left.shape == vector.shape
    assert sent.dtype == vector.dtype
    assert sent.device.type == "cpu"
    return Outcome(payload.tobytes(), sent, left, vector if residual is None else vector + residual, norms)


@cache
def outcome(spec, name, dtype):
    return encode(spec, *inputs(name, dtype))


def outcomes(spec, names=INPUTS):
    return ((f"{name}, {dtype}", outcome(spec, name, dtype)) for name in names for dtype in DTYPES)


def scaled_square(vector, scale):
    return float((vector.double() / scale).square().sum()) if scale else 0.0


# --- conservation


def overflows(spec, found):
    """A value code narrower than the vector clamps it; delta is declared up to that."""
    narrow = {"f16": 65504.0, "bf16": torch.finfo(torch.bfloat16).max, "f32": LARGEST["float32"]}
    limit = min((narrow[stage] for stage in spec.split("+") if stage in narrow), default=math.inf)
    return found.total.numel() > 0 and float(found.total.abs().max()) > limit


def conserved(found):
    """To the rounding of what is left, element by element."""
    room = torch.finfo(found.total.dtype).eps * (found.sent.abs().double() + found.left.abs().double())
    return torch.all((found.sent.double() + found.left.double() - found.total.double()).abs() <= room)


@every_spec
def test_what_is_sent_and_what_is_left_add_up_to_what_was_given(spec):
    for name, found in outcomes(spec):
        assert torch.isfinite(found.sent).all(), name
        assert conserved(found), name
        if spec.startswith("lowrank"):
            continue
        assert torch.equal(found.left[found.sent == 0], found.total[found.sent == 0]), name
        assert torch.all((found.sent == 0) | (found.total == 0) | (found.sent.sign() == found.total.sign())), name
        if spec.rpartition("+")[2] in CASTS and not overflows(spec, found):  # rounding errors are numbers themselves
            assert torch.equal(found.sent + found.left, found.total), name


@every_spec
def test_a_residual_written_over_the_old_one_or_the_vector_is_the_one_written_elsewhere(spec):
    for dtype in DTYPES:
        vector, residual = inputs("a residual", dtype)
        c, found = made(spec), outcome(spec, "a residual", dtype)
        same, alias, over = residual.clone(), residual.clone(), vector.clone()
        in_place, _ = c.encode(vector, c.init(N), 7, same)
        aliased, _ = c.encode(vector, c.init(N), 7, alias[:], alias[:])
        assert torch.equal(same, found.left)
        instead, _ = c.encode(over, c.init(N), 7, residual, over)
        assert torch.equal(alias, found.left)
        assert torch.equal(over, found.left)
        assert in_place.tobytes() == aliased.tobytes() == instead.tobytes() == found.payload


@every_spec
def test_a_residual_of_zeros_is_as_none(spec):
    for dtype in DTYPES:
        vector, _ = inputs("heavy tail", dtype)
        found, same = encode(spec, vector, torch.zeros_like(vector)), outcome(spec, "heavy tail", dtype)
        assert found.payload == same.payload
        assert torch.equal(found.left, same.left)


@pytest.mark.parametrize("spec", [spec for spec in PLAIN if made(spec).omega(N) is None])
def test_a_biased_compressor_sends_the_same_whether_or_not_the_rest_is_kept(spec):
    for dtype in DTYPES:
        vector, norms = inputs("heavy tail", dtype)[0].clone(), Norms()
        kept = outcome(spec, "heavy tail", dtype)
        payload, _ = made(spec).encode(vector, (), 7, norms=norms)
        assert payload.tobytes() == kept.payload
        assert norms.left == pytest.approx(kept.norms.left)
        assert torch.equal(vector, kept.total)


# --- contraction


def floor(spec, dtype):
    """A magnitude below which a format of the specification ends."""
    narrow = {"f16": 2.0**-24, "bf16": torch.finfo(torch.bfloat16).tiny, "f32": torch.finfo(torch.float32).tiny}
    found = [narrow[stage] for stage in spec.split("+") if stage in narrow]
    return max(found, default=torch.finfo(dtype).tiny)


def room(spec, found):
    """How large the square of what is left may be, in units of the square of a scale; and that scale."""
    total, scale = found.total, float(found.total.abs().max()) if found.total.numel() else 0.0
    below = min(floor(spec, total.dtype) / scale, 1e150) if scale else 0.0
    share = 1 - made(spec, total.numel()).delta(total.numel()) + 8 * torch.finfo(total.dtype).eps
    return share * scaled_square(total, scale) + total.numel() * below**2, scale


@pytest.mark.parametrize("spec", [spec for spec in PLAIN if not is_random(spec)])
def test_what_is_left_is_smaller_by_the_declared_delta(spec):
    assert 0.0 <= made(spec).delta(N) <= 1.0
    for name, found in outcomes(spec):
        if not overflows(spec, found):
            allowed, scale = room(spec, found)
            assert scaled_square(found.left, scale) <= allowed, name


# --- what is measured


@every_spec
def test_the_norms_are_those_of_what_was_given_sent_and_left(spec):
    for name, found in outcomes(spec):
        before = float(found.total.double().square().sum())
        near = {"rel": 1e-9, "abs": 1e-9 * before}
        assert found.norms.before == pytest.approx(before, **near), name
        assert found.norms.sent == pytest.approx(float(found.sent.double().square().sum()), **near), name
        assert found.norms.left == pytest.approx(float(found.left.double().square().sum()), **near), name


@pytest.mark.parametrize("spec", ["none", "topk:0.3+int4", "randk:0.3+natural", "lowrank:2"])
def test_norms_add_up_over_calls(spec):
    vector, residual = inputs("a residual", "float64")
    c, norms = made(spec), Norms(1.0, 2.0, 3.0)
    c.encode(vector, c.init(N), 7, residual.clone(), norms=norms)
    once = outcome(spec, "a residual", "float64").norms
    assert norms.before == pytest.approx(1.0 + once.before)
    assert norms.sent == pytest.approx(2.0 + once.sent)
    assert norms.left == pytest.approx(3.0 + once.left)


# --- determinism


@every_spec
def test_equal_keys_give_equal_bytes_wherever_the_vector_lies(spec):
    for dtype in DTYPES:
        vector, residual = inputs("a residual", dtype)
        moved = torch.zeros(N + 3, dtype=vector.dtype)[3:].copy_(vector)
        found, first = encode(spec, moved, residual), outcome(spec, "a residual", dtype)
        assert found.payload == first.payload
        assert torch.equal(found.left, first.left)


@every_spec
def test_another_key_matters_to_a_random_compressor_alone(spec):
    vector, _ = inputs("normal", "float32")
    payloads = {encode(spec, vector, key=key).payload for key in (7, 8, 2**64 - 1)}
    assert len(payloads) == (3 if is_random(spec) else 1)


@pytest.mark.parametrize("spec", [*VALUES, *(f"{s}+int4" for s in SELECTIONS[1:]), "int4+entropy", "qsgd:4"])
def test_the_number_of_threads_does_not_show(spec):
    vector = torch.randn(2 * WORTH + 1001, generator=torch.Generator().manual_seed(3)) ** 3
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            out = torch.empty_like(vector)
            payload, _ = compressor(spec).encode(vector, (), 7, None, out)
            found.append((payload.tobytes(), out, decode(payload, vector.numel())))
        finally:
            torch.set_num_threads(1)
    (first, left, sent), (second, left_too, sent_too) = found
    assert first == second
    assert torch.equal(left, left_too)
    assert torch.equal(sent, sent_too)


# --- the stages


FEW = ("normal", "one spike", "nine magnitudes", "ties and zeros", "a rank-one matrix", "all orders", "a residual")


@every_spec
def test_entropy_coding_alters_nothing_but_the_bytes_and_adds_none(spec):
    assert made(f"{spec}+entropy").delta(N) == made(spec).delta(N)
    assert made(f"{spec}+entropy").omega(N) == made(spec).omega(N)
    for (name, plain), (_, coded) in zip(outcomes(spec, FEW), outcomes(f"{spec}+entropy", FEW), strict=True):
        assert len(coded.payload) <= len(plain.payload), name
        assert torch.equal(coded.sent, plain.sent), name
        assert torch.equal(coded.left, plain.left), name
        assert coded.norms == plain.norms, name


@pytest.mark.parametrize("spec", [*PLAIN, *CODED])
def test_the_specification_of_a_compressor_gives_it_again(spec):
    assert compressor(made(spec).spec, SHAPE) == made(spec)


@every_spec
def test_a_compressor_without_state_carries_none(spec):
    c = made(spec)
    assert c.init(N) == ()
    _, state = c.encode(inputs("normal", "float32")[0], (), 7)
    assert isinstance(state, torch.Tensor) if spec.startswith("lowrank") else state == ()


# --- sizes


@every_spec
@pytest.mark.parametrize("numel", [0, 1, 300_000])
def test_zeros_cost_a_few_bytes_and_leave_nothing(spec, numel):
    shape = (numel // 100, 100) if numel == 300_000 else (numel,)
    for dtype in DTYPES.values():
        c, left = compressor(spec, shape), torch.full((numel,), torch.nan, dtype=dtype)
        payload, _ = c.encode(torch.zeros(numel, dtype=dtype), (), 7, None, left)
        assert payload.size <= 2 + 3
        assert not left.any()
        assert not decode(payload, numel).any()


@every_spec
def test_decode_refuses_any_other_size(spec):
    payload = np.frombuffer(outcome(spec, "normal", "float32").payload, np.uint8)
    for numel in (0, 1, N - 1, N + 1, 2 * N, 2**40):
        with pytest.raises(DecodeError, match="elements where the layout has"):
            decode(payload, numel)


BLOCK, BUCKET = 16, 16
SIZES = st.sampled_from([0, 1, 2, 3, 63, 64, 65, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7]) | st.integers(0, 300)


@st.composite
def drawn_vectors(draw, numel, dtype):
    """Heavy tails, ties, zeros, denormals and large numbers; each drawn alone if they are few."""
    kind, largest = np.dtype(dtype).type, float(np.dtype(dtype).type({"float32": 1e38, "float64": 1e150}[dtype]))
    info = np.finfo(kind)
    special = [0.0, -0.0, 1.0, -1.0, 0.5, float(info.tiny), float(info.smallest_subnormal), largest, -largest]
    if numel <= 3:
        element = st.sampled_from(special) | st.floats(-largest, largest, width=info.bits)
        return torch.from_numpy(draw(arrays.arrays(kind, numel, elements=element)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    vector = random.normal(size=numel) ** 3 * 2.0 ** draw(st.sampled_from([0, -20, 60, -140, -1060]))
    ties, odd = random.random((2, numel)) < 0.2
    vector[ties] = random.integers(-3, 4, numel)[ties]
    if draw(st.booleans()):
        vector[odd] = random.choice(special, numel)[odd]
    return torch.from_numpy(vector.astype(kind))


@settings(deadline=None, max_examples=800)
@given(data=st.data(), spec=st.sampled_from([*PLAIN, *CODED]), dtype=st.sampled_from(list(DTYPES)), numel=SIZES)
def test_vectors_of_every_size_are_conserved_and_contracted(data, spec, dtype, numel):
    vector = data.draw(drawn_vectors(numel, dtype))
    residual = data.draw(st.none() | drawn_vectors(numel, dtype))
    found = encode(spec, vector, residual)
    assert conserved(found)
    if not overflows(spec, found) and not is_random(spec):
        allowed, scale = room(spec, found)
        assert scaled_square(found.left, scale) <= allowed
