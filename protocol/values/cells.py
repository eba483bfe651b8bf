"""Where to cut the range of magnitudes: the best partition of a histogram into few cells.

Bins are equal steps of the IEEE bits, which is nearly equal ratios: about two thousand between the smallest
and the largest magnitude, so that a bin is never wider than 1.4 % and is finer where magnitudes are closer
together (what survives a selection often is). The partition is the best there is,
by dynamic programming: both gains fulfil the quadrangle inequality, so that the best cut moves one way
and each row costs ``n log n`` (divide and conquer).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.floating[Any]]

OCTAVES = 14  # below the largest magnitude; what is smaller shares the lowest bin
BIN_BITS = 11  # 2048 bins, one more or less
BIN_RATIO = 1.0 + OCTAVES / (1 << (BIN_BITS - 1))  # of the largest to the smallest magnitude in a bin, at most


@njit(cache=True, nogil=True)
def _best_rows(gain, counts, sums, edges, cells):  # type: ignore[no-untyped-def]
    """``cuts[m, j]``: where the last of ``m + 1`` cells over the first ``j`` bins begins.

    ``counts`` and ``sums`` are cumulative. Gain 0: the square of what centroids send, which is ``|v|**2`` less
    the squared error. Gain 1: minus the count times the squared width, the error of equal steps.
    """
    n = edges.size - 1
    value = np.full((2, n + 1), -np.inf)
    value[0, 0] = 0.0
    cuts = np.zeros((cells, n + 1), np.int64)
    for m in range(cells):
        before, after = value[m % 2], value[(m + 1) % 2]
        after[:] = -np.inf
        step = 1
        while step <= n:
            step *= 2
        while step:
            for j in range(step, n + 1, 2 * step):
                lowest = cuts[m, j - step] if j > step else 0
                highest = min(j - 1, cuts[m, j + step] if j + step <= n else j - 1)
                for i in range(min(lowest, highest), highest + 1):
                    number = counts[j] - counts[i]
                    if gain == 0:
                        size = sums[j] - sums[i]
                        new = before[i] + size * size / number
                    else:
                        width = edges[j] - edges[i]
                        new = before[i] - number * width * width
                    if new > after[j]:
                        after[j] = new
                        cuts[m, j] = i
            step //= 2
    return cuts


def means(counts: npt.NDArray[np.int64], sums: Floats, cells: int) -> list[int]:
    """The borders of at most ``cells`` cells, each sent as its mean: bin numbers, the last one is the number of bins.

    Args:
        counts: of magnitudes in each bin.
        sums: of magnitudes in each bin, float64.
        cells: at least 1.
    """
    there = np.flatnonzero(counts)
    cuts = _partition(0, counts[there], sums[there], there.astype(np.float64), min(cells, there.size))
    return [0, *(int(there[cut]) for cut in cuts[1:-1]), counts.size]


def steps(counts: npt.NDArray[np.int64], edges: Floats, cells: int) -> list[int]:
    """The borders of at most ``cells`` cells, each divided into equal steps; gaps can be cells of their own.

    Args:
        counts: of magnitudes in each bin.
        edges: one more than bins, ascending, float64.
        cells: at least 1.
    """
    there = np.flatnonzero(counts)
    points = np.union1d(there, there + 1)
    between = counts[points[:-1]]  # a bin, or a gap, which begins with an empty one
    cuts = _partition(1, between, between.astype(np.float64), edges[points], min(cells, between.size))
    return [int(points[cut]) for cut in cuts]


def _partition(gain: int, counts: npt.NDArray[np.int64], sums: Floats, edges: Floats, cells: int) -> list[int]:
    """Where the cells begin, 0 first, and the number of bins; ``edges`` are those that gain 1 needs."""
    zero = np.zeros(1)
    counted, summed = np.concatenate([zero, np.cumsum(counts)]), np.concatenate([zero, np.cumsum(sums)])
    cuts = _best_rows(gain, counted, summed, np.resize(edges, counts.size + 1), cells)
    borders = [counts.size]
    for m in reversed(range(cells)):
        borders.append(int(cuts[m, borders[-1]]))
    return borders[::-1]
