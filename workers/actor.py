"""The Ray actor around a session."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from protocol.errors import CarryoverError, RunStopped
from workers.rounds import WorkerPlan
from workers.runner import Outcome, Train, run
from workers.session import Session

U8 = npt.NDArray[np.uint8]


class RayTransport:
    """Frames to the server actor as arrays, which Ray does not copy on the way in."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def call(self, frame: U8) -> list[U8]:
        """Deliver one frame and wait for its answer."""
        try:
            frames = ray.get(self._server.exchange.remote(frame))
            return [ray.get(f) if isinstance(f, ray.ObjectRef) else f for f in frames]
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CarryoverError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            raise RunStopped(f"the server is gone: {error}") from None


class WorkerActor:
    """One training process on one device.

    Args:
        plan: of this worker.
        server: handle of the server actor.
        cpus: torch threads.
        folder: where ``MODULE:FUNCTION`` is looked up.
    """

    def __init__(self, plan: WorkerPlan, server: Any, cpus: int, folder: str) -> None:
        sys.path.insert(0, folder)
        self._plan = plan
        self._transport = RayTransport(server)
        self._cpus = cpus

    def run(self, train: Train | str) -> Outcome:
        """Train; ``train`` is a function, or where to import it from."""
        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        return run(_imported(train), self._plan, self._transport, self._cpus, device)


def _imported(train: Train | str) -> Train:
    """The function itself; an import that fails does so inside the run, as the function would."""
    if not isinstance(train, str):
        return train
    module, _, name = train.partition(":")

    def imported(session: Session, **arguments: Any) -> Any:
        return getattr(importlib.import_module(module), name)(session, **arguments)

    return imported
