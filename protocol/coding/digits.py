"""Symbols of a fixed alphabet, as many to a byte as fit.

A byte holds the largest number ``p`` of symbols with ``base**p <= 256``, the first one in the lowest
digit: ``s0 + s1 * base + s2 * base**2 + ...``. With bases 2, 4 and 16 that is bits from the lowest
upward; five ternary symbols take a byte, 1.6 bits each where the entropy of fair ones is 1.585.

The ``_into`` functions work on a part of a larger array, which begins at a multiple of ``per_byte``.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from numba import njit

from protocol.errors import DecodeError

U8 = npt.NDArray[np.uint8]


@cache
def per_byte(base: int) -> int:
    """The largest ``p`` with ``base**p <= 256``; ``base`` is from 2 to 256."""
    if not 2 <= base <= 256:
        raise ValueError(f"symbols of base {base} do not fit into bytes; valid is from 2 to 256")
    return max(p for p in range(1, 9) if base**p <= 256)


def size(count: int, base: int) -> int:
    """Bytes for ``count`` symbols."""
    return -(-count // per_byte(base))


@njit(cache=True, nogil=True)
def _pack(rows, base, out):  # type: ignore[no-untyped-def]
    """A byte for each row. Written out for each width, because LLVM then makes vectors of it."""
    if rows.shape[1] == 2:
        for i in range(out.size):
            out[i] = rows[i, 0] + base * rows[i, 1]
    elif rows.shape[1] == 3:
        for i in range(out.size):
            out[i] = rows[i, 0] + base * (rows[i, 1] + base * rows[i, 2])
    elif rows.shape[1] == 4:
        for i in range(out.size):
            out[i] = rows[i, 0] + base * (rows[i, 1] + base * (rows[i, 2] + base * rows[i, 3]))
    else:
        for i in range(out.size):
            out[i] = rows[i, 0] + base * (rows[i, 1] + base * (rows[i, 2] + base * (rows[i, 3] + base * rows[i, 4])))


@njit(cache=True, nogil=True)
def _unpack(data, table, places, rows):  # type: ignore[no-untyped-def]
    """A row for each byte. ``places`` is a tuple, so that the inner loop has a constant length."""
    for i in range(data.size):
        for j in places:
            rows[i, j] = table[data[i], j]


@cache
def _table(base: int) -> U8:
    """Shape ``(256, per_byte(base))``: the digits of every byte."""
    return (np.arange(256)[:, None] // base ** np.arange(per_byte(base)) % base).astype(np.uint8)


def pack_into(symbols: U8, base: int, out: U8) -> None:
    """``pack`` into ``out``, which has exactly ``size(symbols.size, base)`` bytes."""
    width = per_byte(base)
    if width == 1:
        out[:] = symbols
    elif width == 8:
        out[:] = np.packbits(symbols, bitorder="little")
    else:
        full = symbols.size // width
        _pack(symbols[: full * width].reshape(full, width), np.uint8(base), out[:full])
        if full < out.size:
            out[full] = sum(int(s) * base**j for j, s in enumerate(symbols[full * width :]))


def pack(symbols: U8, base: int) -> U8:
    """The bytes of ``symbols``, each below ``base``; the array itself where a byte holds one symbol."""
    if per_byte(base) == 1:
        return symbols
    out = np.empty(size(symbols.size, base), np.uint8)
    pack_into(symbols, base, out)
    return out


def _check(data: U8, count: int, base: int) -> None:
    if data.size != size(count, base):
        raise DecodeError(f"{count} symbols of base {base} come in {data.size} bytes, not {size(count, base)}")
    if not count:
        return
    width = per_byte(base)
    if base**width < 256 and data.max() >= base**width:
        raise DecodeError(f"a byte holds {data.max()}; symbols of base {base} give less than {base**width}")
    if count % width and data[-1] >= base ** (count % width):
        raise DecodeError(f"the last of {count} symbols of base {base} is followed by digits that are not zero")


def unpack_into(data: U8, base: int, out: U8) -> None:
    """``unpack`` into ``out``, whose size is the count."""
    _check(data, out.size, base)
    width = per_byte(base)
    if width == 1:
        out[:] = data
    elif width == 8:
        out[:] = np.unpackbits(data, count=out.size, bitorder="little")
    else:
        full = out.size // width
        _unpack(data[:full], _table(base), tuple(range(width)), out[: full * width].reshape(full, width))
        if full < data.size:
            out[full * width :] = _table(base)[data[full], : out.size - full * width]


def unpack(data: U8, count: int, base: int) -> U8:
    """``count`` symbols; the data itself where a byte holds one symbol.

    Raises:
        DecodeError: the data has another size, a byte is no combination of digits, or those digits of
            the last byte that hold no symbol are not zero.
    """
    if per_byte(base) == 1:
        _check(data, count, base)
        return data
    out = np.empty(count, np.uint8)
    unpack_into(data, base, out)
    return out
