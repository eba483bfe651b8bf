"""Starts the server and the workers, watches them, and brings the results home.

The only module that knows both ``ps`` and ``workers``.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch

from deploy.display import Display
from deploy.importing import function
from deploy.local_ray import LocalRay
from deploy.run import GRACE, Backend, Result, Rows, Run
from deploy.rundir import RunDirectory
from deploy.settings import RunSettings, validate
from protocol.errors import CarryoverError, RunFailed, SettingsError
from ps.actor import RelayActor, ServerActor
from ps.inline import InlineServer, InlineTransport
from ps.metrics import Endpoint
from ps.plan import Plan
from ps.relay import Relay, RelayPlan
from ps.server import Server
from workers.actor import WorkerActor
from workers.rounds import WorkerPlan
from workers.runner import Outcome, Train, run

POLL = 0.2  # seconds between looks at a run

log = logging.getLogger(__name__)


def plans(settings: RunSettings) -> tuple[Plan, list[WorkerPlan]]:
    """What the server and each worker need to know."""
    ids = tuple(range(settings.workers.count))
    every = settings.metrics.sketch_every
    common = {
        "seed": settings.seed,
        "send": settings.send,
        "overrides": settings.overrides,
        "sketch_every": every,
        "schedule": settings.schedule,
        "uplink": settings.uplink,
    }
    relays = relay_plans(settings)
    server = Plan(
        settings.rounds,
        ids,
        downlink=settings.downlink,
        server=settings.server,
        feedback=settings.feedback.kind,
        participation=settings.federated.participation,
        budget=settings.budget,
        relays={relay.relay: relay.group for relay in relays},
        **common,  # type: ignore[arg-type]
    )
    workers = [
        WorkerPlan(
            worker,
            founder=worker == 0,
            feedback=settings.feedback,
            residual=settings.workers.residual,
            local_steps=settings.workers.local_steps,
            accumulate=settings.workers.accumulate,
            granularity=settings.granularity,
            federated=settings.federated,
            asynchronous=settings.server.mode == "async",
            adaptive=settings.budget is not None,
            count=len(ids),
            arguments=settings.arguments,
            **common,  # type: ignore[arg-type]
        )
        for worker in ids
    ]
    return server, workers


def relay_plans(settings: RunSettings) -> list[RelayPlan]:
    """What each relay needs to know: groups of neighbouring workers, as equal as can be; ids follow the workers'."""
    count, relays = settings.workers.count, settings.relays
    return [
        RelayPlan(
            count + number,
            tuple(range(count * number // relays.count, count * (number + 1) // relays.count)),
            relays.uplink,
            settings.overrides,
            settings.schedule,
            settings.seed,
            settings.federated.participation,
            relays.residual,
            settings.metrics.sketch_every,
        )
        for number in range(relays.count)
    ]


def _with_groups(summary: dict[str, Any], groups: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The summary of the server, and what travelled between workers and relays, if there are any."""
    if not groups:
        return summary
    inner: dict[str, Any] = {}
    for way in ("uplink", "downlink"):
        total = sum(group[f"{way}_bytes"] for group in groups)
        dense = sum(group[f"{way}_bytes"] * group[f"{way}_ratio"] for group in groups)
        inner |= {f"group_{way}_bytes": total, f"group_{way}_ratio": dense / total if total else 0.0}
    return summary | inner


class InlineBackend:
    """Everything in this process: one thread a worker, one running at a time."""

    def __init__(self, settings: RunSettings, train: Train) -> None:
        plan, workers = plans(settings)
        self._server = Server(plan, time.monotonic)
        self._endpoint = Endpoint(self._server.vitals, settings.metrics) if settings.metrics.port is not None else None
        self.metrics_port = self._endpoint.port if self._endpoint else None
        self._relays = [Relay(relay) for relay in relay_plans(settings)]
        self._shell = InlineServer(self._server, plan.workers, self._relays)
        self._ended: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._cpus, self._train, self._seen = settings.workers.cpus, train, 0
        self._device = torch.device("cuda" if settings.workers.gpus else "cpu")
        self._threads = [threading.Thread(target=self._work, args=(w,), daemon=True) for w in workers]
        for thread in self._threads:
            thread.start()
        self._shell.begin()

    def _work(self, plan: WorkerPlan) -> None:
        try:
            self._shell.enter(plan.worker)
            transport = InlineTransport(self._shell, plan.worker)
            outcome = run(self._train, plan, transport, self._cpus, self._device)
        except CarryoverError as error:
            outcome = Outcome(plan.worker, error=str(error), stopped=True)
        self._shell.exit(plan.worker)
        self._ended.put(outcome)

    def poll(self) -> tuple[Rows, list[Outcome]]:
        """See ``Backend``."""
        try:
            ended = [self._ended.get(timeout=POLL)]
        except queue.Empty:
            ended = []
        with self._server.vitals.lock:
            rows = self._server.vitals.rows_since(self._seen)
        self._seen = rows[-1]["version"] if rows else self._seen
        return rows, ended

    def stop(self) -> None:
        """See ``Backend``."""
        self._shell.stop()

    def summary(self) -> dict[str, Any]:
        """See ``Backend``."""
        return _with_groups(self._server.vitals.summary(), [relay.vitals.traffic() for relay in self._relays])

    def close(self) -> None:
        """See ``Backend``."""
        self._shell.cancel()
        for thread in self._threads:
            thread.join(GRACE)
        if self._endpoint:
            self._endpoint.close()


class RayBackend:
    """A server actor and one actor a worker, on a cluster or on a Ray of the run's own."""

    def __init__(self, settings: RunSettings, train: Train | str, address: str | None) -> None:
        plan, workers = plans(settings)
        each = settings.workers
        cores = each.count * each.cpus + 1 + settings.relays.count  # one for the server and for each relay
        needed = {"CPU": cores, "GPU": each.count * each.gpus}
        self._own: LocalRay | None = None
        if address is not None:
            ray.init(address=address, ignore_reinit_error=True, logging_level=logging.ERROR)
        elif not ray.is_initialized():
            self._own = LocalRay(needed["CPU"], needed["GPU"])
        self._actors: list[Any] = []
        self._relays: list[Any] = []
        self._runs: dict[Any, int] = {}
        self._seen = 0
        try:
            _warn_of_shortage(needed)
            self._start(settings, plan, workers, train)
        except BaseException:
            self.close()
            raise

    def _start(self, settings: RunSettings, plan: Plan, workers: list[WorkerPlan], train: Train | str) -> None:
        concurrency = 4 * settings.workers.count + 16
        server_class: Any = ray.remote(ServerActor)
        self._server = server_class.options(num_cpus=1, max_concurrency=concurrency).remote(plan, settings.metrics)
        self._actors.append(self._server)
        self.metrics_port: int | None = _get(self._server.metrics_port.remote())
        relay_class: Any = ray.remote(RelayActor)
        upstream: dict[int, Any] = {}
        for relay in relay_plans(settings):
            actor = relay_class.options(num_cpus=1, max_concurrency=concurrency).remote(relay, self._server)
            self._relays.append(actor)
            upstream |= dict.fromkeys(relay.group, actor)
        self._actors += self._relays
        worker_class: Any = ray.remote(WorkerActor)
        needs = {"num_cpus": settings.workers.cpus, "num_gpus": settings.workers.gpus}
        for worker in workers:
            actor = worker_class.options(**needs).remote(
                worker, upstream.get(worker.worker, self._server), settings.workers.cpus, os.getcwd()
            )
            self._actors.append(actor)
            self._runs[actor.run.remote(train)] = worker.worker

    def poll(self) -> tuple[Rows, list[Outcome]]:
        """See ``Backend``."""
        ready, _ = ray.wait(list(self._runs), num_returns=1, timeout=POLL)
        ended = [self._outcome(reference) for reference in ready]
        rows: Rows = _get(self._server.watch.remote(self._seen))
        self._seen = rows[-1]["version"] if rows else self._seen
        return rows, ended

    def _outcome(self, reference: Any) -> Outcome:
        worker = self._runs.pop(reference)
        try:
            outcome: Outcome = _get(reference)
            return outcome
        except CarryoverError as error:
            return Outcome(worker, error=f"worker {worker} failed: {error}")

    def stop(self) -> None:
        """See ``Backend``."""
        _get(self._server.stop.remote())

    def summary(self) -> dict[str, Any]:
        """See ``Backend``."""
        groups = [_get(relay.summary.remote()) for relay in self._relays]
        return _with_groups(_get(self._server.summary.remote()), groups)

    def close(self) -> None:
        """See ``Backend``."""
        for actor in self._actors:
            ray.kill(actor)
        if self._own:
            self._own.close()


def _warn_of_shortage(needed: Mapping[str, int]) -> None:
    """A cluster that is too small may still grow, so the run waits; but it says what for."""
    present = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for resource, count in needed.items():
        if present.get(resource, 0) < count:
            log.warning("waiting for %d %ss; the cluster has %d", count, resource, present.get(resource, 0))


def _get(reference: Any) -> Any:
    """``ray.get``, with our own errors as they were raised and Ray's as ``RunFailed``."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, CarryoverError):
            raise error.cause from None
        raise RunFailed(f"a process of the run failed: {error.cause!r}", str(error), expected=False) from None
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        for line in reversed(lines):  # a constructor that raised: our error is the last line of Ray's text
            name, _, text = line.strip().partition(": ")
            if name.rpartition(".")[2] == SettingsError.__name__:
                raise SettingsError(text) from None
        raise RunFailed(f"a process of the run died: {lines[0]}") from None


def launch(
    train: Train | str,
    settings: Mapping[str, Any] | RunSettings,
    address: str | None = None,
    observe: Callable[[Mapping[str, Any]], None] | None = None,
) -> Result:
    """Run a training function to its end.

    Args:
        train: the function, or ``MODULE:FUNCTION``.
        settings: as in a settings file; ``train`` may be left out.
        address: of a Ray cluster; by default a Ray of the run's own on this machine.
        observe: called with every row of ``metrics.jsonl``; by default a display on standard output.

    Raises:
        SettingsError: a setting is not valid.
        RunFailed: a worker failed or died. What was done until then is in the run directory.
        KeyboardInterrupt: after a clean stop; the model of the last round is saved.
    """
    if not isinstance(settings, RunSettings):
        if not isinstance(train, str):
            name = train.__name__ if train.__name__.isidentifier() else "train"
            settings = {"train": f"{train.__module__}:{name}", **settings}
        settings = validate({"train": train, **settings})
    if isinstance(train, str):
        found = function(train, settings.arguments)  # fail before anything is started
    directory = RunDirectory(settings)

    def start() -> Backend:
        if settings.backend == "ray":
            return RayBackend(settings, train, address)
        return InlineBackend(settings, found if isinstance(train, str) else train)

    if observe is not None:
        return Run(settings, directory, observe, log.info).result(start)
    with Display(settings.rounds, settings.name) as display:
        return Run(settings, directory, display.update, display.message).result(start, display.finish)
