"""A random choice of elements that sender and receiver draw from the same key.

The choice is the first ``count`` values of a keyed permutation of ``range(numel)``: a Feistel network of
six rounds on just enough bits, at least eight, walked on until it is below ``numel`` (Black, Rogaway, "Ciphers with
arbitrary finite domains", 2002). It takes a bit of memory for each element that is not chosen, and every
machine draws the same. docs/protocol.md has the formula.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from protocol.kernels.words import find

Indices = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

ROUNDS = 6
MIN_BITS = 8  # with fewer, six rounds favour some of the few permutations there are: measurably, up to 4 bits
LANES = 512  # permuted side by side, in vector registers


@njit(cache=True, nogil=True)
def _round(half, key):  # type: ignore[no-untyped-def]
    """The 32-bit finaliser of MurmurHash3 over half of the bits and the key of the round."""
    bits = np.uint32(half) ^ np.uint32(key)  # products of numba's uint32 are uint64: cut off each time
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    bits = np.uint32((bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


@njit(cache=True, nogil=True)
def _permute(upper, lower, keys, upper_mask, lower_mask):  # type: ignore[no-untyped-def]
    for number in range(keys.size):
        key = keys[number]
        if number % 2 == 0:
            for i in range(upper.size):
                upper[i] ^= _round(lower[i], key) & upper_mask
        else:
            for i in range(upper.size):
                lower[i] ^= _round(upper[i], key) & lower_mask


@njit(cache=True, nogil=True)
def _mark(keys, count, numel, bits, chosen):  # type: ignore[no-untyped-def]
    """Set the bit of every chosen element."""
    low_bits = bits // 2
    upper_mask = np.uint32((1 << (bits - low_bits)) - 1)
    lower_mask = np.uint32((1 << low_bits) - 1)
    upper, lower = np.empty(LANES, np.uint32), np.empty(LANES, np.uint32)
    drawn, waiting = 0, 0
    while drawn < count or waiting:
        while waiting < LANES and drawn < count:
            upper[waiting] = np.uint32(drawn >> low_bits)
            lower[waiting] = np.uint32(drawn) & lower_mask
            waiting += 1
            drawn += 1
        _permute(upper[:waiting], lower[:waiting], keys, upper_mask, lower_mask)
        left = 0
        for i in range(waiting):
            place = (np.int64(upper[i]) << low_bits) | np.int64(lower[i])
            if place < numel:
                chosen[place >> 3] |= np.uint8(1 << (place & 7))
            else:  # outside: once more through the network
                upper[left], lower[left] = upper[i], lower[i]
                left += 1
        waiting = left


def _round_keys(key: int) -> npt.NDArray[np.uint32]:
    """The upper halves of the first outputs of splitmix64 from this seed."""
    keys = []
    for number in range(1, ROUNDS + 1):
        bits = (key + number * 0x9E3779B97F4A7C15) % 2**64
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        keys.append((bits ^ (bits >> 31)) >> 32)
    return np.array(keys, np.uint32)


def chosen(key: int, count: int, numel: int) -> Indices:
    """``count`` distinct elements of ``numel``, ascending, every set as likely over the keys.

    Args:
        key: 64 bits.
        count: from 1 to ``numel``.
        numel: below 2**62.
    """
    marks: U8 = np.zeros(-(-numel // 64) * 8 + 16, np.uint8)
    _mark(_round_keys(key), count, numel, max(MIN_BITS, (numel - 1).bit_length()), marks)
    indices = np.empty(count, np.int64)
    find(marks, 0, marks.size - 16, indices)
    return indices
