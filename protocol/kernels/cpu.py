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

BLOCK = 4096  # values that stay in the first-level cache between the two inner loops
GROUP = 32  # values whose largest magnitude is looked at before any of them is
SAMPLE = 1 << 16
SLACK = 4.5  # standard deviations by which the sample may overestimate the threshold

# magnitudes are compared as integers: the bits of a float without its sign are ordered like its
# magnitude, and an integer maximum fills vector registers where a floating one must mind NaN
_BITS = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}
_MAGNITUDE = {np.dtype(t): t(np.iinfo(t).max) for t in (np.int32, np.int64)}


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
def _peak(bits, mask):  # type: ignore[no-untyped-def]
    peak = bits[0] & mask
    for i in range(1, bits.size):
        peak = max(peak, bits[i] & mask)
    return peak


@njit(cache=True, nogil=True)
def _collect(bits, start, stop, mask, threshold, found, count):  # type: ignore[no-untyped-def]
    """Append the places in ``[start, stop)`` whose magnitude reaches the threshold."""
    for group in range(start, stop, GROUP):
        end = min(group + GROUP, stop)
        if _peak(bits[group:end], mask) >= threshold:
            for i in range(group, end):
                found[count] = i
                count += np.int64((bits[i] & mask) >= threshold)
    return count


@njit(cache=True, nogil=True)
def _scan(vector, residual, total, bits, mask, threshold, found):  # type: ignore[no-untyped-def]
    """Write ``vector + residual`` to ``total`` (unless residual is empty), collect the candidates.

    A count above ``found.size - BLOCK`` says that there were too many, and ``found`` is not complete.
    """
    count, squares = 0, 0.0
    for start in range(0, vector.size, BLOCK):
        stop = min(start + BLOCK, vector.size)
        if residual.size:
            squares += _add(vector[start:stop], residual[start:stop], total[start:stop])
        else:
            squares += magnitudes(vector[start:stop])[1]
        if count <= found.size - BLOCK:
            count = _collect(bits, start, stop, mask, threshold, found, count)
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
def _refine(total, found, kth, ties, out):  # type: ignore[no-untyped-def]
    """Keep what is larger than the k-th magnitude, and of its equals the first ``ties``."""
    count = 0
    for i in range(found.size):
        magnitude = np.abs(total[found[i]])
        if magnitude > kth:
            out[count] = found[i]
            count += 1
        elif magnitude == kth and ties > 0:
            out[count] = found[i]
            count += 1
            ties -= 1
    return count


@njit(cache=True, nogil=True)
def add_at(total, indices, values):  # type: ignore[no-untyped-def]
    """``total[indices] += values``."""
    for i in range(indices.size):
        total[indices[i]] += values[i]


def _threshold(vector: Floats, residual: Floats, k: int) -> float:
    """A magnitude that at least ``k`` elements reach, up to the chance that SLACK leaves."""
    sample = np.empty(SAMPLE, vector.dtype)
    _sample(vector, residual, k, sample)
    expected = SAMPLE * k / vector.size
    rank = int(expected + SLACK * np.sqrt(expected) + SLACK)
    if rank >= SAMPLE:
        return 0.0
    return float(np.partition(sample, SAMPLE - rank)[SAMPLE - rank])


def top_k(vector: Floats, residual: Floats | None, total: Floats, k: int) -> tuple[Indices, float]:
    """Indices of the ``k`` largest ``|vector + residual|``, ascending, and ``|vector + residual|**2``.

    Elements that are exactly zero are never selected, so there may be fewer than ``k``. Ties go to
    the lowest index. If the returned square is not finite, there are no indices.

    Args:
        vector: shape ``(n,)``, float32 or float64.
        residual: the same, or None for zeros.
        total: receives ``vector + residual``; with ``residual=None`` it must be ``vector`` itself.
    """
    n = vector.size
    threshold = 0.0
    if n > 4 * SAMPLE:
        threshold = _threshold(vector, vector[:0] if residual is None else residual, k)
    room = n if threshold == 0.0 else min(n, 2 * k + SAMPLE)
    found, count, squares = _candidates(vector, residual, total, threshold, room)
    if not np.isfinite(squares):
        return found[:0], squares
    if count < k or count > room:
        found, count = np.arange(n, dtype=np.int64), n  # the sample misled
    found = found[:count]
    candidates = np.abs(total[found])
    kth = np.partition(candidates, count - k)[count - k]
    ties = 0 if kth == 0 else k - int(np.count_nonzero(candidates > kth))
    out = np.empty(k, np.int64)
    return out[: _refine(total, found, kth, ties, out)], squares


def _candidates(
    vector: Floats, residual: Floats | None, total: Floats, threshold: float, room: int
) -> tuple[Indices, int, float]:
    bits = total.view(_BITS[total.dtype])
    found = np.empty(room + BLOCK, np.int64)
    limit = np.asarray(threshold, total.dtype).view(bits.dtype)[()]
    added = vector[:0] if residual is None else residual
    count, squares = _scan(vector, added, total, bits, _MAGNITUDE[bits.dtype], limit, found)
    return found, int(count), float(squares)
