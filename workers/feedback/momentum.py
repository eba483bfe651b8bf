"""Error feedback with momentum inside the loop."""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.sender import Message, Sender
from workers.feedback.method import Method, Round
from workers.settings import MomentumFeedback


class EfMomentum(Method):
    """``m_k' = mu m_k + a_k g_k``;  ``p_k = e_k + m_k'``, with Nesterov ``e_k + mu m_k' + a_k g_k``;  then as ``Ef``.

    Zheng, Huang, Kwok, "Communication-Efficient Distributed Blockwise Momentum SGD with Error-Feedback"
    (NeurIPS 2019), Algorithm 2: what is compressed is the momentum step, so the server adds up steps and needs
    no momentum of its own. Differences: ``g_k`` may be a model difference; the server applies the learning
    rate of the round in which a value arrives, where the paper rescales ``e_k`` by the ratio of the rates.

    Ledger: given ``m_k'`` (with Nesterov ``mu m_k' + a_k g_k``); residual ``e_k``; discarded 0. A refused update
    joins ``e_k`` and its momentum stays. A round without an optimizer step leaves ``m_k`` alone and gives 0.
    """

    def __init__(self, sender: Sender, settings: MomentumFeedback, device: torch.device) -> None:
        super().__init__(sender)
        self._settings = settings
        self._momentum = torch.zeros(sender.layout.trainable, dtype=sender.layout.dtype, device=device)
        self._staged = self._momentum

    def stage(self, given: Tensor, at: Round) -> Message:
        """See ``Method``."""
        mu, trained = self._settings.momentum, given[: self._momentum.numel()]
        given.mul_(at.weight)
        self._staged = self._momentum
        if not at.skipped:
            self._staged = self._momentum.mul(mu).add_(trained)
            if self._settings.nesterov:
                trained.add_(self._staged, alpha=mu)
            else:
                trained.copy_(self._staged)
        return self.sender.stage(given, at.sequence, compressors=at.compressors)

    def commit(self) -> None:
        """See ``Method``."""
        super().commit()
        self._momentum = self._staged

    def refuse(self) -> None:
        """See ``Method``."""
        super().refuse()
        self._momentum = self._staged
