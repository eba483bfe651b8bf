"""Fitted grids are as good as the best of their kind: what they lose, beside what the textbook's quantisers lose."""

from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import compressor, decode
from protocol.values.cells import means, steps

N = 1_000_000
random = np.random.default_rng(2)


@cache
def values(name):
    """Float32 as a selection or a whole gradient gives them to a value code; all of magnitude 1 on average or so."""
    given_ = random.normal(size=N)
    if name.startswith("the largest hundredth"):
        given_ = given_**3 if "cubed" in name else given_
        given_ = given_[np.argsort(-np.abs(given_))[: N // 100]]
    elif name == "sparse":
        given_ = given_[:20_000] * (random.random(20_000) < 0.3)
    else:
        given_ = {"normal": given_, "cubed normal": given_**3, "uniform": random.uniform(-1, 1, N)}[name][:20_000]
    return given_.astype(np.float32)


SELECTED = ("the largest hundredth of cubed normals", "the largest hundredth of normals")
DENSE = ("normal", "cubed normal", "uniform", "sparse")


@cache
def lost(code, name):
    """The squared error, summed."""
    given_ = torch.from_numpy(values(name))
    payload, _ = compressor(code).encode(given_, (), 7)
    return float((decode(payload, given_.numel()).double() - given_.double()).square().sum())


def error(magnitudes, levels):
    """Of the nearest levels."""
    levels = np.sort(levels)
    return float(np.square(magnitudes - levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, magnitudes)]).sum())


@cache
def lloyd_max(name, levels):
    """The best of the fixed points that Lloyd's iteration finds from three beginnings.

    One has a density of levels in proportion to the cube root of that of the values, which is the best for
    many levels (Panter and Dite 1951).
    """
    sizes = np.sort(np.abs(values(name)).astype(np.float64))
    edges = np.quantile(sizes, np.linspace(0, 1, 65))
    share = np.concatenate([[0.0], np.cumsum(np.diff(edges) ** (2 / 3))])
    begins = (
        np.interp((np.arange(levels) + 0.5) / levels * share[-1], share, edges),
        np.quantile(sizes, (np.arange(levels) + 0.5) / levels),
        np.linspace(sizes[0], sizes[-1], 2 * levels + 1)[1::2],
    )
    sums = np.concatenate([[0.0], np.cumsum(sizes)])
    found = []
    for centres in begins:
        for _ in range(300):
            cuts = np.searchsorted(sizes, np.concatenate([[0.0], (centres[1:] + centres[:-1]) / 2, [np.inf]]))
            counts = np.diff(cuts)
            centres = np.where(counts > 0, np.diff(sums[cuts]) / np.maximum(counts, 1), centres)
        found.append(error(sizes, centres))
    return min(found)


def uniform(name, levels, from_zero):
    """A grid of equal steps from the smallest magnitude, or from zero, to the largest, each sent as its middle."""
    sizes = np.abs(values(name)).astype(np.float64)
    edges = np.linspace(0.0 if from_zero else sizes.min(), sizes.max(), levels + 1)
    return error(sizes, (edges[1:] + edges[:-1]) / 2)


LEVELS = {"int2": 2, "int4": 8, "int8": 128}

# Centroids are those of a histogram whose bins are one or two per cent wide, and have eight bits: that costs two or
# eight levels, which are far wider, next to nothing. Lloyd's iteration may itself stop short of the best.
NEAR = 1.1


@pytest.mark.parametrize("name", [*SELECTED, *DENSE])
@pytest.mark.parametrize("code", ["int2", "int4"])
def test_few_levels_lose_hardly_more_than_lloyd_and_max(code, name):
    assert lost(code, name) <= NEAR * lloyd_max(name, LEVELS[code])


# Of 128 free levels some go to single values far out in the tail, where eight cells of equal steps leave most of theirs
# empty; otherwise eight pieces are close to the density that is best (uniform values: the same, normal ones: 1 %).
COMPANDED = 1.4


@pytest.mark.parametrize("name", [*SELECTED, *DENSE])
def test_eight_cells_of_equal_steps_lose_little_more_than_the_best_128_levels(name):
    assert lost("int8", name) <= COMPANDED * lloyd_max(name, 128)


@pytest.mark.parametrize("name", SELECTED)
@pytest.mark.parametrize("code", LEVELS)
def test_what_survives_a_selection_loses_less_than_on_a_uniform_grid(code, name):
    """Far less than on one that begins at zero, where nothing is."""
    assert lost(code, name) < 0.9 * uniform(name, LEVELS[code], from_zero=False)
    assert lost(code, name) < 0.5 * uniform(name, LEVELS[code], from_zero=True)


@pytest.mark.parametrize("name", ["normal", "cubed normal", "sparse"])
@pytest.mark.parametrize("code", LEVELS)
def test_what_is_dense_loses_less_than_on_a_uniform_grid(code, name):
    assert lost(code, name) < uniform(name, LEVELS[code], from_zero=False)


@pytest.mark.parametrize("name", [*SELECTED, *DENSE])
def test_more_bits_lose_much_less(name):
    assert lost("int4", name) < lost("int2", name) / 4
    assert lost("int8", name) < lost("int4", name) / 16


def test_a_grid_goes_with_the_scale_of_its_values():
    name = SELECTED[0]
    for code in LEVELS:
        for scale in (2.0**-60, 2.0**60):
            given_ = torch.from_numpy(values(name) * np.float32(scale))
            payload, _ = compressor(code).encode(given_, (), 7)
            wrong = decode(payload, given_.numel()).double() - given_.double()
            assert float((wrong / scale).square().sum()) == pytest.approx(lost(code, name), rel=1e-6)


# --- the partition


def loss(gain, counts, sums, edges, borders):
    """Of a partition, up to what is the same for all."""
    total = 0.0
    for low, high in pairwise(borders):
        number, size = counts[low:high].sum(), sums[low:high].sum()
        if gain == 0:
            total -= size**2 / number if number else 0.0
        else:
            total += number * (edges[high] - edges[low]) ** 2
    return total


def best_by_trying(gain, counts, sums, edges, cells, inner=None):
    inner = range(1, counts.size) if inner is None else inner
    return min(
        loss(gain, counts, sums, edges, (0, *cuts, counts.size))
        for number in range(min(cells, len(inner) + 1))
        for cuts in combinations(inner, number)
    )


@settings(deadline=None, max_examples=400)
@given(
    counts=st.lists(st.integers(1, 50) | st.integers(1, 10**6), min_size=1, max_size=9),
    gain=st.sampled_from([0, 1]),
    cells=st.integers(1, 9),
    ratio=st.sampled_from([1.02, 1.5, 4.0]),
    seed=st.integers(0, 1000),
)
@example(counts=[1] * 9, gain=1, cells=3, ratio=4.0, seed=0)
def test_the_partition_is_the_best_there_is(counts, gain, cells, ratio, seed):
    counts = np.array(counts, np.int64)
    edges = ratio ** np.arange(counts.size + 1.0)
    sums = counts * np.random.default_rng(seed).uniform(edges[:-1], edges[1:])
    borders = steps(counts, edges, cells) if gain else means(counts, sums, cells)
    assert borders[0] == 0
    assert borders[-1] == counts.size
    assert all(low < high for low, high in pairwise(borders))
    assert len(borders) - 1 <= cells
    best = best_by_trying(gain, counts, sums, edges, cells)
    assert loss(gain, counts, sums, edges, borders) <= best + 1e-9 * abs(best)


@settings(deadline=None, max_examples=200)
@given(counts=st.lists(st.sampled_from([0, 0, 1, 7, 1000]), min_size=1, max_size=9), cells=st.integers(1, 5))
def test_bins_that_are_empty_cost_nothing(counts, cells):
    counts = np.array([*counts, 3], np.int64)
    edges = 1.5 ** np.arange(counts.size + 1.0)
    sums = counts * edges[:-1] * 1.2
    borders = means(counts, sums, cells)
    assert all(counts[low:high].sum() > 0 for low, high in pairwise(borders))
    best = best_by_trying(0, counts, sums, edges, cells)
    assert loss(0, counts, sums, edges, borders) <= best + 1e-9 * abs(best)


@settings(deadline=None, max_examples=300)
@given(counts=st.lists(st.sampled_from([0, 0, 0, 1, 7, 1000]), max_size=8), cells=st.integers(1, 6))
def test_a_gap_between_magnitudes_takes_no_steps_where_a_cell_can_be_spared_for_it(counts, cells):
    counts = np.array([3, *counts, 3], np.int64)
    edges = 1.5 ** np.arange(counts.size + 1.0)
    borders = steps(counts, edges, cells)
    assert (borders[0], borders[-1]) == (0, counts.size)
    assert all(low < high for low, high in pairwise(borders))
    assert len(borders) - 1 <= cells
    beside = [i for i in range(1, counts.size) if counts[i - 1] or counts[i]]  # a magnitude, not within a gap
    best = best_by_trying(1, counts, counts * 1.0, edges, cells, beside)
    assert loss(1, counts, counts * 1.0, edges, borders) <= best + 1e-9 * abs(best)
