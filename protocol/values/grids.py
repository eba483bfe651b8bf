"""``int8``, ``int4``, ``int2``: a sign and one of a few magnitudes, which are fitted to the values and travel.

What survives a selection has a gap around zero and a heavy tail; what is dense is heaped around zero.
A uniform grid spends its levels where nothing is. So the magnitudes' histogram decides:

``int4``, ``int2``
    The best partition into 8 (2) cells, each sent as its mean: the Lloyd-Max quantiser (Lloyd 1982, Max
    1960), found by dynamic programming instead of iteration, so that it is never stuck.
``int8``
    Eight cells of sixteen equal steps, cut where the error is least (a companding quantiser, Bennett
    1948): 128 levels of which nine numbers travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from protocol.errors import DecodeError
from protocol.kernels import kernels_of
from protocol.kernels.numbers import Numbers
from protocol.values.cells import BIN_BITS, BIN_RATIO, OCTAVES, means, steps
from protocol.values.code import U8, Floats, Quantised, as_bytes, take


def _bits_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"i{dtype.itemsize}")


def _halves(numbers: Floats) -> U8:
    """The upper halves of non-negative finite numbers, rounded to nearest but never to infinity."""
    bits = numbers.view(_bits_of(numbers.dtype))
    half = 4 * numbers.dtype.itemsize  # bits that are dropped
    largest = int(np.array(np.finfo(numbers.dtype).max).view(bits.dtype)) >> half
    upper = np.minimum((bits >> half) + ((bits >> (half - 1)) & 1), largest)
    return as_bytes(upper.astype(f"<i{numbers.dtype.itemsize // 2}"))


def _from_halves(data: U8, dtype: np.dtype[Any]) -> Floats:
    bits = np.frombuffer(data.tobytes(), f"<i{dtype.itemsize // 2}").astype(_bits_of(dtype))
    numbers: Floats = (bits << (4 * dtype.itemsize)).view(dtype)
    return numbers


def _pack(knots: Floats, whole: bool) -> tuple[bytes, Floats]:
    """The head, and the knots as they will be received. A single one is whole in any case."""
    if whole or knots.size == 1:
        return bytes([knots.size]) + knots.tobytes(), knots
    halves = _halves(knots)
    return bytes([knots.size]) + halves.tobytes(), _from_halves(halves, knots.dtype)


def _edges(top: int, bottom: int, shift: int, dtype: np.dtype[Any]) -> Floats:
    """Of the bins, float64, as far as numbers are finite."""
    bits = np.arange(bottom, top + 2, dtype=_bits_of(dtype)) << shift
    largest = np.array(np.finfo(dtype).max).view(bits.dtype)
    edges: Floats = np.minimum(bits, largest).view(dtype).astype(np.float64)
    return edges


def _table(levels: Floats, half: int) -> Numbers:
    table = np.zeros(2 * half, levels.dtype)
    table[: levels.size] = levels
    table[half : half + levels.size] = -levels
    return Numbers.of(table)


def _worst(ratio: float, count: int) -> float:
    """Of a cell whose magnitudes are within ``ratio``, sent as their mean; and the rest below OCTAVES, and rounding.

    ``|v - mean|**2`` is at most ``((ratio - 1) / (ratio + 1))**2 |v|**2``. One cell would give ``1 / count``.
    """
    delta = 1.0 - ((ratio - 1) / (ratio + 1)) ** 2 - count * 4.0**-OCTAVES
    return max(delta, 1.0 / max(1, count)) * (1.0 - 2.0**-15)


@dataclass(frozen=True)
class Grid:
    """``1 << (bits - 1)`` magnitudes and a sign.

    On the wire: the number of knots that travel (one byte), then they: by the upper halves of their bits
    where knots are magnitudes and there are several, else whole. A single knot is the only magnitude.
    """

    name: str
    wire_id: int
    bits: int
    fine: int = 1  # steps between two knots; 1: the knots are the magnitudes

    @property
    def base(self) -> int:
        """Symbols: magnitudes, and again for negative values."""
        return 1 << self.bits

    @property
    def _half(self) -> int:
        return self.base // 2

    def omega(self, count: int) -> float | None:
        """Biased: nearest magnitudes."""
        return None

    def delta(self, count: int) -> float:
        """Of the partition into cells of equal ratio, than which the best one is not worse."""
        cells = self._half // self.fine
        ratio = 2.0 ** (OCTAVES / cells) * BIN_RATIO
        if self.fine == 1:
            return _worst(ratio, count)
        # half a step is at most (ratio - 1) / (2 * fine) of the smallest magnitude in its cell
        delta: float = 1.0 - ((ratio - 1) / (2 * self.fine)) ** 2 - count * 4.0**-OCTAVES
        return max(0.0, delta) * (1.0 - 2.0**-15)

    def encode(self, values: Any, key: int, contract: bool) -> Quantised:
        """See ``SymbolCode``."""
        kernels = kernels_of(values)
        extent = kernels.extent(values)
        dtype = kernels.dtype_of(values)
        if extent.low == extent.high:
            head, level = _pack(np.array([extent.low], dtype), whole=True)
            symbols = kernels.negative(values) * np.uint8(self._half)
            return Quantised(head, self.base, symbols, self._numbers(level))
        least = max(extent.low, extent.high * 2.0**-OCTAVES)
        lowest, highest = (int(np.array(x, dtype).view(_bits_of(dtype))) for x in (least, extent.high))
        shift = max(0, (highest - lowest).bit_length() - BIN_BITS)
        bottom, top = lowest >> shift, highest >> shift
        counts, sums = kernels.histogram(values, shift, bottom, top - bottom + 1)
        knots: Floats
        if self.fine == 1:
            borders = means(counts, sums, self._half)
            knots = np.add.reduceat(sums, borders[:-1]) / np.add.reduceat(counts, borders[:-1])
        else:
            edges = _edges(top, bottom, shift, dtype)
            if extent.low < least:
                edges[0] = 0.0  # the lowest bin takes all that is smaller
            borders = steps(counts, edges, self._half // self.fine)
            knots = edges[borders]
        cells = np.searchsorted(borders[1:-1], np.arange(counts.size), side="right").astype(np.uint8)
        if self.fine == 1:
            symbols = kernels.by_cell(values, shift, bottom, cells, self._half)
        else:
            symbols = kernels.by_knot(values, shift, bottom, cells, knots.astype(dtype), self.fine, self._half)
        head, received = _pack(knots.astype(dtype), whole=self.fine > 1)
        return Quantised(head, self.base, symbols, self._numbers(received))

    def _numbers(self, knots: Floats) -> Numbers:
        if self.fine == 1 or knots.size == 1:
            return _table(knots, self._half)
        places = (2 * np.arange(self.fine, dtype=knots.dtype) + 1) / knots.dtype.type(2 * self.fine)
        widths = (knots[1:] - knots[:-1])[:, None] * places  # rounded before it is added
        return _table((knots[:-1, None] + widths).reshape(-1), self._half)

    def read(self, data: U8, at: int, count: int, dtype: np.dtype[Any]) -> tuple[int, Numbers, int]:
        """See ``SymbolCode``."""
        number, at = take(data, at, 1)
        most = self._half if self.fine == 1 else self._half // self.fine + 1
        if not 1 <= number[0] <= most:
            raise DecodeError(f"the segment's grid has {number[0]} knots; valid are 1 to {most}")
        whole = number[0] == 1 or self.fine > 1
        raw, at = take(data, at, int(number[0]) * dtype.itemsize // (1 if whole else 2))
        knots: Floats = np.frombuffer(raw.tobytes(), dtype) if whole else _from_halves(raw, dtype)
        if np.signbit(knots).any() or not np.isfinite(knots).all() or (np.diff(knots) < 0).any():
            raise DecodeError("the segment's grid of magnitudes is negative, not finite, or does not ascend")
        return self.base, self._numbers(knots), at


@dataclass(frozen=True)
class Geometric:
    """The grid of early frames, of constant proportion: ``low``, ``low * step`` and so on. Decoded, not written."""

    name: str
    wire_id: int
    bits: int

    def read(self, data: U8, at: int, count: int, dtype: np.dtype[Any]) -> tuple[int, Numbers, int]:
        """See ``SymbolCode``."""
        raw, at = take(data, at, 2 * dtype.itemsize)
        low, step = np.frombuffer(raw.tobytes(), dtype)
        levels = np.empty(1 << (self.bits - 1), dtype)
        levels[0] = low
        with np.errstate(over="ignore", invalid="ignore"):
            for i in range(1, levels.size):
                levels[i] = levels[i - 1] * step
        if not (low >= 0 and step >= 0) or not np.isfinite(levels).all():
            raise DecodeError("the segment's grid of magnitudes is negative or not finite")
        return 1 << self.bits, _table(levels, levels.size), at
