"""Selections: which elements of a vector are sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from protocol.kernels import kernels_of
from protocol.kernels.permutation import chosen


class Picked(NamedTuple):
    """What a selection gives: places, what is there, and the square of the whole vector."""

    indices: Any  # ascending int64; None for every element
    values: Any  # never zero, except where every element or a drawn one is sent
    squares: float  # |vector + residual|**2 in float64; not finite if an element is not


class Selection(Protocol):
    """Chooses elements of ``vector + residual``."""

    @property
    def spec(self) -> str:
        """As in specifications; empty for all elements."""

    def pick(self, vector: Any, residual: Any, total: Any, key: int) -> Picked:
        """Write ``vector + residual`` to ``total`` (which may be ``vector`` itself without a residual) and choose."""

    def count(self, numel: int) -> int:
        """How many of ``numel`` elements are sent at most."""

    def delta(self, numel: int) -> float:
        """Contraction: ``|S(v) - v|**2 <= (1 - delta) |v|**2``; in expectation if the choice is random."""

    def omega(self, numel: int) -> float | None:
        """Variance once what is sent is divided by ``delta``; None if that is no unbiased selection."""


def _k(ratio: float, numel: int) -> int:
    return min(numel, max(1, round(ratio * numel)))


def _ratio(name: str, ratio: float) -> str:
    return f"{name}:{ratio!r}".removesuffix(".0")


@dataclass(frozen=True)
class Everything:
    """Every element."""

    spec: str = ""

    def pick(self, vector: Any, residual: Any, total: Any, key: int) -> Picked:
        """See ``Selection``."""
        return Picked(None, total, kernels_of(vector).fill(vector, residual, total))

    def count(self, numel: int) -> int:
        """See ``Selection``."""
        return numel

    def delta(self, numel: int) -> float:
        """See ``Selection``."""
        return 1.0

    def omega(self, numel: int) -> float | None:
        """Nothing is lost."""
        return 0.0


@dataclass(frozen=True)
class TopK:
    """The ``k = max(1, round(ratio * n))`` elements of largest magnitude.

    Ties go to the lowest index. Elements that are zero are not sent, so fewer than ``k`` may travel.
    ``delta = k / n`` (Stich, Cordonnier, Jaggi 2018).
    """

    ratio: float

    @property
    def spec(self) -> str:
        """See ``Selection``."""
        return _ratio("topk", self.ratio)

    def pick(self, vector: Any, residual: Any, total: Any, key: int) -> Picked:
        """See ``Selection``."""
        return Picked(*kernels_of(vector).top_k(vector, residual, total, self.count(len(vector))))

    def count(self, numel: int) -> int:
        """See ``Selection``."""
        return _k(self.ratio, numel)

    def delta(self, numel: int) -> float:
        """See ``Selection``."""
        return self.count(numel) / numel if numel else 1.0

    def omega(self, numel: int) -> float | None:
        """Biased."""
        return None


@dataclass(frozen=True)
class BlockTopK:
    """The largest of each block of ``block`` elements, as many as ``topk`` takes of a vector of that size.

    Selection stays within a cache, at the price of a choice that is not the best of the whole vector. It
    contracts like ``topk`` (each block does).
    """

    ratio: float
    block: int = 4096

    @property
    def spec(self) -> str:
        """See ``Selection``."""
        return f"{_ratio('blocktopk', self.ratio)},block={self.block}"

    def pick(self, vector: Any, residual: Any, total: Any, key: int) -> Picked:
        """See ``Selection``."""
        select, block = kernels_of(vector).block_top_k, min(self.block, len(vector))
        last = _k(self.ratio, len(vector) % block or block)
        return Picked(*select(vector, residual, total, block, _k(self.ratio, block), last))

    def count(self, numel: int) -> int:
        """See ``Selection``."""
        full, last = divmod(numel, self.block)
        return full * _k(self.ratio, self.block) + (_k(self.ratio, last) if last else 0)

    def delta(self, numel: int) -> float:
        """Of the block that contracts least."""
        full, last = divmod(numel, self.block)
        shares = [_k(self.ratio, size) / size for size in (self.block if full else 0, last) if size]
        return min(shares, default=1.0)

    def omega(self, numel: int) -> float | None:
        """Biased."""
        return None


@dataclass(frozen=True)
class RandK:
    """``k`` elements that sender and receiver draw from the same key: no index travels.

    Every set of ``k`` is as likely. Unbiased with the factor ``n / k`` and ``omega = n / k - 1``; biased without
    the factor, and then ``delta = k / n`` in expectation.
    """

    ratio: float

    @property
    def spec(self) -> str:
        """See ``Selection``."""
        return _ratio("randk", self.ratio)

    def pick(self, vector: Any, residual: Any, total: Any, key: int) -> Picked:
        """See ``Selection``."""
        squares = kernels_of(vector).fill(vector, residual, total)
        indices, values = kernels_of(vector).at(total, chosen(key, self.count(len(vector)), len(vector)))
        return Picked(indices, values, squares)

    def count(self, numel: int) -> int:
        """See ``Selection``."""
        return _k(self.ratio, numel)

    def delta(self, numel: int) -> float:
        """See ``Selection``."""
        return self.count(numel) / numel if numel else 1.0

    def omega(self, numel: int) -> float | None:
        """``n / k - 1``."""
        return 1.0 / self.delta(numel) - 1.0


def _least(level: float, dtype: np.dtype[Any]) -> float:
    """The smallest number of the dtype that is not below a level, which may be between two of them."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = dtype.type(level)
    return float(rounded if float(rounded) >= level else np.nextafter(rounded, dtype.type(np.inf)))


@dataclass(frozen=True)
class Threshold:
    """Every element whose magnitude is at least ``level`` (Strom 2015; Dutta et al. 2020).

    An absolute compressor (Sahu et al. 2021): what is left has no element above the threshold, so
    ``|S(v) - v|**2 <= n * level**2``, but no share of the vector is sure to be sent: delta is 0.
    """

    level: float

    @property
    def spec(self) -> str:
        """See ``Selection``."""
        return f"threshold:{self.level!r}".removesuffix(".0").replace("e+", "e")  # a plus joins stages

    def pick(self, vector: Any, residual: Any, total: Any, key: int) -> Picked:
        """See ``Selection``."""
        kernels = kernels_of(vector)
        return Picked(*kernels.at_least(vector, residual, total, _least(self.level, kernels.dtype_of(vector))))

    def count(self, numel: int) -> int:
        """See ``Selection``."""
        return numel

    def delta(self, numel: int) -> float:
        """None is sure."""
        return 0.0

    def omega(self, numel: int) -> float | None:
        """Biased."""
        return None
