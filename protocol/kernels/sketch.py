"""The kernels of ``protocol.ledger``'s sketch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Sketch = npt.NDArray[np.float64]

COLUMNS = 256
WORD = 64  # neighbours whose signs are the bits of one word; COLUMNS is a multiple of it


@njit(cache=True, nogil=True)
def _signs(word):  # type: ignore[no-untyped-def]
    """A fair sign for each of 64 elements: the mixed bits of the word's number (the finaliser of splitmix64)."""
    bits = np.uint64(word) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@njit(cache=True, nogil=True)
def _sign(bits, place):  # type: ignore[no-untyped-def]
    return 2.0 * np.float64((bits >> np.uint64(place)) & np.uint64(1)) - 1.0


@njit(cache=True, nogil=True)
def add(vector, start, sketch):  # type: ignore[no-untyped-def]
    """Add a vector whose first element stands at ``start``."""
    stop = start + vector.size
    word = start // WORD
    while word * WORD < stop:
        first, last = max(start, word * WORD), min(stop, (word + 1) * WORD)
        bits = _signs(word) >> np.uint64(first - word * WORD)
        part, into = vector[first - start : last - start], sketch[first % COLUMNS :]
        for i in range(part.size):
            into[i] += _sign(bits, i) * np.float64(part[i])
        word += 1


@njit(cache=True, nogil=True)
def add_difference(vector, other, start, sketch):  # type: ignore[no-untyped-def]
    """Add ``vector - other``."""
    stop = start + vector.size
    word = start // WORD
    while word * WORD < stop:
        first, last = max(start, word * WORD), min(stop, (word + 1) * WORD)
        bits = _signs(word) >> np.uint64(first - word * WORD)
        part, less = vector[first - start : last - start], other[first - start : last - start]
        into = sketch[first % COLUMNS :]
        for i in range(part.size):
            into[i] += _sign(bits, i) * (np.float64(part[i]) - np.float64(less[i]))
        word += 1


@njit(cache=True, nogil=True)
def add_at(indices, values, start, sketch):  # type: ignore[no-untyped-def]
    """Add values that stand at ``start + indices``."""
    for i in range(indices.size):
        place = start + indices[i]
        sketch[place % COLUMNS] += _sign(_signs(place // WORD), place % WORD) * np.float64(values[i])
