"""Runs one training function in one session, whatever the backend, and says how it went."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from protocol.errors import CarryoverError, Refused, RunFailed, RunStopped
from workers.batches import seed_everything
from workers.exchange import Transport
from workers.rounds import WorkerPlan
from workers.session import Session

NO_PARAMETERS = "optimizer got an empty parameter list"  # torch's words, before session.prepare could say more

Train = Callable[..., Any]  # (session, **arguments)


@dataclass
class Outcome:
    """How one worker ended.

    Attributes:
        fingerprint: of its replica; empty if it failed or left before the end.
        reported: values that were reported after the last round.
        conservation_error: of its ledger after the last round.
        model: the founder's model as safetensors bytes.
        error: one sentence, if it failed; None if not.
        traceback: where the error came from.
        expected: it is one of Carryover's own errors, whose sentence says all; the traceback is for debugging.
        stopped: it failed only because the run had ended.
    """

    worker: int
    fingerprint: str = ""
    reported: dict[str, float] = field(default_factory=dict)
    model: npt.NDArray[np.uint8] | None = None
    conservation_error: float = 0.0
    error: str | None = None
    traceback: str = ""
    expected: bool = False
    stopped: bool = False


def run(train: Train, plan: WorkerPlan, transport: Transport, cpus: int, device: torch.device) -> Outcome:
    """Train; every exception ends up in the outcome."""
    torch.set_num_threads(cpus)
    session = Session(plan, transport, device)
    try:
        seed_everything(plan.seed, "start")  # the same on every rank, so that data is split alike
        train(session, **plan.arguments)
        if not session.finished:
            raise RunFailed(
                f"the training function of worker {plan.worker} returned at version {session.version}, before the "
                "run had done its rounds; loop over session.batches until it ends"
            )
        fingerprint = "" if session.left else session.fingerprint()
        imbalance = session.conservation_error
        return Outcome(plan.worker, fingerprint, session.last_reports(), _model(plan, session), imbalance)
    except RunStopped as error:
        return Outcome(plan.worker, error=str(error), expected=True, stopped=True)
    except CarryoverError as error:
        if isinstance(error, Refused) and error.reason == "finished":
            return Outcome(plan.worker, error=str(error), expected=True, stopped=True)
        return Outcome(plan.worker, error=str(error), traceback=traceback.format_exc(), expected=True)
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) and str(error) == NO_PARAMETERS:
            text = f"the model of worker {plan.worker} has no parameters, so there is nothing to train ({error})"
            return Outcome(plan.worker, error=text, traceback=traceback.format_exc(), expected=True)
        text = f"the training function of worker {plan.worker} raised {type(error).__name__}: {error}"
        return Outcome(plan.worker, model=_model(plan, session), error=text, traceback=traceback.format_exc())


def _model(plan: WorkerPlan, session: Session) -> npt.NDArray[np.uint8] | None:
    """The founder's model once all rounds are done, even if what came after them failed."""
    if not plan.founder or session.left or not session.finished:
        return None
    return np.frombuffer(safetensors.torch.save(_state(session.model)), np.uint8)


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors as safetensors takes them: each one's own, contiguous. Other state is left out."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
