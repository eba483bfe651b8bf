"""The product of two thin matrices, which is what ``lowrank`` sends of a matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from protocol.kernels.threads import over, spans

Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.int64]

PIECE = 1 << 16  # elements of the product that are made at a time


@njit(cache=True, nogil=True)
def _product(left, right, out):  # type: ignore[no-untyped-def]
    """``out = left @ right.T``, each product and each sum rounded, in the order of the rank: the same everywhere."""
    for i in range(left.shape[0]):
        row = out[i]
        for r in range(left.shape[1]):
            factor = left[i, r]
            if r == 0:
                for j in range(row.size):
                    row[j] = factor * right[r, j]
            else:
                for j in range(row.size):
                    row[j] += factor * right[r, j]


@dataclass(frozen=True)
class Product:
    """``left @ right``: shapes ``(rows, rank)`` and ``(rank, columns)``, in the working precision."""

    left: Floats
    right: Floats

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        return self.left.dtype

    def __len__(self) -> int:
        return int(self.left.shape[0] * self.right.shape[1])

    def rows(self, first: int, last: int) -> Floats:
        """The elements of some rows, flat."""
        out = np.empty((last - first, self.right.shape[1]), self.dtype)
        _product(self.left[first:last], self.right, out)
        return out.reshape(-1)

    def array(self) -> Floats:
        """The elements in row-major order."""
        return self.rows(0, self.left.shape[0])

    def pieces(self) -> Iterator[tuple[int, Floats]]:
        """The elements in row-major order, as (start, array)."""
        columns = self.right.shape[1]
        step = max(1, PIECE // columns)
        for first in range(0, self.left.shape[0], step):
            yield first * columns, self.rows(first, min(first + step, self.left.shape[0]))

    def add_to(self, out: Floats, indices: Indices | None, sign: int) -> None:
        """``out += sign * product``, each element rounded to out's dtype first."""
        columns = self.right.shape[1]

        def add(first: int, last: int) -> None:
            step = max(1, PIECE // columns)
            for start in range(first, last, step):
                stop = min(start + step, last)
                part = out[start * columns : stop * columns]
                values = self.rows(start, stop).astype(out.dtype, copy=False)
                np.add(part, values, out=part) if sign > 0 else np.subtract(part, values, out=part)

        parts = spans(len(self), columns)
        over([(first // columns, last // columns) for first, last in parts], add)
