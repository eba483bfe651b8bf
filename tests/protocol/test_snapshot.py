"""A snapshot is exact: every dtype, every shape, every bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol import DecodeError, Layout, NotFiniteError, layout_of, snapshot
from protocol.layout import DTYPES, Entry


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def a_model():
    """Parameters, buffers and frozen tensors of every supported dtype, and an empty one."""
    random = torch.Generator().manual_seed(0)

    def tensor(dtype, shape):
        if dtype.is_floating_point:
            return torch.randn(shape, generator=random).to(dtype)
        return torch.randint(0, 2, shape, generator=random).to(dtype)

    floats = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]
    parameters = [(f"trained.{d}", torch.nn.Parameter(tensor(d, (3, 2)))) for d in floats if d != torch.float64]
    parameters += [("empty", torch.nn.Parameter(torch.empty(0, 4))), ("scalar", torch.nn.Parameter(torch.tensor(-2.5)))]
    parameters += [(f"frozen.{d}", torch.nn.Parameter(tensor(d, (2, 2)), requires_grad=False)) for d in floats]
    buffers = [(f"buffer.{d}", tensor(d, (5,))) for d in floats]
    buffers += [(f"counter.{d}", tensor(d, (7,))) for d in DTYPES.values() if not d.is_floating_point]
    buffers += [("steps", torch.tensor(2**62 + 1)), ("mask", torch.zeros(0, 3, dtype=torch.bool))]
    return parameters, buffers


def test_a_model_of_every_dtype_arrives_bit_for_bit():
    parameters, buffers = a_model()
    layout, tensors = layout_of(parameters, buffers), dict([*parameters, *buffers])
    assert {entry.dtype for entry in layout.entries} == set(DTYPES)
    assert layout.dtype == torch.float32
    w = torch.cat([tensors[s.entry.name].detach().reshape(-1).to(layout.dtype) for s in layout.segments])
    statics = [snapshot.raw(tensors[entry.name]) for entry in layout.statics]
    arrived, raws = snapshot.unpack_snapshot(layout, snapshot.pack(layout, w, statics))
    assert bits(arrived) == bits(w)
    assert snapshot.digest(arrived) == snapshot.digest(w)
    for entry, raw in zip(layout.statics, raws, strict=True):
        tensor = snapshot.restore_static(raw, entry.shape, entry.dtype)
        assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[entry.dtype], entry.shape)
        assert bits(tensor) == bits(tensors[entry.name])


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from(["float32", "float64"]), st.integers(0, 9))
def test_every_finite_replica_arrives_bit_for_bit(data, dtype, numel):
    """But for the sign of zero, which a replica never has: it is zero minus what arrived."""
    layout = Layout((Entry("w", (numel,), dtype, "parameter"),))
    largest = {"float32": float(np.finfo(np.float32).max), "float64": 2.0**508}[dtype]
    element = st.sampled_from([0.0, 5e-324 if dtype == "float64" else 2.0**-149, largest, -largest])
    element |= st.floats(-largest, largest, width=int(dtype[5:]))
    w = torch.from_numpy(data.draw(arrays.arrays(dtype, numel, elements=element))) + 0.0
    arrived, _ = snapshot.unpack_snapshot(layout, snapshot.pack(layout, w, ()))
    assert arrived.dtype == layout.dtype
    assert bits(arrived) == bits(w)


def test_a_zero_arrives_without_its_sign_and_stays_so():
    layout = Layout((Entry("w", (3,), "float32", "parameter"),))
    once, _ = snapshot.unpack_snapshot(layout, snapshot.pack(layout, torch.tensor([-0.0, 1.0, 0.0]), ()))
    assert bits(once) == bits(torch.tensor([0.0, 1.0, 0.0]))
    twice, _ = snapshot.unpack_snapshot(layout, snapshot.pack(layout, once, ()))
    assert bits(twice) == bits(once)


def test_a_model_that_is_not_finite_has_no_snapshot():
    layout = Layout((Entry("w", (2,), "float32", "parameter"),))
    with pytest.raises(NotFiniteError):
        snapshot.pack(layout, torch.tensor([1.0, float("nan")]), ())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_raw_tensor_comes_back_bit_for_bit(dtype, shape):
    kind = DTYPES[dtype]
    tensor = torch.zeros(shape, dtype=kind)
    content = torch.randint(0, 2 if kind == torch.bool else 256, (tensor.numel() * kind.itemsize,), dtype=torch.uint8)
    tensor.view(-1).copy_(content.view(kind))  # NaN among them, with whatever payload
    body = snapshot.raw(tensor)
    assert (body.dtype, body.size) == (np.uint8, tensor.numel() * kind.itemsize)
    back = snapshot.restore_static(body, shape, dtype)
    assert (back.dtype, tuple(back.shape)) == (kind, shape)
    assert bits(back) == bits(tensor)


def test_raw_is_a_copy_in_the_order_of_the_elements():
    tensor = torch.arange(6, dtype=torch.int16).view(2, 3).t()  # not contiguous
    body = snapshot.raw(tensor)
    tensor += 1
    assert snapshot.restore_static(body, (3, 2), "int16").tolist() == [[0, 3], [1, 4], [2, 5]]


# -- what is refused ---------------------------------------------------------------------------------

SMALL = Layout((Entry("w", (4,), "float32", "parameter"), Entry("steps", (), "int64", "static")))


def small():
    return snapshot.pack(SMALL, torch.arange(4.0), (snapshot.raw(torch.tensor(7)),))


@pytest.mark.parametrize("bodies", [(), small()[:1], (*small(), small()[1])])
def test_a_missing_or_surplus_tensor_is_refused(bodies):
    with pytest.raises(DecodeError, match=f"{len(bodies)} tensors where the layout has 2"):
        snapshot.unpack_snapshot(SMALL, bodies)


def test_a_static_tensor_of_another_size_is_named():
    with pytest.raises(DecodeError, match="static tensor 'steps' has 4 bytes instead of 8"):
        snapshot.unpack_snapshot(SMALL, (small()[0], small()[1][:4]))


def test_a_segment_of_another_size_is_refused():
    other = Layout((Entry("w", (5,), "float32", "parameter"),))
    with pytest.raises(DecodeError, match="5 elements where the layout has 4"):
        snapshot.unpack_snapshot(SMALL, (snapshot.pack(other, torch.ones(5), ())[0], small()[1]))


# -- names of models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_digest_and_fingerprint_change_with_every_bit(dtype):
    layout = Layout((Entry("w", (3,), dtype, "parameter"),))
    w = torch.tensor([1.5, -2.0, 0.0], dtype=layout.dtype)
    seen = {(snapshot.digest(w), snapshot.fingerprint(layout, w))}
    for bit in range(8 * 3 * layout.dtype.itemsize):
        altered = w.clone()
        altered.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
        seen.add((snapshot.digest(altered), snapshot.fingerprint(layout, altered)))
    assert len({d for d, _ in seen}) == len({f for _, f in seen}) == 1 + 8 * 3 * layout.dtype.itemsize
    assert all(0 <= d < 2**63 and len(f) == 32 for d, f in seen)


def test_a_digest_travels_and_so_never_changes():
    assert snapshot.digest(torch.arange(4.0)) == 393801374154599103
    assert snapshot.digest(torch.arange(4.0, dtype=torch.float64)) == 8058283173904912504


def test_equal_replicas_have_equal_digests_and_fingerprints():
    w = torch.arange(4.0)
    assert snapshot.digest(w) == snapshot.digest(w.clone())
    assert snapshot.fingerprint(SMALL, w) == snapshot.fingerprint(SMALL, w.clone())


def test_a_fingerprint_is_of_the_layout_too():
    other = Layout((Entry("v", (4,), "float32", "parameter"),))
    w = torch.arange(4.0)
    assert snapshot.fingerprint(SMALL, w) != snapshot.fingerprint(other, w)
