"""Sums on the CPU: vector and residual, squares, and a few values into many places.

All kernels release the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from protocol.kernels.bits import LANES
from protocol.kernels.threads import over, spans

Floats = npt.NDArray[np.floating[Any]]

BLOCK = 256 * LANES  # values that stay in the second-level cache between the inner loops


# reassociation lets the sums of squares use vector registers; nothing else in here may be reordered,
# and "contract" must stay off, since a fused multiply-add would differ from the decoder's arithmetic
@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _add(vector, residual, total):  # type: ignore[no-untyped-def]
    squares = 0.0
    for i in range(vector.size):
        value = vector[i] + residual[i]
        total[i] = value
        squares += np.float64(value) * np.float64(value)
    return squares


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _copy(vector, total):  # type: ignore[no-untyped-def]
    squares = 0.0
    for i in range(vector.size):
        total[i] = vector[i]
        squares += np.float64(vector[i]) * np.float64(vector[i])
    return squares


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def magnitudes(values):  # type: ignore[no-untyped-def]
    """Sum of ``|value|`` and of ``value**2`` in float64."""
    total, squares = 0.0, 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        total += np.abs(value)
        squares += value * value
    return total, squares


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _squares_of_sum(vector, residual):  # type: ignore[no-untyped-def]
    squares = 0.0
    for i in range(vector.size):
        value = np.float64(vector[i] + residual[i])
        squares += value * value
    return squares


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _add_onto(vector, total):  # type: ignore[no-untyped-def]
    """Two arrays, not three of which two are one: LLVM makes vectors only of what cannot overlap."""
    squares = 0.0
    for i in range(vector.size):
        value = vector[i] + total[i]
        total[i] = value
        squares += np.float64(value) * np.float64(value)
    return squares


@njit(cache=True, nogil=True)
def fill_span(vector, residual, total, start, stop):  # type: ignore[no-untyped-def]
    """Write ``vector + residual`` (an empty residual is zero) and return its sum of squares."""
    if residual.size and total.ctypes.data == residual.ctypes.data:
        return _add_onto(vector[start:stop], total[start:stop])
    if residual.size:
        return _add(vector[start:stop], residual[start:stop], total[start:stop])
    if total.ctypes.data == vector.ctypes.data:
        return magnitudes(vector[start:stop])[1]
    return _copy(vector[start:stop], total[start:stop])


def fill(vector: Floats, residual: Floats | None, total: Floats) -> float:
    """Write ``vector + residual`` to ``total`` (which may be either) and return its sum of squares."""
    added = vector[:0] if residual is None else residual
    return float(sum(over(spans(vector.size, BLOCK), lambda a, b: fill_span(vector, added, total, a, b))))


def squares_of_sum(vector: Floats, residual: Floats) -> float:
    """``|vector + residual|**2`` in float64, which is not written anywhere."""
    return float(sum(over(spans(vector.size, BLOCK), lambda a, b: _squares_of_sum(vector[a:b], residual[a:b]))))


def squares(values: Floats) -> float:
    """``|values|**2`` in float64; not finite if a value is not."""
    return float(sum(part[1] for part in over(spans(values.size, BLOCK), lambda a, b: magnitudes(values[a:b]))))


@njit(cache=True, nogil=True)
def set_at(total, indices, values):  # type: ignore[no-untyped-def]
    """``total[indices] = values``."""
    for i in range(indices.size):
        total[np.uint64(indices[i])] = values[i]


@njit(cache=True, nogil=True)
def add_at(total, indices, values):  # type: ignore[no-untyped-def]
    """``total[indices] += values``."""
    for i in range(indices.size):
        total[np.uint64(indices[i])] += values[i]


def as_bits(values: Floats) -> tuple[npt.NDArray[Any], Any]:
    """The IEEE bits of the values and the mask that takes off the sign; magnitudes are ordered as they are."""
    bits: npt.NDArray[Any] = values.view(f"i{values.dtype.itemsize}")
    return bits, bits.dtype.type((1 << (8 * values.dtype.itemsize - 1)) - 1)
