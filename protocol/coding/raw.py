"""Indices as they are, each in the bits that the largest possible one needs: for a few."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from protocol.errors import DecodeError
from protocol.kernels.words import load, padded, store, store_part

U8 = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


def width(numel: int) -> int:
    """Bits of an index below ``numel``: from 1 to 63."""
    return max(1, (numel - 1).bit_length())


def size(count: int, numel: int) -> int:
    """Bytes in all."""
    return -(-count * width(numel) // 8)


@njit(cache=True, nogil=True)
def _write(indices, width, out):  # type: ignore[no-untyped-def]
    word, filled, at = np.uint64(0), 0, 0
    for i in range(indices.size):
        index = np.uint64(indices[i])
        word |= index << np.uint64(filled)
        filled += width
        if filled >= 64:
            store(out, at, word)
            at, filled = at + 8, filled - 64
            word = index >> np.uint64(width - filled)
    store_part(out, at, word, filled)


@njit(cache=True, nogil=True)
def _read(data, width, indices):  # type: ignore[no-untyped-def]
    """Fill ``indices``; False if they do not ascend."""
    mask = (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    previous = np.int64(-1)
    for i in range(indices.size):
        at, shift = i * width >> 3, i * width & 7
        word = load(data, at) >> np.uint64(shift)
        if shift + width > 64:  # the index reaches into a ninth byte
            word |= load(data, at + 8) << np.uint64(64 - shift)
        index = np.int64(word & mask)
        if index <= previous:
            return False
        indices[i] = previous = index
    return True


def encode(indices: Indices, numel: int) -> U8:
    """The bytes. ``indices``: ascending, distinct, each in ``[0, numel)``."""
    out = np.empty(size(indices.size, numel), np.uint8)
    _write(indices, width(numel), out)
    return out


def decode(data: U8, count: int, numel: int) -> Indices:
    """The inverse of ``encode``.

    Raises:
        DecodeError: the data does not hold exactly ``count`` ascending indices below ``numel``.
    """
    bits = width(numel)
    if data.size != size(count, numel):
        raise DecodeError(f"{count} raw indices have {data.size} bytes instead of {size(count, numel)}")
    indices = np.empty(count, np.int64)
    if not _read(padded(data), bits, indices):
        raise DecodeError("the raw indices do not ascend")
    if count and indices[-1] >= numel:
        raise DecodeError("the raw indices hold one beyond the end of the segment")
    if count * bits % 8 and data[-1] >> count * bits % 8:
        raise DecodeError("the raw indices hold padding that is not empty")
    return indices
