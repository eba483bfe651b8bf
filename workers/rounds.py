"""One worker's rounds: place the model, take what it has learnt, send it, move the replica."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protocol import energies, snapshot
from protocol.compression import Compression
from protocol.compressors import Norms
from protocol.errors import NotFiniteError, Refused
from protocol.layout import Granularity
from protocol.messages import Entry, Stat, Welcome
from protocol.residual import Memory
from protocol.sampling import participants
from protocol.segment import pack_exact
from protocol.settings import Schedule
from protocol.spec import compressor
from workers import statistics
from workers.batches import seed_of
from workers.exchange import Bodies, Exchange, News, Transport
from workers.feedback import Round, feedback_for
from workers.hooks import GradientCapture, StepCounter, check_optimizer, refuse_momentum
from workers.local import LocalSteps
from workers.replica import Replica
from workers.settings import FederatedSettings, FeedbackSettings


@dataclass(frozen=True)
class WorkerPlan:
    """What one worker needs to know of a run.

    Attributes:
        worker: id, which never changes.
        count: of the workers that the run begins with.
        founder: this worker's model is version 0.
        send: ``difference`` or ``gradient``.
        uplink: compressor specification.
        residual: how the residual is kept in memory, see ``protocol.residual``.
        sketch_every: rounds between checks of the ledger and of the replica.
        asynchronous: the server folds what has arrived, so workers may have different versions.
        adaptive: the server asks for norms by segment, to choose the ratios.
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
    granularity: Granularity = "layer"
    schedule: Schedule = Schedule()
    federated: FederatedSettings = FederatedSettings()
    asynchronous: bool = False
    adaptive: bool = False
    count: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)


class Rounds:
    """The part of a session between the user's loop and the server.

    Args:
        model: the user's, on its device.
        samples: of this worker's own data, for its weight; None if all workers share one data set.
        reported: what the user reports.

    Attributes:
        version: of the replica.
        position: samples that all workers together have consumed.
        weights: of the members; their keys are the workers that are present.
        finished: the last entry has arrived.
        conservation_error: of this worker's ledger, at the last check.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        transport: Transport,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        samples: int | None,
        reported: statistics.Reported,
        clock: Callable[[], float],
    ) -> None:
        federated = plan.federated
        self.replica = replica = Replica(model, plan.granularity, federated.control_variates)
        check_optimizer(optimizer, replica)
        if plan.feedback.kind in ("dgc", "ef_momentum"):
            refuse_momentum(optimizer, plan.feedback.kind)
        self._plan, self._clock = plan, clock
        self._compression = Compression(replica.layout, plan.uplink, plan.overrides, plan.schedule)
        seed = seed_of(plan.seed, "worker", plan.worker)
        self.method = feedback_for(
            plan.feedback, replica.layout, self._compression.final, seed, replica.device, plan.residual
        )
        self._exchange = Exchange(transport, plan.worker, replica.layout)
        self._capture = GradientCapture(optimizer, replica) if plan.send == "gradient" else None
        self._steps = self._capture or StepCounter(optimizer)
        # a fused optimizer would unscale gradients and skip steps inside step(), where no hook sees it
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        self._local = LocalSteps(optimizer, replica, federated.proximal, federated.control_variates)
        self._reported = reported
        self._rotation = statistics.Rotation()
        self._ratios: list[float] = []
        self._checked = 0  # how often a check was due before the last one that was made
        self.conservation_error = 0.0
        self.finished = False
        founding = snapshot.pack(replica.layout, replica.w, replica.statics()) if plan.founder else ()
        described = self._capture.describe() if self._capture else None
        self._take_snapshot(self._exchange.join(described, founding, samples), joining=True)

    @property
    def rank(self) -> int:
        """Place among the workers that are present, from 0."""
        return sorted(self.weights).index(self._plan.worker)

    def participants(self) -> tuple[int, ...]:
        """Who takes part in the round at this version."""
        return participants(self.weights, self._plan.federated.participation, self._plan.seed, self.version)

    def wait_for_turn(self) -> None:
        """Receive entries until this worker takes part, or the run ends."""
        while not self.finished and self._plan.worker not in self.participants():
            self._receive(self._exchange.pull(self.version))

    def begin(self) -> None:
        """Place the model where the round starts: at ``y``."""
        spec = self.method.averages(self.version)
        if spec is not None:
            self._average(spec)
        every = self.version // self._plan.sketch_every
        skipped = self._plan.asynchronous and every > self._checked  # the version at which a check was due
        self._due = skipped or self.version % self._plan.sketch_every == 0
        self._checked = every
        sketched = self._due and self.method.carries
        self._sketch = energies.pack_sketch(self.method.sender.sketch()) if sketched else b""
        self._start = self.replica.show(self.method.start(self.replica.w, self._weight()))
        self._local.begin(self._start, self.weights[self._plan.worker])
        self._steps.take()
        self._steps.factor = self._plan.schedule.learning_rate_factor(self.version)
        self._begun = self._clock()

    def finish(self, samples: int) -> None:
        """Push the round's update, receive what the replica lacks, move it."""
        computed = self._clock()
        self.replica.check()
        skipped = max(0, self._plan.local_steps - (taken := self._steps.take()))
        at = Round(
            self.version,
            self._exchange.sequence + 1,
            self._weight(),
            len(self.participants()),
            not taken,
            self._compression.at(self.version, self._ratios),
        )
        try:
            message = self.method.stage(self._given(taken), at)
        except NotFiniteError as error:
            self._exchange.leave("not_finite")
            raise NotFiniteError(f"{error} in round {self.version} of worker {self._plan.worker}") from None
        reported, names = self._reported.take_numbered()
        packed = statistics.pack(_norms(message.norms), self._rotation.next(), reported)
        due = self._due
        encoded = self._clock()
        try:
            news = self._exchange.push(
                self.version,
                samples,
                message.bodies,
                statistics=packed,
                names=names,
                digest=snapshot.digest(self.replica.w) if due else None,
                options=self._capture.changed() if self._capture and self.rank == 0 else None,
                skipped=skipped,
                replaced=list(message.replaced) or None,
                sketch=self._sketch,
                energies=energies.pack_energies(message.each) if self._plan.adaptive and due else b"",
            )
        except Refused as refusal:
            self.method.refuse()
            if self.method.carries:
                self._local.commit()
            if not (self._plan.asynchronous and refusal.reason == "finished"):
                raise
            news = self._exchange.pull(self.version)  # others were faster; the update stays in the residual
            self.finished = True
            self._receive(news)
            self.conservation_error = self.method.sender.conservation_error()
            return
        exchanged = self._clock()
        self.method.commit()
        self._local.commit()
        self._receive(news)
        if due or self.finished:
            self.conservation_error = self.method.sender.conservation_error()
            self._rotation.set(Stat.CONSERVATION, self.conservation_error)
        times = (self._begun, computed, encoded, exchanged, self._clock())
        for phase, (begun, ended) in zip(Stat.PHASES, itertools.pairwise(times), strict=True):
            self._rotation.set(phase, ended - begun)

    def leave(self, cause: str) -> None:
        """Leave the run before its end and hand over the residual, which enters the next fold."""
        layout, federated = self.replica.layout, self._plan.federated
        bodies: Bodies = ()
        if self.method.carries or federated.control_variates:
            handed = self.method.sender.residual.clone() if self.method.carries else layout.zeros(self.replica.device)
            self._local.withdraw(handed)
            bodies = tuple(pack_exact(handed[place.start : place.stop].cpu().numpy()) for place in layout.segments)
        self._exchange.leave(cause, bodies)
        self.finished = True

    # -- inside ----------------------------------------------------------------------------------

    def _weight(self) -> float:
        """``a_k`` among those who take part."""
        return self.weights[self._plan.worker] / self._present()

    def _present(self) -> float:
        """The share of all weight that takes part; exactly 1 if everyone does."""
        taking = self.participants()
        return 1.0 if len(taking) == len(self.weights) else sum(self.weights[worker] for worker in taking)

    def _given(self, steps: int) -> Tensor:
        """``d_k``, or the gradient; buffers always as differences, control variates as what they lose."""
        given = torch.sub(self._start, self.replica.read(torch.empty_like(self.replica.w)))
        if self._capture is not None:
            trained = self.replica.layout.trainable
            given[:trained] = self._capture.gradient[:trained] if steps else 0.0
        self._local.give(given, self._present())
        return given

    def _take_snapshot(self, welcome: Welcome, joining: bool = False) -> None:
        w, statics = snapshot.unpack_snapshot(self.replica.layout, welcome.bodies)
        self.replica.load(w, statics if joining else None)  # later they are the worker's own
        self.version, self.position, self.weights = welcome.version, welcome.position, welcome.weights
        self._ratios = welcome.ratios or []
        self.finished = self.finished or welcome.final

    def _receive(self, news: News) -> None:
        if news.snapshot is not None:
            self._take_snapshot(news.snapshot)
        for entry in news.entries:
            self._apply(entry)
        if self.finished:
            self.replica.show(self.replica.w)

    def _apply(self, entry: Entry) -> None:
        updates = self._exchange.updates(entry, self.replica.device)
        for place, update in zip(self.replica.layout.segments, updates, strict=True):
            update.subtract_from(self.replica.w[place.start : place.stop])
        self.version, self.position = entry.version, entry.position
        self.weights = entry.weights or self.weights
        self._ratios = entry.ratios or self._ratios
        self.finished = self.finished or entry.final

    def _average(self, spec: str) -> None:
        """Error averaging: send the residual, take this worker's share of the sum."""
        sender, device = self.method.sender, self.replica.device
        compressors = tuple(compressor(spec, place.entry.shape) for place in sender.layout.segments)
        message = sender.average(compressors, self._exchange.sequence + 1)
        mean = self._exchange.average(self.version, message.bodies)
        received = sender.layout.zeros(device)
        for place, update in zip(sender.layout.segments, self._exchange.updates(mean, device), strict=True):
            update.add_to(received[place.start : place.stop])
        sender.replace(message, received.mul_(self.weights[self._plan.worker] / mean.weight))


def _norms(norms: Norms) -> dict[int, float]:
    found = {Stat.BEFORE: norms.before**0.5, Stat.SENT: norms.sent**0.5, Stat.ERROR: norms.left**0.5}
    return found | ({Stat.DISCARDED: norms.discarded**0.5} if norms.discarded else {})
