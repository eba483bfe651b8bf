"""Decoded values before they are numbers, and how they are added to a vector without ever being one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol.errors import DecodeError
from protocol.kernels import cuda_coding, kernels_of, quantise, sums
from protocol.kernels.casts import PIECE, widen
from protocol.kernels.numbers import Numbers
from protocol.values.casts import Cast

U8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Symbols:
    """Decoded values that are still symbols: one byte each."""

    symbols: Any  # uint8: an array, or a tensor on the GPU where they were decoded
    numbers: Numbers

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        return self.numbers.dtype

    def __len__(self) -> int:
        return len(self.symbols)

    def _part(self, start: int, stop: int) -> Floats:
        values: Floats = self.numbers.table[kernels_of(self.symbols).to_host(self.symbols[start:stop])]
        if self.numbers.scales.size > 1:
            values *= self.numbers.scales[np.arange(start, start + values.size) // self.numbers.bucket]
        else:
            values *= self.numbers.scales
        return values

    def pieces(self) -> Iterator[tuple[int, Floats]]:
        """The values, as (start, array) in order."""
        for start in range(0, len(self), PIECE):
            yield start, self._part(start, start + PIECE)

    def array(self) -> Floats:
        """The values in one array."""
        return self._part(0, len(self))

    def add_to(self, out: Floats, indices: Indices | None, sign: int) -> None:
        """``out[indices] += sign * values``, each rounded to out's dtype first; everywhere without indices."""
        if self.numbers.scales.size == 1:
            quantise.add(out, self.symbols, self._table(out.dtype, sign), indices)
            return
        for start, values in self.pieces():
            add_values(out, values, start, indices, sign)

    def adder(self, out: Floats) -> Callable[[Indices, int], None]:
        """What adds the values from one on to ``out``, at as many indices as it is given."""
        if self.numbers.scales.size > 1:
            return lambda indices, start: add_values(out, self._part(start, start + indices.size), 0, indices, 1)
        symbols, table = self.symbols, self._table(out.dtype, 1)
        return lambda indices, start: quantise.add_at(out, symbols[start : start + indices.size], table, indices)

    def _table(self, dtype: np.dtype[Any], sign: int) -> Floats:
        """What each symbol adds if there is one scale, rounded in the message's width first."""
        table: Floats = (self.numbers.table * self.numbers.scales).astype(dtype) * dtype.type(sign)
        return table

    def add_on_device(self, out: Tensor, indices: Tensor | None, sign: int) -> None:
        """``add_to`` on a GPU, if there is one scale: symbols travel there, one byte each."""
        table = torch.from_numpy(self._table(np.dtype(np.float64 if out.dtype == torch.float64 else np.float32), sign))
        symbols = torch.as_tensor(self.symbols).to(out.device)
        cuda_coding.lookup_add(out, indices, symbols, table.to(out.device))


@dataclass(frozen=True)
class Narrowed:
    """Decoded values that are still in the format of their cast, as bytes that may stand anywhere."""

    data: U8
    code: Cast
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return self.data.size // self.code.dtype.itemsize

    def pieces(self) -> Iterator[tuple[int, Floats]]:
        """The values, as (start, array) in order."""
        for start in range(0, len(self), PIECE):
            yield start, self._part(start, start + PIECE)

    def _part(self, start: int, stop: int) -> Floats:
        size = self.code.dtype.itemsize
        return widen(self.data[start * size : stop * size], self.code.dtype, self.dtype)

    def array(self) -> Floats:
        """The values in one array."""
        return self._part(0, len(self))

    def check(self) -> Narrowed:
        """Itself.

        Raises:
            DecodeError: a value is not finite.
        """
        if not all(np.isfinite(piece).all() for _, piece in self.pieces()):
            raise DecodeError("the segment holds values that are not finite")
        return self

    def add_to(self, out: Floats, indices: Indices | None, sign: int) -> None:
        """As ``Symbols.add_to``."""
        for start, values in self.pieces():
            add_values(out, values, start, indices, sign)

    def adder(self, out: Floats) -> Callable[[Indices, int], None]:
        """As ``Symbols.adder``."""
        return lambda indices, start: add_values(out, self._part(start, start + indices.size), 0, indices, 1)


def add_values(out: Floats, values: Floats, start: int, indices: Indices | None, sign: int) -> None:
    """Add ``sign * values``, which are those from ``start`` on, to ``out``; each is rounded to its dtype first.

    Args:
        indices: of all values, or with ``start`` 0 of these; without them the values stand side by side.
    """
    values = values.astype(out.dtype, copy=False)
    stop = start + values.size
    if indices is not None:
        sums.add_at(out, indices[start:stop], values if sign > 0 else -values)
    elif sign > 0:
        np.add(out[start:stop], values, out=out[start:stop])
    else:
        np.subtract(out[start:stop], values, out=out[start:stop])
