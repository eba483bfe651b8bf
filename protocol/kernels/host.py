"""``Kernels`` on numpy arrays, over all cores."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.coding.digits import pack as pack_digits
from protocol.coding.indices import encode as pack_indices
from protocol.kernels.casts import settle_cast
from protocol.kernels.cpu import at_least, block_top_k, top_k
from protocol.kernels.quantise import (
    by_cell,
    by_dither,
    by_exponent,
    by_knot,
    dtype_of,
    extent,
    histogram,
    moments,
    negative,
    settle,
)
from protocol.kernels.sums import fill, squares, squares_of_sum

__all__ = [
    "at",
    "at_least",
    "block_top_k",
    "by_cell",
    "by_dither",
    "by_exponent",
    "by_knot",
    "dtype_of",
    "extent",
    "fill",
    "histogram",
    "moments",
    "negative",
    "pack_digits",
    "pack_indices",
    "settle",
    "settle_cast",
    "squares",
    "squares_of_sum",
    "to_host",
    "top_k",
]


def at(values: npt.NDArray[Any], indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """See ``Kernels``."""
    return indices, values[indices]


def to_host(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """See ``Kernels``: it is there."""
    return array
