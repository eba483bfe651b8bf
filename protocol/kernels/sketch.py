"""The kernels of ``protocol.ledger``'s sketch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Sketch = npt.NDArray[np.float64]

COLUMNS = 256


@njit(cache=True, nogil=True)
def _sign(row):  # type: ignore[no-untyped-def]
    """A fair sign from the mixed bits of the row's number (the finaliser of splitmix64)."""
    bits = np.uint64(row) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return 1.0 if (bits ^ (bits >> np.uint64(31))) & np.uint64(1) else -1.0


@njit(cache=True, nogil=True)
def add(vector, start, sketch):  # type: ignore[no-untyped-def]
    """Add a vector whose first element stands at ``start``."""
    stop = start + vector.size
    row = start // COLUMNS
    while row * COLUMNS < stop:
        first, last = max(start, row * COLUMNS), min(stop, (row + 1) * COLUMNS)
        sign = _sign(row)
        part, into = vector[first - start : last - start], sketch[first - row * COLUMNS :]
        for i in range(part.size):
            into[i] += sign * np.float64(part[i])
        row += 1


@njit(cache=True, nogil=True)
def add_difference(vector, other, start, sketch):  # type: ignore[no-untyped-def]
    """Add ``vector - other``."""
    stop = start + vector.size
    row = start // COLUMNS
    while row * COLUMNS < stop:
        first, last = max(start, row * COLUMNS), min(stop, (row + 1) * COLUMNS)
        sign = _sign(row)
        part, less = vector[first - start : last - start], other[first - start : last - start]
        into = sketch[first - row * COLUMNS :]
        for i in range(part.size):
            into[i] += sign * (np.float64(part[i]) - np.float64(less[i]))
        row += 1


@njit(cache=True, nogil=True)
def add_at(indices, values, start, sketch):  # type: ignore[no-untyped-def]
    """Add values that stand at ``start + indices``."""
    for i in range(indices.size):
        place = start + indices[i]
        sketch[place % COLUMNS] += _sign(place // COLUMNS) * np.float64(values[i])
