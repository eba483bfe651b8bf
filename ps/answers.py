"""Answers: every frame is counted, and each worker's last answer is kept in case it asks again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from protocol.messages import Average, Farewell, Leave, Message, Push, Refusal
from protocol.update import Update
from ps.vitals import Vitals

U8 = npt.NDArray[np.uint8]
Frames = tuple[U8, ...]
Ticket = Hashable
M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Answer:
    """Frames for the call that a ticket stands for."""

    ticket: Ticket
    frames: Frames


@dataclass
class Waiting(Generic[M]):
    """A message whose answer is not due yet.

    Attributes:
        tickets: of every call that has brought it.
        updates: its bodies, decoded.
        size: bytes of its frame.
        parts: the workers' pushes that it stands for: itself, or those that a relay has folded into it.
    """

    message: M
    tickets: list[Ticket]
    updates: tuple[Update, ...] = ()
    size: int = 0
    parts: tuple[Push, ...] = ()


class Answers:
    """Gives answers, the same one to a message that comes again."""

    def __init__(self, vitals: Vitals) -> None:
        self._vitals = vitals
        self._last: dict[int, tuple[int, Frames]] = {}  # worker -> sequence number and answer
        self._farewells: dict[int, Frames] = {}

    def give(self, tickets: Iterable[Ticket], kind: str, frames: Frames) -> list[Answer]:
        """One answer to several calls; ``kind`` is what its bytes count as."""
        answers = [Answer(ticket, frames) for ticket in tickets]
        self._vitals.wire["downlink", kind] += len(answers) * size(frames)
        return answers

    def refuse(self, tickets: list[Ticket], reason: str, detail: str) -> list[Answer]:
        """Nothing was taken from these calls."""
        if tickets:
            self._vitals.rejected[reason] += len(tickets)
        return self.give(tickets, "update", (Refusal(reason, detail).pack(),))

    def deliver(self, waiting: Waiting[Any], kind: str, frames: Frames) -> list[Answer]:
        """The answer to a message that has waited; calls after the first were resends."""
        if isinstance(waiting.message, Push | Average):
            for message in (waiting.message, *waiting.parts):
                self._last[message.worker] = message.sequence, frames
        first, *again = waiting.tickets
        return self.give([first], kind, frames) + self.give(again, "resend", frames)

    def dismiss(self, worker: int, farewell: Farewell, ticket: Ticket) -> list[Answer]:
        """The answer to a worker that leaves."""
        self._farewells[worker] = (farewell.pack(),)
        return self.give([ticket], "update", self._farewells[worker])

    def repeat(self, message: Message, ticket: Ticket) -> list[Answer]:
        """The answer that this message got before, if it did."""
        frames: Frames | None = None
        if isinstance(message, Leave):
            frames = self._farewells.get(message.worker)
        elif isinstance(message, Push | Average) and message.sequence == self.last(message.worker):
            _, frames = self._last[message.worker]
        return self.give([ticket], "resend", frames) if frames is not None else []

    def last(self, worker: int) -> int | None:
        """The number of the worker's last message that was answered."""
        return self._last[worker][0] if worker in self._last else None

    def forget(self, worker: int) -> None:
        """The worker begins anew."""
        self._last.pop(worker, None)
        self._farewells.pop(worker, None)


def size(frames: Frames) -> int:
    """Bytes."""
    return sum(frame.size for frame in frames)
