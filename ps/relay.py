"""A relay between a group of workers and the server: the second tier of a hierarchy.

    p = e_r + sum_k decode(c_k);   c_r = C_outer(p);   e_r' = p - decode(c_r)

Workers apply their weights before they send, so the sum of a group counts at the server as that many workers,
and the residuals of both tiers simply add to the server's. Light compression inside a group and hard
compression outside is what the surveys call hierarchical error feedback.

To its workers a relay is the server; to the server it is one sender that stands for several members. Entries
come back as they are, so every replica still has the same bits. Whatever a relay cannot judge it passes on, and
the server's answer back. Like the server, it has no I/O: a shell performs what it returns.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from protocol import energies, messages
from protocol.compression import Compression
from protocol.errors import DecodeError, NotFiniteError
from protocol.layout import Layout
from protocol.messages import (
    Average,
    Entry,
    Farewell,
    Join,
    Leave,
    Mean,
    Message,
    Push,
    Refusal,
    Stat,
    Welcome,
    pack_statistics,
)
from protocol.residual import Memory
from protocol.sampling import participants
from protocol.segment import pack_exact
from protocol.sender import Message as Staged
from protocol.sender import Sender
from protocol.settings import Schedule
from protocol.update import Update
from ps.aggregate import Contribution, Total
from ps.answers import Answer
from ps.vitals import Vitals

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RelayPlan:
    """What a relay needs to know of a run.

    Attributes:
        relay: id, different from those of all workers and other relays.
        group: ids of its workers.
        uplink: compressor towards the server.
        residual: how its residual is kept in memory.
        sketch_every: rounds between sketches of its residual.
    """

    relay: int
    group: tuple[int, ...]
    uplink: str
    overrides: dict[str, str]
    schedule: Schedule
    seed: int
    participation: float
    residual: Memory
    sketch_every: int


@dataclass(frozen=True)
class Forward:
    """A frame for the server; its answer comes back to ``Relay.answered`` with the same token."""

    frame: U8
    token: Hashable


@dataclass
class _Held:
    """A push that waits for the rest of the group."""

    push: Push
    updates: tuple[Update, ...]
    tickets: list[Hashable] = field(default_factory=list)


Deeds = list[Answer | Forward]


class Relay:
    """Folds the pushes of a group. All calls come from one thread."""

    def __init__(self, plan: RelayPlan) -> None:
        self.plan = plan
        self.vitals = Vitals()
        self.sender: Sender | None = None  # once a worker has joined
        self._layout: Layout | None = None
        self._weights: dict[int, float] = {}
        self._version = 0
        self._sequence = 0
        self._gone: set[int] = set()  # have left since the last entry
        self._held: dict[int, _Held] = {}
        self._folded: dict[int, _Held] | None = None  # what the server has not answered yet
        self._answers: dict[int, tuple[int, tuple[U8, ...]]] = {}  # worker -> its last number and the answer

    def receive(self, frame: U8, ticket: Hashable) -> Deeds:
        """Take in a frame of a worker of the group."""
        try:
            message = messages.parse(frame)
        except DecodeError:
            return [self._pass_on(frame, ticket, None)]
        if isinstance(message, Push) and self._mine(message):
            return self._push(message, frame, ticket)
        self.vitals.wire["uplink", _kind(message)] += frame.size
        if isinstance(message, Leave):
            return self._leave(message, frame, ticket)
        return [self._pass_on(frame, ticket, message)]

    def answered(self, token: Hashable, frames: tuple[U8, ...]) -> Deeds:
        """Take in the server's answer to a ``Forward``."""
        if token == self.plan.relay:
            return self._settle(frames)
        assert isinstance(token, _Passed)
        self._learn(token.message, frames)
        return [self._answer(token.ticket, frames, _kind(token.message)), *self._fold_if_complete()]

    # -- messages that pass ----------------------------------------------------------------------

    def _pass_on(self, frame: U8, ticket: Hashable, message: Message | None) -> Forward:
        return Forward(frame, _Passed(ticket, message))

    def _learn(self, message: Message | None, frames: tuple[U8, ...]) -> None:
        """Note what an answer says of the run."""
        for frame in frames:
            answer = messages.parse(frame)
            if isinstance(answer, Welcome) and isinstance(message, Join):
                self._begin(Layout.restore(message.description), message.worker)
            if isinstance(answer, Farewell) and isinstance(message, Leave):
                self._gone.add(message.worker)
                self._held.pop(message.worker, None)
            if isinstance(answer, Mean) and isinstance(message, Average):
                self._answers[message.worker] = message.sequence, frames
            if isinstance(answer, Welcome | Entry) and answer.version >= self._version:
                if answer.version > self._version:
                    self._gone.clear()
                self._version = answer.version
                self._weights = answer.weights or self._weights

    def _begin(self, layout: Layout, worker: int) -> None:
        self._gone.discard(worker)
        self._answers.pop(worker, None)
        if self.sender is None:
            plan, self._layout = self.plan, layout
            self._compression = Compression(layout, plan.uplink, plan.overrides, plan.schedule)
            self._total = Total(layout)
            self.sender = Sender(layout, self._compression.final, plan.seed + plan.relay, memory=plan.residual)

    def _leave(self, leave: Leave, frame: U8, ticket: Hashable) -> Deeds:
        """The last of the group takes the relay's residual along with its own."""
        others = self._weights.keys() & set(self.plan.group) - self._gone - {leave.worker}
        if others or self.sender is None or self._layout is None or not self.sender.error_norm():
            return [self._pass_on(frame, ticket, leave)]
        owed = self.sender.residual.clone()
        if leave.bodies:
            for place, update in zip(self._layout.segments, messages.updates(leave, self._layout), strict=True):
                update.add_to(owed[place.start : place.stop])
        bodies = tuple(pack_exact(owed[place.start : place.stop].numpy()) for place in self._layout.segments)
        self.sender = None
        return [self._pass_on(replace(leave, bodies=bodies).pack(), ticket, leave)]

    # -- pushes ----------------------------------------------------------------------------------

    def _mine(self, push: Push) -> bool:
        """Whether this push is one to fold; any other the server will refuse."""
        known = self.sender is not None and self._layout is not None and push.layout == self._layout.hash
        member = push.worker in self.plan.group and push.worker in self._weights and push.worker not in self._gone
        return known and member and not push.relayed

    def _push(self, push: Push, frame: U8, ticket: Hashable) -> Deeds:
        number, frames = self._answers.get(push.worker, (None, ()))
        waiting = (self._folded or {}).get(push.worker) or self._held.get(push.worker)
        repeated = push.sequence == number or (waiting is not None and waiting.push.sequence == push.sequence)
        self.vitals.wire["uplink", "resend" if repeated else "update"] += frame.size
        if push.sequence == number:
            return [self._answer(ticket, frames, "resend")]
        if waiting is not None and repeated:
            waiting.tickets.append(ticket)
            return []
        assert self._layout is not None
        if waiting is not None or (number is not None and push.sequence != number + 1):
            text = f"worker {push.worker} sent number {push.sequence} where its relay did not expect it"
            return self._refuse([ticket], "sequence", text)
        if push.version != self._version:
            text = f"worker {push.worker} sent an update of version {push.version} in round {self._version}"
            return self._refuse([ticket], "version", text)
        try:
            updates = messages.updates(push, self._layout)
        except DecodeError as error:
            return self._refuse([ticket], "segment", f"the message of worker {push.worker} is not valid: {error}")
        self._held[push.worker] = _Held(push, updates, [ticket])
        return list(self._fold_if_complete())

    def _fold_if_complete(self) -> Deeds:
        """Once everyone of the group who takes part has pushed."""
        plan, taking = self.plan, participants(self._weights, self.plan.participation, self.plan.seed, self._version)
        expected = set(taking) & set(plan.group) - self._gone
        if self._folded is not None or not expected or not expected <= self._held.keys():
            return []
        folded = self._folded = dict(sorted(self._held.items()))
        self._held = {}
        try:
            return [self._fold(folded)]
        except NotFiniteError as error:
            self._folded = None
            tickets = [ticket for one in folded.values() for ticket in one.tickets]
            return self._refuse(tickets, "not_finite", f"the sum of a group's updates is not finite: {error}")

    def _fold(self, folded: dict[int, _Held]) -> Forward:
        assert self.sender is not None
        plan, number = self.plan, self._sequence + 1
        sketched = self._version % plan.sketch_every == 0
        sketch = energies.pack_sketch(self.sender.sketch()) if sketched else b""
        contributions = [Contribution(w, one.push.sequence, one.updates) for w, one in folded.items()]
        total = self._total.fold(contributions, self._weights)
        message = self.sender.stage(total, number, compressors=self._compression.at(self._version))
        push = Push(
            plan.relay,
            number,
            self._version,
            sum(one.push.samples for one in folded.values()),
            statistics=_statistics(message),
            sketch=sketch,
            relayed=[replace(one.push, bodies=()).pack().tobytes() for one in folded.values()],
            bodies=message.bodies,
            layout=self.sender.layout.hash,
        )
        return Forward(push.pack(), plan.relay)

    def _settle(self, frames: tuple[U8, ...]) -> Deeds:
        """The server has answered the group's push: with an entry, or by refusing it.

        If it is refused, every worker takes its own update back, and the relay's residual stays what it was.
        """
        folded, self._folded = self._folded, None
        assert folded is not None
        assert self.sender is not None
        taken = not any(isinstance(messages.parse(frame), Refusal) for frame in frames)
        if taken:
            self._sequence += 1  # a refused message does not use up its number
            self.sender.commit()
            self._learn(None, frames)
        deeds: Deeds = []
        for worker, one in folded.items():
            if taken:
                self._answers[worker] = one.push.sequence, frames
                for direction in ("uplink", "downlink"):
                    self.vitals.dense[direction] += 4 * self.sender.layout.trainable
            first, *again = one.tickets
            deeds.append(self._answer(first, frames, "update"))
            deeds += [self._answer(ticket, frames, "resend") for ticket in again]
        return deeds + self._fold_if_complete()

    def _refuse(self, tickets: Iterable[Hashable], reason: str, detail: str) -> Deeds:
        frames = (Refusal(reason, detail).pack(),)
        self.vitals.rejected[reason] += 1
        return [self._answer(ticket, frames, "update") for ticket in tickets]

    def _answer(self, ticket: Hashable, frames: tuple[U8, ...], kind: str) -> Answer:
        self.vitals.wire["downlink", kind] += sum(frame.size for frame in frames)
        return Answer(ticket, frames)


@dataclass(frozen=True, eq=False)
class _Passed:
    """The token of a message that was passed on."""

    ticket: Hashable
    message: Message | None


def _kind(message: Message | None) -> str:
    """What the bytes of a message that is passed on, and of its answer, count as."""
    return "snapshot" if isinstance(message, Join) else "average" if isinstance(message, Average) else "update"


def _statistics(message: Staged) -> bytes:
    norms = message.norms
    return pack_statistics({Stat.BEFORE: norms.before**0.5, Stat.SENT: norms.sent**0.5, Stat.ERROR: norms.left**0.5})
