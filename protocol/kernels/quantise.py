"""From values to symbols and back, on the CPU: one pass each, spread over the cores.

A symbol (uint8) names an entry of a table of numbers; the codes in ``protocol.values`` choose the table.
What the functions do is said in ``protocol.kernels.Kernels``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from protocol.kernels.numbers import Extent, Numbers
from protocol.kernels.sums import as_bits
from protocol.kernels.threads import over, spans

Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

GRAIN = 1 << 14


@njit(cache=True, nogil=True, fastmath={"reassoc", "nnan"})
def _extent(values, bits, mask):  # type: ignore[no-untyped-def]
    low, high, total, squares = mask, bits[0] & mask, 0.0, 0.0
    for i in range(values.size):
        low, high = min(low, bits[i] & mask), max(high, bits[i] & mask)
        value = np.float64(values[i])
        total += np.abs(value)
        squares += value * value
    return low, high, total, squares


@njit(cache=True, nogil=True)
def _histogram(values, bits, mask, shift, bottom, counts, sums):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        place = max(((bits[i] & mask) >> shift) - bottom, 0)
        counts[place] += 1
        sums[place] += np.abs(np.float64(values[i]))


@njit(cache=True, nogil=True)
def _by_cell(bits, mask, shift, bottom, cells, half, symbols):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        place = max(((bits[i] & mask) >> shift) - bottom, 0)
        symbols[i] = cells[place] + half * (bits[i] < 0)


@njit(cache=True, nogil=True)
def _by_knot(values, bits, mask, shift, bottom, cells, knots, steps, fine, half, symbols):  # type: ignore[no-untyped-def]
    for i in range(bits.size):
        cell = cells[max(((bits[i] & mask) >> shift) - bottom, 0)]
        place = np.int64((np.abs(values[i]) - knots[cell]) * steps[cell])
        symbols[i] = cell * fine + min(max(place, 0), fine - 1) + half * (bits[i] < 0)


@njit(cache=True, nogil=True)
def _chance(key, i):  # type: ignore[no-untyped-def]
    """A number in [0, 1) that depends on the key and ``i`` alone (the 32-bit finaliser of MurmurHash3)."""
    # products of numba's uint32 are uint64: cut off each time
    bits = np.uint32(np.uint32(i) * np.uint32(0x9E3779B9)) ^ np.uint32(key)
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B) + np.uint32(key >> np.uint64(32)))
    bits = np.uint32((bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.float64(np.uint32(bits ^ (bits >> np.uint32(16)))) * 2.0**-32


@njit(cache=True, nogil=True)
def _by_dither(values, start, levels, units, bucket, key, symbols):  # type: ignore[no-untyped-def]
    """``|v| / unit`` rounded up with the probability of its fraction; a unit that is zero gives zeros."""
    first = 0
    while first < values.size:
        place = (start + first) // bucket
        last = min(values.size, (place + 1) * bucket - start)
        inverse = 1.0 / units[place] if units[place] > 0 else 0.0
        for i in range(first, last):
            level = np.int32(np.abs(np.float64(values[i])) * inverse + _chance(key, start + i))
            level = min(level, np.int32(levels))
            symbols[i] = level + np.int32(levels) * (level > 0) * (values[i] < 0)
        first = last


@njit(cache=True, nogil=True, fastmath={"reassoc", "nnan"})
def _moment(part, levels, largest):  # type: ignore[no-untyped-def]
    most, total = 0.0, 0.0
    for i in range(part.size):
        value = np.abs(np.float64(part[i]))
        most = max(most, value)
        total += value * value
    unit = (most if largest else np.sqrt(total)) / levels
    if unit == 0:
        return 0.0, 0.0, 0.0
    inverse, expected = 1.0 / unit, 0.0
    for i in range(part.size):
        place = np.abs(np.float64(part[i])) * inverse
        fraction = place - np.floor(place)
        expected += place * place + fraction * (1 - fraction)
    return unit, expected * unit * unit, total


@njit(cache=True, nogil=True)
def _moments(values, bucket, levels, largest, units, seconds, squares):  # type: ignore[no-untyped-def]
    """By bucket: the unit (the norm or the largest magnitude over ``levels``), E C(v)**2 and ``|v|**2``."""
    for b in range(units.size):
        units[b], seconds[b], squares[b] = _moment(values[b * bucket : (b + 1) * bucket], levels, largest)


@njit(cache=True, nogil=True)
def _by_exponent(values, bits, mask, start, mantissa, bias, top, lowest, key, symbols):  # type: ignore[no-untyped-def]
    """The power of two below or above ``|v|``, so that the expectation is ``v``: 127 stands for ``2**top``.

    Below ``lowest``, which is ``2**(top - 126)``, it is that or zero.
    """
    one = np.int64(1) << mantissa
    for i in range(values.size):
        exponent = np.int64(bits[i] & mask) >> mantissa
        fraction = np.float64(np.int64(bits[i]) & (one - 1)) / one
        size = np.abs(np.float64(values[i]))
        if exponent == 0 and size > 0:  # denormal: neither is what it looks like
            fraction, exponent = math.frexp(size)
            fraction, exponent = 2 * fraction - 1, exponent - 1 + bias
        chance = _chance(key, start + i)
        level = exponent - bias - top + 127 + (chance < fraction)
        if size < lowest:
            level = np.int64(chance < size / lowest)
        level = min(level, 127)
        symbols[i] = level + 128 * (level > 0) * (values[i] < 0)


@njit(cache=True, nogil=True)
def _negative(values, symbols):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        symbols[i] = values[i] < 0


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _settle_all(values, symbols, start, table, scales, bucket, write):  # type: ignore[no-untyped-def]
    sent, left, first = 0.0, 0.0, 0
    while first < values.size:
        place = (start + first) // bucket
        last, scale = min(values.size, (place + 1) * bucket - start), scales[place]
        for i in range(first, last):
            number = table[symbols[i]] * scale
            rest = values[i] - number
            if write:
                values[i] = rest
            sent += np.float64(number) * np.float64(number)
            left += np.float64(rest) * np.float64(rest)
        first = last
    return sent, left


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _settle_at(values, symbols, start, table, scales, bucket, indices, out):  # type: ignore[no-untyped-def]
    sent, left, first = 0.0, 0.0, 0
    while first < values.size:
        place = (start + first) // bucket
        last, scale = min(values.size, (place + 1) * bucket - start), scales[place]
        for i in range(first, last):
            number = table[symbols[i]] * scale
            rest = values[i] - number
            out[np.uint64(indices[i])] = rest
            sent += np.float64(number) * np.float64(number)
            left += np.float64(rest) * np.float64(rest)
        first = last
    return sent, left


@njit(cache=True, nogil=True)
def _add_all(out, symbols, table):  # type: ignore[no-untyped-def]
    for i in range(symbols.size):
        out[i] += table[symbols[i]]


@njit(cache=True, nogil=True)
def add_at(out, symbols, table, indices):  # type: ignore[no-untyped-def]
    """``out[indices] += table[symbols]``."""
    for i in range(symbols.size):
        out[np.uint64(indices[i])] += table[symbols[i]]  # unsigned: no index counts from the end


def dtype_of(values: Floats) -> np.dtype[Any]:
    """As numpy calls it."""
    return values.dtype


def extent(values: Floats) -> Extent:
    """Of a non-empty array of finite values."""
    bits, mask = as_bits(values)
    parts = over(spans(values.size, GRAIN), lambda a, b: _extent(values[a:b], bits[a:b], mask))
    low, high = np.array([min(p[0] for p in parts), max(p[1] for p in parts)], bits.dtype).view(values.dtype)
    return Extent(float(low), float(high), sum(p[2] for p in parts), sum(p[3] for p in parts))


def histogram(values: Floats, shift: int, bottom: int, bins: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """How many magnitudes are in each bin, and their sums (float64); what is below ``bottom`` joins bin 0."""
    bits, mask = as_bits(values)

    def count(start: int, stop: int) -> tuple[npt.NDArray[np.int64], Floats]:
        counts, sums = np.zeros(bins, np.int64), np.zeros(bins)
        _histogram(values[start:stop], bits[start:stop], mask, shift, bottom, counts, sums)
        return counts, sums

    parts = over(spans(values.size, GRAIN), count)
    return sum(p[0] for p in parts), sum(p[1] for p in parts)  # type: ignore[return-value]


def by_cell(values: Floats, shift: int, bottom: int, cells: U8, half: int) -> U8:
    """The cell of each magnitude's bin, plus ``half`` for negative values."""
    bits, mask = as_bits(values)
    symbols = np.empty(values.size, np.uint8)
    over(spans(values.size, GRAIN), lambda a, b: _by_cell(bits[a:b], mask, shift, bottom, cells, half, symbols[a:b]))
    return symbols


def by_knot(values: Floats, shift: int, bottom: int, cells: U8, knots: Floats, fine: int, half: int) -> U8:
    """The place of each magnitude among ``fine`` steps between the knots of its cell, plus ``half`` if negative."""
    bits, mask = as_bits(values)
    symbols = np.empty(values.size, np.uint8)
    with np.errstate(over="ignore"):  # between denormal numbers
        steps = np.minimum(fine / np.diff(knots.astype(np.float64)), np.finfo(np.float64).max)

    def write(a: int, b: int) -> None:
        _by_knot(values[a:b], bits[a:b], mask, shift, bottom, cells, knots, steps, fine, half, symbols[a:b])

    over(spans(values.size, GRAIN), write)
    return symbols


def moments(values: Floats, bucket: int, levels: int, largest: bool) -> tuple[Floats, Floats, Floats]:
    """By bucket, in float64: the unit of dithering, the expected square of what it gives, and ``|v|**2``.

    The unit is the largest magnitude or the norm of the bucket, over ``levels``.
    """
    count = -(-values.size // bucket)
    units, seconds, squares = np.zeros(count), np.zeros(count), np.zeros(count)

    def measure(a: int, b: int) -> None:
        _moments(values[a * bucket : b * bucket], bucket, levels, largest, units[a:b], seconds[a:b], squares[a:b])

    over(spans(count, 1), measure)
    return units, seconds, squares


def by_dither(values: Floats, levels: int, units: Floats, bucket: int, key: int) -> U8:
    """``|v| / unit`` rounded up or down at random, so that it is the expectation; plus ``levels`` if negative."""
    symbols = np.empty(values.size, np.uint8)
    over(
        spans(values.size, GRAIN),
        lambda a, b: _by_dither(values[a:b], a, levels, units, bucket, np.uint64(key), symbols[a:b]),
    )
    return symbols


def by_exponent(values: Floats, top: int, key: int) -> U8:
    """127 for ``2**top``, 126 for half of it and so on, 0 for zero, up or down at random; plus 128 if negative."""
    symbols = np.empty(values.size, np.uint8)
    bits, mask = as_bits(values)
    kind = np.finfo(values.dtype)
    lowest = math.ldexp(1.0, top - 126)

    def write(a: int, b: int) -> None:
        part = values[a:b], bits[a:b], mask, a, kind.nmant, kind.maxexp - 1
        _by_exponent(*part, top, lowest, np.uint64(key), symbols[a:b])

    over(spans(values.size, GRAIN), write)
    return symbols


def negative(values: Floats) -> U8:
    """1 where a value is below zero, else 0."""
    symbols = np.empty(values.size, np.uint8)
    over(spans(values.size, GRAIN), lambda a, b: _negative(values[a:b], symbols[a:b]))
    return symbols


def settle(
    values: Floats, symbols: U8, numbers: Numbers, indices: Indices | None, out: Floats | None
) -> tuple[float, float]:
    """Write what the symbols leave of the values to ``out`` (at ``indices``, or everywhere).

    Returns:
        The squared norms of what was sent and of what is left of it.
    """
    table, scales, bucket = numbers.table, numbers.scales, numbers.bucket

    def write(a: int, b: int) -> tuple[float, float]:
        if indices is None or out is None:
            return _settle_all(values[a:b], symbols[a:b], a, table, scales, bucket, out is not None)  # type: ignore[no-any-return]
        return _settle_at(values[a:b], symbols[a:b], a, table, scales, bucket, indices[a:b], out)  # type: ignore[no-any-return]

    parts = over(spans(values.size, GRAIN), write)
    return sum(p[0] for p in parts), sum(p[1] for p in parts)


def add(out: Floats, symbols: U8, table: Floats, indices: Indices | None) -> None:
    """``out[indices] += table[symbols]``; everywhere if there are no indices. One dtype."""

    def write(a: int, b: int) -> None:
        if indices is None:
            _add_all(out[a:b], symbols[a:b], table)
        else:
            add_at(out, symbols[a:b], table, indices[a:b])

    over(spans(symbols.size, GRAIN), write)
