"""Deep Gradient Compression."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.compression import sends_all
from protocol.compressors import Compressor
from protocol.sender import Message, Sender
from workers.feedback.method import Method, Round
from workers.settings import DeepGradientCompression


class Dgc(Method):
    """``u_k' = m u_k + a_k g_k``;  ``v_k' = v_k + u_k'``;  ``c_k = C(v_k')``;  what is sent leaves both.

    Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression" (ICLR 2018), Algorithm 2: momentum correction (the
    velocity ``u_k`` is accumulated, not the gradient), momentum factor masking (``u_k'`` is cleared where an
    element was sent, so that stale momentum does not push it further), local gradient clipping by
    ``clip / sqrt(K)`` before all that. Nesterov's variant accumulates ``m u_k' + a_k g_k``. The sparsity
    warm-up is the schedule's (``schedule.warmup_rounds``). The server runs the user's optimizer, which must
    have no momentum of its own.

    Differences: ``v_k`` is the residual and keeps the error of the value code too; a compressor that
    sends all elements masks nothing, since nothing was late.

    Ledger: given ``a_k g_k / (1 - m)``, a gradient's whole effect; residual ``v_k + u_k m / (1 - m)``, with Nesterov
    ``v_k + u_k m^2 / (1 - m)``: what was accumulated, and what the velocity will still bring; discarded: the
    latter of what masking clears, and ``1 / (1 - m)`` times what clipping cuts off. A refused update joins
    ``v_k``, unmasked. A round without an optimizer step leaves ``u_k`` alone, but for the masking.
    """

    def __init__(self, sender: Sender, settings: DeepGradientCompression, device: torch.device) -> None:
        super().__init__(sender)
        self._settings = settings
        self._velocity = torch.zeros(sender.layout.trainable, dtype=sender.layout.dtype, device=device)
        self._staged = self._masked = self._velocity

    def stage(self, given: Tensor, at: Round) -> Message:
        """See ``Method``."""
        m, trained = self._settings.momentum, given[: self._velocity.numel()]
        dropped = self._clip(trained, at.workers) if not at.skipped else 0.0
        given.mul_(at.weight)
        self._staged = self._velocity
        if not at.skipped:
            self._staged = self._velocity.mul(m).add_(trained)
            if self._settings.nesterov:
                trained.add_(self._staged, alpha=m)
            else:
                trained.copy_(self._staged)
        message = self.sender.stage(given, at.sequence, compressors=at.compressors)
        self._masked = self._mask(message, at.compressors)
        cleared = float(torch.linalg.vector_norm(self._staged - self._masked, dtype=torch.float64))
        still = m * m if self._settings.nesterov else m
        message.norms.discarded += ((still * cleared) ** 2 + (at.weight * dropped) ** 2) / (1.0 - m) ** 2
        return message

    def commit(self) -> None:
        """See ``Method``."""
        super().commit()
        self._velocity = self._masked

    def refuse(self) -> None:
        """See ``Method``."""
        super().refuse()
        self._velocity = self._staged

    def _clip(self, gradient: Tensor, workers: int) -> float:
        """Scale the gradient down to ``clip / sqrt(K)``; the norm of what is cut off."""
        if self._settings.clip is None:
            return 0.0
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        bound = self._settings.clip / math.sqrt(workers)
        if not norm > bound:
            return 0.0
        gradient.mul_(bound / norm)
        return norm - bound

    def _mask(self, message: Message, compressors: Sequence[Compressor]) -> Tensor:
        masked = self._staged.clone()
        for place, update, one in zip(self.sender.layout.segments, message.updates, compressors, strict=True):
            late = update.indices is not None and not sends_all(one, place.numel)
            if late and place.stop <= masked.numel():
                masked[place.start : place.stop][torch.as_tensor(update.indices, device=masked.device)] = 0.0
        return masked
