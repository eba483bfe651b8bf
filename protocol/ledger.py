"""The ledger of a sender: sum of what was sent + residual + discarded = sum of what was given.

Adding up whole vectors would cost as much memory as the model, so the ledger adds up sketches: a
fixed linear map to ``COLUMNS`` numbers in float64. Element ``i`` goes to column ``i % COLUMNS`` with a
sign that depends on ``i // COLUMNS`` alone, so that a sketch costs one read of the vector. Over the
signs, the expected square of a sketch's norm is the square of the vector's (the AMS sketch, Alon,
Matias, Szegedy 1999, with one row a column).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit
from torch import Tensor

from protocol.update import Update

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
def _sketch(vector, start, sketch):  # type: ignore[no-untyped-def]
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
def _sketch_at(indices, values, start, sketch):  # type: ignore[no-untyped-def]
    for i in range(indices.size):
        place = start + indices[i]
        sketch[place % COLUMNS] += _sign(place // COLUMNS) * np.float64(values[i])


def sketch(vector: Tensor, start: int = 0) -> Sketch:
    """The sketch of a vector whose first element stands at ``start`` of the flat vector."""
    out = np.zeros(COLUMNS)
    _sketch(vector.cpu().numpy(), start, out)
    return out


def sketch_update(update: Update, start: int) -> Sketch:
    """The sketch of a decoded segment that stands at ``start`` of the flat vector."""
    out = np.zeros(COLUMNS)
    if update.indices is None:
        _sketch(update.values, start, out)
    else:
        _sketch_at(update.indices, update.values, start, out)
    return out


class Ledger:
    """Running sketches of what a sender was given, sent and discarded."""

    def __init__(self) -> None:
        self.difference = np.zeros(COLUMNS)  # given - sent - discarded
        self.scale = 0.0  # sum over rounds of |p|

    def enter(self, given: Sketch, sent: Sketch, discarded: Sketch | None, scale: float) -> None:
        """Book one round; ``scale`` is the norm of what went into the compressor."""
        self.difference += given - sent
        if discarded is not None:
            self.difference -= discarded
        self.scale += scale

    def error(self, residual: Tensor) -> float:
        """The conservation error: ``|sketch(given - sent - discarded - residual)| / (2**-24 sum |p|)``.

        Rounding in float32 keeps it near 1, whatever the number of rounds.
        """
        missing = float(np.linalg.norm(self.difference - sketch(residual)))
        return missing / (2.0**-24 * self.scale) if self.scale else 0.0
