"""The Ray actor around the server: receives frames, runs the state machine on one thread, answers."""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from ps.answers import Answer
from ps.metrics import Endpoint
from ps.plan import Plan
from ps.relay import Deeds, Forward, Relay, RelayPlan
from ps.server import Server
from ps.settings import MetricsSettings
from ps.vitals import Vitals

U8 = npt.NDArray[np.uint8]

INLINE = 100_000  # bytes up to which Ray puts an answer into the reply itself
KEPT = 4  # large broadcasts that stay in the object store while slow readers fetch them


class Shell(ABC):
    """What the actors of the server and of the relays share: calls come in, answers go out, one thread thinks."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._tickets = itertools.count()
        self._waiting: dict[int, asyncio.Future[list[Any]]] = {}
        self._failure: Exception | None = None
        self._broadcasts: deque[tuple[U8, Any]] = deque(maxlen=KEPT)

    @abstractmethod
    def _receive(self, frame: U8, ticket: int) -> Sequence[Any]:
        """Let the state machine have a frame; on the thread."""

    @abstractmethod
    def _perform(self, deeds: Sequence[Any]) -> None:
        """Do what the state machine asks for; on the event loop."""

    async def exchange(self, frame: U8) -> list[Any]:
        """Deliver one frame; returns when there is an answer to it.

        Returns:
            The frames of the answer: arrays, or references to them where they are large.
        """
        if self._failure is not None:
            raise self._failure
        ticket = next(self._tickets)
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = answer
        try:
            await self._think(self._receive, frame, ticket)
        except Exception:
            self._waiting.pop(ticket, None)
            raise
        return await answer

    async def _think(self, what: Callable[..., Sequence[Any]], *arguments: Any) -> None:
        """Run the state machine on its thread and do what it asks for; if it fails, nobody may wait for ever."""
        loop = asyncio.get_running_loop()
        try:
            deeds = await loop.run_in_executor(self._thread, what, *arguments)
        except Exception as error:
            self._fail(error)
            raise
        self._perform(deeds)

    def _deliver(self, answer: Answer) -> None:
        assert isinstance(answer.ticket, int)
        future = self._waiting.pop(answer.ticket, None)  # None once the state machine has failed
        if future is not None and not future.done():
            future.set_result([self._outgoing(frame) for frame in answer.frames])

    def _outgoing(self, frame: U8) -> Any:
        """Small frames travel in the reply; a large one is put once and fetched by every node once."""
        if frame.size <= INLINE:
            return frame
        for known, reference in self._broadcasts:
            if known is frame:
                return reference
        reference = ray.put(frame)
        self._broadcasts.append((frame, reference))
        return reference

    def _fail(self, error: Exception) -> None:
        """Nobody may wait for ever once the state machine has failed, or go on with half a state."""
        self._failure = error
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()


class ServerActor(Shell):
    """One call a round and worker: ``exchange``. Everything else is for the launcher.

    Args:
        plan: of the run.
        metrics: where to serve metrics; with ``port`` None there is no endpoint.

    Raises:
        SettingsError: the metrics port is in use.
    """

    def __init__(self, plan: Plan, metrics: MetricsSettings) -> None:
        super().__init__("server")
        self._server = Server(plan, time.monotonic)
        self._endpoint = Endpoint(self._server.vitals, metrics) if metrics.port is not None else None

    def _receive(self, frame: U8, ticket: int) -> list[Answer]:
        return self._server.receive(frame, ticket)

    def _perform(self, deeds: Sequence[Any]) -> None:
        for answer in deeds:
            self._deliver(answer)

    async def metrics_port(self) -> int | None:
        """The port of the metrics endpoint."""
        return self._endpoint.port if self._endpoint else None

    async def stop(self) -> None:
        """End the run with the next entry."""
        await self._think(self._server.stop)

    async def watch(self, version: int) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl`` after a version."""
        return await asyncio.to_thread(self._read, lambda vitals: vitals.rows_since(version))

    async def summary(self) -> dict[str, Any]:
        """What the server knows for ``summary.json``."""
        return await asyncio.to_thread(self._read, lambda vitals: vitals.summary())

    def _read(self, what: Callable[[Vitals], Any]) -> Any:
        """Read the vital signs; on a thread, since a fold holds their lock and the event loop must not wait."""
        with self._server.vitals.lock:
            return what(self._server.vitals)


class RelayActor(Shell):
    """The actor of one relay: ``exchange`` for its group, calls of the server's ``exchange`` for what it sends on.

    Args:
        plan: of the relay.
        server: handle of the server actor.
    """

    def __init__(self, plan: RelayPlan, server: Any) -> None:
        super().__init__("relay")
        self._relay = Relay(plan)
        self._server = server
        self._sending: set[asyncio.Task[None]] = set()

    async def summary(self) -> dict[str, Any]:
        """What this relay knows for ``summary.json``."""
        return dict(self._relay.vitals.traffic())

    def _receive(self, frame: U8, ticket: int) -> Deeds:
        return self._relay.receive(frame, ticket)

    def _perform(self, deeds: Sequence[Any]) -> None:
        for deed in deeds:
            if isinstance(deed, Forward):
                task = asyncio.get_running_loop().create_task(self._send(deed))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
            else:
                self._deliver(deed)

    async def _send(self, forward: Forward) -> None:
        try:
            frames = await self._server.exchange.remote(forward.frame)
            frames = [await one if isinstance(one, ray.ObjectRef) else one for one in frames]
            await self._think(self._relay.answered, forward.token, tuple(frames))
        except Exception as error:  # the server is gone, or has failed
            self._fail(error)
