"""Clustered indices, as of rows or channels: which blocks of ``2**w`` elements hold any, and a bitmap of each.

::

    varint     number of blocks that are not empty
    byte       Rice parameter of their numbers
    numbers    Golomb-Rice, as in ``rice``
    bitmaps    2**w bits for each of these blocks, lowest first
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from protocol.coding import rice, varint
from protocol.errors import DecodeError
from protocol.kernels.words import find, mark, padded

U8 = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

WIDTHS = range(3, 9)  # a byte at least, so that each bitmap is whole bytes


class Plan(NamedTuple):
    """What the blocks of ``2**w`` elements take: known before they are written."""

    w: int
    gaps: rice.Plan  # of the numbers of those that are not empty

    @property
    def size(self) -> int:
        """Bytes in all."""
        return len(varint.pack(self.gaps.numbers)) + 1 + self.gaps.size + (self.gaps.numbers << self.w - 3)


@njit(cache=True, nogil=True)
def _filled(indices, w):  # type: ignore[no-untyped-def]
    """How many blocks are not empty."""
    blocks = 1
    for i in range(1, indices.size):
        blocks += (indices[i - 1] ^ indices[i]) >> w != 0
    return blocks


@njit(cache=True, nogil=True)
def _gather(indices, w, numbers, places):  # type: ignore[no-untyped-def]
    """The blocks that are not empty, and for every index its place in their bitmaps, one behind the other."""
    rank, previous, mask = -1, -1, (1 << w) - 1
    for i in range(indices.size):
        number = indices[i] >> w
        if number != previous:
            rank += 1
            numbers[rank] = previous = number
        places[i] = (rank << w) + (indices[i] & mask)


@njit(cache=True, nogil=True)
def _spread(numbers, w, indices):  # type: ignore[no-untyped-def]
    """The inverse of ``_gather``, in place; False if a block is empty."""
    previous, mask = -1, (1 << w) - 1
    for i in range(indices.size):
        rank = indices[i] >> w
        if rank > previous + 1:
            return False
        previous = rank
        indices[i] = (numbers[rank] << w) + (indices[i] & mask)
    return previous == numbers.size - 1


def bound(w: int, blocks: int, count: int, bits: int) -> int:
    """Bits that ``blocks`` blocks with ``count`` indices cannot fall below, if Rice alone takes ``bits`` at best.

    With the parameter b they take ``blocks * (2**w + b + 1) + Q``, Q the sum of quotients. It is not
    negative. Nor is it less than the indices' own sum with the parameter ``w + b``, less one for each block,
    because a gap of indices ends before the next block does; and that sum is at least
    ``bits - count * (w + b + 1)``. So there are two lines in b, one rising and one that falls or is
    level, above both of which the bits must be: they meet at what is returned, which rises with ``blocks``.
    """
    return blocks * ((1 << w) + 1) + max(0, blocks * (bits - blocks) // count - blocks * (w + 1))


def plan(indices: Indices, numel: int, bits: int, below: int) -> Plan | None:
    """The blocks with the fewest bytes, by exact size, if that is fewer than ``below``; the smallest of those.

    Args:
        indices: ascending, distinct, each in ``[0, numel)``, at least one.
        bits: what ``rice.plan`` gives for the same indices. (For ``numel`` beyond 2**40, where its
            parameter may be cut off, blocks may go unseen.)
    """
    best = None
    blocks, known = indices.size, 0  # so many are not empty of 2**known elements
    for w in WIDTHS:
        least = -(-blocks >> (w - known))  # two neighbours become one at best
        if bound(w, least, indices.size, bits) >= 8 * below:
            continue
        blocks, known = _filled(indices, w), w
        if bound(w, blocks, indices.size, bits) >= 8 * below:
            continue
        found = Plan(w, rice.plan(indices, numel, w, blocks))
        if found.size < below:
            best, below = found, found.size
    return best


def write(indices: Indices, plan: Plan) -> U8:
    """The bytes, in the order above."""
    numbers, places = np.empty(plan.gaps.numbers, np.int64), np.empty(indices.size, np.int64)
    _gather(indices, plan.w, numbers, places)
    head = np.frombuffer(varint.pack(numbers.size) + bytes([plan.gaps.b]), np.uint8)
    bitmaps = np.zeros(numbers.size << plan.w - 3, np.uint8)
    mark(places, bitmaps, 0)
    return np.concatenate([head, rice.write(numbers, plan.gaps), bitmaps])


def decode(data: U8, w: int, count: int, numel: int) -> Indices:
    """The inverse of ``write``.

    Raises:
        DecodeError: the data does not hold exactly ``count`` indices below ``numel``, in blocks none of
            which is empty.
    """
    if w not in WIDTHS:
        raise DecodeError(f"the index blocks have 2**{w} elements; valid is from 2**{WIDTHS[0]} to 2**{WIDTHS[-1]}")
    blocks, at = varint.take(data, 0)
    split = data.size - (blocks << w - 3)
    if at >= split or not blocks <= count <= 8 * (data.size - split):
        raise DecodeError(f"{data.size} bytes of {count} indices announce {blocks} blocks of 2**{w} elements")
    numbers = rice.decode(data[at + 1 : split], int(data[at]), blocks, -(-numel >> w))
    indices = np.empty(count, np.int64)
    if find(padded(data[split:]), 0, data.size - split, indices) != count:
        raise DecodeError(f"the index blocks do not hold {count} indices")
    if not _spread(numbers, w, indices):
        raise DecodeError("the index blocks hold an empty one")
    if count and not 0 <= indices[-1] < numel:
        raise DecodeError("the index blocks hold an index beyond the end of the segment")
    return indices
