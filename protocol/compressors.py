"""Compressors: what is sent of a vector, and what is left for the next round.

Each declares its contraction ``delta``: ``|C(v) - v|**2 <= (1 - delta) |v|**2``. An unbiased one also declares
its variance ``omega``: ``E C(v) = v`` and ``E |C(v) - v|**2 <= omega |v|**2``; where what is left is kept (error
feedback) it scales itself by ``1 / (1 + omega)``, and the contraction holds in expectation. See
``docs/compressors.md`` for the papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol import segment
from protocol.errors import NotFiniteError
from protocol.kernels import Kernels, kernels_of, on_device
from protocol.selections import Picked, RandK, Selection
from protocol.values import ValueCode
from protocol.values.section import pack

U8 = npt.NDArray[np.uint8]

HUGE = 1e37  # a norm above which the sum of two finite float32 vectors may not be finite
VALUES = 2**64 - 1  # taken with a key: for the values other randomness than for the selection
State = tuple[()] | Tensor


@dataclass
class Norms:
    """Squared norms of what went through ``encode``, summed over calls; float64."""

    before: float = 0.0  # |vector + residual|^2
    sent: float = 0.0  # |decode(payload)|^2
    left: float = 0.0  # |vector + residual - decode(payload)|^2
    discarded: float = 0.0  # of what a rule of ``protocol.carry`` has thrown away

    def __add__(self, other: Norms) -> Norms:
        return Norms(
            self.before + other.before,
            self.sent + other.sent,
            self.left + other.left,
            self.discarded + other.discarded,
        )


class Compressor(Protocol):
    """Stateful maths in the order value, state, key; a stateless compressor carries ``()``."""

    @property
    def spec(self) -> str:
        """The specification that gives this compressor."""

    def init(self, numel: int) -> State:
        """The state before the first call."""

    def encode(
        self,
        vector: Tensor,
        state: State,
        key: int,
        residual: Tensor | None = None,
        residual_out: Tensor | None = None,
        norms: Norms | None = None,
    ) -> tuple[U8, State]:
        """Encode ``vector + residual`` and write what was not sent to ``residual_out``.

        Args:
            vector: shape ``(n,)``, float32 or float64, contiguous, CPU or CUDA. Not altered,
                unless it is ``residual_out`` itself.
            state: what ``init`` or the last call returned. Not altered.
            key: an integer, modulo 2**64, that fixes all randomness of this call; equal keys give equal bytes.
            residual: the same shape and dtype as ``vector``; None for zeros.
            residual_out: receives the new residual; by default ``residual`` itself. A separate
                buffer keeps the old residual, which is what staging needs. If neither is given, what is
                left is dropped, and an unbiased compressor does not scale itself down.
            norms: squared norms of this call are added to it.

        Returns:
            The payload, a 1-D uint8 array that ``protocol.decode`` reads, and the next state.

        Raises:
            NotFiniteError: the sum holds NaN or Inf, or its square overflows float64 (magnitudes
                beyond 1e154). ``residual`` and ``norms`` are as they were (a residual that is written in
                place: unless it was itself not finite, or within 4 % of the largest number).
            ValueError: the tensors do not fit each other or this description.
        """

    def delta(self, numel: int) -> float:
        """The declared contraction for vectors of ``numel`` elements; in expectation for a random compressor.

        Up to rounding, to underflow, and to overflow: of a value code narrower than the vector, of ``qsgd`` where
        the norm is near the largest number, of ``natural`` where the next power of two is beyond it.
        """

    def omega(self, numel: int) -> float | None:
        """The declared variance without error feedback; None if the compressor is biased."""


def decode(payload: U8, numel: int) -> Tensor:
    """The dense vector in a payload: shape ``(numel,)``, float32 or float64, on the CPU.

    Raises:
        DecodeError: the payload is truncated, altered, or of a vector of another size; known before
            anything of that size is allocated.
    """
    return segment.unpack(payload, numel).dense()


@dataclass(frozen=True)
class Arrays:
    """The arguments of ``encode`` as arrays or tensors of a GPU, and where the sum of vector and residual goes."""

    vector: Any
    residual: Any
    total: Any
    out: Any  # receives the new residual; None if nobody wants it

    @staticmethod
    def of(vector: Tensor, residual: Tensor | None, residual_out: Tensor | None) -> Arrays:
        """Refuses what the kernels take for granted, and a sum that is not finite before it overwrites a residual."""
        out = residual if residual_out is None else residual_out
        _refuse_unlike(vector, residual=residual, residual_out=residual_out)
        given, added, rest = (
            None if x is None else x.detach() if on_device(x.device) else x.detach().numpy()
            for x in (vector, residual, out)
        )
        if residual is not None and out is not None and out.data_ptr() == residual.data_ptr():
            kernels = kernels_of(given)
            check(squares := kernels.squares(given))
            if squares > HUGE**2:  # else only a residual beyond all bounds could make the sum overflow
                check(kernels.squares_of_sum(given, added))
        return Arrays(given, added, given if rest is None else rest, rest)

    @property
    def kernels(self) -> Kernels:
        """Those for where the arrays are."""
        return kernels_of(self.vector)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The working precision."""
        return self.kernels.dtype_of(self.vector)


def _refuse_unlike(vector: Tensor, **others: Tensor | None) -> None:
    tensors = {"vector": vector, **{name: tensor for name, tensor in others.items() if tensor is not None}}
    for name, tensor in tensors.items():
        if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()} and {tensor.dtype}; "
                "valid is one dimension, contiguous, float32 or float64"
            )
        if (tensor.shape, tensor.dtype, tensor.device) != (vector.shape, vector.dtype, vector.device):
            raise ValueError(f"{name} is not of the shape, dtype and device of the vector")
    starts = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for name, start in starts.items():
        if any(0 < abs(start - other) < vector.nbytes for other in starts.values()):
            raise ValueError(f"{name} overlaps another argument in part; valid is the same memory, or other memory")


def check(squares: float) -> None:
    """Raise NotFiniteError if a sum of squares says that an element is NaN or Inf."""
    if not math.isfinite(squares):
        raise NotFiniteError("the update holds NaN or Inf, or its square overflows")


@dataclass(frozen=True)
class Pipeline:
    """A selection, then a value code (None: as they are), then entropy coding where it pays."""

    selection: Selection
    code: ValueCode | None = None
    entropy: bool = False

    @property
    def spec(self) -> str:
        """See ``Compressor``."""
        first = self.selection.spec
        values = self.code.name if self.code else "" if first else "none"
        return "+".join(stage for stage in (first, values, "entropy" if self.entropy else "") if stage)

    def init(self, numel: int) -> State:
        """See ``Compressor``."""
        return ()

    def encode(
        self,
        vector: Tensor,
        state: State,
        key: int,
        residual: Tensor | None = None,
        residual_out: Tensor | None = None,
        norms: Norms | None = None,
    ) -> tuple[U8, State]:
        """See ``Compressor``."""
        arrays = Arrays.of(vector, residual, residual_out)
        numel, dtype, key = vector.numel(), arrays.dtype, key % 2**64
        code = self.code or segment.exact(dtype)
        if not numel:
            return segment.nothing(code, dtype, 0), state
        picked = self.selection.pick(arrays.vector, arrays.residual, arrays.total, key)
        check(picked.squares)
        if not len(picked.values) or (picked.squares == 0.0 and not arrays.total.any()):
            if norms is not None:
                norms.before += picked.squares
                norms.left += picked.squares
            return segment.nothing(code, dtype, numel), state
        contract = arrays.out is not None or self.omega(numel) is None
        values, rest, scaled = picked.values, arrays.out, None
        if not contract and isinstance(self.selection, RandK):
            factor, largest = float(dtype.type(1.0 / self.selection.delta(numel))), float(np.finfo(dtype).max)
            scaled = values.clip(-largest / factor, largest / factor) * factor
            values = rest = scaled * 1
        packed = pack(code, values, key ^ VALUES, contract, self.entropy, picked.indices if contract else None, rest)
        if norms is not None:
            norms.before += picked.squares
            norms.sent += packed.sent
            norms.left += _left(picked, packed.left, scaled, rest)
        if picked.indices is None:
            return segment.dense(code, dtype, numel, packed), state
        if isinstance(self.selection, RandK):
            return segment.keyed(code, dtype, numel, key, len(values), packed), state
        return segment.sparse(code, dtype, numel, picked.indices, packed), state

    def delta(self, numel: int) -> float:
        """See ``Compressor``: the product of the stages', whose errors are at right angles."""
        values = self.code.delta(self.selection.count(numel)) if self.code else 1.0
        return self.selection.delta(numel) * values

    def omega(self, numel: int) -> float | None:
        """See ``Compressor``: ``1 + omega`` is the product of the stages'."""
        selection = self.selection.omega(numel)
        values = self.code.omega(self.selection.count(numel)) if self.code else 0.0
        return None if selection is None or values is None else (1.0 + selection) * (1.0 + values) - 1.0


def _left(picked: Picked, left: float, scaled: Any, rest: Any) -> float:
    """The square of what the receiver will not have, of the elements that were picked and of the others."""
    if picked.indices is None:
        return left
    squares = kernels_of(picked.values).squares
    selected = squares(picked.values)
    if scaled is not None:  # unbiased: what is left is taken from the values as they were
        left = squares(picked.values - (scaled - rest))
    return max(0.0, picked.squares - selected) + left
