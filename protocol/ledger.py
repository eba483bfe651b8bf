"""The ledger of a sender: sum of what was sent + residual + discarded = sum of what was given.

Adding up whole vectors would cost as much memory as the model, so the ledger adds up sketches: a
fixed linear map to ``COLUMNS`` numbers in float64. Element ``i`` goes to column ``i % COLUMNS`` with a
sign that is one of the 64 bits of a hash of ``i // 64``, so that a sketch costs one read of the vector.
Over the signs, the expected square of a sketch's norm is the square of the vector's (the AMS sketch,
Alon, Matias, Szegedy 1999, with one row a column), with a relative variance of at most ``2 / COLUMNS`` where
all columns hold as much of the vector, and of ``2 sum_c (s_c / s)^2`` where column c holds ``s_c`` of its square.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from protocol.forms import Rounding
from protocol.kernels import sketch as kernels
from protocol.kernels.sketch import COLUMNS, Sketch
from protocol.update import Update


def sketch(vector: Tensor, start: int = 0) -> Sketch:
    """The sketch of a vector whose first element stands at ``start`` of the flat vector."""
    out = np.zeros(COLUMNS)
    kernels.add(vector.cpu().numpy(), start, out)
    return out


def sketch_update(update: Update, start: int) -> Sketch:
    """The sketch of a decoded segment that stands at ``start`` of the flat vector."""
    out = np.zeros(COLUMNS)
    for at, values in update.pieces():
        if update.indices is None:
            kernels.add(values, start + at, out)
        else:
            kernels.add_at(update.indices[at : at + values.size], values, start, out)
    return out


class Ledger:
    """Running sketches of what a sender was given, sent and discarded, and of what a compact memory rounded off."""

    def __init__(self) -> None:
        self.difference = np.zeros(COLUMNS)  # given - sent - discarded - rounded
        self.scale = 0.0  # sum over rounds of |p|, and of what a rule added up beside it
        self.rounded = Rounding(np.zeros(COLUMNS), 0.0)

    def enter(
        self, given: Sketch, sent: Sketch, discarded: Sketch | None, scale: float, rounding: Rounding | None = None
    ) -> None:
        """Book one round.

        Args:
            given: sketch, as are ``sent`` and ``discarded``.
            scale: norm of what went into the compressor, and of what a rule added up beside it.
            rounding: what a compact memory took away from the residual.
        """
        self.difference += given - sent
        if discarded is not None:
            self.difference -= discarded
        if rounding is not None:
            self.difference -= rounding.changed
            self.rounded += rounding
        self.scale += scale

    def error(self, residual: Sketch) -> float:
        """The conservation error: the larger of two, each near 1 at most in a healthy run of any length.

        What is missing, ``|sketch(given - sent - discarded - rounded - residual)| / (2**-24 sum_t |p_t|)``:
        arithmetic in float32 explains that much. What a compact memory rounds off is booked as it happens, so
        a leak shows as clearly as in the working precision.

        What rounding has taken away in all, ``|sketch(sum_t r_t)| / sqrt(sum_t V_t)``: it must be noise. The
        rounding is unbiased, so given all before, ``r_t`` has mean 0; hence the ``r_t`` are uncorrelated and
        ``E|sum_t r_t|**2 = sum_t E|r_t|**2 <= sum_t V_t``, which a sketch keeps in expectation. A value between
        two neighbours at distance s has variance ``s**2 / 4`` at most, if it is rounded to either and the mean
        is kept; so

        - bfloat16: ``V = (2**-8 |residual|)**2``, as s is at most ``2**-7`` of the value: the unit roundoff;
        - int8: ``V = 256 (m / 254)**2`` summed over blocks, as s is 1/127 of a block's largest magnitude m.

        A memory that takes away more than that, or always to one side, shows.
        """
        missing = float(np.linalg.norm(self.difference - residual))
        biased = float(np.linalg.norm(self.rounded.changed))
        return max(
            missing / (2.0**-24 * self.scale) if self.scale else 0.0,
            biased / self.rounded.expected**0.5 if self.rounded.expected else 0.0,
        )
