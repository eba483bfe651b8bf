"""Each value in a floating-point format of its own; what overflows is clamped to the largest."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cast:
    """``f64``, ``f32``, ``f16``, ``bf16``: rounded to nearest, no scale."""

    name: str
    wire_id: int
    dtype: torch.dtype

    def omega(self, count: int) -> float | None:
        """Float32 and more lose nothing but float64's last bits; a narrower format is biased, however little."""
        return 0.0 if self.dtype.itemsize >= 4 else None

    def delta(self, count: int) -> float:
        """Rounding to nearest: a relative error of at most half a unit in the last place."""
        return 1.0 - (torch.finfo(self.dtype).eps / 2) ** 2
