"""Local error feedback."""

from __future__ import annotations

from torch import Tensor

from protocol.sender import Sender


class Ef:
    """``p_k = e_k + a_k d_k``, ``c_k = C(p_k)``, ``e_k = p_k - decode(c_k)``.

    Lines 14 to 18 of Algorithm 1 in Xu, Huo, Huang, "Step-Ahead Error Feedback for Distributed Training
    with Compressed Gradient" (AAAI 2021); before it Seide et al. 2014 and Karimireddy et al. 2019.
    Differences: the weight ``a_k`` is applied before the residual, so residuals of workers simply add;
    ``d_k`` may be the sum of several local steps of any optimizer, or a gradient.

    Ledger: given ``a_k d_k``; residual ``e_k``; discarded 0. A refused update joins ``e_k``.
    """

    keep = True

    def start(self, w: Tensor, sender: Sender, weight: float) -> Tensor:
        """The replica itself."""
        return w

    def averages(self, version: int) -> str | None:
        """Never."""
        return None
