"""``Kernels`` on tensors of a GPU.

Selection and packing are Triton's (``cuda``, ``cuda_coding``); what touches only the few values that are
sent is plain torch. Random choices are those of the host: equal keys give equal symbols.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol.coding import bitmap, raw
from protocol.coding import indices as index_codes
from protocol.kernels import cuda_coding
from protocol.kernels.casts import narrow
from protocol.kernels.cuda import at_least, block_top_k, top_k
from protocol.kernels.numbers import Extent, Numbers

__all__ = ["at_least", "block_top_k", "top_k"]

U8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]


def _bits(values: Tensor) -> Tensor:
    """The IEEE bits of the magnitudes, which are ordered as they are."""
    wide = values.dtype == torch.float64
    return values.abs().view(torch.int64 if wide else torch.int32)


def _like(array: npt.NDArray[Any], values: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(values.device)


def fill(vector: Tensor, residual: Tensor | None, total: Tensor) -> float:
    """See ``Kernels``."""
    if residual is not None:
        torch.add(vector, residual, out=total)
    elif total.data_ptr() != vector.data_ptr():
        total.copy_(vector)
    return squares(total)


def squares(values: Tensor) -> float:
    """See ``Kernels``."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())


def squares_of_sum(vector: Tensor, residual: Tensor) -> float:
    """See ``Kernels``."""
    return squares(vector + residual)


def at(values: Tensor, indices: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """See ``Kernels``."""
    places = _like(indices, values)
    return places, values[places]


def dtype_of(values: Tensor) -> np.dtype[Any]:
    """See ``Kernels``."""
    return np.dtype(np.float64 if values.dtype == torch.float64 else np.float32)


def extent(values: Tensor) -> Extent:
    """See ``Kernels``."""
    low, high = torch.aminmax(values.abs())
    total = values.abs().sum(dtype=torch.float64)
    found = torch.stack([low.double(), high.double(), total]).tolist()
    return Extent(found[0], found[1], found[2], squares(values))


def histogram(values: Tensor, shift: int, bottom: int, bins: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """See ``Kernels``. Sums are counts times the bins' middles, since those of atomics depend on their order."""
    places = ((_bits(values) >> shift) - bottom).clamp(min=0)
    counts = torch.bincount(places, minlength=bins).cpu().numpy()
    bits = torch.arange(bottom, bottom + bins + 1, dtype=_bits(values[:0]).dtype) << shift
    edges = bits.view(values.dtype).double().clamp(max=torch.finfo(values.dtype).max).numpy()
    sums = counts * (edges[:-1] + edges[1:]) / 2
    sums[0] = float((values.abs() * (places == 0)).sum(dtype=torch.float64))  # with all that is smaller
    return counts, sums


def by_cell(values: Tensor, shift: int, bottom: int, cells: U8, half: int) -> Tensor:
    """See ``Kernels``."""
    places = ((_bits(values) >> shift) - bottom).clamp(min=0)
    return _like(cells, values)[places.long()] + (values < 0).to(torch.uint8) * half


def by_knot(values: Tensor, shift: int, bottom: int, cells: U8, knots: Floats, fine: int, half: int) -> Tensor:
    """See ``Kernels``."""
    cell = by_cell(values, shift, bottom, cells, 0).long()
    low, step = _like(knots, values)[cell], _like(fine / np.diff(knots.astype(np.float64)), values)[cell]
    place = ((values.abs() - low) * step).long().clamp(0, fine - 1)
    return (cell * fine + place + (values < 0) * half).to(torch.uint8)


def negative(values: Tensor) -> Tensor:
    """See ``Kernels``."""
    return (values < 0).to(torch.uint8)


def _buckets(values: Tensor, bucket: int) -> Tensor:
    """Shape (buckets, bucket) in float64, zeros behind the last value."""
    count = -(-values.numel() // bucket)
    padded = values.new_zeros(count * bucket, dtype=torch.float64)
    padded[: values.numel()] = values
    return padded.view(count, bucket)


def moments(values: Tensor, bucket: int, levels: int, largest: bool) -> tuple[Floats, Floats, Floats]:
    """See ``Kernels``."""
    rows = _buckets(values, bucket).abs()
    square = rows.square().sum(1)
    unit = (rows.amax(1) if largest else square.sqrt()) / levels
    place = rows / torch.where(unit > 0, unit, torch.inf)[:, None]
    fraction = place - place.floor()
    second = (place.square() + fraction * (1 - fraction)).sum(1) * unit.square()
    return unit.cpu().numpy(), second.cpu().numpy(), square.cpu().numpy()


def _chance(count: int, key: int, device: torch.device) -> Tensor:
    """As ``quantise._chance``: 32-bit arithmetic in the lower halves of 64 bits."""
    mask = 0xFFFFFFFF
    bits = (torch.arange(count, dtype=torch.int64, device=device) * 0x9E3779B9 & mask) ^ (key & mask)
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B + (key >> 32)) & mask
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & mask
    return (bits ^ (bits >> 16)).double() * 2.0**-32


def by_dither(values: Tensor, levels: int, units: Floats, bucket: int, key: int) -> Tensor:
    """See ``Kernels``."""
    inverse = np.divide(1.0, units, out=np.zeros_like(units), where=units > 0)
    scaled = values.abs().double() * _like(inverse, values).repeat_interleave(bucket)[: values.numel()]
    level = (scaled + _chance(values.numel(), key, values.device)).long().clamp(max=levels)
    return (level + levels * ((level > 0) & (values < 0))).to(torch.uint8)


def by_exponent(values: Tensor, top: int, key: int) -> Tensor:
    """See ``Kernels``."""
    size, chance = values.abs().double(), _chance(values.numel(), key, values.device)
    fraction, exponent = torch.frexp(size)  # the fraction is from 1/2 to 1
    level = (exponent - 1 - top + 127 + (chance < 2 * fraction - 1)).clamp(max=127)
    lowest = math.ldexp(1.0, top - 126)
    level = torch.where(size < lowest, (chance < size / lowest).to(level.dtype), level)
    return (level + 128 * ((level > 0) & (values < 0))).to(torch.uint8)


def numbers_at(symbols: Tensor, numbers: Numbers) -> Tensor:
    """What the symbols stand for, each product rounded."""
    values = _like(numbers.table, symbols)[symbols.long()]
    if numbers.scales.size == 1:
        return values * _like(numbers.scales, symbols)
    return values * _like(numbers.scales, symbols).repeat_interleave(numbers.bucket)[: symbols.numel()]


def _put(rest: Tensor, indices: Tensor | None, out: Tensor | None) -> None:
    if out is not None and indices is None:
        out.copy_(rest)
    elif out is not None:
        out[indices] = rest


def settle(
    values: Tensor, symbols: Tensor, numbers: Numbers, indices: Tensor | None, out: Tensor | None
) -> tuple[float, float]:
    """See ``Kernels``."""
    received = numbers_at(symbols, numbers)
    rest = values - received
    _put(rest, indices, out)
    return squares(received), squares(rest)


def settle_cast(
    values: Tensor, dtype: torch.dtype, indices: Tensor | None, out: Tensor | None
) -> tuple[U8, float, float]:
    """See ``Kernels``."""
    narrowed = narrow(values, dtype)
    data, received = np.array(to_host(narrowed.view(torch.uint8))), narrowed.to(values.dtype)
    rest, sent = values - received, squares(received)
    _put(rest, indices, out)  # which may be what was narrowed
    return data, sent, squares(rest)


def pack_digits(symbols: Tensor, base: int) -> U8:
    """See ``Kernels``."""
    return to_host(cuda_coding.pack_digits(symbols, base))


def pack_indices(indices: Tensor, numel: int) -> tuple[int, int, U8]:
    """See ``Kernels``. What is not as good as random, or few, is left to the host, where all codes are tried."""
    b, unary_bits = cuda_coding.rice_parameter(indices, numel)
    size = -(-indices.numel() * b // 8) + -(-unary_bits // 8)
    runs = int((indices.diff() == 1).sum())
    others = min(bitmap.size(numel), raw.size(indices.numel(), numel))
    if size >= others or 4 * runs > indices.numel():
        return index_codes.encode(to_host(indices), numel)
    return index_codes.RICE, b, to_host(cuda_coding.rice_pack(indices, b, numel, unary_bits))


def to_host(array: Tensor) -> npt.NDArray[Any]:
    """See ``Kernels``."""
    host: npt.NDArray[Any] = array.cpu().numpy()
    return host
