"""How the workers' messages become the sum that the server's optimizer steps by."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from protocol.layout import Layout
from protocol.messages import U8
from protocol.segment import pack_exact
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

    def dropped(self) -> float:
        """Norm of what the factor takes away."""
        return (1.0 - self.factor) * math.hypot(*(u.norm() for u in self.updates)) if self.factor != 1.0 else 0.0


def exact_sum(layout: Layout, messages: Sequence[tuple[Update, ...]]) -> tuple[U8, ...]:
    """The bodies of the sum of messages, one after the other, which is not compressed."""
    total = layout.zeros()
    for place, *updates in zip(layout.segments, *messages, strict=True):
        accumulate(updates, total[place.start : place.stop])
    return tuple(pack_exact(total[s.start : s.stop].numpy()) for s in layout.segments)


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

    One worker after the other, each value, and its product with the factor, rounded to the working precision first.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def fold(self, contributions: Sequence[Contribution], weights: Mapping[int, float]) -> Tensor:
        """See ``Aggregate``."""
        total = self._layout.zeros()
        for factor, equal in itertools.groupby(contributions, key=lambda contribution: contribution.factor):
            for place, *updates in zip(self._layout.segments, *(c.updates for c in equal), strict=True):
                part = total[place.start : place.stop]
                if factor == 1.0:
                    accumulate(updates, part)
                else:
                    for update in updates:
                        update.add_scaled_to(part, factor)
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
        known = sorted(self.known.keys() & weights.keys())
        share = sum(weights[worker] for worker in known)
        if not all(contribution.skipped for contribution in contributions):
            for worker in known:
                total[:trained].add_(self.known[worker], alpha=weights[worker] / share)
        return total

    def _correct(self, contribution: Contribution) -> None:
        trained = self._layout.trainable
        estimate = self.known.get(contribution.worker)
        if estimate is None and contribution.skipped:
            return  # it has no gradient yet
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
