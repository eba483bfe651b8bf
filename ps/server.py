"""The server between frames and state: who may say what, what is folded, who gets which answer.

A shell (the Ray actor, or the inline backend) passes in every frame with a ticket and delivers the
answers it gets back. All calls come from one thread. Time comes from the clock that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol import energies, messages, snapshot
from protocol.errors import DecodeError, NotFiniteError, Refused
from protocol.messages import Average, Farewell, Join, Leave, Mean, Pull, Push, Refusal
from ps.aggregate import Contribution, exact_sum
from ps.answers import Answer, Answers, Frames, Ticket, Waiting
from ps.barrier import Barrier
from ps.checks import check_sender, check_update, parts_of
from ps.membership import Membership
from ps.plan import Plan
from ps.state import Applied, Close, ServerState, apply, shares
from ps.steering import Steering, mismatch, steering_for
from ps.vitals import Vitals

U8 = npt.NDArray[np.uint8]


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
        self._failed = False
        self._ending = "the run has ended"  # what is said to whoever comes too late
        self._membership = Membership(plan)
        self._barrier = Barrier(plan)
        self._answers = Answers(self.vitals)
        self._steering: Steering | None = None
        self._joined: set[int] = set()  # since the last fold, with nothing in memory

    def receive(self, frame: U8, ticket: Ticket) -> list[Answer]:
        """Take in one frame; the answers that are due because of it, perhaps to other tickets too."""
        with self.vitals.lock:
            try:
                return self._receive(frame, ticket)
            except Refused as refusal:
                return self._answers.refuse([ticket], refusal.reason, refusal.detail)

    def stop(self) -> list[Answer]:
        """End the run with the next entry; before the first round, at once."""
        with self.vitals.lock:
            self._stopping = True
            if self.state is not None:
                return []
            self.finished = True
            self.vitals.state = "finished"
            tickets = self._membership.turn_away()
            return self._answers.refuse(tickets, "finished", "the run was stopped before its first round")

    def _receive(self, frame: U8, ticket: Ticket) -> list[Answer]:
        try:
            message = messages.parse(frame)
        except DecodeError as error:
            self.vitals.wire["uplink", "update"] += frame.size
            raise Refused("frame", str(error)) from None
        repeated = self._answers.repeat(message, ticket)
        kind = "snapshot" if isinstance(message, Join) else "average" if isinstance(message, Average) else "update"
        resent = bool(repeated) or self._barrier.waits(message, ticket)
        self.vitals.wire["uplink", "resend" if resent else kind] += frame.size
        if resent:
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

    # -- coming and going ------------------------------------------------------------------------

    def _join(self, join: Join, ticket: Ticket) -> list[Answer]:
        worker, state = join.worker, self.state
        if self.finished:
            raise Refused("finished", self._ending)
        self._membership.add(join, ticket, begun=state is not None)
        if state is None:
            return self._start()
        if worker not in state.weights or worker in self._barrier.leaving:
            return []  # a new member: from the next version on
        # a member that lost its answer or its memory, and for whose push the round would wait for ever
        answers = self._withdraw(worker)
        if worker in self._barrier.pending:
            return answers
        return answers + self._welcome(state, [worker]) + self._close_if_complete(state)

    def _start(self) -> list[Answer]:
        state = self.state = self._membership.start()
        if state is None:
            return []
        self._steering = steering_for(self.plan, state.layout)
        self._note_digest(state)
        self.vitals.members = tuple(state.weights)
        self.vitals.joins += len(state.weights)
        self.vitals.state = "training"
        self._started = self._clock()
        return self._welcome(state, state.weights)

    def _welcome(self, state: ServerState, workers: Collection[int]) -> list[Answer]:
        answers = []
        self._joined |= {worker for worker in workers if self._membership.joining[worker].message.version is None}
        for worker, tickets, frames in self._membership.welcome(state, workers):
            answers += self._answers.give(tickets, "snapshot", frames)
            self._answers.forget(worker)
            self.vitals.workers.pop(worker, None)
            self._barrier.base[worker] = state.version
        return answers

    def _leave(self, leave: Leave, ticket: Ticket) -> list[Answer]:
        state, worker = check_sender(leave, self.state, self._barrier), leave.worker
        try:
            updates = messages.updates(leave, state.layout) if leave.bodies else None
        except DecodeError as error:
            raise Refused("segment", f"worker {worker} handed over no valid residual: {error}") from None
        self.vitals.leaves[leave.cause] += 1
        answers = self._answers.dismiss(worker, Farewell(state.version, layout=state.layout.hash), ticket)
        if self.finished:
            return answers
        if leave.cause == "not_finite":
            return answers + self._fail(f"worker {worker} found NaN or Inf in its update")
        answers += self._withdraw(worker)
        pending = self._barrier.pending.get(worker)
        number = state.sequences.get(worker, 0) if pending is None else pending.message.sequence
        self._barrier.leaving[worker] = None if updates is None else Contribution(worker, number, updates)
        self.vitals.handed_over += updates is not None
        return answers + self._close_if_complete(state)

    def _withdraw(self, worker: int) -> list[Answer]:
        detail = f"worker {worker} left or joined again before its answer"
        return self._answers.refuse(self._barrier.withdraw(worker), "member", detail)

    def _fail(self, why: str) -> list[Answer]:
        """End the run at the last whole version, rather than fold a round that one worker could not make."""
        self.vitals.rejected["not_finite"] += 1
        self.vitals.state = "failed"
        self.finished = self._failed = True
        self._ending = f"the run has ended: {why}"
        tickets = self._barrier.abandon() + self._membership.turn_away()
        return self._answers.give(tickets, "update", (Refusal("finished", self._ending).pack(),))

    # -- exchanges -------------------------------------------------------------------------------

    def _exchange(self, message: Push | Average, ticket: Ticket, size: int) -> list[Answer]:
        if self.finished:
            raise Refused("finished", self._ending)
        parts = parts_of(message, self.plan.relays)
        state = check_sender(message, self.state, self._barrier, parts)
        updates = check_update(message, parts, state, self._barrier, self._answers.last(message.worker))
        self._barrier.pending[message.worker] = Waiting(message, [ticket], updates, size, parts)
        return self._close_if_complete(state)

    def _pull(self, pull: Pull, ticket: Ticket) -> list[Answer]:
        """A worker that has nothing to push waits for the next entry."""
        state, waiting = check_sender(pull, self.state, self._barrier), Waiting(pull, [ticket])
        if pull.version > state.version:
            raise Refused("version", f"worker {pull.worker} has version {pull.version} in round {state.version}")
        if self._failed or (self.finished and pull.version == state.version):
            raise Refused("finished", self._ending)
        if pull.version < state.version:
            return self._deliver(state, {pull.worker: waiting}) + self._close_if_complete(state)
        self._barrier.pulling[pull.worker] = waiting
        return self._close_if_complete(state)

    def _note_digest(self, state: ServerState) -> None:
        """At the versions at which workers check their replicas: asynchronous ones at any."""
        if self._barrier.asynchronous or state.version % self.plan.sketch_every == 0:
            state.log.note(state.version, snapshot.digest(state.w))

    # -- closing a round -------------------------------------------------------------------------

    def _close_if_complete(self, state: ServerState) -> list[Answer]:
        """Who has pushed takes no part in an average."""
        if self.finished or not self._barrier.complete(state):
            return []
        pending = dict(sorted(self._barrier.pending.items()))
        averages = {worker: one for worker, one in pending.items() if isinstance(one.message, Average)}
        return self._average(state, averages) if averages else self._close(state, pending)

    def _average(self, state: ServerState, averages: Mapping[int, Waiting[Any]]) -> list[Answer]:
        """Error averaging: everyone gets the exact sum of what was sent."""
        for worker in averages:
            del self._barrier.pending[worker]
        bodies = exact_sum(state.layout, [one.updates for one in averages.values()])
        weight = sum(state.weights[worker] for worker in averages)
        frame = Mean(state.version, weight, bodies=bodies, layout=state.layout.hash).pack()
        return [answer for one in averages.values() for answer in self._answers.deliver(one, "average", (frame,))]

    def _close(self, state: ServerState, pending: Mapping[int, Waiting[Any]]) -> list[Answer]:
        """Fold the round, broadcast the entry, let joiners in and leavers out."""
        leaving, pushes = self._barrier.leaving, [part for one in pending.values() for part in one.parts]
        folded = [self._contribution(state, one) for one in pending.values()]
        folded += [handed for _, handed in sorted(leaving.items()) if handed is not None]
        last = self._stopping or state.version + 1 >= self.plan.rounds
        joining = {} if last else self._membership.samples()
        stay = {worker: count for worker, count in state.samples.items() if worker not in leaving}
        samples = stay | joining
        weights = None if (found := shares(samples)) == state.weights else found
        final = last or weights == {}
        relayed = [one.message for one in pending.values() if one.message.relayed]
        self._measure_mismatch(state, pushes, relayed)
        sized = [(one.message, one.size) for one in pending.values()]
        every, steering = self.plan.sketch_every, self._steering
        ratios = steering.choose(state.version, state.ratios, sized, every) if steering else None
        options = next((push.options for push in pushes if push.options), None)  # one worker announces them
        begun = self._clock()
        try:
            applied = apply(state, Close(tuple(folded), weights, options, ratios, final, tuple(sorted(self._joined))))
        except NotFiniteError as error:
            return self._fail(f"{error}, after the server's optimizer")
        self.vitals.phases["aggregate"].observe(self._clock() - begun)
        self.vitals.joins += len(joining.keys() - stay.keys())
        self._joined.clear()
        self.finished, state.samples = final, samples
        self._note_digest(state)
        pulling, self._barrier.pulling = self._barrier.pulling, {}
        self._barrier.pending.clear()
        leaving.clear()
        answers = self._deliver(state, pending) + self._deliver(state, pulling)
        for push in relayed:
            self.vitals.observe_relay(push.worker, messages.unpack_statistics(push.statistics))
        self._observe(state, pushes, folded, applied)
        if final:
            return answers + self._answers.refuse(self._membership.turn_away(), "finished", self._ending)
        return answers + self._welcome(state, self._membership.joining)

    def _contribution(self, state: ServerState, one: Waiting[Any]) -> Contribution:
        push: Push = one.message
        factor = self.plan.server.staleness.weight(state.version - push.version)
        skipped = all(part.skipped > 0 for part in one.parts)
        rest = (push.samples, skipped, tuple(push.replaced or ()), factor)
        return Contribution(push.worker, push.sequence, one.updates, *rest)

    def _deliver(self, state: ServerState, waiting: Mapping[int, Waiting[Any]]) -> list[Answer]:
        """Answer pushes and pulls with what each replica lacks: the entries, or a snapshot where they are gone."""
        answers: list[Answer] = []
        whole: Frames = ()
        for worker, one in waiting.items():
            frames = state.since(one.message.version)
            if frames is None:
                frames = whole = whole or (state.welcome(),)
            answers += self._answers.deliver(one, "update", frames)
            for receiver in [part.worker for part in one.parts] or [worker]:
                self._barrier.base[receiver] = state.version
            if isinstance(one.message, Push):
                for direction in ("uplink", "downlink"):
                    self.vitals.dense[direction] += 4 * state.layout.trainable
        return answers

    # -- measuring -------------------------------------------------------------------------------

    def _measure_mismatch(self, state: ServerState, pushes: list[Push], relayed: list[Push]) -> None:
        """Before the fold; who does not take part owes what it owed."""
        seen = self.vitals.workers
        for push in (fresh := [push for push in pushes if push.sketch]):
            seen[push.worker].sketch = energies.unpack_sketch(push.sketch)
        sketches = {worker: sketch for worker in state.weights if (sketch := seen[worker].sketch) is not None}
        if fresh and len(sketches) == len(state.weights):
            between = (energies.unpack_sketch(push.sketch) for push in relayed if push.sketch)
            self.vitals.mismatch = mismatch(sum(between, state.sender.sketch()), sketches, state.weights)

    def _observe(self, state: ServerState, pushes: list[Push], folded: list[Contribution], applied: Applied) -> None:
        vitals = self.vitals
        vitals.version, vitals.position = state.version, state.position
        vitals.server_before, vitals.server_left = applied.before, applied.left
        if state.version % self.plan.sketch_every == 0 or self.finished:
            vitals.server_conservation = state.sender.conservation_error()
        statistics = {p.worker: messages.unpack_statistics(p.statistics) for p in pushes}
        for push in pushes:
            vitals.staleness.observe(state.version - 1 - push.version)
            vitals.observe_push(push.worker, statistics[push.worker], push.names or [], push.skipped)
        vitals.discarded["staleness"] += sum(contribution.dropped() for contribution in folded)
        samples = {p.worker: p.samples for p in pushes}
        reported = vitals.report(statistics, samples)
        vitals.close(self._clock() - self._started, sum(samples.values()), reported)
        vitals.members = tuple(sorted(state.weights))
        if self.finished:
            vitals.state = "finished"
