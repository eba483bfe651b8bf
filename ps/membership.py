"""Joining: the founding workers make a run together, later ones enter with the next version."""

from __future__ import annotations

from collections.abc import Collection

from protocol import snapshot
from protocol.compression import Compression
from protocol.errors import DecodeError, Refused, SettingsError
from protocol.layout import Layout
from protocol.messages import Join
from protocol.sender import Sender
from ps.aggregate import aggregate_for
from ps.answers import Frames, Ticket, Waiting, size
from ps.log import Log
from ps.plan import Plan, optimizer_for
from ps.state import ServerState, shares


class Membership:
    """Those who wait to be members.

    Attributes:
        joining: their Joins, by worker.
    """

    def __init__(self, plan: Plan) -> None:
        self.joining: dict[int, Waiting[Join]] = {}
        self._plan = plan
        self._layout: Layout | None = None  # of the first worker that joined
        self._founded: ServerState | None = None  # version 0, once rank 0 has joined

    def add(self, join: Join, ticket: Ticket, begun: bool) -> None:
        """Let a worker wait; ``begun``: the run has.

        Raises:
            Refused: it is no worker of the run, or its model is another one.
        """
        worker, plan = join.worker, self._plan
        if not begun and worker not in plan.workers:
            known = ", ".join(map(str, plan.workers))
            raise Refused("member", f"worker {worker} is not one of this run's workers, which are {known}")
        try:
            layout = Layout.restore(join.description)
        except DecodeError as error:
            raise Refused("frame", str(error)) from None
        first = self._layout or layout
        if layout.hash != first.hash:
            raise Refused("layout", f"the model of worker {worker} has {first.difference(layout)}")
        if worker == min(plan.workers) and self._founded is None:
            self._founded = _version_0(plan, layout, join)
        self._layout = layout
        self.joining.setdefault(worker, Waiting(join, [])).tickets.append(ticket)

    def start(self) -> ServerState | None:
        """The run's first state, once all founding workers are there."""
        if self._founded is None or not set(self._plan.workers) <= self.joining.keys():
            return None
        self._founded.samples = self.samples()
        self._founded.weights = shares(self._founded.samples)
        return self._founded

    def samples(self) -> dict[int, int | None]:
        """How many samples of their own those who wait have, if they said."""
        return {worker: waiting.message.samples for worker, waiting in self.joining.items()}

    def welcome(self, state: ServerState, workers: Collection[int]) -> list[tuple[int, list[Ticket], Frames]]:
        """Let workers in: each with its calls, and a snapshot or, if that is smaller, the entries that it lacks."""
        whole: Frames = (state.welcome(),) if workers else ()
        welcomed = []
        for worker in sorted(workers):
            waiting = self.joining.pop(worker)
            frames, held = whole, waiting.message.version
            if held is not None and (entries := state.since(held)) is not None:
                frames = min(frames, (state.welcome(held), *entries), key=size)
            welcomed.append((worker, waiting.tickets, frames))
        return welcomed

    def turn_away(self) -> list[Ticket]:
        """Let nobody in any more; the calls that waited."""
        tickets = [ticket for waiting in self.joining.values() for ticket in waiting.tickets]
        self.joining.clear()
        return tickets


def _version_0(plan: Plan, layout: Layout, founder: Join) -> ServerState:
    """The model of rank 0, the lowest id; nobody is a member yet."""
    try:
        w, statics = snapshot.unpack_snapshot(layout, founder.bodies)
    except DecodeError as error:
        raise Refused("segment", f"worker {founder.worker} has not sent its model: {error}") from None
    try:
        compression = Compression(layout, plan.downlink, plan.overrides, plan.schedule)
        optimizer = optimizer_for(plan, layout, founder)
    except SettingsError as error:
        raise Refused("frame", str(error)) from None
    sender = Sender(layout, compression.final, plan.seed, memory=plan.server.residual)
    aggregate = aggregate_for(plan.feedback, layout)
    log = Log(limit=max(w.nbytes, 1 << 20))  # a snapshot is hardly larger
    return ServerState(layout, w, statics, sender, compression, aggregate, optimizer, {}, log=log)
