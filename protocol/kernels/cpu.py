"""Selection on the CPU in one pass over the data.

The largest magnitudes are found without sorting: a threshold is estimated from a sample, one pass
adds the residual, writes the sum and collects the few candidates above the threshold, and the
candidates alone are refined to exactly ``k``. If the sample misled (too few or too many candidates),
every element is a candidate, so the answer is exact in every case.

All kernels release the GIL. The sum of squares they return is NaN or infinite when an element is
(and if float64 magnitudes beyond 1e154 overflow it); the caller then drops what was selected.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from protocol.kernels.bits import LANES, reaching
from protocol.kernels.sums import BLOCK, as_bits, fill, fill_span
from protocol.kernels.threads import over, spans
from protocol.kernels.words import zeros_below

Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.int64]
Picked = tuple[Indices, Floats, float]

SAMPLE = 1 << 16  # magnitudes at most from which the threshold is estimated
SHARE = 64  # one in so many
FEW = 16  # one in so many reaches a threshold that is given, or all are looked at again
SMALL = 1 << 14  # elements below which a sample costs more than it saves
LAST = np.uint64(1 << 63)
BINS = 1 << 12  # of the histogram in which the k-th magnitude is found
SLACK = 4.5  # standard deviations by which the sample may overestimate the threshold


@njit(cache=True, nogil=True)
def _collect(total, start, stop, threshold, found, values, count):  # type: ignore[no-untyped-def]
    """Append the places of ``total[start:stop]`` that reach the threshold, and what is there.

    Up to LANES entries behind the returned count may be overwritten.
    """
    whole = start + (stop - start) // LANES * LANES
    for first in range(start, whole, LANES):
        word = reaching(total, first, threshold)
        # two at a time without a branch: how many there are is what no predictor can know
        while True:
            i = first + zeros_below(word | LAST)
            found[count] = i
            values[count] = total[i]
            count += word != 0
            word &= word - np.uint64(1)
            i = first + zeros_below(word | LAST)
            found[count] = i
            values[count] = total[i]
            count += word != 0
            word &= word - np.uint64(1)
            if word == 0:
                break
    for i in range(whole, stop):
        if np.abs(total[i]) >= threshold:
            found[count] = i
            values[count] = total[i]
            count += 1
    return count


@njit(cache=True, nogil=True)
def _scan(vector, residual, total, start, stop, threshold, found, values):  # type: ignore[no-untyped-def]
    """Fill ``total[start:stop]`` and collect the candidates in it.

    A count above ``found.size - BLOCK`` says that there were too many, and ``found`` is not complete.
    """
    count, squares = 0, 0.0
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        squares += fill_span(vector, residual, total, first, last)
        if count <= found.size - 2 * BLOCK:
            count = _collect(total, first, last, threshold, found, values, count)
        else:
            count = found.size
    return count, squares


@njit(cache=True, nogil=True)
def _sample(vector, residual, step, out):  # type: ignore[no-untyped-def]
    """Magnitudes at pseudo-random places (a multiplicative sequence, so that no stride is favoured)."""
    place = np.uint64(step)
    for i in range(out.size):
        place = place * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        j = np.int64((place >> np.uint64(11)) % np.uint64(vector.size))
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
def _kth_bin(bits, mask, k, counts):  # type: ignore[no-untyped-def]
    """Where the bin of the k-th largest of ``bits & mask`` starts, the bin's width, the rank in there and its size.

    Magnitudes are ordered as their IEEE bits are.
    """
    low, high = mask, bits[0] & mask
    for i in range(bits.size):
        low, high = min(low, bits[i] & mask), max(high, bits[i] & mask)
    shift = 0
    while (high - low) >> shift >= counts.size:
        shift += 1
    for i in range(bits.size):
        counts[((bits[i] & mask) - low) >> shift] += 1
    place = counts.size - 1
    while counts[place] < k:
        k -= counts[place]
        place -= 1
    return low + (place << shift), shift, k, counts[place]


@njit(cache=True, nogil=True)
def _bin_members(bits, mask, start, shift, members):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(bits.size):
        if ((bits[i] & mask) - start) >> shift == 0:
            members[count] = bits[i] & mask
            count += 1


def _kth(values: Floats, k: int) -> tuple[Any, int]:
    """The k-th largest magnitude, and how many of its equals are among the ``k`` largest."""
    bits, mask = as_bits(values)
    counts = np.zeros(BINS, np.int64)
    start, shift, rank, size = _kth_bin(bits, mask, k, counts)
    members = np.empty(size, bits.dtype)
    _bin_members(bits, mask, start, shift, members)
    place = size - rank
    members.partition(place)
    ties = 1 + int(np.count_nonzero(members[place + 1 :] == members[place]))
    return members[place : place + 1].view(values.dtype)[0], ties


def _threshold(vector: Floats, residual: Floats, k: int) -> float:
    """A magnitude that at least ``k`` elements reach, up to the chance that SLACK leaves."""
    sample = np.empty(min(SAMPLE, vector.size // SHARE), vector.dtype)
    _sample(vector, residual, k, sample)
    expected = sample.size * k / vector.size
    rank = int(expected + SLACK * np.sqrt(expected) + SLACK)
    if rank >= sample.size:
        return 0.0
    return float(np.partition(sample, sample.size - rank)[sample.size - rank])


def top_k(vector: Floats, residual: Floats | None, total: Floats, k: int) -> Picked:
    """The ``k`` largest ``|vector + residual|``: ascending indices, values, and ``|vector + residual|**2``.

    Elements that are exactly zero are never selected, so there may be fewer than ``k``. Ties go to
    the lowest index. If the returned square is not finite, what was selected means nothing.

    Args:
        vector: shape ``(n,)``, float32 or float64.
        residual: the same, or None for zeros.
        total: receives ``vector + residual``; may be the residual, or ``vector`` itself if there is none.
        k: at least 1 and at most ``n``.
    """
    n = vector.size
    added = vector[:0] if residual is None else residual
    threshold = _threshold(vector, added, k) if n >= SMALL else 0.0
    if threshold > 0.0:
        found, values, squares = _candidates(vector, residual, total, threshold, 2 * k + SAMPLE)
    else:
        found, values, squares = None, total, fill(vector, residual, total)
    if not np.isfinite(squares):
        return np.empty(0, np.int64), total[:0], squares
    if found is None or found.size < k:  # there was no sample, or it misled
        found, values = np.arange(n, dtype=np.int64), total
    kth, ties = _kth(values, k)
    if kth == 0:
        ties = 0
    indices, kept = np.empty(k, np.int64), np.empty(k, total.dtype)
    count = _refine(found, values, kth, ties, indices, kept)
    return indices[:count], kept[:count], squares


_kept = threading.local()
KEPT = 1 << 25  # bytes at most of what a thread keeps for one use


def _scratch(use: str, size: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Memory that this thread keeps for this use: fresh pages cost as much as what is written to them."""
    if size * dtype.itemsize > KEPT:
        return np.empty(size, dtype)
    key = f"{use} {dtype}"
    held: npt.NDArray[Any] | None = getattr(_kept, key, None)
    if held is None or held.size < size:
        held = np.empty(size, dtype)
        setattr(_kept, key, held)
    return held[:size]


def _candidates(
    vector: Floats, residual: Floats | None, total: Floats, threshold: float, room: int
) -> tuple[Indices | None, Floats, float]:
    """Places and values of what reaches the threshold, or None if that is more than ``room``.

    They lie in this thread's scratch memory, until the next call.
    """
    added, level = vector[:0] if residual is None else residual, total.dtype.type(threshold)
    parts_of = spans(vector.size, BLOCK)
    size = min(parts_of[0][1], room) + 2 * BLOCK
    places = _scratch("places", size * len(parts_of), np.dtype(np.int64)).reshape(-1, size)
    kept = _scratch("values", size * len(parts_of), total.dtype).reshape(-1, size)

    def scan(start: int, stop: int) -> tuple[Indices, Floats, float, bool]:
        row = start // parts_of[0][1]
        count, squares = _scan(vector, added, total, start, stop, level, places[row], kept[row])
        return places[row, :count], kept[row, :count], squares, count > size - BLOCK

    parts = over(parts_of, scan)
    squares = float(sum(part[2] for part in parts))
    if any(part[3] for part in parts):
        return None, total, squares
    if len(parts) == 1:
        return parts[0][0], parts[0][1], squares
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), squares


def at_least(vector: Floats, residual: Floats | None, total: Floats, threshold: float) -> Picked:
    """All elements of ``vector + residual`` whose magnitude reaches the threshold, zeros never; as ``top_k``."""
    found, values, squares = _candidates(vector, residual, total, threshold, vector.size // FEW)
    if found is None:
        found = np.flatnonzero(np.abs(total) >= total.dtype.type(threshold))
        values = total[found]
    return found.copy(), values.copy(), squares


@njit(cache=True, nogil=True)
def _block_top_k(vector, residual, total, start, stop, block, k, k_last, shrink, places, values, found, kept):  # type: ignore[no-untyped-def]
    """Fill ``total[start:stop]`` and append the largest of each block to ``found`` and ``kept``.

    The threshold of one block, times ``shrink``, is where the search in the next one begins.
    """
    count, squares, guess = 0, 0.0, shrink - shrink
    for first in range(start, stop, block):
        last = min(first + block, stop)
        want = k if last - first == block else k_last
        squares += fill_span(vector, residual, total, first, last)
        met = _collect(total, first, last, guess, places, values, 0)
        if met < want:
            met = _collect(total, first, last, shrink - shrink, places, values, 0)
        sizes = np.abs(values[:met])
        kth = np.partition(sizes, met - want)[met - want]
        ties = want if kth > 0 else 0
        for i in range(met):
            ties -= sizes[i] > kth
        count += _refine(places[:met], values[:met], kth, ties, found[count:], kept[count:])
        guess = kth * shrink
    return count, squares


def block_top_k(vector: Floats, residual: Floats | None, total: Floats, block: int, k: int, k_last: int) -> Picked:
    """The ``k`` largest of each block of ``block`` elements, ``k_last`` of an incomplete last one; as ``top_k``."""
    added = vector[:0] if residual is None else residual
    shrink = total.dtype.type(0.7)

    def scan(start: int, stop: int) -> Picked:
        places, values = np.empty(block + LANES, np.int64), np.empty(block + LANES, total.dtype)
        most = -(-(stop - start) // block) * max(k, k_last)
        found, kept = np.empty(most, np.int64), np.empty(most, total.dtype)
        count, squares = _block_top_k(
            vector, added, total, start, stop, block, k, k_last, shrink, places, values, found, kept
        )
        return found[:count], kept[:count], squares

    parts_of = spans(vector.size, block)
    parts = over(parts_of, scan)
    squares = float(sum(part[2] for part in parts))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), squares
