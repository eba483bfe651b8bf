"""Which elements are sent: those that the selection promises, on short vectors and on those that it samples."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import compressor, segment
from protocol.kernels import cpu
from protocol.selections import BlockTopK, RandK, TopK

DTYPES = (torch.float32, torch.float64)
VALUES = ("none", "f64", "bf16", "int8", "int4", "int2", "sign", "natural", "qsgd:4", "int4+entropy")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64"))


def laws(max_examples):
    return settings(deadline=None, max_examples=max_examples)


@st.composite
def vectors(draw, max_numel=150):
    """With ties and zeros."""
    numel, random = draw(st.integers(1, max_numel)), np.random.default_rng(draw(st.integers(0, 2**32)))
    vector = np.round(random.normal(size=numel) ** 3 * 4) / draw(st.sampled_from([1, 4, 1e20, 1e-20]))
    return torch.from_numpy(vector).to(draw(st.sampled_from(DTYPES)))


def places(spec, vector, residual=None, key=7):
    """What is sent of the sum, and what is left."""
    left = torch.empty_like(vector)
    payload, _ = compressor(spec).encode(vector, (), key, residual, left)
    indices = segment.unpack(payload, vector.numel()).indices
    assert indices is not None
    return indices.tolist(), left


def largest(total, k):
    """The places of the ``k`` largest magnitudes that are not zero; ties go to the lowest."""
    order = sorted(range(total.numel()), key=lambda i: (-abs(float(total[i])), i))
    return sorted(i for i in order[:k] if total[i] != 0)


# --- topk


@pytest.mark.parametrize("values", VALUES)
@laws(20)
@given(vector=vectors(), ratio=st.floats(1e-6, 1.0), halved=st.booleans())
def test_the_largest_magnitudes_are_sent_and_ties_go_to_the_lowest_index(values, vector, ratio, halved):
    c = compressor(f"topk:{ratio!r}")
    residual = -vector.flip(0) if halved else None
    total = vector + residual if halved else vector
    found, _ = places(f"{c.spec}+{values}", vector, residual)
    assert found == largest(total, TopK(ratio).count(total.numel()))


@laws(200)
@given(numel=st.integers(0, 10**9), ratio=st.floats(0, 1, exclude_min=True))
@example(numel=250, ratio=0.01)
@example(numel=10**6, ratio=5e-324)
def test_the_count_is_the_rounded_share_but_at_least_one(numel, ratio):
    expected = max(1, round(ratio * numel)) if numel else 0
    assert TopK(ratio).count(numel) == RandK(ratio).count(numel) == expected
    assert BlockTopK(ratio, max(1, numel)).count(numel) == expected


# --- blocktopk


@pytest.mark.parametrize("block", [1, 2, 7, 64, 150, 1000])
@laws(20)
@given(vector=vectors(), ratio=st.floats(1e-6, 1.0))
def test_the_largest_of_every_block_are_sent(block, vector, ratio):
    found, left = places(f"blocktopk:{ratio!r},block={block}", vector)
    expected = []
    for start in range(0, vector.numel(), block):
        part = vector[start : start + block]
        expected += [start + i for i in largest(part, TopK(ratio).count(part.numel()))]
    assert found == expected
    assert len(found) <= BlockTopK(ratio, block).count(vector.numel())
    assert not left[found].any()


@pytest.mark.parametrize("block", [10**6, 10**12, 10**30])
def test_a_block_beyond_the_vector_is_the_whole_vector(block):
    vector = torch.linspace(-1, 1, 101)
    assert places(f"blocktopk:0.1,block={block}", vector)[0] == places("topk:0.1", vector)[0]


# --- threshold


@every_dtype
@pytest.mark.parametrize("values", ["none", "f64", "f32+entropy"])
@pytest.mark.parametrize("level", [1e-300, 1e-60, 1e-30, 0.1, 1 / 3, 1.0, 3.5, 1e30, 1e300])
def test_nothing_that_is_left_is_above_the_threshold(level, values, dtype):
    vector = torch.from_numpy(np.round(np.random.default_rng(0).normal(size=1000), 1)).float()
    vector[3], vector[4] = level if level < 1e38 else 1e38, 0.0
    vector = vector.to(dtype)
    found, left = places(f"threshold:{level!r}".replace("+", "") + f"+{values}", vector)
    assert float(left.abs().max()) <= level
    assert not left[found].any()
    assert all(float(vector[i]) != 0 and abs(float(vector[i])) >= level * (1 - 1e-7) for i in found)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.07, 0.5, 1.0])
def test_a_threshold_that_many_or_few_elements_reach_finds_them_all(share):
    vector = torch.where(torch.arange(100_000) % 1000 < 1000 * share, -2.0, 0.5)
    found, left = places("threshold:1", vector)
    assert found == torch.nonzero(vector == -2.0).view(-1).tolist()
    assert float(left.abs().max()) == (0.5 if share < 1 else 0.0)


# --- randk


@laws(40)
@given(vector=vectors(), other=vectors(), ratio=st.floats(1e-6, 1.0), key=st.integers(0, 2**64 - 1))
def test_a_random_choice_depends_on_key_and_size_alone(vector, other, ratio, key):
    numel = min(vector.numel(), other.numel())
    first, second = vector[:numel] + 100.0, other[:numel].float() - 200.0
    found, left = places(f"randk:{ratio!r}", first, key=key)
    assert found == places(f"randk:{ratio!r}+int4", second, key=key)[0]
    assert len(found) == RandK(ratio).count(numel)
    assert not left[found].any()


@pytest.mark.parametrize(("numel", "ratio"), [(2, 0.5), (5, 0.4), (6, 0.34), (17, 0.25), (33, 0.1)])
def test_every_element_and_every_pair_is_drawn_as_often(numel, ratio):
    """Over consecutive keys, within five standard deviations."""
    keys, k = 4000, RandK(ratio).count(numel)
    drawn = np.zeros((keys, numel))
    for key in range(keys):
        drawn[key, places(f"randk:{ratio}", torch.ones(numel), key=key)[0]] = 1
    together = drawn.T @ drawn
    for chance, counts in (
        (k / numel, np.diag(together)),
        (k * (k - 1) / (numel * (numel - 1)), together[np.triu_indices(numel, 1)]),
    ):
        spread = np.sqrt(keys * chance * (1 - chance))
        assert np.abs(counts - keys * chance).max() <= 5 * spread + 1e-9
        assert np.square(counts - keys * chance).mean() <= 2 * spread**2


def test_elements_that_are_drawn_travel_even_if_they_are_zero():
    vector = torch.zeros(1000)
    vector[::2] = 1.0
    found, left = places("randk:0.1", vector)
    assert len(found) == 100
    assert 20 < sum(float(vector[i]) == 0 for i in found) < 80
    assert not left[found].any()


# --- vectors long enough that the threshold comes from a sample


@cache
def long_input(dtype):
    """Vector, residual, and the places of their sum from the largest magnitude to the smallest."""
    generator = torch.Generator().manual_seed(1)
    numel = 4 * cpu.SMALL + 1001
    vector = torch.randn(numel, generator=generator, dtype=dtype) ** 3
    residual = torch.randn(numel, generator=generator, dtype=dtype)
    return vector, residual, torch.sort((vector + residual).abs(), descending=True, stable=True).indices


@every_dtype
@pytest.mark.parametrize("ratio", ["0.5", "0.01", "1e-9"])
@pytest.mark.parametrize("values", ["none", "int4", "sign+entropy"])
def test_of_a_long_vector_the_largest_are_sent_as_well(values, ratio, dtype):
    vector, residual, order = long_input(dtype)
    k = TopK(float(ratio)).count(vector.numel())
    found, left = places(f"topk:{ratio}+{values}", vector, residual)
    assert found == sorted(order[:k].tolist())
    rest = order[k:]
    assert torch.equal(left[rest], (vector + residual)[rest])


@every_dtype
def test_of_a_long_vector_all_above_a_threshold_are_sent_as_well(dtype):
    vector, residual, _ = long_input(dtype)
    for level in (0.5, 5.0, 50.0, 1e4):
        found, left = places(f"threshold:{level}", vector, residual)
        assert found == torch.nonzero((vector + residual).abs() >= level).view(-1).tolist()
        assert float(left.abs().max()) <= level


@every_dtype
def test_of_a_long_vector_the_largest_of_every_block_are_sent_as_well(dtype):
    vector, residual, _ = long_input(dtype)
    total = vector + residual
    found, left = places("blocktopk:0.01", vector, residual)
    for start in range(0, total.numel(), 4096):
        part = total[start : start + 4096]
        k = TopK(0.01).count(part.numel())
        here = [i - start for i in found if start <= i < start + part.numel()]
        assert here == sorted(torch.sort(part.abs(), descending=True, stable=True).indices[:k].tolist())
    assert not left[found].any()
