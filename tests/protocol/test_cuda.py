"""The GPU's kernels answer what the CPU's answer, on a GPU if there is one, else in Triton's interpreter."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from protocol import DecodeError
from protocol.coding import digits, rice
from protocol.errors import SettingsError
from protocol.kernels import cuda, cuda_coding

reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("reference.py"))))  # tests are no package
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = str(int(DEVICE == "cpu"))  # triton asks for it when it is imported, and again when a kernel runs
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", INTERPRET)
    pytest.importorskip("triton")
    cuda.kernels()

DTYPES = (torch.float32, torch.float64)
SAMPLE = 128  # so that vectors that the interpreter can afford are sampled
LONG = 2 * cuda.SHARE * SAMPLE + 77


@pytest.fixture(scope="module", autouse=True)
def _interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", INTERPRET)
        yield


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels in the order in which they were launched; a refinement of everything is ``all``."""
    names, real = [], cuda.launch

    def spied(kernel, programs, *arguments, **constants):
        names.append("all" if constants.get("with_places") is False else kernel.__name__)
        real(kernel, programs, *arguments, **constants)

    monkeypatch.setattr(cuda, "launch", spied)
    monkeypatch.setattr(cuda, "SAMPLE", SAMPLE)
    return names


def check(vector, residual, k):
    """Kernel and reference on the same numbers; returns the indices, which agree."""
    vector, residual = (None if v is None else torch.as_tensor(v, device=DEVICE) for v in (vector, residual))
    total, expected_total = (vector if residual is None else torch.full_like(vector, math.nan) for _ in range(2))
    indices, values, squares = cuda.top_k(vector, residual, total, k)
    expected, expected_values, expected_squares = reference.top_k(vector, residual, expected_total, k)
    assert indices.dtype == torch.int64
    assert torch.equal(total, expected_total)
    same(indices, values, expected, expected_values)
    assert squares == pytest.approx(expected_squares, rel=1e-9)
    return indices


def same(indices, values, expected, expected_values):
    assert torch.equal(indices, expected)
    assert values.dtype == expected_values.dtype
    assert torch.equal(values, expected_values)


# --- adversarial inputs


def random(n):
    return np.random.default_rng(n).normal(size=n)


def spike(n):
    vector = np.zeros(n)
    vector[n // 2] = -3.0
    return vector


INPUTS = {
    "normal": random,
    "zeros": np.zeros,
    "negative zeros": lambda n: np.full(n, -0.0),
    "all equal": lambda n: np.where(np.arange(n) % 2, -0.25, 0.25),
    "two magnitudes": lambda n: np.where(np.arange(n) % 3 == 1, 2.0, -1.0),
    "denormal": lambda n: random(n) * 1e-42,
    "a single spike": spike,
    "heavy tail": lambda n: np.exp(20 * random(n)) * np.sign(random(n)),
    "rounded to ties": lambda n: np.round(random(n) * 4) / 4,
}
every_input = pytest.mark.parametrize("name", INPUTS)


def vector_of(name, n, dtype=torch.float32):
    return torch.from_numpy(INPUTS[name](n)).to(dtype)


@every_input
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_agrees_with_the_reference_on_short_vectors(name, dtype):
    vector = vector_of(name, 31, dtype)
    check(vector, vector.roll(7) / 4 if dtype == torch.float32 else None, 10)


@every_input
def test_top_k_agrees_with_the_reference_across_blocks(name):
    vector = vector_of(name, 4097)
    check(vector, vector.roll(7) / 4, 200)


@pytest.mark.parametrize("n", [1, 2, 4095, 4096, 70_001])
def test_top_k_agrees_with_the_reference_around_block_sizes(n):
    check(random(n).astype(np.float32), random(n + 1)[1:].astype(np.float32), max(1, n // 50))


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_may_begin_at_any_element(dtype):
    vector, residual, total = (torch.from_numpy(random(n)).to(DEVICE, dtype) for n in (4201, 4203, 4202))
    slices = vector[1:], residual[3:], total[2:]
    indices, values, _ = cuda.top_k(*slices, 99)
    assert torch.equal(total[2:], vector[1:] + residual[3:])
    same(indices, values, *reference.top_k(total[2:], None, total[2:], 99)[:2])


def test_without_a_residual_the_total_may_be_a_copy():
    vector = torch.from_numpy(random(5000)).to(DEVICE)
    total = torch.empty_like(vector)
    cuda.top_k(vector, None, total, 5)
    assert torch.equal(total, vector)


# --- which way was taken


@every_input
def test_top_k_agrees_with_the_reference_when_it_samples(launched, name):
    vector = vector_of(name, LONG)
    check(vector, vector.roll(3) / 8, LONG // 100)
    assert launched[:3] == ["sample", "scan", "gather"]


def test_a_long_vector_takes_one_pass(launched):
    check(random(LONG), None, LONG // 100)
    assert launched == ["sample", "scan", "gather", *["tally"] * 8, "count", "refine"]


@pytest.mark.parametrize("k", [LONG - 1, LONG])
def test_a_large_k_takes_no_sample(launched, k):
    check(random(LONG).astype(np.float32), None, k)
    assert launched == ["scan", "gather", *["tally"] * 4, "count", "refine"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_that_finds_too_few_makes_every_element_a_candidate(launched, monkeypatch, dtype):
    monkeypatch.setattr(cuda, "_generous", lambda count: 1)
    check(vector_of("rounded to ties", LONG, dtype), None, 3000)
    assert "all" in launched


def test_a_sample_that_finds_too_many_makes_every_element_a_candidate(launched):
    check(vector_of("all equal", LONG), None, 300)
    assert "all" in launched


def test_a_sample_of_zeros_leaves_what_is_not_zero(launched):
    assert check(vector_of("a single spike", LONG), None, 300).tolist() == [LONG // 2]
    assert "all" not in launched


# --- what is not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_anything_that_is_not_finite_makes_the_square_not_finite(dtype, bad):
    vector = torch.from_numpy(random(33)).to(DEVICE, dtype)
    vector[20] = bad
    other = torch.zeros_like(vector)
    answers = (
        cuda.top_k(other, vector, torch.empty_like(vector), 1),
        cuda.at_least(vector, None, vector, 0.5),
        cuda.block_top_k(vector, other, torch.empty_like(vector), 16, 1, 1),
    )
    for indices, values, squares in answers:
        assert not math.isfinite(squares)
        assert indices.numel() == values.numel() == 0


@pytest.mark.parametrize("share", [1, 2, LONG])
def test_a_sample_of_what_is_not_finite_ends_as_well(launched, share):
    vector = torch.from_numpy(random(LONG)).to(DEVICE)
    vector[::share] = math.nan
    assert not math.isfinite(cuda.top_k(vector, None, vector, LONG // 100)[2])


# --- the other selections


def largest_of_blocks(total, block, k, k_last):
    picked = []
    for start in range(0, total.numel(), block):
        part = total[start : start + block]
        picked.append(start + reference.top_k(part, None, part, k if part.numel() == block else k_last)[0])
    indices = torch.cat(picked)
    return indices, total[indices]


@pytest.mark.parametrize(
    ("n", "block", "k", "k_last"),
    [(1, 4096, 40, 1), (31, 7, 2, 3), (300, 100, 100, 1), (5, 1, 1, 0), (2000, 999, 10, 2), (9000, 4096, 41, 8)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_of_each_block_are_those_of_the_reference(n, block, k, k_last, dtype):
    for name in ("normal", "rounded to ties") if block > 1 else ("rounded to ties",):
        vector, total = vector_of(name, n, dtype).to(DEVICE), torch.empty(n, dtype=dtype, device=DEVICE)
        indices, values, squares = cuda.block_top_k(vector, vector.roll(1), total, block, k, k_last)
        assert torch.equal(total, vector + vector.roll(1))
        same(indices, values, *largest_of_blocks(total, block, k, k_last))
        assert squares == pytest.approx(float(total.double().square().sum()), rel=1e-9)


@every_input
def test_the_largest_of_each_block_are_those_of_the_reference_on_hard_inputs(name):
    vector = vector_of(name, 600).to(DEVICE)
    indices, values, _ = cuda.block_top_k(vector, None, vector, 250, 30, 12)
    same(indices, values, *largest_of_blocks(vector, 250, 30, 12))


def test_the_largest_block_is_counted_without_overflow():
    vector = torch.ones(cuda.LARGEST_BLOCK, device=DEVICE)
    for k in (cuda.LARGEST_BLOCK, 3):
        assert torch.equal(
            cuda.block_top_k(vector, None, vector, cuda.LARGEST_BLOCK, k, 0)[0], torch.arange(k, device=DEVICE)
        )
    with pytest.raises(SettingsError, match="valid is at most"):
        cuda.block_top_k(vector, None, vector, cuda.LARGEST_BLOCK + 1, 3, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [-1.0, 0.7, 2.25, 1e39, math.inf, math.nan])
def test_what_reaches_a_threshold_is_selected(dtype, threshold):
    vector = vector_of("rounded to ties", 4200, dtype).to(DEVICE)
    vector[5] = 0.7
    expected = torch.nonzero((vector.abs() >= torch.tensor(threshold, dtype=dtype)) & (vector != 0))[:, 0]
    indices, values, squares = cuda.at_least(vector, None, vector, threshold)
    same(indices, values, expected, vector[expected])
    assert squares == pytest.approx(float(vector.double().square().sum()), rel=1e-9)


# --- gaps of indices

SELECTIONS = {
    "one": ([0], 1),
    "the last of many": ([2**40 - 1], 2**40),
    "all": (np.arange(4097), 4097),
    "random": (np.flatnonzero(np.random.default_rng(0).random(70_001) < 0.03), 70_001),
    "a cluster": (2**33 + np.arange(1500), 2**34),
    "far apart": (np.cumsum(np.random.default_rng(1).integers(1, 2**38, 1100)), 2**49),
}
every_selection = pytest.mark.parametrize("name", SELECTIONS)


def selection(name):
    indices, numel = SELECTIONS[name]
    return np.asarray(indices, np.int64), numel


def written(indices, b):
    """Both streams by the format's docstring, a bit at a time."""
    gaps = np.diff(indices, prepend=-1) - 1
    remainders = (gaps[:, None] >> np.arange(b) & 1).astype(np.uint8).ravel()
    unary = np.zeros(int((gaps >> b).sum()) + gaps.size, np.uint8)
    unary[np.cumsum((gaps >> b) + 1) - 1] = 1
    return np.concatenate([np.packbits(bits, bitorder="little") for bits in (remainders, unary)])


@every_selection
def test_the_index_stream_is_that_of_the_cpu(name):
    indices, numel = selection(name)
    tensor = torch.from_numpy(indices).to(DEVICE)
    b, unary_bits = cuda_coding.rice_parameter(tensor, numel)
    data = cuda_coding.rice_pack(tensor, b, numel, unary_bits).cpu().numpy()
    expected_b, expected = rice.encode(indices, numel)
    assert b == expected_b
    assert np.array_equal(data, expected)


@pytest.mark.parametrize("b", [0, 1, 7, 8, 13, 31, 32, 33, 39, 40])
def test_every_parameter_is_written_as_the_format_says_and_read_again(b):
    indices, numel = selection("far apart" if b > 30 else "random")
    tensor = torch.from_numpy(indices).to(DEVICE)
    unary_bits = int((np.diff(indices, prepend=-1) - 1 >> b).sum()) + indices.size
    data = cuda_coding.rice_pack(tensor, b, numel, unary_bits)
    assert np.array_equal(data.cpu().numpy(), written(indices, b))
    unaligned = torch.cat([data[:1], data])[1:]
    assert torch.equal(cuda_coding.rice_unpack(unaligned, b, indices.size, numel), tensor)


@pytest.mark.parametrize("name", ["one", "all", "random"])
def test_without_the_size_of_the_unary_stream_the_bytes_are_the_same(name):
    indices, numel = selection(name)
    data = cuda_coding.rice_pack(torch.from_numpy(indices).to(DEVICE), 3, numel)
    assert np.array_equal(data.cpu().numpy(), written(indices, 3))


def decoded(decode, *arguments):
    """The indices as a list, or None if they are refused."""
    try:
        return decode(*arguments).tolist()
    except DecodeError:
        return None


@pytest.mark.parametrize("b", [0, 5, 40])
def test_the_gpu_refuses_what_the_cpu_refuses(b):
    random, refused = np.random.default_rng(b), 0
    indices = np.sort(random.choice(400, 20, replace=False))
    good = written(indices, b)
    for attempt in range(32):
        data, count, numel = good.copy(), 20, 400
        match attempt % 4:
            case 0:
                data[random.integers(data.size)] ^= 1 << random.integers(8)
            case 1:
                data = random.integers(0, 256, random.integers(1, 2 * data.size)).astype(np.uint8)
            case 2:
                data = np.concatenate([data, np.zeros(random.integers(2), np.uint8)])[: random.integers(1, 99)]
            case 3:
                count, numel = 20 + random.integers(-1, 2), indices[-1] + random.integers(0, 3)
        given = b, int(count), int(numel)
        expected = decoded(rice.decode, data, *given)
        assert decoded(cuda_coding.rice_unpack, torch.from_numpy(data).to(DEVICE), *given) == expected
        refused += expected is None
    assert refused >= 16


def test_quotients_that_wrap_around_are_refused(monkeypatch):
    """With parameter 40 a quotient of 2**24 is 2**64 elements, which an int64 takes for none."""
    monkeypatch.setattr(cuda, "WORDS", 1 << 14)
    monkeypatch.setattr(cuda_coding, "WORDS", 1 << 14)
    data = np.zeros(5 + 2**21 + 1, np.uint8)
    data[-1] = 1
    for decode, given in ((rice.decode, data), (cuda_coding.rice_unpack, torch.from_numpy(data).to(DEVICE))):
        with pytest.raises(DecodeError, match="beyond the end"):
            decode(given, 40, 1, 2**45)


def test_a_parameter_that_no_encoder_uses_is_refused():
    with pytest.raises(DecodeError, match="parameter 41"):
        cuda_coding.rice_unpack(torch.zeros(99, dtype=torch.uint8, device=DEVICE), 41, 1, 2**45)


# --- symbols


@pytest.mark.parametrize("base", [2, 3, 4, 5, 16, 256])
def test_digits_are_those_of_the_cpu(base):
    for n in (1, 2, 7, 8, 9, 10, 5003):
        symbols = np.random.default_rng(n).integers(0, base, n).astype(np.uint8)
        data = cuda_coding.pack_digits(torch.from_numpy(symbols).to(DEVICE), base)
        assert np.array_equal(data.cpu().numpy(), digits.pack(symbols, base))
        assert np.array_equal(cuda_coding.unpack_digits(data, n, base).cpu().numpy(), symbols)


@pytest.mark.parametrize(("data", "count", "base"), [([243], 5, 3), ([9], 2, 3), ([16], 1, 16), ([1, 0], 8, 2)])
def test_bytes_that_no_digits_give_are_refused(data, count, base):
    with pytest.raises(DecodeError):
        cuda_coding.unpack_digits(torch.tensor(data, dtype=torch.uint8, device=DEVICE), count, base)
    with pytest.raises(DecodeError):
        digits.unpack(np.array(data, np.uint8), count, base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_looked_up_first_and_added_second(dtype):
    out, table = (torch.from_numpy(random(n)).to(DEVICE, dtype) for n in (5001, 200))
    symbols = torch.arange(5001, device=DEVICE).mul(7).remainder(200).to(torch.uint8)
    expected = out + table[symbols.long()]
    indices = torch.arange(0, 5001, 3, device=DEVICE)
    sparse = out.clone()
    sparse[indices] += table[symbols[indices].long()]
    altered = out.clone()
    cuda_coding.lookup_add(altered, indices, symbols[indices], table)
    assert torch.equal(altered, sparse)
    cuda_coding.lookup_add(out, None, symbols, table)
    assert torch.equal(out, expected)


def test_a_symbol_beyond_the_table_adds_nothing():
    out, symbols = torch.zeros(3, device=DEVICE), torch.tensor([0, 2, 255], dtype=torch.uint8, device=DEVICE)
    cuda_coding.lookup_add(out, None, symbols, torch.ones(2, device=DEVICE))
    assert out.tolist() == [1.0, 0.0, 0.0]


# --- without Triton, and on the hardware


def test_without_triton_the_error_names_the_extra(monkeypatch):
    import protocol.kernels

    for name in ("gpu_bits", "gpu_select"):
        monkeypatch.delattr(protocol.kernels, name)
        monkeypatch.delitem(sys.modules, f"protocol.kernels.{name}")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SettingsError, match=r"carryover\[gpu\]"):
        cuda.top_k(torch.ones(3), None, torch.ones(3), 1)


COMPILE = """
import json, sys, types
import torch
import protocol
from protocol.kernels import cuda, cuda_coding

brought = "triton" in sys.modules
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

h200 = GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(types.SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: h200
))
made, real = {}, JITFunction.run


def run(self, *arguments, grid, warmup, **options):
    compiled = real(self, *arguments, grid=grid, warmup=True, **options)  # compile, do not launch
    made[f"{self.__name__} {id(compiled)}"] = compiled.asm["ptx"]


JITFunction.run, torch.empty = run, torch.zeros  # nothing runs, so outputs must have been something
for dtype in (torch.float32, torch.float64):
    vector = torch.zeros(cuda.SHARE * cuda.SAMPLE, dtype=dtype)
    cuda.top_k(vector, vector.clone(), vector.clone(), 1)
    cuda.block_top_k(vector, vector.clone(), vector.clone(), 4096, 40, 1)
    cuda_coding.lookup_add(vector, None, vector[:5].byte(), vector[:256])
cuda_coding.rice_parameter(torch.arange(5), 10)
cuda_coding.rice_pack(torch.arange(5), 3, 10)
try:
    cuda_coding.rice_unpack(torch.zeros(5, dtype=torch.uint8), 3, 5, 10)
except protocol.DecodeError:
    pass
cuda_coding.unpack_digits(cuda_coding.pack_digits(torch.zeros(5, dtype=torch.uint8), 3), 5, 3)
kernels = {name for module in cuda.kernels() for name, it in vars(module).items()
           if isinstance(it, JITFunction) and not name.startswith("_")}
print(json.dumps({"brought": brought, "kernels": sorted(kernels), "made": made}))
"""


def test_every_kernel_compiles_for_an_h200_with_sums_that_are_those_of_the_cpu(tmp_path):
    """Without the GPU itself: neither a fused multiply-add nor a sum that flushes denormal numbers to zero."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command, root = [sys.executable, "-c", COMPILE], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["brought"], "importing protocol must not import triton"
    assert {name.split()[0] for name in found["made"]} == set(found["kernels"])
    sums = 0
    for name, ptx in found["made"].items():
        assert ".ftz" not in ptx, name
        assert "fma.rn.f" not in ptx, name
        sums += "add.f32" in ptx or "add.rn.f32" in ptx
    assert sums
