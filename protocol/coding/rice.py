"""Golomb-Rice coding of the gaps between sorted indices.

A gap ``g`` is split into a quotient ``g >> b``, sent in unary, and a remainder of ``b`` bits. The two
parts travel in separate streams, so that remainders can be read at random and the unary stream by
whole words. For gaps of a random selection (geometric) this is within 1.5 % of the entropy at the
densities that compression uses; in no case does it take more than ``count * (b + 1) + numel / 2**b``
bits (Rice, "Some practical universal noiseless coding techniques", JPL 79-22, 1979).

Bits fill each byte from the lowest upward. Unary: ``quotient`` zeros, then a one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from protocol.errors import DecodeError
from protocol.kernels.words import find, load, mark, padded, store, store_part

U8 = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

MAX_PARAMETER = 40


class Plan(NamedTuple):
    """What a stream of so many ``numbers`` takes with the parameter ``b``: known before it is written."""

    b: int
    numbers: int
    quotients: int  # their sum

    @property
    def bits(self) -> int:
        """Of both streams, without what fills their last bytes."""
        return self.numbers * (self.b + 1) + self.quotients

    @property
    def split(self) -> int:
        """Bytes of the remainders."""
        return -(-self.numbers * self.b // 8)

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.split - (-(self.numbers + self.quotients) // 8)


@njit(cache=True, nogil=True)
def _quotients(indices, w, lowest):  # type: ignore[no-untyped-def]
    """How many blocks are not empty, and the sums of their quotients for ``lowest`` and the next two parameters."""
    w, lowest = np.uint64(w), np.uint64(lowest)
    quotient = (np.uint64(indices[0]) >> w) >> lowest
    blocks, first, second, third = 1, quotient, quotient >> np.uint64(1), quotient >> np.uint64(2)
    for i in range(1, indices.size):
        step = (np.uint64(indices[i]) >> w) - (np.uint64(indices[i - 1]) >> w)
        apart = step != np.uint64(0)
        blocks += apart
        quotient = (step - np.uint64(apart)) >> lowest
        first += quotient
        second += quotient >> np.uint64(1)
        third += quotient >> np.uint64(2)
    return blocks, (np.int64(first), np.int64(second), np.int64(third))


@njit(cache=True, nogil=True)
def _search(indices, w, best):  # type: ignore[no-untyped-def]
    """The lowest parameter with the fewest bits, the blocks that are not empty, and the sum of their quotients.

    The bits are convex in the parameter: one more takes a bit more for each gap ``g`` and spares
    ``ceil((g >> b) / 2)``, which falls as ``b`` rises. So a local minimum is the minimum.
    """
    while True:
        lowest = min(max(best - 1, 0), MAX_PARAMETER - 2)
        blocks, sums = _quotients(indices, w, lowest)
        j = 0
        for k in (1, 2):
            if blocks * k + sums[k] < blocks * j + sums[j]:
                j = k
        best = lowest + j
        if j == 1 or best == 0 or best == MAX_PARAMETER:
            return best, blocks, sums[j]


@njit(cache=True, nogil=True)
def _write(indices, b, out, places):  # type: ignore[no-untyped-def]
    """Fill ``out`` with the remainders, and ``places`` with those of the ones of the unary stream."""
    shift, mask = np.uint64(b), (np.uint64(1) << np.uint64(b)) - np.uint64(1)
    expected, place = np.uint64(0), np.uint64(0)
    word, filled, at = np.uint64(0), 0, 0
    for i in range(indices.size):
        gap = np.uint64(indices[i]) - expected
        expected = np.uint64(indices[i]) + np.uint64(1)
        place += gap >> shift
        places[i] = np.int64(place)
        place += np.uint64(1)
        remainder = gap & mask
        word |= remainder << np.uint64(filled)
        filled += b
        if filled >= 64:
            store(out, at, word)
            at, filled = at + 8, filled - 64
            word = remainder >> np.uint64(b - filled)
    store_part(out, at, word, filled)


@njit(cache=True, nogil=True)
def _read(data, b, last, indices):  # type: ignore[no-untyped-def]
    """Turn the places of ones into indices up to ``last``; False if there is one beyond.

    No sum here exceeds 64 bits unsigned if ``(places - i) << b`` is at most ``last``.
    """
    shift, mask = np.uint64(b), (np.uint64(1) << np.uint64(b)) - np.uint64(1)
    bit, below = np.uint64(0), np.uint64(0)  # the rest of each index: remainders so far, one for each before
    for i in range(indices.size):
        above = np.uint64(indices[i] - i) << shift
        below += (load(data, np.int64(bit >> np.uint64(3))) >> (bit & np.uint64(7))) & mask
        if below > np.uint64(last) - above:
            return False
        indices[i] = np.int64(above + below)
        below += np.uint64(1)
        bit += shift
    return True


def usual(numel: int, count: int) -> int:
    """The parameter that suits ``count`` random numbers below ``numel``."""
    return max(1, 7 * numel // max(1, 10 * count)).bit_length() - 1


def plan(indices: Indices, numel: int, w: int = 0, blocks: int | None = None) -> Plan:
    """The parameter with the fewest bits, by exact size, and the lowest of those.

    Args:
        indices: ascending, distinct, each in ``[0, numel)``.
        w: not the indices are to be sent, but the numbers of the blocks of ``2**w`` elements they are in.
        blocks: how many those are, if known: it says where the search begins.
    """
    if not indices.size:
        return Plan(0, 0, 0)
    return Plan(*_search(indices, w, usual(numel >> w, blocks or indices.size)))


def write(indices: Indices, plan: Plan) -> U8:
    """The remainders followed by the unary stream."""
    out = np.empty(plan.size, np.uint8)
    places = np.empty(indices.size, np.int64)
    _write(indices, plan.b, out, places)
    mark(places, out, plan.split)
    return out


def encode(indices: Indices, numel: int) -> tuple[int, U8]:
    """The parameter ``b`` and the bytes."""
    best = plan(indices, numel)
    return best.b, write(indices, best)


def decode(data: U8, b: int, count: int, numel: int) -> Indices:
    """The inverse of ``encode``.

    Raises:
        DecodeError: the stream does not hold exactly ``count`` ascending indices below ``numel``.
    """
    split = -(-count * b // 8)
    if b > MAX_PARAMETER:
        raise DecodeError(f"the index stream has Rice parameter {b}; valid is at most {MAX_PARAMETER}")
    if 8 * (data.size - split) < count:  # each index takes at least one bit of the unary stream
        raise DecodeError(f"the index stream of {data.size} bytes is too short for {count} indices")
    bits, indices = padded(data), np.empty(count, np.int64)
    found = find(bits, split, data.size, indices)
    if found != count:
        raise DecodeError(f"the index stream does not hold {count} indices")
    used = int(indices[-1]) + 1 if count else 0
    if 8 * (data.size - split) - used > 7 or (count * b % 8 and data[split - 1] >> count * b % 8):
        raise DecodeError("the index stream holds padding that is not empty")
    if (count and (used - count) << b >= numel) or not _read(bits, b, numel - 1, indices):
        raise DecodeError("the index stream holds an index beyond the end of the segment")
    return indices
