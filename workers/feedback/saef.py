"""Step-ahead error feedback with error averaging."""

from __future__ import annotations

from torch import Tensor

from protocol.sender import Message, Sender
from workers.feedback.method import Method, Round
from workers.settings import StepAhead


class Saef(Method):
    """``y = w - lambda e_k / a_k``; train from ``y`` to ``y'``; then as in local error feedback.

    Algorithm 1, lines 6 to 12 and 18, of Xu, Huo, Huang, "Step-Ahead Error Feedback for Distributed
    Training with Compressed Gradient" (AAAI 2021), with two-way compression. The gradient is taken
    where the model would be if this worker's residual had already arrived, which removes most of the
    mismatch between the point of the gradient and the point that it moves.

    Every ``average_every`` rounds (the paper's p), before the step, ``e_k = e_k - b_k + share * sum_j b_j``
    with ``b_k = decode(C(e_k))`` and ``share = a_k / sum_j a_j`` over those who took part; with ``C = f32``
    that is line 7.

    Differences from the paper: our ``e_k`` carries the weight, so the paper's is ``e_k / a_k``; lambda
    may be below 1; the average may be compressed; buffers of the model are not shifted, since a
    shifted variance could be negative.

    Ledger: given ``a_k d_k`` and what an averaging brings; residual ``e_k``; discarded 0. A refused
    update joins ``e_k``.
    """

    def __init__(self, sender: Sender, settings: StepAhead) -> None:
        super().__init__(sender)
        self._settings = settings

    def start(self, w: Tensor, weight: float) -> Tensor:
        """``w - lambda e_k / a_k`` for parameters, ``w`` for buffers."""
        y = w.clone()
        trained = self.sender.layout.trainable  # parameters come first in the flat vector
        self.sender.subtract_residual(y[:trained], self._settings.strength / weight)
        return y

    def averages(self, version: int) -> str | None:
        """Line 6: when ``version + 1`` is a multiple of p."""
        every = self._settings.average_every
        return self._settings.average if every is not None and (version + 1) % every == 0 else None

    def stage(self, given: Tensor, at: Round) -> Message:
        """See ``Method``."""
        return self.sender.stage(given.mul_(at.weight), at.sequence, compressors=at.compressors)
