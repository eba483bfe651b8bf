"""Local error feedback, and its variants that fade the residual."""

from __future__ import annotations

from torch import Tensor

from protocol.carry import Carry, Dropped, Owed
from protocol.sender import Message, Sender
from workers.feedback.method import Method, Round
from workers.settings import ErrorFeedback


class Ef(Method):
    """``p_k = s b e_k + a_k d_k``, ``c_k = C(p_k)``, ``e_k' = (1 - s) b e_k + p_k - decode(c_k)``.

    With ``s = b = 1``, the default, lines 14 to 18 of Algorithm 1 in Xu, Huo, Huang, "Step-Ahead Error
    Feedback for Distributed Training with Compressed Gradient" (AAAI 2021); before it Seide et al. 2014 and
    Karimireddy et al. 2019. Differences: the weight ``a_k`` is applied before the residual, so residuals of
    workers simply add; ``d_k`` may be the sum of several local steps of any optimizer, or a gradient.

    ``decay`` b and ``clip`` are those of a residual that must not grow without bound; ``reset_every`` clears
    it in a worker's first round from every such multiple of versions on; ``strength`` s, a function of the
    version, feeds back a share and lets the rest wait; before ``start_round`` there is no error feedback. They
    are the practices of the surveys ("periodic error reset", "overflow prevention", "adaptive error feedback",
    "delayed error feedback").

    Ledger: given ``a_k d_k``; residual ``e_k``; discarded: what decay, clip and resets take from ``e_k``, and
    before ``start_round`` what was not sent. A refused update joins ``e_k``, but before ``start_round`` it is gone.
    """

    def __init__(self, sender: Sender, settings: ErrorFeedback) -> None:
        super().__init__(sender)
        self._settings = settings
        self._period = self._staged = 0  # whole periods of ``reset_every`` until the last round

    def stage(self, given: Tensor, at: Round) -> Message:
        """See ``Method``."""
        self._staged = at.version // self._settings.reset_every if self._settings.reset_every else 0
        return self.sender.stage(given.mul_(at.weight), at.sequence, self._rule(at.version), at.compressors)

    def commit(self) -> None:
        """See ``Method``."""
        super().commit()
        self._period = self._staged

    def _rule(self, version: int) -> Carry:
        settings = self._settings
        if version < settings.start_round:
            return Dropped()
        reset = self._staged > self._period  # a worker need not take part in the very round at which a period begins
        return Owed(settings.strength.at(version), 0.0 if reset else settings.decay, settings.clip)
