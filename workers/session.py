"""What a training function sees: ``prepare`` once, then loop over ``batches``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from protocol import snapshot
from protocol.errors import SettingsError
from workers.batches import Collate, Samples, seed_everything, seed_of, to_device
from workers.exchange import Transport
from workers.hooks import warn_if_stateful
from workers.rounds import Rounds, WorkerPlan
from workers.statistics import Reported


class Session:
    """One worker's part of a run. The same loop serves every backend, mode and method.

    Attributes:
        device: where the model and the batches are.
        model: what was given to ``prepare``.
    """

    model: torch.nn.Module

    def __init__(
        self,
        plan: WorkerPlan,
        transport: Transport,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device = device
        self.left = False
        self._taken = 0  # batches of the round that is open
        self._consumed = 0  # samples that this worker has consumed
        self._plan = plan
        self._transport = transport
        self._clock = clock
        self._reported = Reported()
        self._rounds: Rounds | None = None

    @property
    def version(self) -> int:
        """Of the model: rounds folded so far."""
        return self._rounds.version if self._rounds else 0

    @property
    def finished(self) -> bool:
        """Whether the run has ended for this worker."""
        return self._rounds is not None and self._rounds.finished

    @property
    def worker(self) -> int:
        """Id of this worker, from 0; it never changes, and is known before ``prepare``: the number of its own data."""
        return self._plan.worker

    @property
    def workers(self) -> int:
        """How many workers the run began with, ``workers.count``; one that joins late has an id from there on."""
        return self._plan.count

    @property
    def conservation_error(self) -> float:
        """Of this worker's ledger at its last check."""
        return self._rounds.conservation_error if self._rounds else 0.0

    @property
    def rank(self) -> int:
        """Place of this worker among the present ones, from 0."""
        return self._present().rank

    @property
    def world_size(self) -> int:
        """How many workers are present."""
        return len(self._present().weights)

    def _present(self) -> Rounds:
        if self._rounds is None:
            raise SettingsError("session.rank and session.world_size are known once session.prepare has returned")
        return self._rounds

    # -- setting up ------------------------------------------------------------------------------

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, samples: int | None = None
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """Join the run with this model; returns the same objects, watched.

        The model is moved to ``device`` and becomes version 0: rank 0's tensors on every worker.

        Args:
            samples: of this worker's own data: its weight is its share of all workers' samples, as in FedAvg.
                None: every worker counts the same.

        Raises:
            LayoutError: the model has no parameters that require grad.
            Refused: the model differs from that of the other workers.
            SettingsError: ``prepare`` was called before, or the optimizer is of another model, or ``samples`` is
                not a whole number above 0.
        """
        if self._rounds is not None:
            raise SettingsError("session.prepare was called twice; one run trains one model")
        if samples is not None and (type(samples) is not int or samples < 1):
            raise SettingsError(f"session.prepare got samples={samples!r}; valid is a whole number above 0, or None")
        model.to(self.device)
        plan = self._plan
        if plan.send == "difference" and plan.local_steps == 1 and plan.founder:
            warn_if_stateful(optimizer, plan.feedback.kind)
        self._rounds = Rounds(plan, self._transport, model, optimizer, samples, self._reported, self._clock)
        self.model = model
        seed_everything(self._plan.seed, "prepared")  # joining took its turn among workers that may share this process
        return model, optimizer

    # -- training --------------------------------------------------------------------------------

    def batches(
        self,
        dataset: Any,
        batch_size: int,
        collate: Collate | None = None,
        *,
        shared: bool = True,
        indices: bool = False,
    ) -> Iterator[Any]:
        """Batches for this worker until the run has done its rounds; drives the rounds.

        A round is ``local_steps * accumulate`` batches. Which samples a batch holds depends only on
        the seed, the samples consumed so far, the rank and the step; if the data set is this worker's own, on
        the seed, the worker and the samples that it has consumed itself. Before each batch Python, numpy
        and torch are seeded from (seed, version, step, rank). Tensors arrive on ``device``.

        Args:
            dataset: map-style: has ``len`` and indexing.
            batch_size: samples a batch, before ``schedule.batch``.
            collate: makes a batch of a list of samples; by default torch's ``default_collate``.
            shared: all workers have the same data set and divide it; False: it is this worker's own.
            indices: yield ``(batch, indices)``, where the indices say which samples of ``dataset`` these are:
                int64, shape ``(batch_size,)``, on the CPU; for memories of one's own by sample.

        Raises:
            SettingsError: ``prepare`` was not called, the data set does not fit, or an earlier loop was left
                in the middle of a round.
            NotFiniteError: the update of a round holds NaN or Inf; it was not sent.
            Refused: the server did not take the update.
        """
        rounds, plan = self._running("batches"), self._plan
        seed = plan.seed if shared else seed_of(plan.seed, "own", plan.worker)
        samples = Samples(dataset, batch_size, seed, collate)
        steps = plan.local_steps * plan.accumulate
        if self._taken:  # an earlier loop was left by a break
            if self._taken < steps:
                raise SettingsError(
                    f"session.batches was left after {self._taken} of the {steps} batches of a round; take all of them"
                )
            self._finish(rounds, batch_size)
        while True:
            rounds.wait_for_turn()
            if rounds.finished:
                seed_everything(plan.seed, "finished")
                return
            rounds.begin()
            size = plan.schedule.batch_size(rounds.version, batch_size)
            for step in range(steps):
                self._taken = step + 1
                seed_everything(plan.seed, rounds.version, step, rounds.rank)
                chosen = samples.indices(self._start(rounds, step, size, shared), size)
                batch = to_device(samples.batch(chosen), self.device)
                yield (batch, torch.tensor(chosen)) if indices else batch
                if rounds.finished:  # the loop's body left the run
                    return
            self._finish(rounds, batch_size)

    def _start(self, rounds: Rounds, step: int, size: int, shared: bool) -> int:
        """Where the batch begins in the endless sequence over the data set."""
        if not shared:
            return self._consumed + step * size
        if self._plan.asynchronous:  # every worker has a version of its own, so it takes its turns of the sequence
            return (self._consumed + step * size) * self.world_size + rounds.rank * size
        taking = rounds.participants()
        return rounds.position + (step * len(taking) + taking.index(self._plan.worker)) * size

    def _finish(self, rounds: Rounds, batch_size: int) -> None:
        steps = self._plan.local_steps * self._plan.accumulate
        size = self._plan.schedule.batch_size(rounds.version, batch_size)
        self._taken = 0
        rounds.finish(steps * size)
        self._consumed += steps * size

    def report(self, **values: float | Tensor) -> None:
        """Report quantities of this step, such as ``loss=loss``; their means go to metrics and report.

        Raises:
            SettingsError: more names than ``workers.statistics.REPORTED_LIMIT``.
        """
        plain = {n: v.detach().item() if isinstance(v, Tensor) else float(v) for n, v in values.items()}
        self._reported.add(plain)

    @contextmanager
    def evaluating(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Within, the model's parameters are exactly ``w`` and it is in evaluation mode.

        Afterwards its tensors and modes are what they were.

        Raises:
            SettingsError: ``prepare`` was not called, or was given another model.
        """
        replica = self._running("evaluating").replica
        if model is not self.model:
            raise SettingsError("session.evaluating takes the model that was given to session.prepare, and no other")
        kept = replica.read(torch.empty_like(replica.w))
        modes = {module: module.training for module in model.modules()}
        replica.show(replica.w)
        model.eval()
        try:
            yield model
        finally:
            for module, training in modes.items():
                module.training = training
            replica.show(kept)

    def last_reports(self) -> dict[str, float]:
        """What was reported since the last push, by name: for after the last round."""
        return self._reported.take()

    def fingerprint(self) -> str:
        """The name of this worker's replica; equal on all workers."""
        replica = self._running("fingerprint").replica
        return snapshot.fingerprint(replica.layout, replica.w)

    def leave(self, cause: str) -> None:
        """Leave the run before its end and hand over the residual, which enters the next fold."""
        self._running("leave").leave(cause)
        self.left = True

    def _running(self, what: str) -> Rounds:
        if self._rounds is None:
            raise SettingsError(f"session.{what} needs a model; call session.prepare(model, optimizer) first")
        return self._rounds
