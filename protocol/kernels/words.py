"""Bits read and written in words of 64, for the loops of the codes, which numba compiles.

Bits fill each byte from the lowest upward, as everywhere on the wire, so the first bit of a
little-endian word is its lowest. A word may begin at any byte. Nothing here checks bounds: who reads
takes the bytes from ``padded``, and who writes ends with ``store_part``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import extending, njit, types

U8 = npt.NDArray[np.uint8]
# its own type does not know that callers leave out the first argument
intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic


def padded(data: U8) -> U8:
    """A copy with two words of zeros behind it, so that a word can be read from the last byte as well."""
    out = np.empty(data.size + 16, np.uint8)
    out[: data.size] = data
    out[data.size :] = 0
    return out


def _address(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    begin = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(begin, [at]), context.get_value_type(types.uint64).as_pointer())


@intrinsic
def load(typing: Any, data: Any, at: Any) -> Any:
    """The word in the bytes ``data[at : at + 8]``, uint64."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature.args[0], *args), align=1)

    return types.uint64(data, types.intp), lower


@intrinsic
def store(typing: Any, data: Any, at: Any, word: Any) -> Any:
    """Write a word to the bytes ``data[at : at + 8]``."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, signature.args[0], *args[:2]), align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.uint64), lower


@intrinsic
def zeros_below(typing: Any, word: Any) -> Any:
    """How many zeros are before the first one of a word, int64; the word must not be 0."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], context.get_constant(types.boolean, 1))

    return types.int64(types.uint64), lower


@intrinsic
def ones(typing: Any, word: Any) -> Any:
    """How many bits of a word are set, int64."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.uint64), lower


@njit(cache=True, nogil=True)
def store_part(data, at, word, bits):  # type: ignore[no-untyped-def]
    """Write the first ``bits`` bits of a word to no more bytes than they need."""
    for i in range((bits + 7) >> 3):
        data[at + i] = np.uint8(word & np.uint64(255))
        word >>= np.uint64(8)


@njit(cache=True, nogil=True)
def mark(places, data, at):  # type: ignore[no-untyped-def]
    """Set the bits at the ascending ``places``, counted from ``data[at]``, and clear those before and between.

    Nothing is written behind the byte of the last one.
    """
    word, begin, place = np.uint64(0), 0, -1
    for i in range(places.size):
        place = places[i]
        if place >= begin + 64:
            store(data, at, word)
            at, begin = at + 8, begin + 64
            while place >= begin + 64:
                store(data, at, np.uint64(0))
                at, begin = at + 8, begin + 64
            word = np.uint64(0)
        word |= np.uint64(1) << np.uint64(place & 63)
    store_part(data, at, word, place - begin + 1)


@njit(cache=True, nogil=True)
def find(data, at, end, places):  # type: ignore[no-untyped-def]
    """The inverse of ``mark``: fill ``places`` with the bits that are set in ``data[at:end]``, padded.

    Returns how many were found; if it is more than ``places`` has room for, the search stopped there.
    """
    found, begin = 0, 0
    for i in range(at, end, 8):
        word = load(data, i)
        first, found = found, found + ones(word)
        if found > places.size:
            break
        for j in range(first, found):
            places[np.uint64(j)] = begin + zeros_below(word)
            word &= word - np.uint64(1)
        begin += 64
    return found
