"""``lowrank``: a matrix as the product of two thin ones (PowerSGD, Vogels, Karimireddy, Jaggi 2019).

Algorithm 1 of the paper: ``P = M Q``, orthogonalise ``P``, ``Q = M^T P``, decode ``P Q^T``; ``Q`` is kept for
the next call, so that each call is one more power iteration towards the dominant singular vectors.

Differences: every sender projects its own matrix, where the paper averages ``P`` over workers before the
orthogonalisation (there is no all-reduce here); ``P`` is orthogonalised by Householder reflections, which
rank-deficient matrices do not disturb; where the kept ``Q`` sends less than a random one would on
average, a random one is taken, so that the contraction is sure; tensors that are no matrix, or too small
to save anything, or that hold numbers near the largest, are sent as they are, in the same value code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocol import segment
from protocol.compressors import U8, Arrays, Norms, Pipeline, State, check
from protocol.kernels.casts import narrow
from protocol.selections import Everything
from protocol.values import Cast
from protocol.values.section import pack


@dataclass(frozen=True)
class LowRank:
    """``rank`` columns of a matrix of ``rows`` x ``columns``. The state is ``Q``, shape ``(columns, rank)``.

    ``delta = rank / columns`` in expectation over the first ``Q``: its span is a random subspace, which holds
    that share of the square of every row.
    """

    rank: int
    rows: int
    columns: int
    code: Cast | None = None
    entropy: bool = False

    @property
    def spec(self) -> str:
        """See ``Compressor``."""
        stages = (f"lowrank:{self.rank}", self.code.name if self.code else "", "entropy" if self.entropy else "")
        return "+".join(stage for stage in stages if stage)

    def init(self, numel: int) -> State:
        """See ``Compressor``; the first call draws ``Q`` from its key."""
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
        code = self.code or segment.exact(arrays.dtype)
        squares = arrays.kernels.fill(arrays.vector, arrays.residual, arrays.total)
        check(squares)
        total, body = torch.as_tensor(arrays.total), segment.nothing(code, arrays.dtype, vector.numel())
        largest = float(np.finfo(arrays.dtype).max)
        scale = total.abs().max()
        if float(scale) > largest / (2 * self.rank * math.sqrt(self.rows)):  # no room for sums
            plain = Pipeline(Everything(), code, self.entropy)
            body, _ = plain.encode(total, (), key, None, total if arrays.out is not None else None, norms)
            return body, state
        if scale:
            warm = state if isinstance(state, Tensor) else None
            left, right, state = self._factors(total.view(self.rows, self.columns), scale, code.dtype, warm, key)
            body = self._pack(code, arrays.dtype, left, right)
        received = segment.unpack(body, vector.numel())
        if norms is not None:
            sent = received.dense().to(total.device)
            norms.before += squares
            norms.sent += _square(sent)
            norms.left += _square(total - sent)
        if arrays.out is not None:
            received.subtract_from(total)
        return body, state

    def _pack(self, code: Cast, dtype: np.dtype[Any], left: Tensor, right: Tensor) -> U8:
        """Both matrices in the same way: entropy-coded if that pays for each."""
        flat = [x.contiguous().view(-1).cpu().numpy() for x in (left, right)]
        parts = [pack(code, x, smaller=self.entropy) for x in flat]
        if parts[0].entropy != parts[1].entropy:
            parts = [pack(code, x) for x in flat]
        return segment.product(code, dtype, self.rows, self.columns, self.rank, parts)

    def _factors(
        self, matrix: Tensor, scale: Tensor, dtype: torch.dtype, warm: Tensor | None, key: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``P`` as the receiver will have it, the best ``Q`` for that, and the ``Q`` to begin with next time."""
        matrix = matrix / scale  # its largest magnitude, so that no square underflows
        for begin in (warm, None):
            if begin is None:
                generator = torch.Generator().manual_seed(key % 2**63)
                begin = torch.randn(self.columns, self.rank, generator=generator, dtype=matrix.dtype).to(matrix.device)
            left = narrow(torch.linalg.qr(matrix @ begin).Q, dtype).to(matrix.dtype)
            square = left.T @ left  # the identity, unless rounding has bent it
            right = matrix.T @ torch.linalg.solve(square, left.T).T
            sent = (square * (right.T @ right)).sum()  # |P Q^T|**2
            if begin is not warm or sent >= self.rank / self.columns * matrix.square().sum():
                break
        return left, right * scale, right

    def delta(self, numel: int) -> float:
        """See ``Compressor``."""
        values = self.code.delta(numel) if self.code else 1.0
        return self.rank / self.columns * values

    def omega(self, numel: int) -> float | None:
        """Biased."""
        return None


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())
