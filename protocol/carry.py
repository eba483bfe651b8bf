"""What becomes of the part of a segment that its message leaves behind: one rule for each method.

A rule encodes one segment and leaves in the memory what counts from then on. ``Owed`` and ``Dropped`` stand
here, since the server sends by them too; the rules of EF21 stand with it, in ``workers.feedback``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol.compressors import Norms, State
from protocol.residual import Operands, Residual
from protocol.update import Update

U8 = npt.NDArray[np.uint8]


class Encoded(NamedTuple):
    """One segment as it travels, and as the receiver will read it."""

    body: U8
    state: State
    update: Update


Send = Callable[[Operands, Norms], Encoded]


@dataclass
class Kept:
    """What a rule has made of one segment.

    Attributes:
        left: what the memory shall stage.
        discarded: a vector that was taken out of the memory without being sent, or None.
        forgotten: all that was given and not sent is discarded too.
        replaces: the receiver shall forget what it had of this segment before it adds the message.
        beside: squared norm of what the rule has added up beside the sum that is sent, where that may be larger:
            its rounding counts too.
    """

    encoded: Encoded
    left: Tensor | None
    discarded: Tensor | None = None
    forgotten: bool = False
    replaces: bool = False
    beside: float = 0.0


class Carry(Protocol):
    """A rule. ``owes`` says whether the memory holds a debt to the receiver, to which all that is given adds."""

    owes: bool

    def stage(self, send: Send, memory: Residual, number: int, given: Tensor, norms: Norms) -> Kept:
        """Encode segment ``number`` and say what is left of it.

        Args:
            given: shape ``(n,)``; not altered.
            norms: receives the squared norms; ``left`` is that of what the receiver lacks and may still get.
        """


@dataclass(frozen=True)
class Owed:
    """Error feedback: ``p = s b e + g;  c = C(p);  e' = (1 - s) b e + p - decode(c)``, with ``b e`` clipped.

    Args:
        strength: s, the share of the residual that is fed back now; the rest waits.
        decay: b, the share of the residual that is kept; the rest is discarded.
        clip: no element of ``b e`` may be larger than this times the largest of ``|g|``; what is cut off is
            discarded. Where ``g`` is 0, as in a round without a step, it says nothing about the size of ``e``.
    """

    strength: float = 1.0
    decay: float = 1.0
    clip: float | None = None
    owes = True

    def stage(self, send: Send, memory: Residual, number: int, given: Tensor, norms: Norms) -> Kept:
        """See ``Carry``."""
        if self.strength == self.decay == 1.0 and self.clip is None:
            operands = memory.begin(number, given)
            return Kept(send(operands, norms), operands.out)
        before = memory.copy(number).clone()
        beside = square(before)
        residual = memory.copy(number).mul_(self.decay)
        if self.clip is not None and given.numel() and (largest := float(given.abs().max())):
            residual.clamp_(-self.clip * largest, self.clip * largest)
        discarded = before.sub_(residual)
        held = residual * (1.0 - self.strength)
        residual.mul_(self.strength)
        mine = Norms()
        encoded = send(Operands(given, residual, residual), mine)
        residual.add_(held)
        norms.before += mine.before
        norms.sent += mine.sent
        norms.left += square(residual)
        norms.discarded += square(discarded)
        return Kept(encoded, residual, discarded, beside=beside)


OWED = Owed()


@dataclass(frozen=True)
class Dropped:
    """No error feedback: ``c = C(g)``, and what is not sent is discarded. A residual from before is kept as it is."""

    owes = False

    def stage(self, send: Send, memory: Residual, number: int, given: Tensor, norms: Norms) -> Kept:
        """See ``Carry``."""
        mine = Norms()
        encoded = send(Operands(given, None, None), mine)
        norms.before += mine.before
        norms.sent += mine.sent
        norms.discarded += mine.left
        return Kept(encoded, memory.copy(number), forgotten=True)


def square(vector: Tensor) -> float:
    """``|vector|^2`` in float64."""
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64)) ** 2
