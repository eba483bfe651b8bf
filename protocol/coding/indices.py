"""Which elements of a sparse segment are sent: four codes, of which the one with the fewest bytes is taken.

::

    2 rice      gaps in Golomb-Rice code; parameter: b. For random selections
    3 bitmap    a bit for every element; no parameter
    4 blocks    a bitmap for every block of 2**w elements that is not empty; parameter: w. For clusters
    5 raw       the same bits for each; no parameter. For a few
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protocol.coding import bitmap, blocks, raw, rice
from protocol.errors import DecodeError

U8 = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

RICE, BITMAP, BLOCKS, RAW = 2, 3, 4, 5
NAMES = {RICE: "rice", BITMAP: "bitmap", BLOCKS: "blocks", RAW: "raw"}


def encode(indices: Indices, numel: int) -> tuple[int, int, U8]:
    """The code with the fewest bytes (of equals the bitmap, else the lowest), its parameter (one byte), and the bytes.

    Args:
        indices: ascending, distinct, each in ``[0, numel)``, at least one.
    """
    gaps = rice.plan(indices, numel)
    sizes = {RICE: gaps.size, BITMAP: bitmap.size(numel), RAW: raw.size(indices.size, numel)}
    below = min(sizes[RICE], sizes[BITMAP], sizes[RAW] + 1)  # a tie goes to the lower code
    if clusters := blocks.plan(indices, numel, gaps.bits, below):
        return BLOCKS, clusters.w, blocks.write(indices, clusters)
    # rice with b = 0 is the bitmap, less empty bytes: where there are none, the name that says so
    code = min(sizes, key=lambda code: (sizes[code], code != BITMAP, code))
    if code == RICE:
        return RICE, gaps.b, rice.write(indices, gaps)
    return code, 0, bitmap.encode(indices, numel) if code == BITMAP else raw.encode(indices, numel)


def sizes(indices: Indices, numel: int) -> dict[str, int]:
    """The bytes that each code would take, by name. ``indices``: as in ``encode``."""
    gaps = rice.plan(indices, numel)
    clusters = blocks.plan(indices, numel, gaps.bits, 1 << 62)
    assert clusters  # there is no upper limit
    found = gaps.size, bitmap.size(numel), clusters.size, raw.size(indices.size, numel)
    return dict(zip(NAMES.values(), found, strict=True))


def decode(code: int, parameter: int, data: U8, count: int, numel: int) -> Indices:
    """The inverse of ``encode``: ``count`` ascending indices, int64, each in ``[0, numel)``.

    Allocates no more than the indices and what the data's own length justifies.

    Raises:
        DecodeError: the code or its parameter is unknown, or the data is not exactly such indices.
    """
    if code == RICE:
        return rice.decode(data, parameter, count, numel)
    if code == BLOCKS:
        return blocks.decode(data, parameter, count, numel)
    if code not in NAMES or parameter:
        raise DecodeError(f"the segment has unknown index code {code} with parameter {parameter}")
    return bitmap.decode(data, count, numel) if code == BITMAP else raw.decode(data, count, numel)
