"""How the workers' messages become the sum that the server's optimizer steps by."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from protocol.layout import Layout
from protocol.update import Update, accumulate


@dataclass(frozen=True)
class Contribution:
    """What one worker adds to a fold: a push, or the residual it hands over when it leaves.

    Attributes:
        skipped: a step of its optimizer did not happen (a GradScaler found the loss scale too large).
        replaced: segments of which the server forgets the worker's estimate before it adds (EF21+).
        factor: what the update is multiplied with: its staleness weight.
    """

    worker: int
    sequence: int
    updates: tuple[Update, ...]
    samples: int = 0
    skipped: bool = False
    replaced: tuple[int, ...] = ()
    factor: float = 1.0


class Aggregate(Protocol):
    """Deterministic: equal contributions in equal order give equal bits."""

    def fold(self, contributions: Sequence[Contribution], weights: Mapping[int, float]) -> Tensor:
        """The sum, shape ``(layout.numel,)`` in the working precision.

        Args:
            contributions: in worker-id order, hand-overs behind the pushes.
            weights: of the members, by worker.
        """

    def retain(self, members: Collection[int]) -> None:
        """Forget what belongs to workers that are no longer there."""


class Total:
    """The plain sum: the workers have applied their weights, so residuals and hand-overs simply add.

    One worker after the other, each value rounded to the working precision first.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def fold(self, contributions: Sequence[Contribution], weights: Mapping[int, float]) -> Tensor:
        """See ``Aggregate``."""
        total = self._layout.zeros()
        fresh = [c.updates for c in contributions if c.factor == 1.0]
        for place, *updates in zip(self._layout.segments, *fresh, strict=True):
            accumulate(updates, total[place.start : place.stop])
        for stale in (c for c in contributions if c.factor != 1.0):
            for place, update in zip(self._layout.segments, stale.updates, strict=True):
                total[place.start : place.stop].add_(update.dense().to(total.dtype), alpha=stale.factor)
        return total

    def retain(self, members: Collection[int]) -> None:
        """See ``Aggregate``."""


class Estimates:
    """EF21: ``g = sum_k a_k g_k`` over the members whose estimate is known; ``g_k`` is theirs bit for bit.

    Every ``g_k`` is kept, so that weights can change, a member that misses a round counts with what it sent
    last, and EF21+ can replace. Buffers of the model are summed as in ``Total``. ``g`` is added up anew in every
    round: a running sum would drift.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._total = Total(layout)
        self.known: dict[int, Tensor] = {}  # worker -> g_k, shape (layout.trainable,)

    def fold(self, contributions: Sequence[Contribution], weights: Mapping[int, float]) -> Tensor:
        """See ``Aggregate``; zero if every worker skipped its step."""
        for contribution in contributions:
            self._correct(contribution)
        total, trained = self._total.fold(contributions, weights), self._layout.trainable
        total[:trained] = 0.0
        share = sum(weights[worker] for worker in self.known if worker in weights)
        if not all(contribution.skipped for contribution in contributions):
            for worker in sorted(self.known.keys() & weights.keys()):
                total[:trained].add_(self.known[worker], alpha=weights[worker] / share)
        return total

    def _correct(self, contribution: Contribution) -> None:
        trained = self._layout.trainable
        estimate = self.known.get(contribution.worker)
        if estimate is None:
            estimate = self.known[contribution.worker] = self._layout.zeros()[:trained].clone()
        segments = zip(self._layout.segments, contribution.updates, strict=True)
        for number, (place, update) in enumerate(segments):
            if place.stop > trained:
                break
            part = estimate[place.start : place.stop]
            if number in contribution.replaced:
                part.zero_()
            update.add_to(part)

    def retain(self, members: Collection[int]) -> None:
        """See ``Aggregate``."""
        for worker in self.known.keys() - set(members):
            del self.known[worker]


def aggregate_for(feedback: str, layout: Layout) -> Aggregate:
    """The aggregate that a kind of feedback needs."""
    return Estimates(layout) if feedback in ("ef21", "ef21_plus") else Total(layout)
