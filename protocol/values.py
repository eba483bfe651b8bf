"""Value codes: how the values that were selected (or all of them) are written in few bits.

A code turns an array into bytes and says what the receiver will read in them, so that the sender's
residual is exact. What the receiver reads is built from products and sums that IEEE 754 fixes to the
last bit, never from powers or logarithms: every machine decodes the same bits.

Ids are append-only; bit 7 of the id on the wire says that the values are float64 ("wide"), otherwise
they are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from protocol.errors import DecodeError
from protocol.kernels.cpu import magnitudes

U8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]


class ValueCode(Protocol):
    """A code for a non-empty array of finite values, float32 or float64."""

    @property
    def name(self) -> str:
        """As in specifications."""

    @property
    def wire_id(self) -> int:
        """As on the wire, without bit 7."""

    def encode(self, values: Floats) -> tuple[U8, Floats]:
        """The bytes, and the values that ``decode`` will give for them (same shape and dtype)."""

    def decode(self, data: U8, count: int, dtype: np.dtype[Any]) -> Floats:
        """``count`` values of ``dtype``. ``data`` has exactly ``size(count, dtype)`` bytes.

        Raises:
            DecodeError: the bytes are not what any encoder writes.
        """

    def size(self, count: int, dtype: np.dtype[Any]) -> int:
        """Exact number of bytes for ``count`` values."""

    def delta(self, count: int) -> float:
        """Contraction: ``|decode(v) - v|**2 <= (1 - delta) |v|**2``, up to underflow."""


def _bytes(values: npt.NDArray[Any]) -> U8:
    return np.ascontiguousarray(values).view(np.uint8)


def _finite(values: Floats) -> Floats:
    if not np.isfinite(values).all():
        raise DecodeError("the segment holds values that are not finite")
    return values


def _scales(data: U8, count: int, dtype: np.dtype[Any]) -> Floats:
    return _finite(data[: count * dtype.itemsize].view(dtype))


@dataclass(frozen=True)
class Cast:
    """Each value in a floating-point format of its own; what overflows is clamped to the largest."""

    name: str
    wire_id: int
    dtype: torch.dtype

    def encode(self, values: Floats) -> tuple[U8, Floats]:
        """See ``ValueCode``."""
        tensor = torch.from_numpy(values)
        if self.dtype == tensor.dtype:
            return _bytes(values), values
        if torch.finfo(self.dtype).max < torch.finfo(tensor.dtype).max:
            tensor = tensor.clamp(torch.finfo(self.dtype).min, torch.finfo(self.dtype).max)
        narrow = tensor.to(self.dtype)
        return narrow.view(torch.uint8).numpy(), narrow.to(tensor.dtype).numpy()

    def decode(self, data: U8, count: int, dtype: np.dtype[Any]) -> Floats:
        """See ``ValueCode``."""
        narrow = torch.from_numpy(np.array(data)).view(self.dtype)
        return _finite(narrow.to(torch.float64 if dtype == np.float64 else torch.float32).numpy())

    def size(self, count: int, dtype: np.dtype[Any]) -> int:
        """See ``ValueCode``."""
        return count * self.dtype.itemsize

    def delta(self, count: int) -> float:
        """Rounding to nearest: a relative error of at most half a unit in the last place."""
        return 1.0 - (torch.finfo(self.dtype).eps / 2) ** 2


@dataclass(frozen=True)
class Sign:
    """One bit a value and their mean magnitude, ``|v|_1 / d * sign(v)`` (SAEF paper, equation 2).

    Contraction: ``|C(v) - v|**2 = |v|**2 - |v|_1**2 / d``, so delta is at least ``1 / d``. Zero counts
    as positive.
    """

    name: str = "sign"
    wire_id: int = 4

    def encode(self, values: Floats) -> tuple[U8, Floats]:
        """See ``ValueCode``."""
        scale = values.dtype.type(magnitudes(values)[0] / values.size)
        negative = values < 0
        bits = np.packbits(negative, bitorder="little")
        return np.concatenate([_bytes(np.array([scale])), bits]), np.where(negative, -scale, scale)

    def decode(self, data: U8, count: int, dtype: np.dtype[Any]) -> Floats:
        """See ``ValueCode``."""
        scale = _scales(data, 1, dtype)[0]
        bits = data[dtype.itemsize :]
        if scale < 0 or (count % 8 and bits[-1] >> (count % 8)):
            raise DecodeError("the segment's signs have a negative scale or padding that is not empty")
        negative = np.unpackbits(bits, count=count, bitorder="little").astype(bool)
        signed: Floats = np.where(negative, -scale, scale)
        return signed

    def size(self, count: int, dtype: np.dtype[Any]) -> int:
        """See ``ValueCode``."""
        return dtype.itemsize + -(-count // 8)

    def delta(self, count: int) -> float:
        """The worst case is one value that is not zero."""
        return 1.0 / max(1, count)


@njit(cache=True, nogil=True)
def _nearest_levels(values, levels, middles, codes, decoded):  # type: ignore[no-untyped-def]
    """The nearest of a power of two of levels, by bisection; a tie goes to the smaller level."""
    half = levels.size
    for i in range(values.size):
        magnitude = np.abs(values[i])
        low, step = 0, half >> 1
        while step:  # without a branch on the data, which would be mispredicted half of the time
            low += step * (magnitude > middles[low + step - 1])
            step >>= 1
        negative = values[i] < 0
        codes[i] = low + half * negative
        decoded[i] = -levels[low] if negative else levels[low]


@dataclass(frozen=True)
class Geometric:
    """A sign and a magnitude from a geometric grid between the smallest and the largest magnitude.

    What survives a selection has a gap around zero and a heavy tail, so levels in constant proportion
    spend the bits where the values are. The levels are ``low``, ``low * step``, ``low * step * step``
    and so on, multiplied in the working precision; both numbers travel. Magnitudes more than ``SPAN``
    below the largest share the lowest level.
    """

    name: str
    wire_id: int
    bits: int

    SPAN = 2.0**-14

    @property
    def _count(self) -> int:
        return 1 << (self.bits - 1)

    def _levels(self, low: Any, step: Any) -> Floats:
        levels = np.empty(self._count, np.asarray(low).dtype)
        levels[0] = low
        with np.errstate(over="ignore"):
            for i in range(1, levels.size):
                levels[i] = levels[i - 1] * step
        return levels

    def encode(self, values: Floats) -> tuple[U8, Floats]:
        """See ``ValueCode``. The values must not be zero."""
        kind = values.dtype.type
        sizes = np.abs(values)
        high = float(sizes.max())
        # a grid that begins at a denormal number could not grow in constant proportion
        low = kind(min(high, max(float(sizes.min()), high * self.SPAN, float(np.finfo(kind).tiny))))
        step = kind((high / float(low)) ** (1.0 / (self._count - 1)))
        levels = self._levels(low, step)
        while levels[-1] > high:  # rounding must not carry the last level past the largest value
            step = np.nextafter(step, kind(0))
            levels = self._levels(low, step)
        codes: U8 = np.empty(values.size, np.uint8)
        decoded = np.empty_like(values)
        exact = levels.astype(np.float64)
        middles = exact[:-1] + (exact[1:] - exact[:-1]) / 2
        _nearest_levels(values, levels, middles, codes, decoded)
        if self.bits == 4:
            codes = np.pad(codes, (0, codes.size % 2))
            codes = codes[::2] | codes[1::2] << np.uint8(4)
        return np.concatenate([_bytes(np.array([low, step])), codes]), decoded

    def decode(self, data: U8, count: int, dtype: np.dtype[Any]) -> Floats:
        """See ``ValueCode``."""
        low, step = _scales(data, 2, dtype)
        levels = self._levels(low, step)
        if low < 0 or step < 0 or not np.isfinite(levels).all():
            raise DecodeError("the segment's grid of magnitudes is negative or not finite")
        codes = data[2 * dtype.itemsize :]
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)
            if count % 2 and codes[-1]:
                raise DecodeError("the segment's codes have padding that is not empty")
        return np.concatenate([levels, -levels])[codes[:count]]

    def size(self, count: int, dtype: np.dtype[Any]) -> int:
        """See ``ValueCode``."""
        return 2 * dtype.itemsize + -(-count * self.bits // 8)

    def delta(self, count: int) -> float:
        """Nearest of two levels in proportion q is off by at most (q - 1) / (q + 1) of the value.

        Values below the lowest level add at most ``count * (SPAN * largest)**2``; underflow is below
        the smallest normal number.
        """
        q = float(self.SPAN ** (-1.0 / (self._count - 1)))
        return max(0.0, 1.0 - ((q - 1) / (q + 1)) ** 2 - count * self.SPAN**2)


F64 = Cast("f64", 0, torch.float64)
F32 = Cast("f32", 1, torch.float32)
BF16 = Cast("bf16", 3, torch.bfloat16)
SIGN = Sign()
INT8 = Geometric("int8", 5, 8)
INT4 = Geometric("int4", 6, 4)

CODES: tuple[ValueCode, ...] = (F64, F32, BF16, SIGN, INT8, INT4)
BY_NAME = {code.name: code for code in CODES}
BY_ID = {code.wire_id: code for code in CODES}
if len(BY_ID) != len(CODES):
    raise AssertionError("two value codes share a wire id")
