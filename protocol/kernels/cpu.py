"""Top-k selection on the CPU in one pass over the data.

The largest magnitudes are found without sorting: a threshold is estimated from a sample, one pass
adds the residual, writes the sum and collects the few candidates above the threshold, and the
candidates alone are refined to exactly ``k``. If the sample misled (too few or too many candidates),
every element is a candidate, so the answer is exact in every case.

All kernels release the GIL. The sum of squares they return is NaN or infinite when an element is
(and if float64 magnitudes beyond 1e154 overflow it); the caller then drops what was selected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.int64]

BLOCK = 4096  # values that stay in the first-level cache between the inner loops; a multiple of 8
SAMPLE = 1 << 16  # magnitudes at most from which the threshold is estimated
SHARE = 16  # one in so many, and none for vectors that are smaller than SHARE * BLOCK / 4
SLACK = 4.5  # standard deviations by which the sample may overestimate the threshold


# reassociation lets the sum of squares use vector registers; nothing else in here may be reordered,
# and "contract" must stay off, since a fused multiply-add would differ from the decoder's arithmetic
@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _add(vector, residual, total):  # type: ignore[no-untyped-def]
    squares = 0.0
    for i in range(vector.size):
        value = vector[i] + residual[i]
        total[i] = value
        squares += np.float64(value) * np.float64(value)
    return squares


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def magnitudes(values):  # type: ignore[no-untyped-def]
    """Sum of ``|value|`` and of ``value**2`` in float64."""
    total, squares = 0.0, 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        total += np.abs(value)
        squares += value * value
    return total, squares


@njit(cache=True, nogil=True)
def _flag(total, threshold, flags):  # type: ignore[no-untyped-def]
    """One byte a value: 1 where the magnitude reaches the threshold, which NaN never does."""
    for i in range(total.size):
        flags[i] = np.abs(total[i]) >= threshold
    flags[total.size :] = 0


@njit(cache=True, nogil=True)
def _collect(total, start, words, found, values, count):  # type: ignore[no-untyped-def]
    """Append the flagged places and what is there. A word is eight flags, the first in its lowest byte."""
    for w in range(words.size):
        word, i = words[w], start + 8 * w
        while word:
            if word & np.uint64(1):
                found[count] = i
                values[count] = total[i]
                count += 1
            word >>= np.uint64(8)
            i += 1
    return count


@njit(cache=True, nogil=True)
def _scan(vector, residual, total, threshold, found, values):  # type: ignore[no-untyped-def]
    """Write ``vector + residual`` to ``total`` (unless residual is empty), collect the candidates.

    A count above ``found.size - BLOCK`` says that there were too many, and ``found`` is not complete.
    """
    count, squares = 0, 0.0
    flags = np.empty(BLOCK, np.uint8)
    for start in range(0, vector.size, BLOCK):
        stop = min(start + BLOCK, vector.size)
        if residual.size:
            squares += _add(vector[start:stop], residual[start:stop], total[start:stop])
        else:
            squares += magnitudes(vector[start:stop])[1]
        if count <= found.size - BLOCK:
            _flag(total[start:stop], threshold, flags)
            count = _collect(total, start, flags.view(np.uint64), found, values, count)
    return count, squares


@njit(cache=True, nogil=True)
def _sample(vector, residual, step, out):  # type: ignore[no-untyped-def]
    """Magnitudes at pseudo-random places (a multiplicative sequence, so that no stride is favoured)."""
    place = np.uint64(step)
    for i in range(out.size):
        place = place * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        j = np.int64((place >> np.uint64(33)) % np.uint64(vector.size))
        value = vector[j]
        if residual.size:
            value = value + residual[j]
        out[i] = np.abs(value)


@njit(cache=True, nogil=True)
def _refine(found, values, kth, ties, indices, kept):  # type: ignore[no-untyped-def]
    """Keep what is larger than the k-th magnitude, and of its equals the first ``ties``."""
    count = 0
    for i in range(found.size):
        magnitude = np.abs(values[i])
        if magnitude > kth or (magnitude == kth and ties > 0):
            indices[count] = found[i]
            kept[count] = values[i]
            count += 1
            ties -= magnitude == kth
    return count


@njit(cache=True, nogil=True)
def add_at(total, indices, values):  # type: ignore[no-untyped-def]
    """``total[indices] += values``."""
    for i in range(indices.size):
        total[indices[i]] += values[i]


def _threshold(vector: Floats, residual: Floats, k: int) -> float:
    """A magnitude that at least ``k`` elements reach, up to the chance that SLACK leaves."""
    sample = np.empty(min(SAMPLE, vector.size // SHARE), vector.dtype)
    _sample(vector, residual, k, sample)
    expected = sample.size * k / vector.size
    rank = int(expected + SLACK * np.sqrt(expected) + SLACK)
    if rank >= sample.size:
        return 0.0
    return float(np.partition(sample, sample.size - rank)[sample.size - rank])


def top_k(vector: Floats, residual: Floats | None, total: Floats, k: int) -> tuple[Indices, Floats, float]:
    """The ``k`` largest ``|vector + residual|``: ascending indices, values, and ``|vector + residual|**2``.

    Elements that are exactly zero are never selected, so there may be fewer than ``k``. Ties go to
    the lowest index. If the returned square is not finite, nothing is selected.

    Args:
        vector: shape ``(n,)``, float32 or float64.
        residual: the same, or None for zeros.
        total: receives ``vector + residual``; with ``residual=None`` it must be ``vector`` itself.
        k: at least 1 and at most ``n``.
    """
    n = vector.size
    added = vector[:0] if residual is None else residual
    threshold = _threshold(vector, added, k) if n >= SHARE * BLOCK // 4 else 0.0
    room = n if threshold == 0.0 else min(n, 2 * k + SAMPLE)
    found, values, count, squares = _candidates(vector, added, total, threshold, room)
    if not np.isfinite(squares):
        return found[:0], values[:0], squares
    if count < k or count > room:  # the sample misled
        found, values, count = np.arange(n, dtype=np.int64), total, n
    found, values = found[:count], values[:count]
    magnitude = np.abs(values)
    kth = np.partition(magnitude, count - k)[count - k]
    ties = 0 if kth == 0 else k - int(np.count_nonzero(magnitude > kth))
    indices, kept = np.empty(k, np.int64), np.empty(k, total.dtype)
    count = _refine(found, values, kth, ties, indices, kept)
    return indices[:count], kept[:count], squares


def _candidates(
    vector: Floats, added: Floats, total: Floats, threshold: float, room: int
) -> tuple[Indices, Floats, int, float]:
    found, values = np.empty(room + BLOCK, np.int64), np.empty(room + BLOCK, total.dtype)
    count, squares = _scan(vector, added, total, total.dtype.type(threshold), found, values)
    return found, values, int(count), float(squares)
