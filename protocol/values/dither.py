"""Unbiased codes: ``qsgd``, ``ternary`` and ``natural`` round at random so that the expectation is the value.

With error feedback an unbiased code of variance omega is scaled by ``1 / (1 + omega)``, which makes it a
contraction with ``delta = 1 / (1 + omega)`` in expectation (Beznosikov et al. 2020; EF21 paper, section 2).
We scale by ``|v|**2 / E |C(v)|**2``, which is the same with the variance of the very vector instead of the
worst one: the expected error is then ``(1 - scale) |v|**2``, at most what the worst case promises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from protocol.coding.varint import pack, take
from protocol.errors import DecodeError
from protocol.kernels import kernels_of
from protocol.kernels.numbers import Numbers
from protocol.values.code import U8, Floats, Quantised, scale_of
from protocol.values.code import take as take_bytes

MAX_LEVELS = 127


@dataclass(frozen=True)
class Dither:
    """``unit * sign(v) * level`` with ``|v| / unit`` rounded up or down at random to a level from 0 to ``levels``.

    ``qsgd``: the unit is the norm over ``levels``, by buckets (Alistarh et al. 2017, section 3.1, with the
    buckets of its experiments and without Elias coding: ``entropy`` does better). ``ternary``: one level, the
    unit is the largest magnitude of the segment (TernGrad, Wen et al. 2017, without gradient clipping).

    On the wire: ``levels`` (one byte), the bucket (varint, 0 for one bucket), a unit for each bucket.
    """

    name: str
    levels: int
    bucket: int = 0  # values that share a unit; 0: all
    largest: bool = False  # the unit comes from the largest magnitude, else from the norm
    wire_id: int = 10

    def omega(self, count: int) -> float | None:
        """``min(d / s**2, sqrt(d) / s)`` (QSGD, Lemma 3.1); ``(sqrt(d) - 1) / 2`` with the largest magnitude and s = 1.

        The latter is reached where one magnitude is ``sqrt(d) + 1`` times all others.
        """
        d = max(1, min(count, self.bucket or count))
        if self.largest:
            return (math.sqrt(d) - 1.0) / 2.0
        return min(d / self.levels**2, math.sqrt(d) / self.levels)

    def delta(self, count: int) -> float:
        """See ``SymbolCode``."""
        return 1.0 / (1.0 + (self.omega(count) or 0.0))

    def encode(self, values: Any, key: int, contract: bool) -> Quantised:
        """See ``SymbolCode``."""
        kernels = kernels_of(values)
        dtype, bucket = kernels.dtype_of(values), self._size(self.bucket, len(values))
        units, expected, squares = kernels.moments(values, bucket, self.levels, self.largest)
        symbols = kernels.by_dither(values, self.levels, units, bucket, key)
        if contract:
            units = units * np.divide(squares, expected, out=np.zeros_like(units), where=expected > 0)
        limit = np.float64(np.finfo(dtype).max) / self.levels  # not a Python float, which would be rounded to compare
        sent = np.minimum(units, limit).astype(dtype)
        sent = np.where(sent > limit, np.nextafter(sent, dtype.type(0)), sent)  # rounded up
        head = bytes([self.levels]) + pack(self.bucket) + sent.tobytes()
        return Quantised(head, 2 * self.levels + 1, symbols, self._numbers(self.levels, sent, bucket))

    @staticmethod
    def _size(bucket: int, count: int) -> int:
        return min(bucket, count) if bucket else count

    def _numbers(self, levels: int, units: Floats, bucket: int) -> Numbers:
        steps = np.arange(levels + 1, dtype=units.dtype)
        return Numbers(np.concatenate([steps, -steps[1:]]), units, bucket)

    def read(self, data: U8, at: int, count: int, dtype: np.dtype[Any]) -> tuple[int, Numbers, int]:
        """See ``SymbolCode``."""
        levels, at = take_bytes(data, at, 1)
        bucket, at = take(data, at)
        if not 1 <= levels[0] <= MAX_LEVELS:
            raise DecodeError(f"the segment has {levels[0]} levels; valid are 1 to {MAX_LEVELS}")
        size = self._size(bucket, count)
        units, at = scale_of(data, at, -(-count // size), dtype)
        if units.max() > np.float64(np.finfo(dtype).max) / levels[0]:
            raise DecodeError("the segment has levels that overflow")
        return 2 * int(levels[0]) + 1, self._numbers(int(levels[0]), units, size), at


@dataclass(frozen=True)
class Natural:
    """A sign and a power of two: the one below or above the magnitude (natural compression, Horvath et al. 2019).

    The exponents are 126 octaves below the power of two that is at least the largest magnitude; the paper's
    are those of float32. On the wire: that power times the scale, then a byte each.
    """

    name: str = "natural"
    wire_id: int = 11

    def omega(self, count: int) -> float | None:
        """One eighth, up to underflow (Theorem 1 of the paper)."""
        return 1.0 / 8.0

    def delta(self, count: int) -> float:
        """``1 / (1 + omega)``."""
        return 8.0 / 9.0

    def encode(self, values: Any, key: int, contract: bool) -> Quantised:
        """See ``SymbolCode``."""
        kernels = kernels_of(values)
        dtype = kernels.dtype_of(values)
        fraction, exponent = math.frexp(kernels.extent(values).high)
        top = min(exponent - (fraction == 0.5), np.finfo(dtype).maxexp - 1)
        symbols = kernels.by_exponent(values, top, key)
        scale = np.array([math.ldexp(8.0 / 9.0 if contract else 1.0, top)]).astype(dtype)
        return Quantised(scale.tobytes(), 256, symbols, self._numbers(scale))

    def _numbers(self, scale: Floats) -> Numbers:
        powers = np.concatenate([[0.0], np.ldexp(1.0, np.arange(-126, 1))]).astype(scale.dtype)
        table = powers * scale
        return Numbers.of(np.concatenate([table, -table]))

    def read(self, data: U8, at: int, count: int, dtype: np.dtype[Any]) -> tuple[int, Numbers, int]:
        """See ``SymbolCode``."""
        scale, at = scale_of(data, at, 1, dtype)
        return 256, self._numbers(scale), at
