"""What the server concludes from the workers' statistics: gradient mismatch, and the ratio of every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from protocol import energies
from protocol.compression import Compression, ratio_of
from protocol.energies import Energy
from protocol.kernels.sketch import Sketch
from protocol.layout import Layout
from protocol.messages import Push
from protocol.settings import Budget, Schedule
from ps.plan import Plan

EXPONENT = 0.5  # see Steering.ratios
NARROW = 60  # halvings of the interval in which the common factor of the ratios lies


@dataclass(frozen=True)
class Mismatch:
    """How far from the model they belong to gradients are taken.

    Xu, Huo, Huang, "Step-Ahead Error Feedback" (AAAI 2021): with an L-smooth loss the mismatch is at most ``L^2``
    times these, squared, plus ``4 sigma^2``. The paper's ``1/K sum_k e_k`` is our ``sum_k e_k``, since ours carry
    their weight, and its ``e_k`` is our ``e_k / a_k``. Norms from sketches, to about 4 %.

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

    Let a layer's squared error be ``E(k) = c k^-a`` if it sends ``k`` elements. The sum of ``E`` under
    ``sum k = const`` is least where all ``dE/dk = -a E / k`` are equal. From the measured ``E`` at the present
    ``k`` follows ``c``, and for ``a = 1`` the new ``k`` in proportion to ``k (E / k)^(1/2)``; repeated, this
    goes to the point where ``E / k`` is equal everywhere whatever ``a`` is. What an element costs in bytes is
    measured from the bodies of the messages.

    Args:
        uplink: of the workers; ratios are for those segments that it selects by a ratio.
    """

    def __init__(self, layout: Layout, uplink: Compression, schedule: Schedule, budget: Budget) -> None:
        self._layout, self._uplink, self._schedule, self._budget = layout, uplink, schedule, budget
        self._places = [n for n, one in enumerate(uplink.final) if ratio_of(one) is not None]

    def choose(self, version: int, present: Sequence[float], pushes: Sequence[tuple[Push, int]]) -> list[float] | None:
        """The ratios from version ``version + 1`` on; see ``ratios``.

        Args:
            pushes: of the round, each with the bytes of its frame; those count that bring norms by segment.
        """
        telling = [(push, size) for push, size in pushes if push.energies]
        if not telling:
            return None
        return self.ratios(
            version,
            present,
            [energies.unpack_energies(push.energies, len(self._layout.segments)) for push, _ in telling],
            [[body.size for body in push.bodies] for push, _ in telling],
            sum(size - len(push.sketch) - len(push.energies) for push, size in telling) / len(telling),
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
        used = [ratio_of(one) for one in self._uplink.at(version, present)]
        error = np.array([sum(each[n].left for each in measured) for n in self._places])
        bytes_ = np.array([float(np.mean([each[n] for each in sizes])) for n in self._places])
        numel = np.array([self._layout.segments[n].numel for n in self._places], np.float64)
        count = np.maximum(1.0, np.array([used[n] for n in self._places], np.float64) * numel)
        wanted = count * (error / count + 1e-30) ** EXPONENT
        cost = bytes_ / count
        budget = self._budget.bytes - (whole - float(bytes_.sum()))
        low, high = self._budget.smallest * numel, self._budget.largest * numel
        chosen = _filled(wanted, cost, np.maximum(low, 1.0), np.maximum(high, 1.0), budget) / numel
        ratios = [0.0] * len(self._layout.segments)
        for n, ratio in zip(self._places, chosen, strict=True):
            ratios[n] = float(min(1.0, ratio))
        return ratios


def steering_for(plan: Plan, layout: Layout) -> Steering | None:
    """What the plan's budget needs, if it has one."""
    if plan.budget is None:
        return None
    uplink = Compression(layout, plan.uplink, plan.overrides, plan.schedule)
    return Steering(layout, uplink, plan.schedule, plan.budget)


def _filled(wanted: np.ndarray, cost: np.ndarray, low: np.ndarray, high: np.ndarray, budget: float) -> np.ndarray:
    """``clip(f wanted, low, high)`` with the factor f for which ``sum(cost * .)`` is the budget, if there is one."""
    under, over = 0.0, float((high / wanted).max())
    for _ in range(NARROW):
        middle = (under + over) / 2.0
        if float((cost * np.clip(middle * wanted, low, high)).sum()) > budget:
            over = middle
        else:
            under = middle
    return np.clip(under * wanted, low, high)
