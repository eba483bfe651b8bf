"""What all error feedback methods have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from protocol.compressors import Compressor
from protocol.sender import Message, Sender


@dataclass(frozen=True)
class Round:
    """What a method may know of the round whose update it stages.

    Attributes:
        version: of the replica.
        sequence: number of the message.
        weight: ``a_k``, this worker's share.
        workers: how many take part.
        skipped: the optimizer did not step in this round, so there is no gradient and nothing was learnt.
        compressors: for this round, one a segment.
    """

    version: int
    sequence: int
    weight: float
    workers: int
    skipped: bool
    compressors: Sequence[Compressor]


class Method(ABC):
    """One error feedback method of one worker: where a round starts, what is sent, what is kept.

    A message is staged, then committed once the server has answered, or refused; until then the state is the
    old one, so that the same message can be staged again.

    Args:
        sender: of this worker, with its residual ``e_k``.
    """

    carries = True  # the residual is a debt: it is handed over when the worker leaves

    def __init__(self, sender: Sender) -> None:
        self.sender = sender

    def start(self, w: Tensor, weight: float) -> Tensor:
        """The point from which the worker trains this round; may be ``w`` itself, the replica."""
        return w

    def averages(self, version: int) -> str | None:
        """The compressor for averaging residuals before the round at ``version``, or None."""
        return None

    @abstractmethod
    def stage(self, given: Tensor, at: Round) -> Message:
        """Make the round's message.

        Args:
            given: shape ``(layout.numel,)``, may be overwritten: the model difference ``d_k``, or with
                ``send: gradient`` the gradient, and the differences of the buffers behind it. Without the weight.

        Raises:
            NotFiniteError: what would be sent holds NaN or Inf; the state is as it was.
        """

    def commit(self) -> None:
        """The server has taken the staged message."""
        self.sender.commit()

    def refuse(self) -> None:
        """The server has not taken the staged message: its update is still to be sent."""
        self.sender.refuse()
