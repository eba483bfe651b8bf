"""The barrier at the end of a round: who has arrived, and whether that is enough to close it.

Bulk synchronous (Valiant 1990): all who take part. Asynchronous with a buffer (FedBuff: Nguyen et al., "Federated
Learning with Buffered Asynchronous Aggregation", AISTATS 2022), and with a bound on staleness (stale synchronous
parallel: Ho et al., NeurIPS 2013).
"""

from __future__ import annotations

from collections.abc import Collection

from protocol.messages import Average, Message, Pull, Push
from protocol.sampling import participants
from ps.aggregate import Contribution
from ps.answers import Ticket, Waiting
from ps.plan import Plan
from ps.state import ServerState


class Barrier:
    """The round that is open.

    Attributes:
        pending: pushes and averages, at most one a worker.
        pulling: workers that wait for the next entry without an update of their own.
        leaving: members that go when the round closes, with what they hand over.
        base: the version that each worker was last given.
    """

    def __init__(self, plan: Plan) -> None:
        self.pending: dict[int, Waiting[Push | Average]] = {}
        self.pulling: dict[int, Waiting[Pull]] = {}
        self.leaving: dict[int, Contribution | None] = {}
        self.base: dict[int, int] = {}
        self._plan = plan
        self.asynchronous = plan.server.mode == "async"

    def asked(self, state: ServerState) -> Collection[int]:
        """Who takes part in the round."""
        return participants(state.weights, self._plan.participation, self._plan.seed, state.version)

    def arrived(self) -> set[int]:
        """Whose updates or averages are there, through a relay or not."""
        return self.pending.keys() | {part.worker for one in self.pending.values() for part in one.parts}

    def version(self, state: ServerState, worker: int) -> int:
        """Of which the worker's update must be."""
        return self.base[worker] if self.asynchronous else state.version

    def complete(self, state: ServerState) -> bool:
        """Whether the round closes now.

        Synchronous: everyone who takes part has sent something. Asynchronous: nobody is at work any more, or
        ``buffer`` have pushed and nobody at work would fall behind by more than ``max_staleness`` versions. So
        somebody is always at work.
        """
        if not self.asynchronous:
            expected = set(self.asked(state)) - self.leaving.keys()
            return expected <= self.arrived() and bool(expected or self.leaving)
        at_work = state.weights.keys() - self.leaving.keys() - self.pending.keys() - self.pulling.keys()
        if not at_work:
            return bool(self.pending or self.leaving)
        most = self._plan.server.max_staleness
        bounded = most is None or all(state.version + 1 - self.base[worker] <= most for worker in at_work)
        return bounded and len(self.pending) >= self._plan.buffer

    def waits(self, message: Message, ticket: Ticket) -> bool:
        """Whether this message waits already; then this call of it waits as well."""
        if isinstance(message, Push | Average):
            pending = self.pending.get(message.worker)
            if pending is not None and pending.message.sequence == message.sequence:
                pending.tickets.append(ticket)
                return True
        if isinstance(message, Pull):
            pulling = self.pulling.get(message.worker)
            same = (message.version, message.layout)
            if pulling is not None and (pulling.message.version, pulling.message.layout) == same:
                pulling.tickets.append(ticket)
                return True
        return False

    def withdraw(self, worker: int) -> list[Ticket]:
        """Drop the average and the pull of a worker that will not see the answers; nothing of them was used."""
        tickets: list[Ticket] = []
        if worker in self.pulling:
            tickets += self.pulling.pop(worker).tickets
        if worker in self.pending and isinstance(self.pending[worker].message, Average):
            tickets += self.pending.pop(worker).tickets
        return tickets

    def abandon(self) -> list[Ticket]:
        """The round will not close; the calls that waited for it."""
        tickets = [t for waiting in (self.pending, self.pulling) for one in waiting.values() for t in one.tickets]
        self.pending.clear()
        self.pulling.clear()
        return tickets
