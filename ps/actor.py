"""The Ray actor around the server: receives frames, runs the state machine on one thread, answers."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from ps.metrics import Endpoint
from ps.plan import Plan
from ps.server import Answer, Server
from ps.settings import MetricsSettings
from ps.vitals import Vitals

U8 = npt.NDArray[np.uint8]

INLINE = 100_000  # bytes up to which Ray puts an answer into the reply itself
KEPT = 4  # large broadcasts that stay in the object store while slow readers fetch them


class ServerActor:
    """One call a round and worker: ``exchange``. Everything else is for the launcher.

    Args:
        plan: of the run.
        metrics: where to serve metrics; with ``port`` None there is no endpoint.

    Raises:
        SettingsError: the metrics port is in use.
    """

    def __init__(self, plan: Plan, metrics: MetricsSettings) -> None:
        self._server = Server(plan, time.monotonic)
        self._endpoint = Endpoint(self._server.vitals, metrics) if metrics.port is not None else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="server")
        self._tickets = itertools.count()
        self._waiting: dict[int, asyncio.Future[list[Any]]] = {}
        self._failure: Exception | None = None
        self._broadcasts: deque[tuple[U8, Any]] = deque(maxlen=KEPT)

    async def metrics_port(self) -> int | None:
        """The port of the metrics endpoint."""
        return self._endpoint.port if self._endpoint else None

    async def exchange(self, frame: U8) -> list[Any]:
        """Deliver one frame; returns when the server has an answer to it.

        Returns:
            The frames of the answer: arrays, or references to them where they are large.
        """
        if self._failure is not None:
            raise self._failure
        ticket = next(self._tickets)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Any]] = loop.create_future()
        self._waiting[ticket] = answer
        try:
            answers = await loop.run_in_executor(self._thread, self._server.receive, frame, ticket)
        except Exception as error:
            del self._waiting[ticket]
            self._fail(error)
            raise
        self._deliver(answers)
        return await answer

    async def stop(self) -> None:
        """End the run with the next entry."""
        loop = asyncio.get_running_loop()
        self._deliver(await loop.run_in_executor(self._thread, self._server.stop))

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

    def _deliver(self, answers: list[Answer]) -> None:
        for answer in answers:
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
