"""Golomb-Rice coding of the gaps between sorted indices.

A gap ``g`` is split into a quotient ``g >> b``, sent in unary, and a remainder of ``b`` bits. The two
parts travel in separate streams, so that remainders can be read at random and the unary stream by
whole words. For gaps of a random selection (geometric) this is within 1.5 % of the entropy at the
densities that compression uses; in no case does it take more than ``count * (b + 1) + numel / 2**b``
bits (Rice, "Some practical universal noiseless coding techniques", JPL 79-22, 1979).

Bits fill each byte from the lowest upward. Unary: ``quotient`` zeros, then a one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from protocol.errors import DecodeError

U8 = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

MAX_PARAMETER = 40


@njit(cache=True, nogil=True)
def _sums_of_quotients(indices, lowest, sums):  # type: ignore[no-untyped-def]
    previous = -1
    for i in range(indices.size):
        gap = (indices[i] - previous - 1) >> lowest
        previous = indices[i]
        for j in range(sums.size):
            sums[j] += gap >> j


@njit(cache=True, nogil=True)
def _encode(indices, b, remainders, unary):  # type: ignore[no-untyped-def]
    """Fill both streams, which arrive zeroed."""
    previous = -1
    mask = (1 << b) - 1
    word, filled, at = np.uint64(0), 0, 0
    position = 0
    for i in range(indices.size):
        gap = indices[i] - previous - 1
        previous = indices[i]
        word |= np.uint64(gap & mask) << np.uint64(filled)
        filled += b
        while filled >= 8:
            remainders[at] = np.uint8(word & np.uint64(255))
            word >>= np.uint64(8)
            filled -= 8
            at += 1
        position += gap >> b
        unary[position >> 3] |= np.uint8(1 << (position & 7))
        position += 1
    if filled > 0:
        remainders[at] = np.uint8(word & np.uint64(255))


@njit(cache=True, nogil=True)
def _decode(remainders, unary, b, numel, indices):  # type: ignore[no-untyped-def]
    """Fill ``indices``; the return value is 0, or the number of the rule that was broken."""
    count = indices.size
    mask = np.uint64((1 << b) - 1)
    word, filled, at = np.uint64(0), 0, 0
    found, quotient, previous = 0, 0, -1
    for byte_at in range(unary.size):
        byte = np.int64(unary[byte_at])
        for bit in range(8):
            if not (byte >> bit) & 1:
                quotient += 1
                continue
            if found == count:
                return 1
            while filled < b:
                word |= np.uint64(remainders[at]) << np.uint64(filled)
                filled += 8
                at += 1
            if quotient > (numel - previous - 1) >> b:  # before the shift, which could wrap around
                return 2
            index = previous + 1 + (quotient << b) + np.int64(word & mask)
            word >>= np.uint64(b)
            filled -= b
            if index >= numel:
                return 2
            indices[found] = index
            previous = index
            found += 1
            quotient = 0
    if found < count:
        return 3
    if quotient > 7 or word != np.uint64(0):
        return 4
    return 0


_RULES = (
    "",
    "more indices than announced",
    "an index beyond the end of the segment",
    "fewer indices than announced",
    "padding that is not empty",
)


def parameter(indices: Indices, numel: int) -> tuple[int, int]:
    """The Rice parameter ``b`` with the fewest bits, by exact size, and the bits of the unary stream.

    Args:
        indices: ascending, distinct, each in ``[0, numel)``.
    """
    guess = int(np.log2(max(1.0, 0.7 * numel / max(1, indices.size))))
    lowest = min(MAX_PARAMETER - 5, max(0, guess - 2))
    sums = np.zeros(5, np.int64)
    _sums_of_quotients(indices, lowest, sums)
    widths = np.arange(lowest, lowest + sums.size)
    best = int(np.argmin(indices.size * (widths + 1) + sums))
    return int(widths[best]), int(sums[best]) + indices.size


def encode(indices: Indices, numel: int) -> tuple[int, U8]:
    """The parameter ``b``, and the remainder stream followed by the unary stream."""
    b, unary_bits = parameter(indices, numel)
    split = -(-indices.size * b // 8)
    out = np.zeros(split + -(-unary_bits // 8), np.uint8)
    _encode(indices, b, out[:split], out[split:])
    return b, out


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
    indices = np.empty(count, np.int64)
    broken = _decode(data[:split], data[split:], b, numel, indices)
    if broken:
        raise DecodeError(f"the index stream holds {_RULES[broken]}")
    return indices
