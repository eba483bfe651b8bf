"""One sender's side of error feedback: what was not sent is carried over to the next message.

Workers and the server send by the same mechanism::

    p = residual + given;   message = C(p);   residual' = p - decode(message)

A message is *staged* (the old residual is kept), then *committed* when the receiver is known to have
it, or *refused*, which puts the given vector back into the residual. The ledger of a sender balances
at every one of these points.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol import ledger
from protocol.compressors import Compressor, Norms
from protocol.errors import NotFiniteError
from protocol.layout import Layout
from protocol.segment import unpack
from protocol.update import Update

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Message:
    """What one call of ``stage`` gave: bodies in the order of the segments, decoded and measured."""

    bodies: tuple[U8, ...]
    updates: tuple[Update, ...]
    norms: Norms


@dataclass(frozen=True)
class _Staged:
    given: Tensor
    message: Message


class Sender:
    """Residual, compressors and ledger of one sender.

    Args:
        layout: of the model; every segment is compressed on its own.
        compressors: one for each segment.
        seed: fixes the compressors' randomness, together with the number of the message.
        keep: False drops what was not sent instead of carrying it over (no error feedback).
        device: of the residual.

    Attributes:
        residual: shape ``(layout.numel,)`` in the working precision: what is owed to the receiver.
        ledger: given = sent + residual + discarded; ``given`` is what ``stage`` was given and what was
            added by ``add``; ``discarded`` is all that was not sent if ``keep`` is False.
    """

    def __init__(
        self,
        layout: Layout,
        compressors: Sequence[Compressor],
        seed: int,
        keep: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout
        self.compressors = tuple(compressors)
        self.seed = seed
        self.keep = keep
        self.residual = layout.zeros(device)
        self.ledger = ledger.Ledger()
        self._spare = layout.zeros(device)
        self._staged: _Staged | None = None

    def encode(self, vector: Tensor, sequence: int, residual: Tensor | None, out: Tensor) -> Message:
        """Compress ``vector + residual`` by segments and write what is left to ``out``.

        Raises:
            NotFiniteError: the sum holds NaN or Inf; the message names the first such tensor.
        """
        bodies, norms = [], Norms()
        for number, (place, compressor) in enumerate(zip(self.layout.segments, self.compressors, strict=True)):
            span = slice(place.start, place.stop)
            try:
                body, _ = compressor.encode(
                    vector[span],
                    compressor.init(place.numel),
                    _key(self.seed, sequence, number),
                    residual=None if residual is None else residual[span],
                    residual_out=out[span],
                    norms=norms,
                )
            except NotFiniteError:
                raise NotFiniteError(f"the update of {place.entry.name!r} holds NaN or Inf") from None
            bodies.append(body)
        decoded = (unpack(b, p.numel) for b, p in zip(bodies, self.layout.segments, strict=True))
        return Message(tuple(bodies), tuple(decoded), norms)

    def stage(self, given: Tensor, sequence: int) -> Message:
        """Compress ``residual + given``. Nothing is final until ``commit`` or ``refuse``.

        Args:
            given: shape ``(layout.numel,)``; must not be altered before commit or refuse.
            sequence: number of the message, which with the seed fixes the compressors' randomness.

        Raises:
            NotFiniteError: the sum holds NaN or Inf; residual and ledger are as they were.
        """
        message = self.encode(given, sequence, self.residual if self.keep else None, self._spare)
        self._staged = _Staged(given, message)
        return message

    def commit(self) -> None:
        """The receiver has the staged message: the new residual counts from now on."""
        given, message = self._take()
        lost = None if self.keep else ledger.sketch(self._spare)
        self.ledger.enter(ledger.sketch(given), self._sent(message), lost, math.sqrt(message.norms.before))
        if self.keep:
            self.residual, self._spare = self._spare, self.residual

    def refuse(self) -> None:
        """The receiver did not take the staged message: what was given joins the residual unsent."""
        given, message = self._take()
        zero = np.zeros(ledger.COLUMNS)
        lost = None if self.keep else ledger.sketch(given)
        self.ledger.enter(ledger.sketch(given), zero, lost, math.sqrt(message.norms.before))
        if self.keep:
            self.residual += given

    def replace(self, message: Message, received: Tensor) -> None:
        """Error averaging: ``residual - decode(message) + received``, booked as sent and given."""
        before = float(torch.linalg.vector_norm(self.residual))
        for place, update in zip(self.layout.segments, message.updates, strict=True):
            update.subtract_from(self.residual[place.start : place.stop])
        self.residual += received
        after = float(torch.linalg.vector_norm(self.residual))
        self.ledger.enter(ledger.sketch(received), self._sent(message), None, before + after)

    def conservation_error(self) -> float:
        """See ``Ledger.error``."""
        return self.ledger.error(self.residual)

    def error_norm(self) -> float:
        """``|residual|``."""
        return float(torch.linalg.vector_norm(self.residual))

    def _take(self) -> tuple[Tensor, Message]:
        staged, self._staged = self._staged, None
        if staged is None:
            raise RuntimeError("no message is staged")
        return staged.given, staged.message

    def _sent(self, message: Message) -> ledger.Sketch:
        total = np.zeros(ledger.COLUMNS)
        for place, update in zip(self.layout.segments, message.updates, strict=True):
            total += ledger.sketch_update(update, place.start)
        return total


def _key(seed: int, sequence: int, segment: int) -> int:
    text = f"{seed}/{sequence}/{segment}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
