"""The inner loops: selection and quantisation, where the data are.

``host`` works on numpy arrays (numba, all cores), ``device`` on tensors of a GPU (Triton and torch). Both
fulfil ``Kernels``, and the layers above hold an array or a tensor without caring which.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from protocol.kernels.numbers import Extent, Numbers

U8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]

Picked = tuple[Any, Any, float]  # ascending int64 indices, values, |vector + residual|**2


class Kernels(Protocol):
    """What both sides offer. ``Any`` stands for a 1-D array or tensor, float32 or float64 unless it says otherwise.

    The selections write ``vector + residual`` (None for zeros) to ``total``, which may be ``vector`` itself
    if there is no residual. Zeros are never selected; ties go to the lowest index; if the square of
    the sum is not finite, what was selected means nothing.
    """

    def fill(self, vector: Any, residual: Any, total: Any) -> float:
        """Write the sum and return its square in float64."""

    def top_k(self, vector: Any, residual: Any, total: Any, k: int) -> Picked:
        """The ``k`` largest magnitudes."""

    def block_top_k(self, vector: Any, residual: Any, total: Any, block: int, k: int, k_last: int) -> Picked:
        """The ``k`` largest of each ``block`` elements, ``k_last`` of a last one that is not full."""

    def at_least(self, vector: Any, residual: Any, total: Any, threshold: float) -> Picked:
        """All magnitudes that reach the threshold."""

    def at(self, values: Any, indices: npt.NDArray[np.int64]) -> tuple[Any, Any]:
        """Indices where the values are, and what stands there."""

    def squares(self, values: Any) -> float:
        """``|values|**2`` in float64; not finite if a value is not."""

    def squares_of_sum(self, vector: Any, residual: Any) -> float:
        """``|vector + residual|**2``, which is not written anywhere."""

    def dtype_of(self, values: Any) -> np.dtype[Any]:
        """As numpy calls it."""

    def extent(self, values: Any) -> Extent:
        """Of a non-empty array of finite values."""

    def histogram(self, values: Any, shift: int, bottom: int, bins: int) -> tuple[npt.NDArray[np.int64], Floats]:
        """How many magnitudes are in each bin, and their sums (float64), on the host.

        The bin is the magnitude's IEEE bits, shifted, less ``bottom``; what is below joins bin 0.
        """

    def by_cell(self, values: Any, shift: int, bottom: int, cells: U8, half: int) -> Any:
        """Symbols: the cell of each magnitude's bin, plus ``half`` for negative values."""

    def by_knot(self, values: Any, shift: int, bottom: int, cells: U8, knots: Floats, fine: int, half: int) -> Any:
        """Symbols: the place among ``fine`` steps between the knots of the magnitude's cell; plus ``half``."""

    def moments(self, values: Any, bucket: int, levels: int, largest: bool) -> tuple[Floats, Floats, Floats]:
        """By bucket, in float64 on the host: the unit of dithering, the expected square of it, ``|v|**2``.

        The unit is the largest magnitude or the norm of the bucket, over ``levels``.
        """

    def by_dither(self, values: Any, levels: int, units: Floats, bucket: int, key: int) -> Any:
        """Symbols: ``|v| / unit`` rounded up or down at random, so that it is the expectation; plus ``levels``."""

    def by_exponent(self, values: Any, top: int, key: int) -> Any:
        """Symbols: 127 for ``2**top``, 126 for half of it, ..., 0 for zero, up or down at random; plus 128."""

    def negative(self, values: Any) -> Any:
        """Symbols: 1 where a value is below zero, else 0."""

    def settle(self, values: Any, symbols: Any, numbers: Numbers, indices: Any, out: Any) -> tuple[float, float]:
        """Write what the symbols leave of the values to ``out``, at ``indices``; without them ``out`` is ``values``.

        Returns the squared norms of what was sent and of what is left of it.
        """

    def settle_cast(self, values: Any, dtype: Any, indices: Any, out: Any) -> tuple[U8, float, float]:
        """The little-endian bytes of the values in a torch dtype, on the host; the rest as ``settle``."""

    def pack_digits(self, symbols: Any, base: int) -> U8:
        """See ``protocol.coding.digits``; on the host."""

    def pack_indices(self, indices: Any, numel: int) -> tuple[int, int, U8]:
        """See ``protocol.coding.indices.encode``; the bytes are on the host."""

    def to_host(self, array: Any) -> npt.NDArray[Any]:
        """As a numpy array."""


def on_device(place: torch.device) -> bool:
    """Whether tensors that are there are for the kernels of ``device``."""
    return place.type != "cpu"


def kernels_of(values: Any) -> Kernels:
    """The kernels that work where the values are: a numpy array, or a tensor on a GPU."""
    if isinstance(values, np.ndarray):
        from protocol.kernels import host

        return cast(Kernels, host)
    from protocol.kernels import device

    return cast(Kernels, device)
