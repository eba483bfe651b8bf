"""Compressors: what is sent of a vector, and what is left for the next round.

All of them are stateless so far (their state is ``()``), deterministic, and declare their contraction
``delta``: ``|C(v) - v|**2 <= (1 - delta) |v|**2``. See ``docs/algorithms.md`` for the papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol import segment
from protocol.errors import NotFiniteError
from protocol.kernels import cpu, reference
from protocol.values import BY_NAME, ValueCode

U8 = npt.NDArray[np.uint8]
State = tuple[()]


@dataclass
class Norms:
    """Squared norms of what went through ``encode``, summed over calls; float64."""

    before: float = 0.0  # |vector + residual|^2
    sent: float = 0.0  # |decode(payload)|^2
    left: float = 0.0  # |what was not sent|^2


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
            vector: shape ``(n,)``, float32 or float64, contiguous, CPU or CUDA. Not altered.
            state: what ``init`` or the last call returned.
            key: a number that fixes all randomness of this call; equal keys give equal bytes.
            residual: the same shape and dtype as ``vector``; None for zeros.
            residual_out: receives the new residual; by default ``residual`` itself. A separate
                buffer saves a pass and keeps the old residual, which is what staging needs.
            norms: squared norms of this call are added to it.

        Returns:
            The payload, a 1-D uint8 array that ``protocol.decode`` reads, and the next state.

        Raises:
            NotFiniteError: the sum holds NaN or Inf, or its square overflows float64 (magnitudes
                beyond 1e154). ``residual`` and ``norms`` are as they were.
        """

    def delta(self, numel: int) -> float:
        """The declared contraction for vectors of ``numel`` elements.

        Up to rounding, to underflow, and to overflow of a value code narrower than the vector.
        """


def decode(payload: U8, numel: int) -> Tensor:
    """The dense vector in a payload: shape ``(numel,)``, float32 or float64, on the CPU.

    Raises:
        DecodeError: the payload is truncated, altered, or of a vector of another size; known before
            anything of that size is allocated.
    """
    return segment.unpack(payload, numel).dense()


def _code_for(name: str, vector: Tensor) -> ValueCode:
    return BY_NAME[name if name != "none" else "f64" if vector.dtype == torch.float64 else "f32"]


def _squares(vector: Tensor) -> float:
    if vector.is_cuda:
        return float(vector.double().square().sum())
    return float(cpu.magnitudes(vector.numpy())[1])


def _check(squares: float) -> None:
    if not math.isfinite(squares):
        raise NotFiniteError("the update holds NaN or Inf, or its square overflows")


@dataclass(frozen=True)
class Dense:
    """Every element, in a value code: ``f64``, ``f32``, ``bf16``, ``sign``, or ``none`` for no change.

    With ``sign`` this is scaled SignSGD (SAEF paper, equation 2).
    """

    values: str

    @property
    def spec(self) -> str:
        """See ``Compressor``."""
        return self.values

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
        total = vector if residual is None else vector + residual
        squares = _squares(total)
        _check(squares)
        given = total.cpu().numpy()
        body, sent = segment.pack_dense(_code_for(self.values, vector), given)
        out = residual if residual_out is None else residual_out
        if out is None and norms is None:
            return body, state
        left = given - sent
        if out is not None:
            out.copy_(torch.from_numpy(left))
        if norms is not None:
            norms.before += squares
            norms.sent += float(cpu.magnitudes(sent)[1])
            norms.left += float(cpu.magnitudes(left)[1])
        return body, state

    def delta(self, numel: int) -> float:
        """See ``Compressor``."""
        return 1.0 if self.values == "none" else BY_NAME[self.values].delta(numel)


@dataclass(frozen=True)
class TopK:
    """The ``k = max(1, round(ratio * n))`` elements of largest magnitude, their values in a value code.

    Ties go to the lowest index. Elements that are zero are not sent, so fewer than ``k`` may travel.
    Contraction: at least ``k / n`` times that of the value code (Stich, Cordonnier, Jaggi 2018).
    """

    ratio: float
    values: str

    @property
    def spec(self) -> str:
        """See ``Compressor``."""
        selection = f"topk:{self.ratio!r}".removesuffix(".0")
        return selection if self.values == "none" else f"{selection}+{self.values}"

    def count(self, numel: int) -> int:
        """How many of ``numel`` elements are sent."""
        return min(numel, max(1, round(self.ratio * numel)))

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
        out = residual if residual_out is None else residual_out
        if residual is None:
            total = vector
        elif out is None or out.data_ptr() == residual.data_ptr():
            total = torch.empty_like(vector)  # the old residual must survive a sum that is not finite
        else:
            total = out
        indices, values, squares = self._select(vector, residual, total)
        _check(squares)
        body, sent = segment.pack_sparse(_code_for(self.values, vector), vector.numel(), indices, values)
        if out is not None:
            if out is not total:
                out.copy_(total)
            segment.Update(vector.numel(), indices, sent).subtract_from(out)
        if norms is not None:
            selected = float(cpu.magnitudes(values)[1])
            norms.before += squares
            norms.sent += float(cpu.magnitudes(sent)[1])
            norms.left += max(0.0, squares - selected) + float(cpu.magnitudes(values - sent)[1])
        return body, state

    def _select(self, vector: Tensor, residual: Tensor | None, total: Tensor) -> tuple[cpu.Indices, cpu.Floats, float]:
        k = self.count(vector.numel())
        if vector.is_cuda or not vector.numel():
            indices, values, squares = reference.top_k(vector, residual, total, k)
            return indices.cpu().numpy(), values.cpu().numpy(), squares
        added = None if residual is None else residual.numpy()
        return cpu.top_k(vector.numpy(), added, total.numpy(), k)

    def delta(self, numel: int) -> float:
        """See ``Compressor``."""
        k = self.count(numel)
        share = k / numel if numel else 1.0
        return share if self.values == "none" else share * BY_NAME[self.values].delta(k)
