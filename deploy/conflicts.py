"""Settings that are each valid and do not go together, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from protocol.compression import ratio_of, selects
from protocol.spec import compressor

if TYPE_CHECKING:
    from deploy.settings import RunSettings

GRADIENT_ONLY = {
    "ef21": "since it estimates gradients",
    "ef21_plus": "since it estimates gradients",
    "dgc": "since it accumulates velocities of gradients",
}

ESTIMATING = ("ef21", "ef21_plus")


def conflicts(settings: RunSettings) -> Iterator[str]:
    """One sentence for each combination that makes no sense: the key, its value, and what it needs."""
    yield from _sending(settings)
    yield from _feedback(settings)
    yield from _asynchronous(settings)
    yield from _compression(settings)
    yield from _relays(settings)


def _sending(settings: RunSettings) -> Iterator[str]:
    kind, federated = settings.feedback.kind, settings.federated
    if settings.send == "difference":
        if kind in GRADIENT_ONLY:
            yield f"feedback.kind {kind} needs send: gradient, {GRADIENT_ONLY[kind]}"
        return
    if kind == "saef":
        yield "feedback.kind saef needs send: difference, since it steps ahead by a model difference"
    if settings.workers.local_steps > 1:
        also = f"; feedback.kind {kind} has no other mode" if kind in GRADIENT_ONLY else ""
        yield f"workers.local_steps must be 1 with send: gradient; several steps need send: difference{also}"
    if settings.server.optimizer.kind != "sum":
        yield "server.optimizer must be sum with send: gradient, where the server runs the user's optimizer"
    if federated.proximal:
        yield "federated.proximal needs send: difference, since a gradient is taken where the round begins"
    if federated.control_variates:
        yield "federated.control_variates needs send: difference, since it corrects local steps"


def _feedback(settings: RunSettings) -> Iterator[str]:
    kind, residual, optimizer = settings.feedback.kind, settings.workers.residual, settings.server.optimizer
    if kind in ESTIMATING and residual not in ("float32", "sparse"):
        yield (
            f"workers.residual is {residual}, but feedback.kind {kind} needs float32 or sparse: worker and server keep "
            "the same estimate bit for bit"
        )
    if kind == "dgc" and not any(selects(compressor(spec)) for spec in _uplinks(settings)):
        yield f"uplink is {settings.uplink}, but feedback.kind dgc needs a selection, as in topk:0.001, to mask"
    if kind == "ef_momentum" and optimizer.options.get("momentum"):
        yield (
            f"server.optimizer has momentum {optimizer.options['momentum']}, but feedback.kind ef_momentum keeps the "
            "momentum itself (feedback.momentum)"
        )


def _asynchronous(settings: RunSettings) -> Iterator[str]:
    server, count = settings.server, settings.workers.count
    if server.mode == "sync":
        for key in ("buffer", "max_staleness"):
            if getattr(server, key) is not None:
                yield f"server.{key} needs server.mode: async; a synchronous round waits for every worker"
        if server.staleness.kind != "constant":
            yield "server.staleness needs server.mode: async; no update of a synchronous round is late"
        return
    if server.staleness.kind != "constant" and settings.feedback.kind in ESTIMATING:
        yield (
            f"server.staleness is {server.staleness.kind}, but feedback.kind {settings.feedback.kind} needs constant: "
            "what it sends corrects an estimate, and a part of a correction is wrong"
        )
    if settings.budget is not None:
        yield "budget needs server.mode: sync, where all updates of a round were compressed by the same ratios"
    if server.buffer is not None and server.buffer > count:
        yield f"server.buffer is {server.buffer}; valid is at most workers.count, {count}"
    kind, weighted = settings.feedback.kind, server.staleness.kind
    if kind in ("ef21", "ef21_plus") and weighted != "constant":
        yield (
            f"server.staleness is {weighted}, but feedback.kind {kind} needs constant: worker and server add the same "
            "corrections to the same estimate"
        )
    if settings.federated.participation < 1.0:
        yield "federated.participation needs server.mode: sync, where a round knows who takes part"
    if settings.federated.control_variates:
        yield "federated.control_variates needs server.mode: sync, where all correct by the same variate"
    if getattr(settings.feedback, "average_every", None) is not None:
        yield "feedback.average_every needs server.mode: sync, where all residuals are of one version"


def _relays(settings: RunSettings) -> Iterator[str]:
    relays, count = settings.relays.count, settings.workers.count
    if not relays:
        return
    if relays > count:
        yield f"relays.count is {relays}; valid is at most workers.count, {count}, since a relay needs a group"
    if settings.feedback.kind in ("ef21", "ef21_plus"):
        kind = settings.feedback.kind
        yield f"relays.count must be 0 with feedback.kind {kind}, where the server keeps each worker's estimate"
    if settings.server.mode == "async":
        yield "relays needs server.mode: sync, since a relay waits for its group"
    if settings.budget is not None:
        yield "budget needs relays.count: 0; with relays the server does not see what each worker's update costs"


def _compression(settings: RunSettings) -> Iterator[str]:
    specs = {"uplink": settings.uplink, "downlink": settings.downlink}
    if average := getattr(settings.feedback, "average", None):
        specs["feedback.average"] = average
    for key, spec in specs.items():
        if settings.granularity == "model" and spec.startswith("lowrank"):
            yield f"{key} is {spec}, which needs granularity: layer; all parameters as one vector are no matrix"
    yield from _warmup(settings)
    if settings.budget is None:
        return
    low, high = settings.budget.smallest, settings.budget.largest
    if low > high:
        yield f"budget.smallest is {low}; valid is at most budget.largest, {high}"
    if all(ratio_of(compressor(spec)) is None for spec in _uplinks(settings)):
        yield f"budget needs an uplink that selects by a ratio, as in topk:0.01; uplink is {settings.uplink}"


def _warmup(settings: RunSettings) -> Iterator[str]:
    schedule = settings.schedule
    if not schedule.warmup_rounds:
        if schedule.warmup_steps is not None:
            yield f"schedule.warmup_steps is {schedule.warmup_steps}, but there are no schedule.warmup_rounds to divide"
        return
    found = [ratio_of(compressor(spec)) for spec in (settings.downlink, *_uplinks(settings))]
    ratios = [ratio for ratio in found if ratio is not None]
    if not ratios:
        yield "schedule.warmup_rounds needs a compressor that selects by a ratio, as in topk:0.01"
    elif settings.budget is None and min(ratios) >= schedule.warmup_ratio:
        yield f"schedule.warmup_ratio is {schedule.warmup_ratio}; valid is above the ratio that follows, {min(ratios)}"


def _uplinks(settings: RunSettings) -> tuple[str, ...]:
    """The specifications of the layers of an update."""
    return (settings.uplink, *settings.overrides.values())
