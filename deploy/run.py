"""One run from start to summary, whatever the backend: watch it, write everything down, say what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from deploy.rundir import RunDirectory, load_model
from deploy.settings import RunSettings
from protocol.errors import CarryoverError, RunFailed
from workers.runner import Outcome

GRACE = 30.0  # seconds for a stopped run to finish its round

BYTES = ("uplink_bytes", "downlink_bytes", "uplink_ratio", "downlink_ratio")  # in rows and in the summary

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """What a run has left: its directory and its summary."""

    path: Path
    summary: dict[str, Any]

    def load_model(self) -> dict[str, Tensor]:
        """The trained model, for ``load_state_dict``."""
        return load_model(self.path)


class Backend(Protocol):
    """One way of running the same state machines."""

    metrics_port: int | None  # of the Prometheus endpoint, on the host of the settings

    def poll(self) -> tuple[Rows, list[Outcome]]:
        """Wait a moment; the new rows, and the workers that have ended since."""

    def stop(self) -> None:
        """Let the run end with its next entry."""

    def summary(self) -> dict[str, Any]:
        """What the server knows."""

    def close(self) -> None:
        """Leave nothing running."""


class Run:
    """One run from start to summary."""

    def __init__(
        self,
        settings: RunSettings,
        directory: RunDirectory,
        observe: Callable[[Mapping[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.directory = directory
        self.failure: BaseException | None = None
        self._observe = observe
        self._say = say
        self._outcomes: list[Outcome] = []
        self._last: Mapping[str, Any] = {}

    def result(
        self, start: Callable[[], Backend], finish: Callable[[Mapping[str, Any], Path], None] | None = None
    ) -> Result:
        """Train, write everything down, and only then raise what went wrong."""
        from deploy.report import write_report  # matplotlib takes a second that a run need not wait for at its start

        summary = self.run(start)
        if not self.directory.begun:
            assert self.failure is not None
            raise self.failure
        try:
            write_report([self.directory.path])
        finally:
            if finish is not None:
                finish(summary, self.directory.path)
            if self.failure is not None:
                raise self.failure
        return Result(self.directory.path, summary)

    def run(self, start: Callable[[], Backend]) -> dict[str, Any]:
        """Train; the summary, whatever happened."""
        begun = time.monotonic()
        known: dict[str, Any] = {}
        try:
            backend = start()
            self.directory.begin()
            try:
                if backend.metrics_port is not None:
                    self._say(f"metrics at http://{self.settings.metrics.host}:{backend.metrics_port}/metrics")
                self._watch(backend)
                known = backend.summary()
            finally:
                backend.close()
        except (CarryoverError, KeyboardInterrupt) as error:
            self.failure = self.failure or error
        return self._summary(known, time.monotonic() - begun)

    def _watch(self, backend: Backend) -> None:
        left = self.settings.workers.count
        deadline: float | None = None
        while left and (deadline is None or time.monotonic() < deadline):
            try:
                rows, ended = backend.poll()
            except KeyboardInterrupt as interrupt:
                if deadline is not None:
                    raise
                self.failure = interrupt
                self._say("stopping after this round; press Ctrl-C again to stop at once")
                deadline = time.monotonic() + GRACE
                backend.stop()
                continue
            self.directory.add(rows)
            for row in rows:
                self._last = row
                self._observe(row)
            left -= len(ended)
            self._outcomes += ended
            failed = [o for o in ended if o.error is not None and not o.stopped]
            if failed and self.failure is None:
                self.failure = _failure(failed[0])
                if self._last.get("version") != self.settings.rounds:
                    return
                deadline = time.monotonic() + GRACE  # all rounds are done: wait for the model of the founder
        ended_early = [o for o in self._outcomes if o.error is not None]
        if ended_early and self.failure is None:
            self.failure = _failure(ended_early[0])

    def _summary(self, known: dict[str, Any], seconds: float) -> dict[str, Any]:
        good = [o for o in self._outcomes if o.error is None]
        imbalance = max([known.get("conservation_error", 0.0), *(o.conservation_error for o in good)])
        prints = {o.fingerprint for o in good if o.fingerprint}
        if len(prints) > 1 and self.failure is None:
            self.failure = RunFailed(f"the workers' replicas differ at the end: {', '.join(sorted(prints))}")
        for outcome in self._outcomes:
            if outcome.model is not None:
                self.directory.save_model(outcome.model)
        names = sorted({name for o in good for name in o.reported})
        last = {}
        for name in names:
            values = [o.reported[name] for o in good if name in o.reported]
            last[name] = sum(values) / len(values)
        interrupted = isinstance(self.failure, KeyboardInterrupt)
        summary = {
            "status": "interrupted" if interrupted else "failed" if self.failure else "finished",
            "rounds": self._last.get("version", 0),
            **{key: self._last[key] for key in BYTES if key in self._last},
            "workers": self.settings.workers.count,
            "seconds": round(seconds, 3),
            **known,
            "conservation_error": imbalance,
            "fingerprint": min(prints, default=""),
            "reported": {**known.get("reported", {}), **last},
        }
        if self.directory.begun:
            self.directory.finish(summary)
        return summary


def _failure(outcome: Outcome) -> RunFailed:
    return RunFailed(outcome.error or "", outcome.traceback, outcome.expected)
