"""What a value code is, and what its parts share.

A code either narrows each number (``casts``), or names each by a symbol: an entry of a table of at most
256 numbers that is fitted to the values and travels in few bytes. What the receiver reads is built from
products and sums that IEEE 754 fixes to the last bit, never from logarithms: every machine decodes the
same bits, and the sender's residual is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from protocol.errors import DecodeError
from protocol.kernels.numbers import Numbers

U8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Quantised:
    """Values as symbols: ``head`` and the symbols travel, ``numbers`` is what the receiver makes of them."""

    head: bytes
    base: int  # symbols are below it
    symbols: Any  # uint8, where the values are
    numbers: Numbers


class Reader(Protocol):
    """What decodes symbols."""

    def read(self, data: U8, at: int, count: int, dtype: np.dtype[Any]) -> tuple[int, Numbers, int]:
        """The base, the numbers, and the place behind the head that stands at ``data[at:]``.

        Raises:
            DecodeError: the head is truncated, or not what any encoder writes.
        """


class SymbolCode(Reader, Protocol):
    """A code for a non-empty array of finite values, float32 or float64."""

    @property
    def name(self) -> str:
        """As in specifications."""

    @property
    def wire_id(self) -> int:
        """As on the wire, below 64."""

    def omega(self, count: int) -> float | None:
        """Variance of ``count`` values: ``E |C(v) - v|**2 <= omega |v|**2`` with ``E C(v) = v``; None if biased."""

    def delta(self, count: int) -> float:
        """Contraction: ``|C(v) - v|**2 <= (1 - delta) |v|**2``, in expectation if there is an omega."""

    def encode(self, values: Any, key: int, contract: bool) -> Quantised:
        """Quantise ``values``.

        Args:
            values: a non-empty numpy array, or a tensor on a GPU.
            key: fixes all randomness.
            contract: an unbiased code scales itself down, so that it contracts (``1 / (1 + omega)``).
        """


def take(data: U8, at: int, size: int) -> tuple[U8, int]:
    """``size`` bytes at ``data[at:]`` and the place behind them.

    Raises:
        DecodeError: the data ends before.
    """
    if data.size - at < size:
        raise DecodeError("the segment ends inside its values")
    return data[at : at + size], at + size


def join(*parts: bytes | U8) -> U8:
    """One array of bytes and arrays of them."""
    return np.concatenate([np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part for part in parts])


def as_bytes(values: npt.NDArray[Any]) -> U8:
    """The little-endian bytes of an array."""
    return np.ascontiguousarray(values).view(np.uint8)


def scale_of(data: U8, at: int, count: int, dtype: np.dtype[Any]) -> tuple[Floats, int]:
    """``count`` scales, finite and not negative.

    Raises:
        DecodeError: they are not, or the data ends before.
    """
    raw, at = take(data, at, count * dtype.itemsize)
    scales: Floats = np.frombuffer(raw.tobytes(), dtype)
    if np.signbit(scales).any() or not np.isfinite(scales).all():
        raise DecodeError("the segment has a scale that is negative or not finite")
    return scales, at
