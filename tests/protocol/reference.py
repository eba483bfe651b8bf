"""What the kernels must answer, in plain torch: slow, short, and on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(vector: Tensor, residual: Tensor | None, total: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    """The ``k`` largest ``|vector + residual|``: ascending indices, values, and ``|vector + residual|**2``.

    The contract is that of ``protocol.kernels.Kernels``: ties go to the lowest index, zeros are
    never selected, ``total`` receives the sum (with ``residual=None`` it must be ``vector`` itself).
    """
    if residual is not None:
        torch.add(vector, residual, out=total)
    magnitude = total.abs()
    places = torch.sort(magnitude, descending=True, stable=True).indices[:k]
    places = torch.sort(places[magnitude[places] > 0]).values
    return places, total[places], float(total.double().square().sum())
