"""What ``encode`` is given: refused where it does not fit, and left as it was where it cannot be sent."""

import os
import signal

import numpy as np
import pytest
import torch

from protocol import NotFiniteError, compressor, decode
from protocol.kernels.threads import WORTH
from protocol.segment import unpack
from protocol.update import accumulate

SPECS = ("topk:0.1+int4", "blocktopk:0.1", "randk:0.5", "threshold:0.5", "sign", "natural", "none")
N = 1000


@pytest.fixture
def vector():
    return torch.randn(N, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("place", ["vector", "residual", "residual_out"])
@pytest.mark.parametrize(
    "unlike",
    [
        lambda: torch.randn(2 * N)[::2],
        lambda: torch.randn(1).expand(N),
        lambda: torch.randn(10, N // 10),
        lambda: torch.ones(N, dtype=torch.int64),
        lambda: torch.ones(N, dtype=torch.float16),
    ],
    ids=["strided", "expanded", "two dimensions", "integers", "half"],
)
def test_a_tensor_that_the_kernels_cannot_read_is_refused(spec, place, unlike, vector):
    given = {"residual": vector.clone(), "residual_out": vector.clone(), place: unlike()}
    with pytest.raises(ValueError, match=place):
        compressor(spec).encode(given.pop("vector", vector), (), 1, **given)


@pytest.mark.parametrize("other", [torch.zeros(N - 1), torch.zeros(N, dtype=torch.float64)], ids=["size", "dtype"])
def test_a_residual_unlike_the_vector_is_refused(other, vector):
    with pytest.raises(ValueError, match="residual"):
        compressor("topk:0.1").encode(vector, (), 1, other)


def test_buffers_that_overlap_in_part_are_refused(vector):
    memory = torch.zeros(N + 100)
    with pytest.raises(ValueError, match="overlaps"):
        compressor("topk:0.1").encode(vector, (), 1, memory[:N], memory[100:])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("key", [-1, 2**64, 2**80 + 3])
def test_any_integer_is_a_key_and_counts_modulo_two_to_the_64(spec, key, vector):
    payload, _ = compressor(spec).encode(vector, (), key)
    same, _ = compressor(spec).encode(vector, (), key % 2**64)
    assert payload.tobytes() == same.tobytes()


@pytest.mark.parametrize("spec", [*SPECS, "lowrank:2"])
@pytest.mark.parametrize("bad", ["nan", "inf", "their sum"])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_residual_in_place_survives_what_cannot_be_sent_to_the_last_bit(spec, bad, explicit):
    """Also where the vector is so large that subtracting it again would not give the residual back."""
    vector, residual = torch.full((N,), 1e10), torch.linspace(1e-30, 1, N)
    if bad == "their sum":
        vector[500] = residual[500] = 3e38
    else:
        vector[500] = float(bad)
    before = residual.clone()
    with pytest.raises(NotFiniteError):
        compressor(spec, (10, 100)).encode(vector, (), 1, residual, residual if explicit else None)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_natural_keeps_its_variance_among_denormal_numbers(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    smallest = np.nextafter(np.zeros(1, str(dtype).removeprefix("torch.")), 1).item()
    vector = torch.tensor([tiny / 8, *([smallest] * 300), tiny / 64, -tiny / 3], dtype=dtype)
    scale = 2.0**80 if dtype == torch.float32 else 2.0**600  # squares must not underflow
    wide = vector.double() * scale
    found = torch.stack([decode(compressor("natural").encode(vector, (), key)[0], 303) for key in range(200)])
    wrong = ((found.double() * scale - wide) ** 2).sum(1).mean() / (wide**2).sum()
    assert wrong <= 1 / 8
    assert torch.allclose((found.double() * scale).mean(0)[0], wide[0], rtol=0.15)


@pytest.mark.parametrize("size", [N - 1, N + 1])
def test_an_update_is_added_to_nothing_of_another_size(size, vector):
    update = unpack(compressor("topk:0.1+int4").encode(vector, (), 1)[0], N)
    for act in (update.add_to, update.subtract_from, lambda out: accumulate([update, update], out)):
        with pytest.raises(ValueError, match="1000"):
            act(torch.zeros(size))


def test_a_process_that_was_forked_has_threads_of_its_own():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        large = torch.ones(2 * WORTH)
        expected = compressor("sign").encode(large, (), 1)[0].tobytes()
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends it if it waits for ever
            os._exit(compressor("sign").encode(large, (), 1)[0].tobytes() != expected)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)
