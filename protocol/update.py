"""A decoded segment, and how it is added to a vector without ever being a vector itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol.kernels import on_device
from protocol.kernels.product import Product
from protocol.kernels.threads import over, spans
from protocol.values.decoded import Narrowed, Symbols

Floats = npt.NDArray[np.floating[Any]]

STRIP = 1 << 19  # elements that stay in the last-level cache while several updates are added to them


@dataclass(frozen=True)
class Update:
    """A segment of ``numel`` elements: dense if ``indices`` is None, else zero where they do not point.

    ``indices`` are ascending int64, an array or a tensor on the GPU where they were decoded; the values have
    the working precision of the message, float32 or float64.
    """

    numel: int
    indices: Any
    coded: Symbols | Narrowed | Product

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        return self.coded.dtype

    @property
    def values(self) -> Floats:
        """All values in one array: as many as there are indices, or ``numel``."""
        return self.coded.array()

    def pieces(self) -> Iterator[tuple[int, Floats]]:
        """The values in order, as (start, array); never many at a time."""
        return self.coded.pieces()

    def add_to(self, out: Tensor) -> None:
        """``out += update``; ``out`` has shape ``(numel,)``. Values are rounded to its dtype first."""
        self._apply(out, 1)

    def subtract_from(self, out: Tensor) -> None:
        """``out -= update``, in the same way."""
        self._apply(out, -1)

    def add_scaled_to(self, out: Tensor, factor: float) -> None:
        """``out += factor * update``: values, then products, are rounded to the dtype of ``out``, then added."""
        self.check(out)
        for start, piece in self.pieces():
            products = torch.from_numpy(piece).to(out.dtype).mul(factor).to(out.device)
            if self.indices is None:
                out[start : start + products.numel()].add_(products)
            else:
                places = torch.as_tensor(self.indices[start : start + products.numel()])
                out.index_add_(0, places.to(out.device), products)

    def norm(self) -> float:
        """Of the values, in float64."""
        return math.hypot(*(float(np.linalg.norm(piece.astype(np.float64))) for _, piece in self.pieces()))

    def _apply(self, out: Tensor, sign: int) -> None:
        self.check(out)
        if not on_device(out.device):
            self.coded.add_to(out.numpy(), self.indices, sign)
            return
        places = None if self.indices is None else torch.as_tensor(self.indices).to(out.device)
        if isinstance(self.coded, Symbols) and self.coded.numbers.scales.size == 1:
            self.coded.add_on_device(out, places, sign)
            return
        for start, piece in self.pieces():
            values = torch.from_numpy(piece).to(out.dtype).to(out.device)
            if places is None:
                out[start : start + values.numel()].add_(values, alpha=sign)
            else:  # indices are distinct, so the order of additions cannot matter
                out.index_add_(0, places[start : start + values.numel()], values, alpha=sign)

    def check(self, out: Tensor) -> None:
        """Refuse a vector of another size.

        Raises:
            ValueError: ``out`` is not contiguous or has not ``numel`` elements.
        """
        if out.shape != (self.numel,) or not out.is_contiguous():
            raise ValueError(f"an update of {self.numel} elements cannot be added to a tensor of {tuple(out.shape)}")

    def dense(self) -> Tensor:
        """Shape ``(numel,)``, in the working precision of the message."""
        out = torch.zeros(self.numel, dtype=torch.float64 if self.dtype == np.float64 else torch.float32)
        self.add_to(out)
        return out


def accumulate(updates: Sequence[Update], out: Tensor) -> None:
    """``out += update`` for one after the other, with the same bits, but with less traffic.

    Sparse updates are added strip by strip, so that what several of them touch is in the cache.
    """
    for update in updates:
        update.check(out)
    strips = -(-out.numel() // STRIP)
    adders = [] if on_device(out.device) or strips < 2 else [_adder(u, out.numpy(), strips) for u in updates]
    if len(adders) < 2 or None in adders:
        for update in updates:
            update.add_to(out)
        return

    def add(first: int, last: int) -> None:
        for strip in range(first, last):
            for adder in adders:
                adder(strip)  # type: ignore[misc]

    over(spans(strips, 1, worth=1), add)


def _adder(update: Update, out: Floats, strips: int) -> Callable[[int], None] | None:
    """Adds what an update has in one strip of ``out``; None if it is not sparse."""
    if update.indices is None or isinstance(update.coded, Product):
        return None
    indices, add = update.indices, update.coded.adder(out)
    borders = np.searchsorted(indices, np.arange(0, strips + 1) * STRIP).tolist()
    return lambda strip: add(indices[borders[strip] : borders[strip + 1]], borders[strip])
