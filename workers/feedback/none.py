"""No error feedback: plain compressed training, for comparison."""

from __future__ import annotations

from torch import Tensor

from protocol.carry import Dropped
from protocol.sender import Message
from workers.feedback.method import Method, Round


class NoCarry(Method):
    """``c_k = C(a_k d_k)``; what was not sent is discarded.

    Ledger: given ``a_k d_k``; residual 0; discarded ``a_k d_k - decode(c_k)``.
    """

    carries = False

    def stage(self, given: Tensor, at: Round) -> Message:
        """See ``Method``."""
        return self.sender.stage(given.mul_(at.weight), at.sequence, Dropped(), at.compressors)
