"""What symbols stand for, and what is known of magnitudes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Numbers:
    """What symbols stand for: ``table[symbol] * scales[i // bucket]`` for element i.

    ``table`` has an entry for each symbol, at most 256; both have the working precision of the message.
    """

    table: Floats
    scales: Floats
    bucket: int

    @staticmethod
    def of(table: Floats) -> Numbers:
        """Numbers that need no scale."""
        return Numbers(table, np.ones(1, table.dtype), 1 << 62)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what is decoded."""
        return self.table.dtype


@dataclass(frozen=True)
class Extent:
    """Of magnitudes: the smallest and the largest, their sum and the sum of their squares in float64."""

    low: float
    high: float
    total: float
    squares: float
