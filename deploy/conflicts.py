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
    kind, residual = settings.feedback.kind, settings.workers.residual
    if kind in ("ef21", "ef21_plus") and residual != "float32":
        yield (
            f"workers.residual is {residual}, but feedback.kind {kind} needs float32: worker and server keep the "
            "same estimate bit for bit"
        )
    if kind == "dgc":
        specs = {"uplink": settings.uplink} | {f"overrides.{glob}": s for glob, s in settings.overrides.items()}
        for key, spec in specs.items():
            if not selects(compressor(spec)):
                yield f"{key} is {spec}, but feedback.kind dgc needs a selection, as in topk:0.001, to mask"


def _asynchronous(settings: RunSettings) -> Iterator[str]:
    server, count = settings.server, settings.workers.count
    if server.mode == "sync":
        for key in ("buffer", "max_staleness"):
            if getattr(server, key) is not None:
                yield f"server.{key} needs server.mode: async; a synchronous round waits for every worker"
        if server.staleness.kind != "constant":
            yield "server.staleness needs server.mode: async; no update of a synchronous round is late"
        return
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
    if settings.granularity == "model" and settings.overrides:
        yield "overrides needs granularity: layer; with granularity: model there are no layers to name"
    if settings.budget is None:
        return
    low, high = settings.budget.smallest, settings.budget.largest
    if low > high:
        yield f"budget.smallest is {low}; valid is at most budget.largest, {high}"
    specs = (settings.uplink, *settings.overrides.values())
    if all(ratio_of(compressor(spec)) is None for spec in specs):
        yield f"budget needs an uplink that selects by a ratio, as in topk:0.01; uplink is {settings.uplink}"
