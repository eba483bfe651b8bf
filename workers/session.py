"""What a training function sees: ``prepare`` once, then loop over ``batches``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protocol import snapshot
from protocol.errors import NotFiniteError, Refused, SettingsError
from protocol.messages import Entry, Stat
from protocol.residual import Memory
from protocol.segment import pack_exact
from protocol.sender import Sender
from protocol.spec import compressor, compressors_for
from workers import statistics
from workers.batches import Collate, Samples, seed_everything, seed_of, to_device
from workers.exchange import Exchange, Transport
from workers.feedback import feedback_for
from workers.hooks import GradientCapture, StepCounter, check_optimizer, warn_if_stateful
from workers.replica import Replica
from workers.settings import FeedbackSettings


@dataclass(frozen=True)
class WorkerPlan:
    """What one worker needs to know of a run.

    Attributes:
        worker: id, which never changes.
        founder: this worker's model is version 0.
        send: ``difference`` or ``gradient``.
        uplink: compressor specification.
        residual: how the residual is kept in memory, see ``protocol.residual``.
        sketch_every: rounds between checks of the ledger and of the replica.
        arguments: keyword arguments of the training function.
    """

    worker: int
    founder: bool
    seed: int
    send: str
    uplink: str
    overrides: dict[str, str]
    feedback: FeedbackSettings
    residual: Memory
    local_steps: int
    accumulate: int
    sketch_every: int
    arguments: dict[str, Any] = field(default_factory=dict)


class Session:
    """One worker's part of a run. The same loop serves every backend, mode and method.

    Attributes:
        version: of the model: rounds folded so far.
        rank: place of this worker among the present ones, from 0.
        world_size: workers that are present.
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
        self.version = 0
        self.finished = False
        self.left = False
        self._taken = 0  # batches of the round that is open
        self.conservation_error = 0.0
        self._plan = plan
        self._transport = transport
        self._clock = clock
        self._feedback = feedback_for(plan.feedback)
        self._weights: dict[int, float] = {}
        self._position = 0
        self._reported = statistics.Reported()
        self._rotation = statistics.Rotation()
        self._replica: Replica | None = None

    @property
    def rank(self) -> int:
        """Place of this worker among the present ones, from 0."""
        return sorted(self._present()).index(self._plan.worker)

    @property
    def world_size(self) -> int:
        """How many workers are present."""
        return len(self._present())

    def _present(self) -> dict[int, float]:
        if not self._weights:
            raise SettingsError("session.rank and session.world_size are known once session.prepare has returned")
        return self._weights

    # -- setting up ------------------------------------------------------------------------------

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """Join the run with this model; returns the same objects, watched.

        The model is moved to ``device`` and becomes version 0: rank 0's tensors on every worker.

        Raises:
            LayoutError: the model has no parameters that require grad.
            Refused: the model differs from that of the other workers.
            SettingsError: ``prepare`` was called before, or the optimizer is of another model.
        """
        if self._replica is not None:
            raise SettingsError("session.prepare was called twice; one run trains one model")
        plan = self._plan
        model.to(self.device)
        replica = Replica(model)
        check_optimizer(optimizer, replica)
        compressors = compressors_for(replica.layout, plan.uplink, plan.overrides)
        seed = seed_of(plan.seed, "worker", plan.worker)
        self._sender = Sender(replica.layout, compressors, seed, self._feedback.keep, replica.device, plan.residual)
        self._exchange = Exchange(self._transport, plan.worker, replica.layout)
        self._capture = GradientCapture(optimizer, replica) if plan.send == "gradient" else None
        self._steps = self._capture or StepCounter(optimizer)
        # a fused optimizer would unscale gradients and skip steps inside step(), where no hook sees it
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if plan.send == "difference" and plan.local_steps == 1 and plan.founder:
            warn_if_stateful(optimizer, plan.feedback.kind)
        founding = snapshot.pack(replica.layout, replica.w, replica.statics()) if plan.founder else ()
        welcome = self._exchange.join(self._capture.describe() if self._capture else None, founding)
        replica.load(*snapshot.unpack_snapshot(replica.layout, welcome.bodies))
        self.version, self._position, self._weights = welcome.version, welcome.position, welcome.weights
        self._replica = replica
        self.model = model
        seed_everything(plan.seed, "prepared")  # joining took its turn among workers that may share this process
        return model, optimizer

    # -- training --------------------------------------------------------------------------------

    def batches(self, dataset: Any, batch_size: int, collate: Collate | None = None) -> Iterator[Any]:
        """Batches for this worker until the run has done its rounds; drives the rounds.

        A round is ``local_steps * accumulate`` batches. Which samples a batch holds depends only on
        the seed, the samples consumed so far, the rank and the step. Before each batch Python, numpy
        and torch are seeded from (seed, version, step, rank). Tensors arrive on ``device``.

        Args:
            dataset: map-style: has ``len`` and indexing.
            batch_size: samples a batch.
            collate: makes a batch of a list of samples; by default torch's ``default_collate``.

        Raises:
            SettingsError: ``prepare`` was not called, the data set does not fit, or an earlier loop was left
                in the middle of a round.
            NotFiniteError: the update of a round holds NaN or Inf; it was not sent.
            Refused: the server did not take the update.
        """
        if self._replica is None:
            raise SettingsError("session.batches needs a model; call session.prepare(model, optimizer) first")
        samples = Samples(dataset, batch_size, self._plan.seed, collate)
        steps = self._plan.local_steps * self._plan.accumulate
        if self._taken:  # an earlier loop was left by a break
            if self._taken < steps:
                raise SettingsError(
                    f"session.batches was left after {self._taken} of the {steps} batches of a round; take all of them"
                )
            self._finish(self._replica, steps * batch_size)
        while not self.finished:
            self._begin(self._replica)
            for step in range(steps):
                self._taken = step + 1
                seed_everything(self._plan.seed, self.version, step, self.rank)
                start = self._position + (step * self.world_size + self.rank) * batch_size
                yield to_device(samples.batch(start), self.device)
                if self.finished:  # the loop's body left the run
                    return
            self._finish(self._replica, steps * batch_size)

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
        if self._replica is None:
            raise SettingsError("session.evaluating needs a model; call session.prepare(model, optimizer) first")
        if model is not self.model:
            raise SettingsError("session.evaluating takes the model that was given to session.prepare, and no other")
        kept = self._replica.read(torch.empty_like(self._replica.w))
        modes = {module: module.training for module in model.modules()}
        self._replica.show(self._replica.w)
        model.eval()
        try:
            yield model
        finally:
            for module, training in modes.items():
                module.training = training
            self._replica.show(kept)

    def last_reports(self) -> dict[str, float]:
        """What was reported since the last push, by name: for after the last round."""
        return self._reported.take()

    def fingerprint(self) -> str:
        """The name of this worker's replica; equal on all workers."""
        assert self._replica is not None
        return snapshot.fingerprint(self._replica.layout, self._replica.w)

    # -- one round -------------------------------------------------------------------------------

    def _begin(self, replica: Replica) -> None:
        """Place the model where the round starts: at ``y``."""
        spec = self._feedback.averages(self.version)
        if spec is not None:
            self._average(spec)
        weight = self._weights[self._plan.worker]
        self._start = replica.show(self._feedback.start(replica.w, self._sender, weight))
        self._steps.take()
        self._begun = self._clock()

    def _finish(self, replica: Replica, samples: int) -> None:
        """Push the round's update, receive the entry, move the replica."""
        self._taken = 0
        computed = self._clock()
        replica.check()
        skipped = max(0, self._plan.local_steps - (taken := self._steps.take()))
        given = self._given(replica, taken)
        try:
            message = self._sender.stage(given, self._exchange.sequence + 1)
        except NotFiniteError as error:
            self._exchange.leave("not_finite")
            raise NotFiniteError(f"{error} in round {self.version} of worker {self._plan.worker}") from None
        reported, names = self._reported.take_numbered()
        packed = statistics.pack(self._norms(message.norms), self._rotation.next(), reported)
        check = self.version % self._plan.sketch_every == 0
        encoded = self._clock()
        try:
            entry = self._exchange.push(
                self.version,
                samples,
                message.bodies,
                statistics=packed,
                names=names,
                digest=snapshot.digest(replica.w) if check else None,
                options=self._capture.changed() if self._capture and self.rank == 0 else None,
                skipped=skipped,
            )
        except Refused:
            self._sender.refuse()
            raise
        exchanged = self._clock()
        self._sender.commit()
        self._apply(replica, entry)
        if check or self.finished:
            self.conservation_error = self._sender.conservation_error()
            self._rotation.set(Stat.CONSERVATION, self.conservation_error)
        times = (self._begun, computed, encoded, exchanged, self._clock())
        for phase, begun, ended in zip(Stat.PHASES, times, times[1:], strict=False):
            self._rotation.set(phase, ended - begun)

    def _given(self, replica: Replica, steps: int) -> Tensor:
        """``a_k d_k``, or ``a_k`` times the gradient; buffers always as differences."""
        given = torch.sub(self._start, replica.read(torch.empty_like(replica.w)))
        if self._capture is not None:
            trained = replica.layout.trainable
            given[:trained] = self._capture.gradient[:trained] if steps else 0.0
        return given.mul_(self._weights[self._plan.worker])

    def _norms(self, norms: Any) -> dict[int, float]:
        left = norms.left**0.5
        kept = {Stat.ERROR: left} if self._feedback.keep else {Stat.ERROR: 0.0, Stat.DISCARDED: left}
        return {Stat.BEFORE: norms.before**0.5, Stat.SENT: norms.sent**0.5, **kept}

    def _apply(self, replica: Replica, entry: Entry) -> None:
        for place, update in zip(replica.layout.segments, self._exchange.updates(entry, replica.device), strict=True):
            update.subtract_from(replica.w[place.start : place.stop])
        self.version, self._position = entry.version, entry.position
        if entry.weights is not None:
            self._weights = entry.weights
        self.finished = entry.final
        if self.finished:
            replica.show(replica.w)
            seed_everything(self._plan.seed, "finished")

    def _average(self, spec: str) -> None:
        """Error averaging: send the residual, take this worker's share of the sum."""
        sender = self._sender
        compressors = tuple(compressor(spec, place.entry.shape) for place in sender.layout.segments)
        message = sender.average(compressors, self._exchange.sequence + 1)
        mean = self._exchange.average(self.version, message.bodies)
        received = sender.layout.zeros(self.device)
        for place, update in zip(sender.layout.segments, self._exchange.updates(mean, self.device), strict=True):
            update.add_to(received[place.start : place.stop])
        sender.replace(message, received.mul_(self._weights[self._plan.worker] / mean.weight))

    def leave(self, cause: str) -> None:
        """Leave the run before its end and hand over the residual, which enters the next fold."""
        self._exchange.leave(cause, tuple(pack_exact(owed.cpu().numpy()) for _, owed in self._sender.parts()))
        self.finished = self.left = True
