"""What the server concludes from the workers' statistics: gradient mismatch, and the ratio of every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protocol import energies
from protocol.compression import Compression, count_of, ratio_of
from protocol.energies import Energy
from protocol.kernels.sketch import Sketch
from protocol.layout import Layout
from protocol.messages import Push
from protocol.settings import Budget, Schedule
from ps.plan import Plan

Floats = npt.NDArray[np.float64]

EXPONENT = 0.5  # see Steering
STEP = 4.0  # how much a layer's odds change at most, relative to those of the others
WIDEST, NARROW = 128.0, 60  # binary logarithm of the common factor of the odds; halvings of the interval it lies in


@dataclass(frozen=True)
class Mismatch:
    """How far from the model they belong to gradients are taken.

    Xu, Huo, Huang, "Step-Ahead Error Feedback" (AAAI 2021): with an L-smooth loss the mismatch is at most ``L^2``
    times these, squared, plus ``4 sigma^2``. The paper's ``1/K sum_k e_k`` is our ``sum_k e_k``, since ours carry
    their weight, and its ``e_k`` is our ``e_k / a_k``. Norms from sketches, to about 4 % (see ``protocol.ledger``).

    Attributes:
        replica: ``|e + sum_k e_k|``, equation (9): gradients at ``w``, as in ``ef``.
        ahead: ``sqrt(sum_k a_k |e + sum_j e_j - e_k / a_k|^2)``, equation (10): at ``w - e_k / a_k``, as in ``saef``.
    """

    replica: float
    ahead: float


def mismatch(server: Sketch, workers: Mapping[int, Sketch], weights: Mapping[int, float]) -> Mismatch:
    """The mismatch of a round.

    Args:
        server: sketch of ``e``.
        workers: of each ``e_k``, of the workers that took part.
        weights: ``a_k`` of at least those.
    """
    total = server + sum(workers.values(), np.zeros_like(server))
    share = sum(weights[worker] for worker in workers)
    ahead = sum(
        weights[worker] / share * float(np.sum((total - sketch * (share / weights[worker])) ** 2))
        for worker, sketch in workers.items()
    )
    return Mismatch(float(np.linalg.norm(total)), math.sqrt(ahead))


class Steering:
    """Sets each layer's ratio so that the workers' errors, in sum, are least for a budget of bytes.

    Let a layer's squared error be ``E(k) = c k^-a`` if it sends ``k`` of its ``n`` elements. The sum of ``E`` under
    ``sum k = const`` is least where all ``dE/dk = -a E / k`` are equal. From the measured ``E`` at the present
    ``k`` follows ``c``, and for ``a = 1`` the new ``k`` in proportion to ``k (E / k)^(1/2)``; repeated, this
    goes to the point where ``E / k`` is equal everywhere whatever ``a`` is. The law ends near ``k = n``, where
    ``E`` falls to 0; so it is the odds ``k / (n - k)``, there and where few are sent alike, that are multiplied, by
    ``STEP`` at most. What an element costs in bytes is measured from the bodies of the messages.

    Args:
        uplink: of the workers; ratios are for those segments that it selects by a ratio.
    """

    def __init__(self, layout: Layout, uplink: Compression, schedule: Schedule, budget: Budget) -> None:
        self._layout, self._uplink, self._schedule, self._budget = layout, uplink, schedule, budget
        self._places = [n for n, s in enumerate(layout.segments) if s.numel and ratio_of(uplink.final[n]) is not None]
        self._numel = np.array([layout.segments[n].numel for n in self._places], np.float64)

    def choose(
        self, version: int, present: Sequence[float], pushes: Sequence[tuple[Push, int]], every: int
    ) -> list[float] | None:
        """The ratios from version ``version + 1`` on; see ``ratios``.

        Args:
            pushes: of the round, each with the bytes of its frame; those count that bring norms by segment.
            every: rounds between pushes that bring them.
        """
        telling = [(push, size) for push, size in pushes if push.energies]
        if not telling:
            return None
        others = 1.0 - 1.0 / every  # pushes without statistics
        return self.ratios(
            version,
            present,
            [energies.unpack_energies(push.energies, len(self._layout.segments)) for push, _ in telling],
            [[body.size for body in push.bodies] for push, _ in telling],
            sum(size - others * len(push.sketch + push.energies) for push, size in telling) / len(telling),
        )

    def ratios(
        self,
        version: int,
        present: Sequence[float],
        measured: Sequence[Sequence[Energy]],
        sizes: Sequence[Sequence[int]],
        whole: float,
    ) -> list[float] | None:
        """The ratios from version ``version + 1`` on, one a segment (0 where there is none to choose).

        Args:
            present: what was announced last; empty before.
            measured: of each worker's message, by segment.
            sizes: bytes of the bodies of each worker's message, by segment.
            whole: bytes of a message, on average.

        Returns:
            None if there is nothing to say: no compression yet, or no layer to choose for.
        """
        if not self._places or not measured or not self._schedule.compresses(version):
            return None
        used = self._uplink.at(version, present)
        count = np.array([count_of(used[n], self._layout.segments[n].numel) for n in self._places], np.float64)
        error = np.array([sum(each[n].left for each in measured) for n in self._places])
        bytes_ = np.array([float(np.mean([each[n] for each in sizes])) for n in self._places])
        step = np.ones_like(error)
        if error.any():
            step = ((error / count) / (error.sum() / count.sum())) ** EXPONENT
        odds = step.clip(1.0 / STEP, STEP) * (count + 0.5) / (self._numel - count + 0.5)
        counts = self._filled(odds, bytes_ / count, self._budget.bytes - (whole - float(bytes_.sum())))
        ratios = [0.0] * len(self._layout.segments)
        for n, ratio in zip(self._places, counts / self._numel, strict=True):
            ratios[n] = float(ratio)
        return ratios

    def _filled(self, odds: Floats, cost: Floats, budget: float) -> Floats:
        """The counts for these odds times the factor for which ``sum(cost * .)`` is the budget, if there is one."""
        low = np.maximum(1.0, self._budget.smallest * self._numel)
        high = np.maximum(low, self._budget.largest * self._numel)

        def counts(power: float) -> Floats:
            scaled = 2.0**power * odds
            found: Floats = np.clip(self._numel * scaled / (1.0 + scaled), low, high)
            return found

        under, over = -WIDEST, WIDEST
        for _ in range(NARROW):
            middle = (under + over) / 2.0
            if float((cost * counts(middle)).sum()) > budget:
                over = middle
            else:
                under = middle
        return counts(under)


def steering_for(plan: Plan, layout: Layout) -> Steering | None:
    """What the plan's budget needs, if it has one."""
    if plan.budget is None:
        return None
    uplink = Compression(layout, plan.uplink, plan.overrides, plan.schedule)
    return Steering(layout, uplink, plan.schedule, plan.budget)
