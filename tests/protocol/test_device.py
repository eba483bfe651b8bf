"""Tensors of a GPU give the payloads, residuals and decoded bits that arrays give.

Where there is no GPU, tensors of the CPU are sent the same way, through Triton's interpreter.
"""

import numpy as np
import pytest
import torch

import protocol
from protocol import Norms, compressor, compressors, kernels, segment, update
from protocol.kernels import cuda, device, host
from protocol.values import section

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRET = str(int(DEVICE.type == "cpu"))
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", INTERPRET)
    pytest.importorskip("triton")
    cuda.kernels()

NUMEL = 5000
SAME = (  # as bytes too: nothing in these depends on the order of a sum
    "topk:0.01",
    "topk:0.02+sign",
    "topk:0.02+f16",
    "blocktopk:0.02,block=512+bf16",
    "randk:0.1",
    "threshold:4+int8",
    "int8",
    "natural",
    "bf16+entropy",
    "none",
)
CLOSE = ("topk:0.05+int4", "int2", "sign", "ternary", "qsgd:4", "topk:0.1+int4+entropy", "lowrank:2")


@pytest.fixture(autouse=True)
def _sent_to_the_device(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", INTERPRET)
    for module in (compressors, segment, section, update):
        monkeypatch.setattr(module, "on_device", lambda place: place == DEVICE)


def vectors(dtype):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(NUMEL, generator=generator, dtype=dtype) ** 3 for _ in range(2)]


def encode(spec, dtype, monkeypatch, on_host):
    vector, residual = vectors(dtype)
    left, norms = torch.empty(NUMEL, dtype=dtype), Norms()
    with monkeypatch.context() as changed:
        if on_host:
            for module in (compressors, segment, section, update):
                changed.setattr(module, "on_device", lambda place: False)
        else:
            vector, residual, left = (x.to(DEVICE) for x in (vector, residual, left))
        payload, _ = compressor(spec, (50, 100)).encode(vector, (), 9, residual, left, norms)
    return payload, left.cpu(), norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", SAME + CLOSE)
def test_a_tensor_of_a_gpu_is_encoded_as_an_array_is(spec, dtype, monkeypatch):
    payload, left, norms = encode(spec, dtype, monkeypatch, on_host=False)
    expected, _, expected_norms = encode(spec, dtype, monkeypatch, on_host=True)
    total = sum(vectors(dtype))
    received = protocol.decode(payload, NUMEL)
    assert torch.allclose(received + left, total, rtol=1e-5, atol=1e-5)
    if spec in SAME:
        assert payload.tobytes() == expected.tobytes()
    assert abs(payload.size - expected.size) <= 2
    for name in ("before", "sent", "left"):
        assert getattr(norms, name) == pytest.approx(getattr(expected_norms, name), rel=2e-3)


@pytest.mark.parametrize("out", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", SAME + CLOSE)
def test_both_decode_the_same_bytes_to_the_same_bits(spec, out, monkeypatch):
    payload, _, _ = encode(spec, torch.float32, monkeypatch, on_host=True)
    start = torch.linspace(-3, 3, NUMEL, dtype=out)
    there, here = start.to(DEVICE, copy=True), start.clone()
    there_too, here_too = there.clone(), here.clone()
    sent = segment.unpack(payload, NUMEL, DEVICE)
    sent.add_to(there)
    sent.subtract_from(there_too)
    monkeypatch.setattr(update, "on_device", lambda place: False)
    decoded = segment.unpack(payload, NUMEL)
    decoded.add_to(here)
    decoded.subtract_from(here_too)
    assert torch.equal(there.cpu(), here)
    assert torch.equal(there_too.cpu(), here_too)


def test_what_arrives_as_usual_is_decoded_on_the_device(monkeypatch):
    payload, _, _ = encode("topk:0.05+int4", torch.float32, monkeypatch, on_host=True)
    sent = segment.unpack(payload, NUMEL, DEVICE)
    assert isinstance(sent.indices, torch.Tensor)
    assert isinstance(sent.coded.symbols, torch.Tensor)
    assert np.array_equal(sent.values, segment.unpack(payload, NUMEL, torch.device("meta")).values)


def test_clusters_are_left_to_the_codes_of_the_host():
    indices = torch.arange(1000) + 640 * (torch.arange(1000) // 64)
    assert device.pack_indices(indices.to(DEVICE), 20_000)[0] == host.pack_indices(indices.numpy(), 20_000)[0] == 4


@pytest.mark.parametrize("module", [host, device], ids=["host", "device"])
def test_both_sides_offer_every_kernel(module):
    wanted = {name for name in vars(kernels.Kernels) if not name.startswith("_")}
    assert wanted <= set(dir(module))


def test_a_vector_that_is_not_finite_leaves_the_residual_in_place(monkeypatch):
    vector, residual = (x.to(DEVICE) for x in vectors(torch.float32))
    vector[17], before = float("nan"), residual.clone()
    with pytest.raises(protocol.NotFiniteError):
        compressor("topk:0.01+int4").encode(vector, (), 1, residual)
    assert torch.equal(residual, before)
