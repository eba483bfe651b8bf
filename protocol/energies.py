"""Statistics of a whole residual in few bytes: its sketch, and squared norms by segment.

They travel in a push every ``sketch_every`` rounds. Sketches add up like the residuals that they are of, so the
server learns the norms of sums that it never sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from protocol.compressors import Norms
from protocol.errors import DecodeError
from protocol.kernels.sketch import COLUMNS, Sketch

SINGLE = np.dtype("<f4")


class Energy(NamedTuple):
    """Of one segment's message: ``|p|^2`` and ``|p - decode(C(p))|^2``."""

    before: float
    left: float


def pack_sketch(sketch: Sketch) -> bytes:
    """A scale in float32 and one signed byte a column: 260 bytes.

    A column is off by at most 1/254 of the largest, which is far below what sketching itself leaves open: the
    norm of a vector is known to about ``1 / sqrt(2 COLUMNS)``, 4.4 %. Beyond the range of float32, it is zero.
    """
    step, range_ = float(np.abs(sketch).max()) / 127.0, np.finfo(np.float32)
    if not float(range_.tiny) <= step <= float(range_.max):
        return np.zeros(1, SINGLE).tobytes() + bytes(COLUMNS)
    scale = np.array([step], SINGLE)
    return scale.tobytes() + np.rint(sketch / float(scale[0])).clip(-127, 127).astype(np.int8).tobytes()


def unpack_sketch(data: bytes) -> Sketch:
    """The inverse, rounded.

    Raises:
        DecodeError: the length is wrong, or the scale is negative or not finite.
    """
    if len(data) != SINGLE.itemsize + COLUMNS:
        raise DecodeError(f"the sketch takes {len(data)} bytes instead of {SINGLE.itemsize + COLUMNS}")
    scale = float(np.frombuffer(data[: SINGLE.itemsize], SINGLE)[0])
    if not 0.0 <= scale < math.inf:
        raise DecodeError(f"the sketch has the scale {scale}")
    return np.frombuffer(data[SINGLE.itemsize :], np.int8).astype(np.float64) * scale


def pack_energies(norms: Sequence[Norms]) -> bytes:
    """Eight bytes a segment. Without error feedback, what a message leaves behind is what was discarded."""
    largest = float(np.finfo(np.float32).max)
    values = np.array([(one.before, one.left or one.discarded) for one in norms], np.float64).reshape(-1)
    return values.clip(0.0, largest).astype(SINGLE).tobytes()


def unpack_energies(data: bytes, segments: int) -> list[Energy]:
    """The inverse, in float32.

    Raises:
        DecodeError: the length is wrong, or a value is negative or not finite.
    """
    if len(data) != 2 * SINGLE.itemsize * segments:
        raise DecodeError(f"the energies take {len(data)} bytes instead of {2 * SINGLE.itemsize * segments}")
    values = np.frombuffer(data, SINGLE).astype(np.float64).reshape(-1, 2)
    if not (np.isfinite(values).all() and (values >= 0.0).all()):
        raise DecodeError("the energies hold a value that is negative or not finite")
    return [Energy(float(before), float(left)) for before, left in values]
