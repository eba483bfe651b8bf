"""No error feedback: plain compressed training, for comparison."""

from __future__ import annotations

from torch import Tensor

from protocol.sender import Sender


class NoCarry:
    """``c_k = C(a_k d_k)``; what was not sent is discarded.

    Ledger: given ``a_k d_k``; residual 0; discarded ``a_k d_k - decode(c_k)``.
    """

    keep = False

    def start(self, w: Tensor, sender: Sender, weight: float) -> Tensor:
        """The replica itself."""
        return w

    def averages(self, version: int) -> str | None:
        """Never: there are no residuals."""
        return None
