"""One sender's side of error feedback: what was not sent is carried over to the next message.

Workers and the server send by the same mechanism::

    p = residual + given;   message = C(p);   residual' = p - decode(message)

What becomes of the rest is the rule of a method, see ``protocol.carry``; that above is the usual one.

A message is *staged* (the old residual is kept), then *committed* when the receiver is known to have
it, or *refused*, which puts the given vector back into the residual. The ledger of a sender balances
at every one of these points. The compressors' states go the same way: a refused message leaves them as
they were.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol import ledger
from protocol.carry import OWED, Carry, Encoded, Kept
from protocol.compressors import Compressor, Norms, State
from protocol.errors import NotFiniteError
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
    each: tuple[Norms, ...]  # the same by segment
    replaced: tuple[int, ...] = ()  # segments of which the receiver forgets what it had, before it adds


@dataclass
class _Balance:
    """The entries of one message in the ledger, as sketches; ``owes``: by segment, what was given is a debt."""

    owes: list[bool]
    scale: float  # norm of all that was added up
    given: Sketch = field(default_factory=lambda: np.zeros(COLUMNS))
    sent: Sketch = field(default_factory=lambda: np.zeros(COLUMNS))
    discarded: Sketch = field(default_factory=lambda: np.zeros(COLUMNS))


@dataclass(frozen=True)
class _Staged:
    given: Tensor
    message: Message
    states: list[State]
    balance: _Balance


class Sender:
    """Residual, compressors and ledger of one sender.

    Args:
        layout: of the model; every segment is compressed on its own.
        compressors: one for each segment.
        seed: fixes all randomness, together with the number of the message.
        device: of the vectors that are given.
        memory: how the residual is kept, see ``protocol.residual``; None if the rules leave nothing.

    Attributes:
        ledger: given = sent + residual + discarded; ``given`` is what ``stage`` was given under a rule that
            owes it, and what ``replace`` received.
    """

    def __init__(
        self,
        layout: Layout,
        compressors: Sequence[Compressor],
        seed: int,
        device: torch.device | str = "cpu",
        memory: Memory | None = "float32",
    ) -> None:
        self.layout = layout
        self.compressors = tuple(compressors)
        self.seed = seed
        self.ledger = ledger.Ledger()
        self._residual: Residual = residual_for(memory, layout, device) if memory else Nothing(layout, device)
        self._states = _first(self.compressors, layout)
        self._staged: _Staged | None = None

    # -- messages --------------------------------------------------------------------------------

    def stage(
        self,
        given: Tensor,
        sequence: int,
        rules: Carry | Sequence[Carry] = OWED,
        compressors: Sequence[Compressor] | None = None,
    ) -> Message:
        """Compress ``residual + given``. Nothing is final until ``commit`` or ``refuse``.

        Args:
            given: shape ``(layout.numel,)``; must not be altered before commit or refuse.
            sequence: number of the message, which with the seed fixes all randomness.
            rules: what becomes of the rest, for all segments or for each.
            compressors: from this message on; a state is kept where the specification stays the same.

        Raises:
            NotFiniteError: the sum holds NaN or Inf; the message names the first such tensor. Residual,
                states and ledger are as they were.
        """
        self._staged = None
        if compressors is not None and tuple(compressors) != self.compressors:
            self._use(compressors)
        norms, kept = [], []
        each = rules if isinstance(rules, Sequence) else [rules] * len(self.compressors)
        for number, (place, compressor) in enumerate(zip(self.layout.segments, self.compressors, strict=True)):
            send = partial(_encode, place, compressor, self._states[number], self._key(sequence, number))
            norms.append(Norms())
            one = each[number].stage(send, self._residual, number, given[place.start : place.stop], norms[-1])
            self._residual.stage(number, one.left, self._key(sequence, number, "staged"))
            kept.append(one)
        bodies, states, updates = zip(*(one.encoded for one in kept), strict=True)
        replaced = tuple(number for number, one in enumerate(kept) if one.replaces)
        message = Message(sequence, bodies, updates, sum(norms, Norms()), tuple(norms), replaced)
        self._staged = _Staged(given, message, list(states), self._balance(given, each, kept, message.norms))
        return message

    def commit(self) -> None:
        """The receiver has the staged message: the new residual and the new states count from now on."""
        staged = self._take()
        self._states = staged.states
        balance = staged.balance
        self.ledger.enter(balance.given, balance.sent, balance.discarded, balance.scale, self._residual.adopt())

    def refuse(self) -> None:
        """The receiver did not take the staged message: what was given joins the residual unsent.

        Under a rule that owes nothing, the memory stays as it was.
        """
        staged = self._take()
        given = np.zeros(COLUMNS)
        for number, place in enumerate(self.layout.segments):
            total = self._residual.copy(number)
            if staged.balance.owes[number]:
                total += (vector := staged.given[place.start : place.stop])
                given += ledger.sketch(vector, place.start)
            self._residual.stage(number, total, self._key(staged.message.sequence, number, "refused"))
        self.ledger.enter(given, np.zeros(COLUMNS), None, staged.balance.scale, self._residual.adopt())

    def average(self, compressors: Sequence[Compressor], sequence: int) -> Message:
        """The residual itself as a message, by compressors of its own. Alters nothing; see ``replace``."""
        encoded, norms = [], [Norms() for _ in compressors]
        states = _first(compressors, self.layout)
        for number, ((place, residual), compressor) in enumerate(zip(self.parts(), compressors, strict=True)):
            operands = Operands(residual, None, torch.empty_like(residual))  # what is left will be kept
            key = self._key(sequence, number)
            encoded.append(_encode(place, compressor, states[number], key, operands, norms[number]))
        bodies, _, updates = zip(*encoded, strict=True)
        return Message(sequence, bodies, updates, sum(norms, Norms()), tuple(norms))

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

    def sketch(self) -> Sketch:
        """The residual's sketch, see ``protocol.ledger``; costs one read of it."""
        sketches = (ledger.sketch(residual, place.start) for place, residual in self.parts())
        return sum(sketches, np.zeros(COLUMNS))

    def error_norm(self) -> float:
        """``|residual|``."""
        return math.hypot(*(float(torch.linalg.vector_norm(residual)) for _, residual in self.parts()))

    def conservation_error(self) -> float:
        """See ``Ledger.error``."""
        return self.ledger.error(self.sketch())

    # -- inside ----------------------------------------------------------------------------------

    def _use(self, compressors: Sequence[Compressor]) -> None:
        fresh = _first(compressors, self.layout)
        stays = [new.spec == old.spec for new, old in zip(compressors, self.compressors, strict=True)]
        self._states = [old if stay else new for stay, old, new in zip(stays, self._states, fresh, strict=True)]
        self.compressors = tuple(compressors)

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

    def _balance(self, given: Tensor, rules: Sequence[Carry], kept: Sequence[Kept], norms: Norms) -> _Balance:
        """What the ledger will be told. Where all that is not sent is discarded, there is nothing to check."""
        scale = math.sqrt(norms.before + sum(one.beside for one in kept))
        balance = _Balance([rule.owes for rule in rules], scale)
        for place, rule, one in zip(self.layout.segments, rules, kept, strict=True):
            if one.forgotten:
                continue
            if rule.owes:
                balance.given += ledger.sketch(given[place.start : place.stop], place.start)
            if one.discarded is not None:
                balance.discarded += ledger.sketch(one.discarded, place.start)
            balance.sent += ledger.sketch_update(one.encoded.update, place.start)
        return balance

    def _key(self, *parts: int | str) -> int:
        text = "/".join(map(str, (self.seed, *parts))).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _first(compressors: Sequence[Compressor], layout: Layout) -> list[State]:
    return [one.init(place.numel) for one, place in zip(compressors, layout.segments, strict=True)]


def _encode(
    place: Segment, compressor: Compressor, state: State, key: int, operands: Operands, norms: Norms
) -> Encoded:
    vector, residual, out = operands
    try:
        body, state = compressor.encode(vector, state, key, residual=residual, residual_out=out, norms=norms)
    except NotFiniteError:
        raise NotFiniteError(f"the update of {place.entry.name!r} holds NaN or Inf") from None
    return Encoded(body, state, unpack(body, place.numel))
