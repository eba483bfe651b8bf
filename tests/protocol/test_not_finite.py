"""An update that holds NaN or infinity, in any compressor: refused, and nothing of it is kept. Huge ones are sent."""

import math

import numpy as np
import pytest
import torch

from protocol import Norms, NotFiniteError, compressor, decode

VALUES = ("none", "f64", "f32", "f16", "bf16", "int8", "int4", "int2", "sign", "ternary", "natural", "qsgd:4")
SELECTIONS = ("topk:0.3", "blocktopk:0.3,block=16", "randk:0.3", "threshold:0.7")
SPECS = (*VALUES, *SELECTIONS, *(f"{s}+int4+entropy" for s in SELECTIONS), "lowrank:2", "lowrank:1+bf16+entropy")
SHAPE = (13, 10)
N = math.prod(SHAPE)
LONG = 40_000  # topk and threshold estimate from a sample, and the blocks begin where the one before ended
LARGEST = torch.finfo(torch.float32).max

every_spec = pytest.mark.parametrize("spec", SPECS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=("float32", "float64"))


def pair(dtype, numel=N):
    random = torch.Generator().manual_seed(1)
    return (torch.randn(numel, generator=random, dtype=dtype) for _ in range(2))


def refused(spec, vector, residual, residual_out):
    """And nothing of it was kept; what was written in place has been taken off again, which rounds."""
    before, norms, bits = residual.clone(), Norms(1.0, 2.0, 3.0), vector.numpy().tobytes()
    with pytest.raises(NotFiniteError):
        compressor(spec, SHAPE).encode(vector, (), 7, residual, residual_out, norms)
    assert vector.numpy().tobytes() == bits
    assert norms == Norms(1.0, 2.0, 3.0)
    if residual_out is None or residual_out.data_ptr() == residual.data_ptr():
        near = torch.finfo(vector.dtype).eps * (vector.abs() + before.abs()).nan_to_num(0, 0, 0)
        assert torch.all(
            (residual == before) | (residual.isnan() & before.isnan()) | ((residual - before).abs() <= near)
        )
    else:
        assert residual.numpy().tobytes() == before.numpy().tobytes()


@every_dtype
@every_spec
@pytest.mark.parametrize(("bad", "place"), [(math.nan, 0), (math.inf, N // 2), (-math.inf, N - 1)])
def test_an_update_that_is_not_finite_is_refused_and_nothing_changes(spec, dtype, bad, place):
    vector, residual = pair(dtype)
    vector[place] = bad
    for out in (None, residual[:], torch.zeros_like(vector)):
        refused(spec, vector, residual, out)
    with pytest.raises(NotFiniteError):
        compressor(spec, SHAPE).encode(vector, (), 7)


@every_spec
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_residual_that_is_not_finite_is_refused_and_stays_as_it_is(spec, bad):
    vector, residual = pair(torch.float32)
    residual[N // 3] = bad
    refused(spec, vector, residual, torch.zeros_like(vector))
    with pytest.raises(NotFiniteError):
        compressor(spec, SHAPE).encode(vector, (), 7, residual)  # in place it is lost: it was already


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "lowrank" not in spec])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("many", [False, True])
def test_a_long_vector_is_refused_as_well(spec, bad, many):
    vector, residual = pair(torch.float32, LONG)
    vector[:: 1 if many else LONG - 1] = bad
    refused(spec, vector, residual, None)
    refused(spec, vector, residual, torch.zeros_like(vector))


@pytest.mark.parametrize("good", range(16))
def test_a_block_with_few_numbers_among_nan_is_refused_as_well(good):
    vector = torch.full((16,), math.nan)
    vector[:good] = 1.0
    refused("blocktopk:0.3,block=16", vector, torch.zeros(16), None)


@every_spec
def test_opposite_infinities_do_not_cancel(spec):
    vector, residual = torch.full((N,), math.inf), torch.full((N,), -math.inf)
    refused(spec, vector, residual, torch.zeros_like(vector))


@every_spec
def test_a_sum_that_overflows_is_refused(spec):
    vector = torch.full((N,), LARGEST)
    refused(spec, vector, vector.clone(), torch.zeros_like(vector))
    refused(spec, vector, vector.clone(), None)


@every_spec
def test_a_vector_whose_square_overflows_is_refused(spec):
    vector = torch.full((N,), 1e200, dtype=torch.float64)
    refused(spec, vector, torch.zeros_like(vector), None)


@every_spec
@pytest.mark.parametrize("kept", [False, True])
def test_the_largest_float32_overflows_nothing_on_its_way(spec, kept):
    vector = torch.from_numpy(np.random.default_rng(0).choice(np.float32([LARGEST, -LARGEST, 0.9 * LARGEST]), N))
    left, norms = torch.zeros_like(vector) if kept else None, Norms()
    payload, _ = compressor(spec, SHAPE).encode(vector, (), 7, None, left, norms)
    sent = decode(payload, N)
    assert torch.isfinite(sent).all()
    assert math.isfinite(norms.sent)
    assert math.isfinite(norms.left)
    assert sent.any()
    assert not kept or torch.isfinite(left).all()


def test_no_number_of_levels_overflows():
    vector = torch.full((3,), LARGEST)
    for levels in range(1, 128):
        payload, _ = compressor(f"qsgd:{levels}").encode(vector, (), 7)
        assert torch.isfinite(decode(payload, 3)).all(), levels
