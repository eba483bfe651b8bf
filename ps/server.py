"""The server between frames and state: who may say what, when a round closes, who gets which answer.

A shell (the Ray actor, or the inline backend) passes in every frame with a ticket and delivers the
answers it gets back. All calls come from one thread. Time comes from the clock that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from protocol import messages, snapshot
from protocol.errors import DecodeError, Refused
from protocol.layout import Layout
from protocol.messages import Average, Farewell, Join, Leave, Mean, Message, Push, Refusal, Welcome
from protocol.segment import Update, pack_exact
from protocol.sender import Sender
from protocol.spec import compressors_for
from ps.optimizer import ServerOptimizer, Sum, TorchOptimizer
from ps.settings import ServerSettings
from ps.state import Applied, Close, Contribution, ServerState, apply, equal_weights
from ps.vitals import Vitals

U8 = npt.NDArray[np.uint8]
Ticket = Hashable


@dataclass(frozen=True)
class Answer:
    """Frames for the call that a ticket stands for."""

    ticket: Ticket
    frames: tuple[U8, ...]


@dataclass(frozen=True)
class Plan:
    """What the server needs to know of a run.

    Attributes:
        workers: ids of the workers that must join before the first round.
        send: ``difference`` or ``gradient``.
        sketch_every: rounds between checks of the server's ledger.
    """

    rounds: int
    workers: tuple[int, ...]
    send: str
    downlink: str
    overrides: dict[str, str]
    seed: int
    sketch_every: int
    server: ServerSettings


@dataclass
class _Waiting:
    """A message that waits for its round to close."""

    message: Message
    updates: tuple[Update, ...]
    tickets: list[Ticket] = field(default_factory=list)


class Server:
    """The parameter server of one run, without any I/O."""

    def __init__(self, plan: Plan, clock: Callable[[], float]) -> None:
        self.plan = plan
        self.vitals = Vitals()
        self.state: ServerState | None = None
        self.finished = False
        self._clock = clock
        self._started = clock()
        self._stopping = False
        self._joining: dict[int, _Waiting] = {}
        self._layout: Layout | None = None  # of the first worker that joined
        self._pushes: dict[int, _Waiting] = {}
        self._averages: dict[int, _Waiting] = {}
        self._leaving: dict[int, Contribution | None] = {}
        self._answered: dict[int, tuple[int, tuple[U8, ...]]] = {}  # sequence and frames, by worker

    def receive(self, frame: U8, ticket: Ticket) -> list[Answer]:
        """Take in one frame; the answers that are due because of it, perhaps to other tickets too."""
        with self.vitals.lock:
            try:
                return self._receive(frame, ticket)
            except Refused as refusal:
                self.vitals.rejected[refusal.reason] += 1
                return [self._answer(ticket, "update", Refusal(refusal.reason, refusal.detail).pack())]

    def stop(self) -> list[Answer]:
        """End the run with the next entry; before the first round, at once."""
        with self.vitals.lock:
            self._stopping = True
            if self.state is not None:
                return []
            answer = Refusal("finished", "the run was stopped before its first round").pack()
            tickets = [t for waiting in self._joining.values() for t in waiting.tickets]
            return [self._answer(ticket, "snapshot", answer) for ticket in tickets]

    def _receive(self, frame: U8, ticket: Ticket) -> list[Answer]:
        try:
            message = messages.parse(frame)
        except DecodeError as error:
            raise Refused("frame", str(error)) from None
        if isinstance(message, Join):
            self.vitals.wire["uplink", "snapshot"] += frame.size
            return self._join(message, ticket)
        if isinstance(message, Push | Average):
            return self._exchange(message, frame.size, ticket)
        if isinstance(message, Leave):
            self.vitals.wire["uplink", "update"] += frame.size
            return self._leave(message, ticket)
        raise Refused("frame", f"a server takes no {type(message).__name__} message")

    # -- joining ---------------------------------------------------------------------------------

    def _join(self, join: Join, ticket: Ticket) -> list[Answer]:
        if self.finished:
            raise Refused("finished", "the run has ended")
        try:
            layout = Layout.restore(join.description)
        except DecodeError as error:
            raise Refused("frame", str(error)) from None
        if self._layout is None:
            self._layout = layout
        if layout.hash != self._layout.hash:
            raise Refused("layout", f"the model of worker {join.worker} has {self._layout.difference(layout)}")
        if self.state is None and join.worker not in self.plan.workers:
            known = ", ".join(map(str, self.plan.workers))
            raise Refused("member", f"worker {join.worker} is not one of this run's workers, which are {known}")
        self._joining.setdefault(join.worker, _Waiting(join, ())).tickets.append(ticket)
        if self.state is None and set(self.plan.workers) <= self._joining.keys():
            self._start(layout)
            return self._welcome()
        return []

    def _start(self, layout: Layout) -> None:
        """Version 0: the model of rank 0, the lowest id."""
        first = self._joining[min(self.plan.workers)].message
        assert isinstance(first, Join)
        try:
            w, statics = snapshot.unpack_snapshot(layout, first.bodies)
        except DecodeError as error:
            raise Refused("segment", f"worker {first.worker} has not sent its model: {error}") from None
        compressors = compressors_for(layout, self.plan.downlink, self.plan.overrides)
        sender = Sender(layout, compressors, self.plan.seed)
        optimizer = _optimizer(self.plan, layout, first)
        weights = equal_weights(list(self.plan.workers))
        self.state = ServerState(layout, w, statics, sender, optimizer, weights)
        self.vitals.members = tuple(sorted(weights))
        self.vitals.state = "training"
        self._started = self._clock()

    def _welcome(self) -> list[Answer]:
        """Answer everyone who waits to join with the entries it lacks, or with a snapshot."""
        assert self.state is not None
        state, answers = self.state, []
        if not self._joining:
            return []
        whole = Welcome(state.version, state.position, state.weights, layout=state.layout.hash)
        bodies = snapshot.pack(state.layout, state.w, state.statics)
        full = Welcome(state.version, state.position, state.weights, bodies=bodies, layout=state.layout.hash).pack()
        for worker, waiting in sorted(self._joining.items()):
            assert isinstance(waiting.message, Join)
            held = waiting.message.version
            entries = None if held is None or held > state.version else state.log.since(held)
            if entries is None or held is None or sum(e.size for e in entries) > full.size:
                frames: tuple[U8, ...] = (full,)
            else:
                own = Welcome(held, whole.position, whole.weights, layout=whole.layout).pack()
                frames = (own, *entries)
            answers += [self._answer(ticket, "snapshot", *frames) for ticket in waiting.tickets]
            self._answered.pop(worker, None)
            self.vitals.joins += 1
        self._joining.clear()
        return answers

    # -- exchanges -------------------------------------------------------------------------------

    def _exchange(self, message: Push | Average, size: int, ticket: Ticket) -> list[Answer]:
        state = self.state
        if state is None or message.worker not in state.weights or message.worker in self._leaving:
            raise Refused("member", f"worker {message.worker} has not joined, or has left")
        waiting = self._pushes if isinstance(message, Push) else self._averages
        kind = "update" if isinstance(message, Push) else "average"
        known = waiting.get(message.worker)
        last, frames = self._answered.get(message.worker, (0, ()))
        if message.sequence == last and frames:
            self.vitals.wire["uplink", "resend"] += size
            return [self._answer(ticket, "resend", *frames)]
        if known is not None and _number(known.message) == message.sequence:
            self.vitals.wire["uplink", "resend"] += size
            known.tickets.append(ticket)
            return []
        if self.finished:
            raise Refused("finished", "the run has ended")
        self._check(message, state, last)
        try:
            decoded = messages.updates(message, state.layout)
            if isinstance(message, Push):
                messages.unpack_statistics(message.statistics)
        except DecodeError as error:
            raise Refused("segment", f"the message of worker {message.worker} is not valid: {error}") from None
        self.vitals.wire["uplink", kind] += size
        waiting[message.worker] = _Waiting(message, decoded, [ticket])
        return self._close_if_complete()

    def _check(self, message: Push | Average, state: ServerState, last: int) -> None:
        worker = message.worker
        if message.layout != state.layout.hash:
            raise Refused("layout", f"the message of worker {worker} is for a model of another layout")
        if message.sequence != last + 1 and last:
            raise Refused("sequence", f"worker {worker} sent number {message.sequence} after {last}")
        if message.version != state.version:
            raise Refused(
                "version",
                f"worker {worker} sent an update of version {message.version} in round {state.version}",
            )
        if isinstance(message, Push) and message.digest not in (None, snapshot.digest(state.w)):
            self.vitals.replica_mismatches += 1
            raise Refused(
                "replica",
                f"the replica of worker {worker} differs from the server's at version {state.version}",
            )

    def _close_if_complete(self) -> list[Answer]:
        assert self.state is not None
        present = self.state.weights.keys() - self._leaving.keys()
        if self._averages and present <= self._averages.keys():
            return self._average()
        if present <= self._pushes.keys() and (present or self._leaving):
            return self._close()
        return []

    def _average(self) -> list[Answer]:
        """Error averaging: everyone gets the exact sum of what was sent."""
        assert self.state is not None
        state, waiting = self.state, dict(sorted(self._averages.items()))
        self._averages.clear()
        total = state.layout.zeros()
        for average in waiting.values():
            for place, update in zip(state.layout.segments, average.updates, strict=True):
                update.add_to(total[place.start : place.stop])
        bodies = tuple(pack_exact(total[s.start : s.stop].numpy()) for s in state.layout.segments)
        weight = sum(state.weights[worker] for worker in waiting)
        frame = Mean(state.version, weight, bodies=bodies, layout=state.layout.hash).pack()
        return self._deliver(waiting, frame, "average")

    def _close(self) -> list[Answer]:
        """Fold the round, broadcast the entry, let joiners in and leavers out."""
        assert self.state is not None
        state, waiting = self.state, dict(sorted(self._pushes.items()))
        self._pushes.clear()
        pushes = [w.message for w in waiting.values() if isinstance(w.message, Push)]
        folded = [
            Contribution(p.worker, p.sequence, w.updates, p.samples)
            for p, w in zip(pushes, waiting.values(), strict=True)
        ]
        folded += [handed for _, handed in sorted(self._leaving.items()) if handed is not None]
        weights = self._next_weights(state)
        final = self._stopping or state.version + 1 >= self.plan.rounds or weights == {}
        options = pushes[0].options if pushes else None
        begun = self._clock()
        applied = apply(state, Close(tuple(folded), weights, options, final))
        self.vitals.phases["aggregate"].observe(self._clock() - begun)
        self.finished = final
        answers = self._deliver(waiting, applied.frame, "update")
        self._observe(state, pushes, applied)
        return answers + self._welcome()

    def _next_weights(self, state: ServerState) -> dict[int, float] | None:
        """The members from the next round on, if they change."""
        if not self._joining and not self._leaving:
            return None
        stay = (state.weights.keys() - self._leaving.keys()) | self._joining.keys()
        self._leaving.clear()
        return equal_weights(list(stay))

    def _deliver(self, waiting: dict[int, _Waiting], frame: U8, kind: str) -> list[Answer]:
        answers = []
        for worker, message in waiting.items():
            self._answered[worker] = (_number(message.message), (frame,))
            first, *again = message.tickets
            answers.append(self._answer(first, kind, frame))
            answers += [self._answer(ticket, "resend", frame) for ticket in again]
            if kind == "update":
                for direction in ("uplink", "downlink"):
                    self.vitals.dense[direction] += 4 * self.state.layout.trainable if self.state else 0
        return answers

    # -- leaving ---------------------------------------------------------------------------------

    def _leave(self, leave: Leave, ticket: Ticket) -> list[Answer]:
        state = self.state
        if state is None or leave.worker not in state.weights:
            raise Refused("member", f"worker {leave.worker} has not joined, or has left")
        handed = None
        if leave.bodies:
            try:
                updates = messages.updates(leave, state.layout)
            except DecodeError as error:
                raise Refused("segment", f"worker {leave.worker} handed over no valid residual: {error}") from None
            handed = Contribution(leave.worker, state.sequences.get(leave.worker, 0), updates)
            self.vitals.handed_over += 1
        if leave.cause == "not_finite":
            self.vitals.rejected["not_finite"] += 1
        self.vitals.leaves[leave.cause] += 1
        farewell = self._answer(ticket, "update", Farewell(state.version, layout=state.layout.hash).pack())
        if self.finished:
            return [farewell]
        self._leaving[leave.worker] = handed
        return [farewell, *self._close_if_complete()]

    # -- measuring -------------------------------------------------------------------------------

    def _answer(self, ticket: Ticket, kind: str, *frames: U8) -> Answer:
        self.vitals.wire["downlink", kind] += sum(frame.size for frame in frames)
        return Answer(ticket, frames)

    def _observe(self, state: ServerState, pushes: list[Push], applied: Applied) -> None:
        vitals = self.vitals
        vitals.version, vitals.position = state.version, state.position
        vitals.server_before, vitals.server_left = applied.before, applied.left
        if state.version % self.plan.sketch_every == 0 or self.finished:
            vitals.server_conservation = state.sender.conservation_error()
        statistics = {p.worker: messages.unpack_statistics(p.statistics) for p in pushes}
        for push in pushes:
            vitals.observe_push(push.worker, statistics[push.worker], push.names or [], push.skipped)
        samples = {p.worker: p.samples for p in pushes}
        reported = vitals.report(statistics, samples)
        vitals.close(self._clock() - self._started, sum(samples.values()), reported)
        vitals.members = tuple(sorted(state.weights))
        if self.finished:
            vitals.state = "finished"


def _number(message: Message) -> int:
    assert isinstance(message, Push | Average)
    return message.sequence


def _optimizer(plan: Plan, layout: Layout, first: Join) -> ServerOptimizer:
    if plan.send == "gradient":
        if first.optimizer is None:
            raise Refused("frame", f"worker {first.worker} has not said which optimizer the server shall run")
        return TorchOptimizer(layout, str(first.optimizer["kind"]), first.optimizer["groups"])
    settings = plan.server.optimizer
    if settings.kind == "sum":
        return Sum()
    names = [s.entry.name for s in layout.segments if s.entry.role == "parameter"]
    return TorchOptimizer(layout, settings.kind, [{"params": names, **settings.options}])
