"""The server's state and the one function that changes it.

``apply`` has no clock, no I/O and no randomness of its own: the same records give the same state, bit
for bit, and the same entries. It alters the state in place, since a model is too large to copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from protocol import snapshot
from protocol.compression import Compression
from protocol.layout import Layout
from protocol.messages import U8, Entry, Welcome
from protocol.sender import Sender
from ps.aggregate import Aggregate, Contribution
from ps.log import Log
from ps.optimizer import ServerOptimizer


@dataclass(frozen=True)
class Close:
    """A round closes: everything that the fold needs.

    Attributes:
        contributions: in worker-id order, hand-overs behind the pushes.
        weights: the members from the next round on with their weights, if they change.
        options: the optimizer's options by group, as rank 0 announced them.
        ratios: of the uplink's selections from the next round on, by segment, if they change.
        joined: members that have joined, perhaps again, since the last fold: they remember nothing.
    """

    contributions: tuple[Contribution, ...]
    weights: dict[int, float] | None = None
    options: list[dict[str, Any]] | None = None
    ratios: list[float] | None = None
    final: bool = False
    joined: tuple[int, ...] = ()


@dataclass
class ServerState:
    """Everything that the next entry depends on.

    ``w`` is the replica that all workers hold, ``sender.residual`` is ``e``; the true model is
    ``x = w - e``. Shapes: ``(layout.numel,)`` in the working precision.
    """

    layout: Layout
    w: Tensor
    statics: tuple[U8, ...]
    sender: Sender
    compression: Compression
    aggregate: Aggregate
    optimizer: ServerOptimizer
    weights: dict[int, float]
    ratios: list[float] = field(default_factory=list)
    version: int = 0
    position: int = 0
    samples: dict[int, int | None] = field(default_factory=dict)  # of each member's own data, if it said
    sequences: dict[int, int] = field(default_factory=dict)  # the last one folded, by worker
    log: Log = field(default_factory=Log)
    final: bool = False  # the last entry was

    def since(self, version: int) -> tuple[U8, ...] | None:
        """The entries that a replica at a version lacks, or None if some are gone or it is none of this run's."""
        entries = self.log.since(version)
        return tuple(entries) if entries is not None and len(entries) == self.version - version else None

    def welcome(self, held: int | None = None) -> U8:
        """The model as a snapshot; or for a replica that is held, of a version, the word that it is good."""
        bodies = snapshot.pack(self.layout, self.w, self.statics) if held is None else ()
        version = self.version if held is None else held
        at = (version, self.position, self.weights, self.ratios or None, self.final)
        return Welcome(*at, bodies=bodies, layout=self.layout.hash).pack()


@dataclass(frozen=True)
class Applied:
    """What ``apply`` gives beside the new state: the frame to broadcast, and squared norms."""

    frame: U8
    before: float  # |e + u|^2
    left: float  # |e'|^2


def shares(samples: Mapping[int, int | None]) -> dict[int, float]:
    """The members' weights: in proportion to their samples if all have said how many, else equal."""
    known = {worker: count for worker, count in sorted(samples.items()) if count is not None}
    if len(known) < len(samples):
        return {worker: 1.0 / len(samples) for worker in sorted(samples)}
    return {worker: count / sum(known.values()) for worker, count in known.items()}


def _true_model(state: ServerState) -> Tensor:
    """``x = w - e``."""
    x = state.w.clone()
    state.sender.subtract_residual(x)
    return x


def apply(state: ServerState, record: Close) -> Applied:
    """Fold a round into the state: ``p = e + u``, ``c = C(p)``, ``e = p - c``, ``w = w - c``.

    The fold adds one worker after the other in worker-id order, each value rounded to the working
    precision first, so the bits depend on nothing but the record. If every worker skipped a step and no
    parameter would move, the optimizer skips its own, as in plain torch; residuals that arrive are stepped.

    Raises:
        NotFiniteError: the step of the server's optimizer holds NaN or Inf; no version was made.
    """
    state.aggregate.retain(state.weights.keys() - set(record.joined))
    total = state.aggregate.fold(record.contributions, state.weights)
    skipped = all(contribution.skipped for contribution in record.contributions) and not any(
        total[s.start : s.stop].any() for s in state.layout.segments if s.entry.role == "parameter"
    )
    step = total
    if not skipped:
        model = _true_model(state) if state.optimizer.needs_model else None
        step = state.optimizer.step(total, model, record.options)
    message = state.sender.stage(step, state.version, compressors=state.compression.at(state.version))
    state.sender.commit()
    for contribution in record.contributions:
        state.sequences[contribution.worker] = contribution.sequence
        state.position += contribution.samples
    for place, update in zip(state.layout.segments, message.updates, strict=True):
        update.subtract_from(state.w[place.start : place.stop])
    state.version += 1
    state.final = record.final
    if record.weights is not None:
        state.weights = record.weights
        state.aggregate.retain(record.weights)
    if record.ratios is not None:
        state.ratios = record.ratios
    entry = Entry(
        version=state.version,
        position=state.position,
        weights=record.weights,
        ratios=record.ratios,
        final=record.final,
        bodies=message.bodies,
        layout=state.layout.hash,
    )
    frame = entry.pack()
    state.log.append(state.version, frame)
    return Applied(frame, message.norms.before, message.norms.left)
