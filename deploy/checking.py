"""``carryover check``: what a run will cost, measured on the user's model without training it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from deploy.display import bytes_text
from deploy.launch import plans
from deploy.settings import RunSettings, resolved
from protocol.compressors import Compressor
from protocol.errors import SettingsError
from protocol.layout import Layout
from protocol.messages import STATISTICS_LIMIT, Entry, Push
from protocol.residual import Memory, footprint
from protocol.spec import compressors_for
from workers import Session
from workers.replica import Replica
from workers.settings import DeepGradientCompression, Ef21Feedback, MomentumFeedback

WORKER_VECTORS = 3  # replica, start of the round, update; beside them the residual
SERVER_VECTORS = 2  # replica, sum
RELAY_VECTORS = 1  # sum


class _Prepared(BaseException):
    """Ends the training function once it has shown its model; not an Exception, so that it gets through."""


class _Probe(Session):
    """A session whose ``prepare`` is as far as a training function gets."""

    layout: Layout | None = None

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, samples: int | None = None) -> Any:
        """Take note of the layout and stop."""
        plan = self._plan
        self.layout = Replica(model, plan.granularity, plan.federated.control_variates).layout
        raise _Prepared


def describe(settings: RunSettings, train: Callable[..., Any]) -> str:
    """The resolved settings, then memory and bytes per round for the model that ``train`` prepares.

    The training function runs up to ``session.prepare`` and no further.

    Raises:
        SettingsError: the function never calls ``session.prepare``, or the server's optimizer does not suit its model.
    """
    layout = _layout(settings, train)
    settings.server.optimizer.of(layout)
    itemsize = torch.finfo(layout.dtype).bits // 8
    up, outer, down = (
        _frame_bytes(layout, compressors_for(layout, spec, settings.overrides), direction)
        for spec, direction in ((settings.uplink, "up"), (settings.relays.uplink, "up"), (settings.downlink, "down"))
    )
    dense = 4 * layout.trainable
    taking = plans(settings)[0].pushes
    senders, sent = (settings.relays.count, outer) if settings.relays.count else (taking, up)
    receivers = settings.relays.count or settings.workers.count
    carries = settings.feedback.kind != "none"
    own = itemsize * (WORKER_VECTORS * layout.numel + _state_vectors(settings) * layout.trainable)
    worker = _memory(own, settings.workers.residual if carries else None, layout)
    kept = itemsize * (SERVER_VECTORS * layout.numel + _estimates(settings) * layout.trainable)
    lines = [
        resolved(settings),
        f"model                {layout.trainable:,} parameters in {_tensors(layout)} tensors",
        f"update, each worker  {up:,} bytes a round, {dense / up:.1f}x less than float32",
    ]
    if settings.relays.count:
        lines.append(f"update, each relay   {outer:,} bytes a round, {dense / outer:.1f}x less than float32")
    lines += [
        f"answer, each worker  {down:,} bytes a round, {dense / down:.1f}x less than float32",
        f"server's link        {bytes_text(senders * sent)} in and {bytes_text(receivers * down)} out a round",
        f"memory, each worker  {worker} beside the model, its gradients and its optimizer",
        f"memory, server       {_memory(kept, settings.server.residual, layout)}",
    ]
    if settings.relays.count:
        relay = _memory(itemsize * RELAY_VECTORS * layout.numel, settings.relays.residual, layout)
        lines.append(f"memory, each relay   {relay}")
    return "\n".join(lines)


def _tensors(layout: Layout) -> int:
    """Of the model itself, that are exchanged."""
    return sum(place.entry.role != "control" for place in layout.tensors)


def _state_vectors(settings: RunSettings) -> int:
    """Vectors of a worker's method beside the residual, two halves each."""
    feedback, controls = settings.feedback, settings.federated.control_variates
    momentum = isinstance(feedback, MomentumFeedback | DeepGradientCompression)
    average = isinstance(feedback, Ef21Feedback) and feedback.eta < 1.0
    masked = isinstance(feedback, DeepGradientCompression)
    return 2 * (momentum + average + controls) + masked + (settings.send == "gradient")


def _estimates(settings: RunSettings) -> int:
    """Vectors of the server that EF21 needs: one a worker."""
    return settings.workers.count if isinstance(settings.feedback, Ef21Feedback) else 0


def _memory(vectors: int, residual: Memory | None, layout: Layout) -> str:
    size = vectors + (footprint(residual, layout) if residual else 0)
    return ("at most " if residual == "sparse" else "") + bytes_text(size)


def _layout(settings: RunSettings, train: Callable[..., Any]) -> Layout:
    probe = _Probe(plans(settings)[1][0], _NoTransport(), torch.device("cpu"))
    with suppress(_Prepared):
        train(probe, **settings.arguments)
    if probe.layout is None:
        raise SettingsError(f"train is {settings.train!r}, but that function never calls session.prepare")
    return probe.layout


class _NoTransport:
    def call(self, frame: Any) -> Any:
        raise AssertionError("a probe sends nothing")


def _frame_bytes(layout: Layout, compressors: Sequence[Compressor], direction: str) -> int:
    """Bytes of a whole frame, measured by encoding random values."""
    generator = torch.Generator().manual_seed(0)
    bodies = []
    for place, compressor in zip(layout.segments, compressors, strict=True):
        vector = torch.randn(place.numel, generator=generator, dtype=layout.dtype)
        bodies.append(compressor.encode(vector, compressor.init(place.numel), 0)[0])
    if direction == "up":
        return (
            Push(1, 1, 1, 1, statistics=bytes(STATISTICS_LIMIT), bodies=tuple(bodies), layout=layout.hash).pack().size
        )
    return Entry(1, 1, bodies=tuple(bodies), layout=layout.hash).pack().size
