"""One sender's side of error feedback: what was not sent is carried over to the next message.

Workers and the server send by the same mechanism::

    p = residual + given;   message = C(p);   residual' = p - decode(message)

A message is *staged* (the old residual is kept), then *committed* when the receiver is known to have
it, or *refused*, which puts the given vector back into the residual. The ledger of a sender balances
at every one of these points. The compressors' states go the same way: a refused message leaves them as
they were.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol import ledger
from protocol.compressors import Compressor, Norms, State
from protocol.errors import NotFiniteError
from protocol.forms import Rounding
from protocol.kernels.sketch import COLUMNS, Sketch
from protocol.layout import Layout, Segment
from protocol.residual import Memory, Nothing, Operands, Residual, residual_for
from protocol.segment import unpack
from protocol.update import Update

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Message:
    """What one call of ``stage`` gave: bodies in the order of the segments, decoded and measured."""

    sequence: int
    bodies: tuple[U8, ...]
    updates: tuple[Update, ...]
    norms: Norms


@dataclass(frozen=True)
class _Staged:
    given: Tensor
    message: Message
    states: list[State]


class Sender:
    """Residual, compressors and ledger of one sender.

    Args:
        layout: of the model; every segment is compressed on its own.
        compressors: one for each segment.
        seed: fixes all randomness, together with the number of the message.
        keep: False drops what was not sent instead of carrying it over (no error feedback).
        device: of the vectors that are given.
        memory: how the residual is kept, see ``protocol.residual``.

    Attributes:
        ledger: given = sent + residual + discarded; ``given`` is what ``stage`` was given and what
            ``replace`` received; ``discarded`` is all that was not sent if ``keep`` is False.
    """

    def __init__(
        self,
        layout: Layout,
        compressors: Sequence[Compressor],
        seed: int,
        keep: bool = True,
        device: torch.device | str = "cpu",
        memory: Memory = "float32",
    ) -> None:
        self.layout = layout
        self.compressors = tuple(compressors)
        self.seed = seed
        self.keep = keep
        self.ledger = ledger.Ledger()
        self._residual: Residual = residual_for(memory, layout, device) if keep else Nothing(layout, device)
        self._states = _first(self.compressors, layout)
        self._staged: _Staged | None = None

    # -- messages --------------------------------------------------------------------------------

    def stage(self, given: Tensor, sequence: int) -> Message:
        """Compress ``residual + given``. Nothing is final until ``commit`` or ``refuse``.

        Args:
            given: shape ``(layout.numel,)``; must not be altered before commit or refuse.
            sequence: number of the message, which with the seed fixes all randomness.

        Raises:
            NotFiniteError: the sum holds NaN or Inf; the message names the first such tensor. Residual,
                states and ledger are as they were.
        """
        self._staged = None
        bodies, states, norms = [], [], Norms()
        for number, (place, compressor) in enumerate(zip(self.layout.segments, self.compressors, strict=True)):
            operands = self._residual.begin(number, given[place.start : place.stop])
            key = self._key(sequence, number)
            body, state = _encode(place, compressor, self._states[number], key, operands, norms)
            self._residual.stage(number, operands.out, self._key(sequence, number, "staged"))
            bodies.append(body)
            states.append(state)
        message = self._message(sequence, bodies, norms)
        self._staged = _Staged(given, message, states)
        return message

    def commit(self) -> None:
        """The receiver has the staged message: the new residual and the new states count from now on."""
        staged = self._take()
        self._states = staged.states
        self._book(staged, self._sent(staged.message), self._residual.adopt())

    def refuse(self) -> None:
        """The receiver did not take the staged message: what was given joins the residual unsent."""
        staged = self._take()
        for number, place in enumerate(self.layout.segments):
            total = self._residual.copy(number)
            total += staged.given[place.start : place.stop]
            self._residual.stage(number, total, self._key(staged.message.sequence, number, "refused"))
        self._book(staged, np.zeros(COLUMNS), self._residual.adopt())

    def average(self, compressors: Sequence[Compressor], sequence: int) -> Message:
        """The residual itself as a message, by compressors of its own. Alters nothing; see ``replace``."""
        bodies, norms = [], Norms()
        states = _first(compressors, self.layout)
        for number, ((place, residual), compressor) in enumerate(zip(self.parts(), compressors, strict=True)):
            operands = Operands(residual, None, torch.empty_like(residual))  # what is left will be kept
            key = self._key(sequence, number)
            bodies.append(_encode(place, compressor, states[number], key, operands, norms)[0])
        return self._message(sequence, bodies, norms)

    def replace(self, message: Message, received: Tensor) -> None:
        """Error averaging: ``residual - decode(message) + received``, booked as sent and given."""
        if self._staged is not None:
            raise RuntimeError("a message is staged, and the residual it leaves would be lost")
        before = self.error_norm()
        for number, (place, update) in enumerate(zip(self.layout.segments, message.updates, strict=True)):
            residual = self._residual.copy(number)
            update.subtract_from(residual)
            residual += received[place.start : place.stop]
            self._residual.stage(number, residual, self._key(message.sequence, number, "replaced"))
        rounding = self._residual.adopt()
        scale = before + self.error_norm()
        self.ledger.enter(ledger.sketch(received), self._sent(message), None, scale, rounding)

    # -- the residual ----------------------------------------------------------------------------

    @property
    def residual(self) -> Tensor:
        """What is owed to the receiver: shape ``(layout.numel,)`` in the working precision.

        With ``float32`` the vector itself; with any other memory a dense copy, made anew at every call.
        """
        return self._residual.dense()

    def parts(self) -> Iterator[tuple[Segment, Tensor]]:
        """The residual by segments, without a copy of the whole; each is to be read before the next is taken."""
        for number, place in enumerate(self.layout.segments):
            yield place, self._residual.load(number)

    def subtract_residual(self, out: Tensor, scale: float = 1.0) -> None:
        """``out -= scale * residual``; ``out`` has the elements of the first segments, or of all."""
        for place, residual in self.parts():
            if place.stop <= out.numel():
                out[place.start : place.stop].sub_(residual, alpha=scale)

    def error_norm(self) -> float:
        """``|residual|``."""
        return math.hypot(*(float(torch.linalg.vector_norm(residual)) for _, residual in self.parts()))

    def conservation_error(self) -> float:
        """See ``Ledger.error``."""
        sketches = (ledger.sketch(residual, place.start) for place, residual in self.parts())
        return self.ledger.error(sum(sketches, np.zeros(COLUMNS)))

    # -- inside ----------------------------------------------------------------------------------

    def _message(self, sequence: int, bodies: Sequence[U8], norms: Norms) -> Message:
        decoded = (unpack(body, place.numel) for body, place in zip(bodies, self.layout.segments, strict=True))
        return Message(sequence, tuple(bodies), tuple(decoded), norms)

    def _take(self) -> _Staged:
        staged, self._staged = self._staged, None
        if staged is None:
            raise RuntimeError("no message is staged")
        return staged

    def _sent(self, message: Message) -> Sketch:
        total = np.zeros(COLUMNS)
        for place, update in zip(self.layout.segments, message.updates, strict=True):
            total += ledger.sketch_update(update, place.start)
        return total

    def _book(self, staged: _Staged, sent: Sketch, rounding: Rounding | None) -> None:
        given = ledger.sketch(staged.given)
        discarded = None if self.keep else given - sent  # all that was not sent
        self.ledger.enter(given, sent, discarded, math.sqrt(staged.message.norms.before), rounding)

    def _key(self, *parts: int | str) -> int:
        text = "/".join(map(str, (self.seed, *parts))).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _first(compressors: Sequence[Compressor], layout: Layout) -> list[State]:
    return [one.init(place.numel) for one, place in zip(compressors, layout.segments, strict=True)]


def _encode(
    place: Segment, compressor: Compressor, state: State, key: int, operands: Operands, norms: Norms
) -> tuple[U8, State]:
    vector, residual, out = operands
    try:
        return compressor.encode(vector, state, key, residual=residual, residual_out=out, norms=norms)
    except NotFiniteError:
        raise NotFiniteError(f"the update of {place.entry.name!r} holds NaN or Inf") from None
