"""The CPU kernels answer what a plain reference answers, however a sample misleads them."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.kernels import cpu, sums
from protocol.kernels.permutation import chosen
from protocol.kernels.product import Product
from protocol.kernels.threads import WORTH

reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("reference.py"))))  # tests are no package
LONG = 4 * cpu.SAMPLE + 12_345  # long enough that the threshold comes from a sample
DTYPES = (np.float32, np.float64)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def passes(monkeypatch):
    """Threshold and number of candidates of each pass with a sampled threshold; None if they were too many.

    Fewer candidates than ``k``, or too many, are of no use: if the answer is right all the same, every
    element was made a candidate.
    """
    seen, real = [], cpu._candidates

    def spied(*args):
        answer = real(*args)
        seen.append((args[3], None if answer[0] is None else answer[0].size))
        return answer

    monkeypatch.setattr(cpu, "_candidates", spied)
    return seen


def check(vector, residual, k):
    """Both kernels on the same input; returns the indices, which agree."""
    total = vector if residual is None else np.full_like(vector, np.nan)
    indices, values, squares = cpu.top_k(vector, residual, total, k)
    given_ = None if residual is None else torch.from_numpy(residual)
    expected_total = torch.from_numpy(vector if residual is None else np.full_like(vector, np.nan))
    expected, expected_values, expected_squares = reference.top_k(torch.from_numpy(vector), given_, expected_total, k)
    assert indices.dtype == np.int64
    assert values.dtype == vector.dtype
    assert np.array_equal(indices, expected.numpy())
    assert np.array_equal(values, expected_values.numpy())
    assert np.array_equal(total, expected_total.numpy())
    assert squares == pytest.approx(expected_squares, rel=1e-9)
    return indices


def sampled(n, k):
    """The places that the kernel will look at first: those of a vector that holds its own places."""
    out = np.empty(cpu.SAMPLE, np.float64)
    cpu._sample(np.arange(n, dtype=np.float64), np.empty(0), k, out)
    return np.unique(out.astype(np.int64))


# --- adversarial inputs


def random(n):
    return np.random.default_rng(n).normal(size=n)


def uniform(n):
    return np.random.default_rng(n + 1).random(n)


def few(n):
    vector = np.zeros(n)
    vector[[5, n // 2, n - 1]] = 1.0, -2.0, 1e-40
    return vector


INPUTS = {
    "normal": random,
    "rising": lambda n: np.arange(n) + 1.0,
    "falling": lambda n: -np.arange(n, 0.0, -1.0),
    "all equal": lambda n: np.full(n, -0.25),
    "two magnitudes": lambda n: np.where(np.arange(n) % 3 == 1, 2.0, -1.0),
    "zeros": np.zeros,
    "negative zeros": lambda n: np.full(n, -0.0),
    "few that are not zero": few,
    "heavy tail": lambda n: np.exp(4 * random(n)) * np.sign(random(n)),
    "one giant": lambda n: np.where(np.arange(n) == n // 3, 1e30, random(n)),
    "clustered": lambda n: np.where(np.arange(n) < n // 50, 10.0, 1.0) * random(n),
    "periodic": lambda n: np.where(np.arange(n) % 32 == 0, 5.0, 1.0) * random(n),
    "denormal": lambda n: random(n) * 1e-42,
    "rounded to ties": lambda n: np.round(random(n) * 4) / 4,
}


@pytest.mark.parametrize(("dtype", "with_residual"), [(np.float32, False), (np.float32, True), (np.float64, True)])
@pytest.mark.parametrize("name", INPUTS)
def test_the_kernel_agrees_with_the_reference_on_long_vectors(name, dtype, with_residual):
    vector = INPUTS[name](LONG).astype(dtype)
    check(vector, np.roll(vector, 7) / 4 if with_residual else None, 2_600)


@pytest.mark.parametrize("name", ["normal", "few that are not zero", "rounded to ties"])
@pytest.mark.parametrize("k", [1, 2, LONG // 4, LONG - 1, LONG])
def test_the_kernel_agrees_with_the_reference_for_every_k(name, k):
    check(INPUTS[name](LONG).astype(np.float32), None, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, cpu.BLOCK - 1, cpu.BLOCK, cpu.BLOCK + 1, 3 * cpu.BLOCK + 17])
def test_the_kernel_agrees_with_the_reference_around_its_block_sizes(n, dtype):
    for make in INPUTS.values():
        vector = make(max(n, 6))[:n].astype(dtype)
        for k in sorted({1, max(1, n // 3), n}):
            check(vector, np.roll(vector, 1), k)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 300),
    seed=st.integers(0, 2**32),
    grid=st.sampled_from([0, 1, 4]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_the_kernel_agrees_with_the_reference_on_short_vectors(n, seed, grid, dtype, data):
    vector, residual = np.random.default_rng(seed).normal(size=(2, n))
    if grid:
        vector, residual = np.round(vector * grid) / grid, np.round(residual * grid) / grid
    k = data.draw(st.integers(1, n))
    indices = check(vector.astype(dtype), data.draw(st.sampled_from([None, residual.astype(dtype)])), k)
    assert indices.size <= k


# --- which way was taken


def test_a_long_vector_takes_one_pass_with_a_sampled_threshold(passes):
    check(random(LONG).astype(np.float32), None, 2_600)
    ((threshold, count),) = passes
    assert threshold > 0.0
    assert 2_600 <= count < LONG // 10


def test_a_short_vector_needs_no_sample(passes):
    check(random(cpu.SMALL - 1).astype(np.float32), None, cpu.SMALL // 100)
    assert not passes


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_that_finds_too_few_candidates_makes_every_element_one(passes, dtype, with_residual):
    k = LONG // 2
    vector = np.abs(random(LONG)) % 1.0
    vector[sampled(LONG, k)] += 10.0  # all that the sample sees is large, and there is not enough of it
    check(vector.astype(dtype), uniform(LONG).astype(dtype) if with_residual else None, k)
    ((threshold, count),) = passes
    assert threshold > 2.0
    assert count < k


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 100])
def test_a_sample_that_finds_too_many_candidates_makes_every_element_one(passes, dtype, with_residual, k):
    vector = 10.0 + np.abs(random(LONG))
    vector[sampled(LONG, k)] = 0.5  # all that the sample sees is small
    check(vector.astype(dtype), uniform(LONG).astype(dtype) if with_residual else None, k)
    ((threshold, count),) = passes
    assert 0.0 < threshold < 2.0
    assert count is None


def test_a_sample_that_sees_only_zeros_makes_every_element_a_candidate(passes):
    vector = few(LONG).astype(np.float32)
    vector[sampled(LONG, 2)] = 0.0
    check(vector, None, 2)
    assert not passes


@pytest.mark.parametrize("more", [-1, 0, 1, cpu.BLOCK - 1, cpu.BLOCK, cpu.BLOCK + 1, 2 * cpu.BLOCK])
def test_candidates_that_fill_the_room_are_all_found_or_none(passes, more):
    """As many of one magnitude as there is room for, and one that is larger at the very end."""
    k, n = 100, 8 * cpu.SAMPLE
    vector = np.where(np.arange(n) < 2 * k + cpu.SAMPLE + more, 1.0, 0.25).astype(np.float32)
    vector[-1] = 2.0
    assert n - 1 in check(vector, None, k)
    ((threshold, _),) = passes
    assert threshold == 1.0


def test_two_threads_find_what_one_finds(passes):
    n = 2 * WORTH + 77
    vector = np.tile(random(1 << 16), n // (1 << 16) + 1)[:n].astype(np.float32)
    torch.set_num_threads(2)
    try:
        check(vector, None, n // 100)
        check(vector, vector[::-1].copy(), n // 100)
    finally:
        torch.set_num_threads(1)
    assert all(count is not None and count >= n // 100 for _, count in passes)


# --- the other selections


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "block"), [(n, block) for n in (1, 63, 64, 65, 300) for block in (1, 5, 64, 100)] + [(40_017, 4096)]
)
def test_the_largest_of_each_block_are_those_of_the_reference(n, block, dtype):
    for make in INPUTS.values():
        vector = make(max(n, 6))[:n].astype(dtype)
        k, last = max(1, block // 10), n % block
        k_last = max(1, last // 3) if last else k
        indices, values, squares = cpu.block_top_k(vector, None, vector, block, k, k_last)
        expected = []
        for start in range(0, n, block):
            part = torch.from_numpy(vector[start : start + block])
            expected += (start + reference.top_k(part, None, part, k if len(part) == block else k_last)[0]).tolist()
        assert indices.tolist() == expected
        assert np.array_equal(values, vector[indices])
        assert squares == pytest.approx(float(np.square(vector.astype(np.float64)).sum()), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 65, cpu.BLOCK + 1, LONG])
def test_all_that_reach_a_threshold_are_found(n, dtype):
    for make in INPUTS.values():
        vector = make(max(n, 6))[:n].astype(dtype)
        residual = np.roll(vector, 3)
        for level in (1e-3, 0.25, 1.0, 1e20):
            total = np.full_like(vector, np.nan)
            indices, values, squares = cpu.at_least(vector, residual, total, level)
            assert np.array_equal(total, vector + residual)
            assert np.array_equal(indices, np.flatnonzero(np.abs(total) >= dtype(level)))
            assert np.array_equal(values, total[indices])
            assert squares == pytest.approx(float(np.square(total.astype(np.float64)).sum()), rel=1e-9)


def test_a_random_choice_is_of_distinct_elements_in_order():
    for numel in (1, 2, 3, 5, 255, 256, 257, 1000, 70_000):
        for count in {1, numel // 2, numel} - {0}:
            indices = chosen(numel, count, numel)
            assert indices.size == count
            assert indices[0] >= 0
            assert indices[-1] < numel
            assert np.all(np.diff(indices) > 0)


def test_the_elements_of_a_smaller_choice_are_among_those_of_a_larger_one():
    assert set(chosen(5, 10, 1000)) < set(chosen(5, 100, 1000))


# --- products


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    rank=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
)
def test_a_product_rounds_every_product_and_every_sum_in_order(rows, columns, rank, seed, dtype):
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(rows, rank)).astype(dtype), random.normal(size=(rank, columns)).astype(dtype)
    expected = np.zeros((rows, columns), dtype)
    for r in range(rank):
        step = left[:, r : r + 1] * right[r]
        expected = step if r == 0 else expected + step
    product = Product(left, right)
    assert len(product) == rows * columns
    assert np.array_equal(product.array(), expected.reshape(-1))
    assert np.array_equal(np.concatenate([values for _, values in product.pieces()]), expected.reshape(-1))
    out = random.normal(size=rows * columns)
    added = out.copy()
    product.add_to(added, None, -1)
    assert np.array_equal(added, out - expected.reshape(-1).astype(np.float64))


# --- what is not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 33, cpu.BLOCK + 1, LONG])
def test_anything_that_is_not_finite_makes_the_square_not_finite(n, dtype, bad):
    for place in {0, n // 2, n - 1}:
        vector, residual = random(n).astype(dtype), np.zeros(n, dtype)
        vector[place] = bad
        for first, second in ((vector, None), (vector, residual), (residual, vector)):
            total = first if second is None else np.empty_like(first)
            indices, values, squares = cpu.top_k(first, second, total, 1)
            assert not math.isfinite(squares)
            assert indices.size == values.size == 0
        tensor = torch.from_numpy(vector)
        assert not math.isfinite(reference.top_k(tensor, None, tensor, 1)[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_long_vector_of_nothing_finite_ends_as_well(bad):
    vector = np.full(LONG, bad, np.float32)
    assert not math.isfinite(cpu.top_k(vector, None, vector, 2_600)[2])


def test_a_sum_that_overflows_is_not_finite():
    vector = np.full(3, np.finfo(np.float32).max)
    assert cpu.top_k(vector, vector, np.empty_like(vector), 1)[2] == math.inf


# --- the small ones


@settings(deadline=None, max_examples=40)
@given(n=st.integers(0, 200), seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES))
def test_magnitudes_are_the_two_norms(n, seed, dtype):
    values = np.random.default_rng(seed).normal(size=n).astype(dtype)
    total, squares = sums.magnitudes(values)
    assert total == pytest.approx(math.fsum(np.abs(values).tolist()), rel=1e-12)
    assert squares == pytest.approx(math.fsum((values.astype(np.float64) ** 2).tolist()), rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 200), seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES))
def test_values_are_rounded_first_and_added_second(n, seed, dtype):
    random = np.random.default_rng(seed)
    total, values = random.normal(size=(2, n)).astype(dtype)
    places = np.flatnonzero(random.random(n) < 0.5)
    expected = total.copy()
    expected[places] = expected[places] + values[: places.size]
    sums.add_at(total, places, values[: places.size])
    assert np.array_equal(total, expected)
