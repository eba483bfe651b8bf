"""The server between frames and state: who may say what, when a round closes, who gets which answer.

A shell (the Ray actor, or the inline backend) passes in every frame with a ticket and delivers the
answers it gets back. All calls come from one thread. Time comes from the clock that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from protocol import energies, messages, snapshot
from protocol.compression import Compression
from protocol.errors import DecodeError, NotFiniteError, Refused, SettingsError
from protocol.layout import Layout
from protocol.messages import Average, Farewell, Join, Leave, Mean, Message, Pull, Push, Refusal, Welcome
from protocol.sampling import participants
from protocol.segment import pack_exact
from protocol.sender import Sender
from protocol.update import Update, accumulate
from ps.aggregate import Contribution, aggregate_for
from ps.log import Log
from ps.plan import Plan, optimizer_for
from ps.state import Applied, Close, ServerState, apply, shares
from ps.steering import Steering, mismatch
from ps.vitals import Vitals

U8 = npt.NDArray[np.uint8]
Ticket = Hashable


@dataclass(frozen=True)
class Answer:
    """Frames for the call that a ticket stands for."""

    ticket: Ticket
    frames: tuple[U8, ...]


@dataclass
class _Waiting:
    """A message that waits for its round to close."""

    message: Message
    updates: tuple[Update, ...]
    tickets: list[Ticket] = field(default_factory=list)
    size: int = 0  # bytes of its frame
    parts: tuple[Push, ...] = ()  # the pushes that it stands for: itself, or what a relay has folded


class Server:
    """The parameter server of one run, without any I/O."""

    def __init__(self, plan: Plan, clock: Callable[[], float]) -> None:
        self.plan = plan
        self.vitals = Vitals()
        self.state: ServerState | None = None  # None until all of the plan's workers have joined
        self.finished = False
        self._clock = clock
        self._started = clock()
        self._stopping = False
        self._joining: dict[int, _Waiting] = {}
        self._layout: Layout | None = None  # of the first worker that joined
        self._founded: ServerState | None = None  # version 0, once rank 0 has joined
        self._pending: dict[int, _Waiting] = {}  # at most one push or average a worker
        self._leaving: dict[int, Contribution | None] = {}
        self._pulling: dict[int, _Waiting] = {}  # at most one pull a worker
        self._base: dict[int, int] = {}  # the version that each worker has
        self._answered: dict[int, tuple[int, tuple[U8, ...]]] = {}  # the last sequence number and its answer
        self._farewells: dict[int, U8] = {}
        self._steering: Steering | None = None

    def receive(self, frame: U8, ticket: Ticket) -> list[Answer]:
        """Take in one frame; the answers that are due because of it, perhaps to other tickets too."""
        with self.vitals.lock:
            try:
                return self._receive(frame, ticket)
            except Refused as refusal:
                return self._refuse([ticket], refusal.reason, refusal.detail)

    def stop(self) -> list[Answer]:
        """End the run with the next entry; before the first round, at once."""
        with self.vitals.lock:
            self._stopping = True
            if self.state is not None:
                return []
            self.finished = True
            self.vitals.state = "finished"
            return self._turn_away("the run was stopped before its first round")

    def _receive(self, frame: U8, ticket: Ticket) -> list[Answer]:
        try:
            message = messages.parse(frame)
        except DecodeError as error:
            self.vitals.wire["uplink", "update"] += frame.size
            raise Refused("frame", str(error)) from None
        repeated = self._repeated(message, ticket)
        kind = "snapshot" if isinstance(message, Join) else "average" if isinstance(message, Average) else "update"
        self.vitals.wire["uplink", kind if repeated is None else "resend"] += frame.size
        if repeated is not None:
            return repeated
        if isinstance(message, Join):
            return self._join(message, ticket)
        if isinstance(message, Push | Average):
            return self._exchange(message, ticket, frame.size)
        if isinstance(message, Pull):
            return self._pull(message, ticket)
        if isinstance(message, Leave):
            return self._leave(message, ticket)
        raise Refused("frame", f"a server takes no {type(message).__name__} message")

    def _repeated(self, message: Message, ticket: Ticket) -> list[Answer] | None:
        """What a message that came before gets: the same answer, now or when its round closes."""
        if isinstance(message, Leave) and message.worker in self._farewells:
            return [self._answer(ticket, "resend", self._farewells[message.worker])]
        if not isinstance(message, Push | Average):
            return None
        number, frames = self._answered.get(message.worker, (None, None))
        if frames is not None and message.sequence == number:
            return [self._answer(ticket, "resend", *frames)]
        pending = self._pending.get(message.worker)
        if pending is not None and message.sequence == _number(pending):
            pending.tickets.append(ticket)
            return []
        return None

    # -- joining ---------------------------------------------------------------------------------

    def _join(self, join: Join, ticket: Ticket) -> list[Answer]:
        worker, state = join.worker, self.state
        if self.finished:
            raise Refused("finished", "the run has ended")
        if state is None and worker not in self.plan.workers:
            known = ", ".join(map(str, self.plan.workers))
            raise Refused("member", f"worker {worker} is not one of this run's workers, which are {known}")
        try:
            layout = Layout.restore(join.description)
        except DecodeError as error:
            raise Refused("frame", str(error)) from None
        first = self._layout or layout
        if layout.hash != first.hash:
            raise Refused("layout", f"the model of worker {worker} has {first.difference(layout)}")
        if worker == min(self.plan.workers) and self._founded is None:
            self._founded = self._found(layout, join)
        self._layout = layout
        self._joining.setdefault(worker, _Waiting(join, ())).tickets.append(ticket)
        if state is None:
            return self._start() if set(self.plan.workers) <= self._joining.keys() else []
        if worker not in state.weights or worker in self._leaving:
            return []  # a new member: from the next version on
        # a member that lost its answer or its memory, and for whose push the round would wait for ever
        answers = self._withdraw(worker)
        return answers if worker in self._pending else answers + self._welcome([worker])

    def _found(self, layout: Layout, founder: Join) -> ServerState:
        """Version 0: the model of rank 0, the lowest id."""
        try:
            w, statics = snapshot.unpack_snapshot(layout, founder.bodies)
        except DecodeError as error:
            raise Refused("segment", f"worker {founder.worker} has not sent its model: {error}") from None
        plan = self.plan
        try:
            compression = Compression(layout, plan.downlink, plan.overrides, plan.schedule)
            optimizer = optimizer_for(plan, layout, founder)
        except SettingsError as error:
            raise Refused("frame", str(error)) from None
        if plan.budget is not None:
            uplink = Compression(layout, plan.uplink, plan.overrides, plan.schedule)
            self._steering = Steering(layout, uplink, plan.schedule, plan.budget)
        sender = Sender(layout, compression.final, plan.seed, memory=plan.server.residual)
        aggregate = aggregate_for(plan.feedback, layout)
        log = Log(limit=max(w.nbytes, 1 << 20))  # a snapshot is hardly larger
        return ServerState(layout, w, statics, sender, compression, aggregate, optimizer, {}, log=log)

    def _start(self) -> list[Answer]:
        assert self._founded is not None
        self.state = self._founded
        self.state.samples = {worker: _samples(waiting) for worker, waiting in self._joining.items()}
        self.state.weights = shares(self.state.samples)
        self.vitals.members = tuple(self.state.weights)
        self.vitals.joins += len(self.state.weights)
        self.vitals.state = "training"
        self._started = self._clock()
        return self._welcome(self.plan.workers)

    def _welcome(self, workers: Iterable[int]) -> list[Answer]:
        """Answer workers that wait to join: with a snapshot or the entries they lack, whichever is smaller."""
        assert self.state is not None
        if not (workers := sorted(workers)):
            return []
        state, answers = self.state, []
        full = self._snapshot(state)
        for worker in workers:
            waiting = self._joining.pop(worker)
            assert isinstance(waiting.message, Join)
            frames: tuple[U8, ...] = (full,)
            if (held := waiting.message.version) is not None and held <= state.version:
                entries = state.log.since(held)
                if entries is not None and len(entries) == state.version - held:
                    frames = min(frames, (self._greeting(state, held).pack(), *entries), key=_size)
            answers += [self._answer(ticket, "snapshot", *frames) for ticket in waiting.tickets]
            self._answered.pop(worker, None)
            self._farewells.pop(worker, None)
            self.vitals.workers.pop(worker, None)
            self._base[worker] = state.version
        return answers

    def _greeting(self, state: ServerState, version: int, bodies: tuple[U8, ...] = ()) -> Welcome:
        ratios = state.ratios or None
        return Welcome(version, state.position, state.weights, ratios, bodies=bodies, layout=state.layout.hash)

    def _snapshot(self, state: ServerState) -> U8:
        """The model at this version."""
        return self._greeting(state, state.version, snapshot.pack(state.layout, state.w, state.statics)).pack()

    def _since(self, state: ServerState, version: int) -> tuple[U8, ...]:
        """What a replica at ``version`` lacks: the entries, or a snapshot where they are gone."""
        entries = state.log.since(version)
        return tuple(entries) if entries is not None else (self._snapshot(state),)

    def _turn_away(self, detail: str) -> list[Answer]:
        """Refuse everyone who waits to join a run that has ended."""
        tickets = [ticket for waiting in self._joining.values() for ticket in waiting.tickets]
        self._joining.clear()
        return self._refuse(tickets, "finished", detail)

    # -- exchanges -------------------------------------------------------------------------------

    def _exchange(self, message: Push | Average, ticket: Ticket, size: int) -> list[Answer]:
        state = self.state
        if self.finished:
            raise Refused("finished", "the run has ended")
        parts = self._parts(message)
        for worker in [part.worker for part in parts] or [message.worker]:
            if state is None or worker not in state.weights or worker in self._leaving:
                raise Refused("member", f"worker {worker} has not joined, or has left")
        assert state is not None
        self._check(message, parts, state)
        try:
            decoded = messages.updates(message, state.layout)
            for push in (message, *parts) if isinstance(message, Push) else ():
                self._check_statistics(push, state)
        except DecodeError as error:
            raise Refused("segment", f"the message of worker {message.worker} is not valid: {error}") from None
        self._pending[message.worker] = _Waiting(message, decoded, [ticket], size, parts)
        return self._close_if_complete()

    def _parts(self, message: Push | Average) -> tuple[Push, ...]:
        """The workers' pushes in a push: itself, or those that a relay of this run has folded into it."""
        if not isinstance(message, Push) or message.relayed is None:
            return (message,) if isinstance(message, Push) else ()
        group = self.plan.relays.get(message.worker, ())
        try:
            parts = [messages.parse(np.frombuffer(frame, np.uint8)) for frame in message.relayed]
        except DecodeError as error:
            raise Refused("frame", f"what relay {message.worker} has folded is not valid: {error}") from None
        pushes = tuple(part for part in parts if isinstance(part, Push) and part.worker in group)
        if not parts or len(pushes) < len(parts) or any(push.relayed for push in pushes):
            raise Refused("member", f"relay {message.worker} has folded what is not a push of its group")
        return pushes

    @staticmethod
    def _check_statistics(push: Push, state: ServerState) -> None:
        messages.unpack_statistics(push.statistics)
        if push.sketch:
            energies.unpack_sketch(push.sketch)
        if push.energies:
            energies.unpack_energies(push.energies, len(state.layout.segments))
        if any(number >= len(state.layout.segments) for number in push.replaced or ()):
            raise DecodeError(f"it replaces segments {push.replaced} of {len(state.layout.segments)}")

    def _check(self, message: Push | Average, parts: tuple[Push, ...], state: ServerState) -> None:
        worker = message.worker
        if message.layout != state.layout.hash:
            raise Refused("layout", f"the message of worker {worker} is for a model of another layout")
        last, _ = self._answered.get(worker, (None, None))
        if worker in self._pending:
            raise Refused("sequence", f"worker {worker} sent a message while its last one waits for an answer")
        if last is not None and message.sequence != last + 1:
            raise Refused("sequence", f"worker {worker} sent number {message.sequence} after {last}")
        expected = self._base[worker] if self.plan.server.mode == "async" else state.version
        if any(version != expected for version in (message.version, *(part.version for part in parts))):
            raise Refused("version", f"worker {worker} sent an update of version {message.version} in round {expected}")
        for part in parts:
            if part.digest is None or part.version != state.version or part.digest == snapshot.digest(state.w):
                continue
            self.vitals.replica_mismatches += 1
            raise Refused(
                "replica", f"the replica of worker {part.worker} differs from the server's at version {state.version}"
            )

    def _pull(self, pull: Pull, ticket: Ticket) -> list[Answer]:
        """A worker that does not take part waits for the next entry."""
        state, worker = self.state, pull.worker
        if state is None or worker not in state.weights or worker in self._leaving:
            raise Refused("member", f"worker {worker} has not joined, or has left")
        if pull.layout != state.layout.hash:
            raise Refused("layout", f"the message of worker {worker} is for a model of another layout")
        if pull.version > state.version:
            raise Refused("version", f"worker {worker} has version {pull.version} in round {state.version}")
        if pull.version < state.version:
            return self._deliver({worker: _Waiting(pull, (), [ticket])})
        if self.finished:
            raise Refused("finished", "the run has ended")
        self._pulling.setdefault(worker, _Waiting(pull, ())).tickets.append(ticket)
        return []

    def _due(self, state: ServerState) -> bool:
        """Whether enough has arrived to close the round.

        Synchronous: everyone who takes part has sent something. Asynchronous: ``buffer`` have pushed, and
        nobody who is still at work would fall behind by more than ``max_staleness`` versions.
        """
        present = state.weights.keys() - self._leaving.keys()
        if self.plan.server.mode == "sync":
            asked = set(participants(state.weights, self.plan.participation, self.plan.seed, state.version))
            expected = asked - self._leaving.keys()
            there = {part.worker for one in self._pending.values() for part in one.parts} | self._pending.keys()
            return expected <= there and bool(expected or self._leaving)
        if not present:
            return bool(self._leaving)
        oldest = min((self._base[w] for w in present - self._pending.keys()), default=state.version)
        most = self.plan.server.max_staleness
        bounded = most is None or state.version + 1 - oldest <= most
        return bounded and len(self._pending) >= min(self.plan.buffer, len(present))

    def _close_if_complete(self) -> list[Answer]:
        """Who has pushed takes no part in an average."""
        assert self.state is not None
        if not self._due(self.state):
            return []
        averages = {w: p for w, p in sorted(self._pending.items()) if isinstance(p.message, Average)}
        return self._average(averages) if averages else self._close()

    def _average(self, averages: dict[int, _Waiting]) -> list[Answer]:
        """Error averaging: everyone gets the exact sum of what was sent."""
        assert self.state is not None
        state = self.state
        total = state.layout.zeros()
        for worker in averages:
            del self._pending[worker]
        for place, *updates in zip(state.layout.segments, *(a.updates for a in averages.values()), strict=True):
            accumulate(updates, total[place.start : place.stop])
        bodies = tuple(pack_exact(total[s.start : s.stop].numpy()) for s in state.layout.segments)
        weight = sum(state.weights[worker] for worker in averages)
        frame = Mean(state.version, weight, bodies=bodies, layout=state.layout.hash).pack()
        return self._deliver(averages, (frame,))

    def _close(self) -> list[Answer]:
        """Fold the round, broadcast the entry, let joiners in and leavers out."""
        assert self.state is not None
        state, waiting = self.state, dict(sorted(self._pending.items()))
        self._pending.clear()
        pushes = [w.message for w in waiting.values() if isinstance(w.message, Push)]
        folded = [self._contribution(state, p, w) for p, w in zip(pushes, waiting.values(), strict=True)]
        parts = [part for one in waiting.values() for part in one.parts]
        folded += [handed for _, handed in sorted(self._leaving.items()) if handed is not None]
        last = self._stopping or state.version + 1 >= self.plan.rounds
        weights = self._next_weights(state, set() if last else set(self._joining))
        final = last or weights == {}
        ratios = self._steer(state, pushes, parts, waiting)
        options = next((part.options for part in parts if part.options), None)  # one worker announces them
        begun = self._clock()
        try:
            applied = apply(state, Close(tuple(folded), weights, options, ratios, final))
        except NotFiniteError as error:
            self._pending.update(waiting)
            return self._fail(f"{error}, after the server's optimizer")
        self.vitals.phases["aggregate"].observe(self._clock() - begun)
        self.finished = final
        pulling, self._pulling = self._pulling, {}
        answers = self._deliver({**waiting, **pulling})
        self._observe(state, pushes, parts, applied)
        return answers + (self._turn_away("the run has ended") if final else self._welcome(self._joining))

    def _steer(
        self, state: ServerState, pushes: list[Push], parts: list[Push], waiting: dict[int, _Waiting]
    ) -> list[float] | None:
        """Measure the gradient mismatch, and choose the ratios, where the workers have sent what that takes."""
        sketches = {part.worker: energies.unpack_sketch(part.sketch) for part in parts if part.sketch}
        if parts and len(sketches) == len(parts):
            relayed = [energies.unpack_sketch(push.sketch) for push in pushes if push.relayed and push.sketch]
            self.vitals.mismatch = mismatch(sum(relayed, state.sender.sketch()), sketches, state.weights)
        if self._steering is None or not pushes or not all(push.energies for push in pushes):
            return None
        segments = len(state.layout.segments)
        return self._steering.ratios(
            state.version,
            state.ratios,
            [energies.unpack_energies(push.energies, segments) for push in pushes],
            [[body.size for body in push.bodies] for push in pushes],
            sum(waiting[p.worker].size - len(p.sketch) - len(p.energies) for p in pushes) / len(pushes),
        )

    def _next_weights(self, state: ServerState, joining: set[int]) -> dict[int, float] | None:
        """The members from the next round on, if they change."""
        stay = state.weights.keys() - self._leaving.keys()
        self._leaving.clear()
        self.vitals.joins += len(joining - stay)
        members = stay | joining
        for worker in joining:
            state.samples[worker] = _samples(self._joining[worker])
        if members == state.weights.keys():
            return None
        state.samples = {worker: state.samples[worker] for worker in members}
        return shares(state.samples)

    def _contribution(self, state: ServerState, push: Push, waiting: _Waiting) -> Contribution:
        staleness = state.version - push.version
        self.vitals.staleness.observe(staleness)
        return Contribution(
            push.worker,
            push.sequence,
            waiting.updates,
            push.samples,
            all(part.skipped > 0 for part in waiting.parts),
            tuple(push.replaced or ()),
            self.plan.server.staleness.weight(staleness),
        )

    def _deliver(self, waiting: dict[int, _Waiting], frames: tuple[U8, ...] | None = None) -> list[Answer]:
        """Answer messages, with what each sender's replica lacks unless ``frames`` say otherwise."""
        assert self.state is not None
        state, answers = self.state, []
        for worker, one in waiting.items():
            assert isinstance(one.message, Push | Average | Pull)
            given = self._since(state, one.message.version) if frames is None else frames
            kind = "average" if isinstance(one.message, Average) else "update"
            first, *again = one.tickets
            answers.append(self._answer(first, kind, *given))
            answers += [self._answer(ticket, "resend", *given) for ticket in again]
            if not isinstance(one.message, Average):
                self._base[worker] = state.version
            if not isinstance(one.message, Pull):
                self._answered[worker] = (_number(one), given)
            for part in one.parts:
                self._base[part.worker] = state.version
                self._answered[part.worker] = (part.sequence, given)
            if isinstance(one.message, Push):
                for direction in ("uplink", "downlink"):
                    self.vitals.dense[direction] += 4 * state.layout.trainable
        return answers

    # -- leaving ---------------------------------------------------------------------------------

    def _leave(self, leave: Leave, ticket: Ticket) -> list[Answer]:
        state, worker = self.state, leave.worker
        if state is None or worker not in state.weights:
            raise Refused("member", f"worker {worker} has not joined, or has left")
        if leave.layout != state.layout.hash:
            raise Refused("layout", f"the message of worker {worker} is for a model of another layout")
        try:
            updates = messages.updates(leave, state.layout) if leave.bodies else None
        except DecodeError as error:
            raise Refused("segment", f"worker {worker} handed over no valid residual: {error}") from None
        self.vitals.leaves[leave.cause] += 1
        self._farewells[worker] = Farewell(state.version, layout=state.layout.hash).pack()
        answers = [self._answer(ticket, "update", self._farewells[worker])]
        if self.finished:
            return answers
        if leave.cause == "not_finite":
            return answers + self._fail(f"worker {worker} found NaN or Inf in its update")
        answers += self._withdraw(worker)
        pending = self._pending.get(worker)
        number = state.sequences.get(worker, 0) if pending is None else _number(pending)
        self._leaving[worker] = None if updates is None else Contribution(worker, number, updates)
        self.vitals.handed_over += updates is not None
        return answers + self._close_if_complete()

    def _fail(self, why: str) -> list[Answer]:
        """End the run at the last whole version, rather than fold a round that one worker could not make."""
        self.vitals.rejected["not_finite"] += 1
        self.vitals.state = "failed"
        self.finished = True
        waiting = [*self._pending.values(), *self._pulling.values(), *self._joining.values()]
        for some in (self._pending, self._pulling, self._joining):
            some.clear()
        frame = Refusal("finished", f"the run has ended: {why}").pack()
        return [self._answer(ticket, "update", frame) for one in waiting for ticket in one.tickets]

    def _withdraw(self, worker: int) -> list[Answer]:
        """Drop the average of a worker that will not see the answer; nothing of it was used."""
        pending = self._pending.get(worker)
        if pending is None or not isinstance(pending.message, Average):
            return []
        del self._pending[worker]
        return self._refuse(pending.tickets, "member", f"worker {worker} left or joined again before its average")

    # -- measuring -------------------------------------------------------------------------------

    def _refuse(self, tickets: Sequence[Ticket], reason: str, detail: str) -> list[Answer]:
        frame = Refusal(reason, detail).pack()
        if tickets:
            self.vitals.rejected[reason] += len(tickets)
        return [self._answer(ticket, "update", frame) for ticket in tickets]

    def _answer(self, ticket: Ticket, kind: str, *frames: U8) -> Answer:
        self.vitals.wire["downlink", kind] += _size(frames)
        return Answer(ticket, frames)

    def _observe(self, state: ServerState, pushes: list[Push], parts: list[Push], applied: Applied) -> None:
        vitals = self.vitals
        vitals.version, vitals.position = state.version, state.position
        vitals.server_before, vitals.server_left = applied.before, applied.left
        if state.version % self.plan.sketch_every == 0 or self.finished:
            vitals.server_conservation = state.sender.conservation_error()
        statistics = {p.worker: messages.unpack_statistics(p.statistics) for p in parts}
        for part in parts:
            vitals.observe_push(part.worker, statistics[part.worker], part.names or [], part.skipped)
        for push in pushes:
            if push.relayed:
                vitals.observe_relay(push.worker, messages.unpack_statistics(push.statistics))
        samples = {p.worker: p.samples for p in parts}
        reported = vitals.report(statistics, samples)
        vitals.close(self._clock() - self._started, sum(samples.values()), reported)
        vitals.members = tuple(sorted(state.weights))
        if self.finished:
            vitals.state = "finished"


def _number(waiting: _Waiting) -> int:
    assert isinstance(waiting.message, Push | Average)
    return waiting.message.sequence


def _samples(waiting: _Waiting) -> int | None:
    assert isinstance(waiting.message, Join)
    return waiting.message.samples


def _size(frames: tuple[U8, ...]) -> int:
    return sum(frame.size for frame in frames)
