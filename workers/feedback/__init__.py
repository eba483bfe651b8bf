"""Error feedback methods: one file each, one table.

A method says where a round starts, what is sent, and what is kept; the residual itself, staged and
committed, is the ``protocol.sender.Sender``'s.
"""

from __future__ import annotations

from typing import assert_never

import torch

from protocol.compressors import Compressor
from protocol.layout import Layout
from protocol.residual import Memory
from protocol.sender import Sender
from workers.feedback.dgc import Dgc
from workers.feedback.ef import Ef
from workers.feedback.ef21 import Ef21
from workers.feedback.method import Method, Round
from workers.feedback.momentum import EfMomentum
from workers.feedback.none import NoCarry
from workers.feedback.saef import Saef
from workers.settings import (
    DeepGradientCompression,
    Ef21Feedback,
    ErrorFeedback,
    FeedbackSettings,
    MomentumFeedback,
    NoFeedback,
    StepAhead,
)

__all__ = ["Method", "Round", "feedback_for"]


def feedback_for(
    settings: FeedbackSettings,
    layout: Layout,
    compressors: tuple[Compressor, ...],
    seed: int,
    device: torch.device,
    memory: Memory,
) -> Method:
    """The method that the settings name, with a sender of its own. See ``Sender`` for the arguments."""
    carries = not isinstance(settings, NoFeedback)
    sender = Sender(layout, compressors, seed, device, memory if carries else None)
    match settings:
        case NoFeedback():
            return NoCarry(sender)
        case ErrorFeedback():
            return Ef(sender, settings)
        case MomentumFeedback():
            return EfMomentum(sender, settings, device)
        case StepAhead():
            return Saef(sender, settings)
        case Ef21Feedback():
            return Ef21(sender, settings, device)
        case DeepGradientCompression():
            return Dgc(sender, settings, device)
        case _:
            assert_never(settings)
