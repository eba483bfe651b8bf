"""Error feedback methods: one file each, one table.

A method says where a round starts (``start``), whether the sender keeps what it did not send
(``keep``), and when residuals are averaged. The residual itself, staged and committed, is the
``protocol.sender.Sender``'s.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from protocol.sender import Sender
from workers.feedback.ef import Ef
from workers.feedback.none import NoCarry
from workers.feedback.saef import Saef
from workers.settings import ErrorFeedback, FeedbackSettings, NoFeedback


class Feedback(Protocol):
    """One error feedback method of a worker."""

    keep: bool

    def start(self, w: Tensor, sender: Sender, weight: float) -> Tensor:
        """The point from which the worker trains this round; may be ``w`` itself.

        Args:
            w: the replica, shape ``(layout.numel,)``.
            sender: of this worker, with its residual ``e_k``.
            weight: ``a_k``.
        """

    def averages(self, version: int) -> str | None:
        """The compressor for averaging residuals before the round at ``version``, or None."""


def feedback_for(settings: FeedbackSettings) -> Feedback:
    """The method that the settings name."""
    if isinstance(settings, NoFeedback):
        return NoCarry()
    if isinstance(settings, ErrorFeedback):
        return Ef()
    return Saef(settings.strength, settings.average_every, settings.average)
