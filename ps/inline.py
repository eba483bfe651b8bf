"""The server inside the process of its workers: the same state machine and frames, no Ray.

Each worker runs on a thread of its own, but only one runs at any time: it keeps the baton until it
waits for an answer. So the order of events, and everything that depends on global random state, is
fixed.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protocol.errors import RunStopped
from ps.answers import Answer
from ps.relay import Deeds, Forward, Relay
from ps.server import Server

U8 = npt.NDArray[np.uint8]
Order = Callable[[Sequence[int]], int]  # of the workers that could run, longest waiting first: who does


def first_come(ready: Sequence[int]) -> int:
    """All workers are equally fast."""
    return ready[0]


@dataclass(frozen=True, eq=False)
class _Forwarded:
    """The ticket of a frame that a relay has sent."""

    relay: Relay
    token: Hashable


class InlineServer:
    """Delivers frames to a server and passes the baton between the workers' threads.


    Args:
        relays: which send on what their groups push.
        order: who runs next; a slow worker is one that is seldom chosen.
    """

    def __init__(
        self, server: Server, workers: tuple[int, ...], relays: Sequence[Relay] = (), order: Order = first_come
    ) -> None:
        self._server = server
        self._relays = {worker: relay for relay in relays for worker in relay.plan.group}
        self._order = order
        self._ready = deque(workers)
        self._turn = {worker: threading.Event() for worker in workers}
        self._owners: dict[int, int] = {}  # ticket -> worker
        self._answers: dict[int, tuple[U8, ...]] = {}
        self._tickets = itertools.count()
        self._cancelled = False

    def begin(self) -> None:
        """Give the baton to the first worker."""
        self._pass_on()

    def enter(self, worker: int) -> None:
        """Called first by a worker's thread: wait for the baton."""
        self._wait(worker)

    def exit(self, worker: int) -> None:
        """Called last by a worker's thread: pass the baton on for good."""
        self._pass_on()

    def call(self, worker: int, frame: U8) -> list[U8]:
        """Deliver a frame; others run until the answer is there.

        Raises:
            RunStopped: the run was cancelled, or no worker is left that could cause an answer.
        """
        ticket = next(self._tickets)
        self._owners[ticket] = worker
        relay = self._relays.get(worker)
        if relay is None:
            self._deliver(self._server.receive(frame, ticket))
        else:
            self._perform(relay, relay.receive(frame, ticket))
        self._pass_on()  # even if the answer is there: nobody may run ahead of those who wait for their turn
        self._wait(worker)
        return list(self._answers.pop(ticket))

    def stop(self) -> None:
        """End the run with the next entry."""
        self._deliver(self._server.stop())

    def cancel(self) -> None:
        """Let every worker that waits raise ``RunStopped``."""
        self._cancelled = True
        for event in self._turn.values():
            event.set()

    def _deliver(self, answers: list[Answer]) -> None:
        for answer in answers:
            if isinstance(answer.ticket, _Forwarded):
                forwarded = answer.ticket
                self._perform(forwarded.relay, forwarded.relay.answered(forwarded.token, answer.frames))
                continue
            assert isinstance(answer.ticket, int)
            self._answers[answer.ticket] = answer.frames
            self._ready.append(self._owners.pop(answer.ticket))

    def _perform(self, relay: Relay, deeds: Deeds) -> None:
        for deed in deeds:
            if isinstance(deed, Forward):
                self._deliver(self._server.receive(deed.frame, _Forwarded(relay, deed.token)))
            else:
                self._deliver([deed])

    def _pass_on(self) -> None:
        if self._ready:
            worker = self._order(self._ready)
            self._ready.remove(worker)
            self._turn[worker].set()
        else:
            self.cancel()

    def _wait(self, worker: int) -> None:
        if not self._cancelled:
            self._turn[worker].wait()
            self._turn[worker].clear()
        if self._cancelled:
            raise RunStopped("the run ended while this worker was waiting")


class InlineTransport:
    """One worker's way to an ``InlineServer``."""

    def __init__(self, server: InlineServer, worker: int) -> None:
        self._server = server
        self._worker = worker

    def call(self, frame: U8) -> list[U8]:
        """Deliver one frame and wait for its answer."""
        return self._server.call(self._worker, frame)
