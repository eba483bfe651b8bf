"""Indices as a bit for every element, the first element in the lowest bit of the first byte.

Golomb-Rice with ``b = 0`` is the same, less the empty bytes at the end.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protocol.errors import DecodeError
from protocol.kernels.words import find, mark, padded

U8 = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


def size(numel: int) -> int:
    """Bytes, whatever the indices are."""
    return -(-numel // 8)


def encode(indices: Indices, numel: int) -> U8:
    """The bitmap. ``indices``: ascending, distinct, each in ``[0, numel)``."""
    out = np.zeros(size(numel), np.uint8)
    mark(indices, out, 0)
    return out


def decode(data: U8, count: int, numel: int) -> Indices:
    """The inverse of ``encode``.

    Raises:
        DecodeError: the data is not a bitmap of ``numel`` elements of which ``count`` are set.
    """
    if data.size != size(numel):
        raise DecodeError(f"a bitmap of {numel} elements has {data.size} bytes instead of {size(numel)}")
    if count > numel:
        raise DecodeError(f"a bitmap of {numel} elements cannot hold {count} indices")
    indices = np.empty(count, np.int64)
    if find(padded(data), 0, data.size, indices) != count:
        raise DecodeError(f"the bitmap does not hold {count} indices")
    if count and indices[-1] >= numel:
        raise DecodeError("the bitmap holds padding that is not empty")
    return indices
