"""Numbers in a narrower format, by pieces that stay in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol.kernels.sums import magnitudes, set_at

Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

PIECE = 1 << 15  # numbers at a time: in the cache, and few enough that torch does not share them out


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to nearest; what overflows is clamped to the largest."""
    if torch.finfo(dtype).max < torch.finfo(values.dtype).max:
        values = values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return values.to(dtype)


def widen(data: U8, dtype: torch.dtype, wide: np.dtype[Any]) -> Floats:
    """The numbers in bytes that need not be aligned, in the working precision."""
    if dtype.itemsize == wide.itemsize:  # as they are, without a detour of a few microseconds over torch
        return np.array(data).view(wide)
    if not data.size:  # numpy gives it a stride that torch does not view
        return np.empty(0, wide)
    numbers = torch.from_numpy(np.array(data)).view(dtype)
    values: Floats = numbers.to(torch.float64 if wide == np.float64 else torch.float32).numpy()
    return values


def settle_cast(
    values: Floats, dtype: torch.dtype, indices: Indices | None, out: Floats | None
) -> tuple[U8, float, float]:
    """See ``Kernels``."""
    if dtype.itemsize == values.itemsize:  # nothing is left of any value
        data, sent = np.array(values).view(np.uint8), magnitudes(values)[1]
        if out is not None and indices is None:
            out.fill(0)  # the values themselves, which are no longer needed
        elif out is not None:
            set_at(out, indices, np.zeros_like(values))
        return data, sent, 0.0
    data = np.empty(values.size * dtype.itemsize, np.uint8)
    sent = left = 0.0
    for start in range(0, values.size, PIECE):
        part = slice(start, start + PIECE)
        raw = data[start * dtype.itemsize : (start + PIECE) * dtype.itemsize]
        raw[:] = narrow(torch.from_numpy(values[part]), dtype).view(torch.uint8).numpy()
        received = widen(raw, dtype, values.dtype)
        rest = values[part] - received
        sent += magnitudes(received)[1]
        left += magnitudes(rest)[1]
        if out is not None and indices is None:
            out[part] = rest
        elif out is not None and indices is not None:
            set_at(out, indices[part], rest)
    return data, sent, left
