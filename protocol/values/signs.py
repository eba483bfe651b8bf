"""``sign``: one bit a value and one magnitude for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from protocol.kernels import kernels_of
from protocol.kernels.numbers import Numbers
from protocol.values.code import U8, Quantised, scale_of


@dataclass(frozen=True)
class Sign:
    """``|v|_1 / d * sign(v)`` (SAEF paper, equation 2; Bernstein et al. 2018 with a scale).

    Contraction: ``|C(v) - v|**2 = |v|**2 - |v|_1**2 / d``, so delta is at least ``1 / d``. Zero counts
    as positive. On the wire: the scale, then a bit each, 1 for negative.
    """

    name: str = "sign"
    wire_id: int = 4

    def omega(self, count: int) -> float | None:
        """Biased."""
        return None

    def delta(self, count: int) -> float:
        """The worst case is one value that is not zero."""
        return 1.0 / max(1, count)

    def encode(self, values: Any, key: int, contract: bool) -> Quantised:
        """See ``SymbolCode``."""
        kernels = kernels_of(values)
        extent = kernels.extent(values)
        same = extent.low == extent.high  # then a mean could only add a rounding error
        scale = np.array([extent.low if same else extent.total / len(values)], kernels.dtype_of(values))
        return Quantised(scale.tobytes(), 2, kernels.negative(values), self._numbers(scale))

    def _numbers(self, scale: Any) -> Numbers:
        return Numbers.of(np.concatenate([scale, -scale]))

    def read(self, data: U8, at: int, count: int, dtype: np.dtype[Any]) -> tuple[int, Numbers, int]:
        """See ``SymbolCode``."""
        scale, at = scale_of(data, at, 1, dtype)
        return 2, self._numbers(scale), at
