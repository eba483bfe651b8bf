"""What travels with a push beside the update: norms, durations, and what the user reported."""

from __future__ import annotations

import math
from collections.abc import Mapping

from protocol.errors import SettingsError
from protocol.messages import Stat, pack_statistics

LARGEST = 3.4028234e38  # of float32
REPORTED_LIMIT = 5  # names a worker; with the norms they fit into the statistics of one push


class Reported:
    """Means of the values that the user reported since the last push.

    A name gets its number when it is first used and keeps it; the server learns new names with the
    push that uses them first.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._announced = 0
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Take in one call of ``session.report``.

        Raises:
            SettingsError: there are more names than a push has room for.
        """
        for name, value in values.items():
            if name not in self._numbers and len(self._numbers) == REPORTED_LIMIT:
                known = ", ".join(self._numbers)
                raise SettingsError(
                    f"session.report got {name!r} beside {known}; at most {REPORTED_LIMIT} names are possible"
                )
            self._numbers.setdefault(name, len(self._numbers))
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means since the last call, by name."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means

    def take_numbered(self) -> tuple[dict[int, float], list[str] | None]:
        """The means by their keys in a push, and the names that the server does not know yet."""
        means = {Stat.REPORTED + self._numbers[name]: _single(value) for name, value in self.take().items()}
        new = list(self._numbers)[self._announced :]
        self._announced = len(self._numbers)
        return means, new or None


def _single(value: float) -> float:
    """The value as float32 can carry it: infinite if it is too large."""
    return math.copysign(math.inf, value) if abs(value) > LARGEST else value


class Rotation:
    """Figures that need not travel every round: one a push, in turn, so that a push stays small."""

    def __init__(self) -> None:
        self._latest: dict[int, float] = {}
        self._turn = 0

    def set(self, key: int, value: float) -> None:
        """The latest figure for a key of ``Stat``."""
        self._latest[key] = value

    def next(self) -> dict[int, float]:
        """The next figure in turn, at most one."""
        if not self._latest:
            return {}
        keys = sorted(self._latest)
        key = keys[self._turn % len(keys)]
        self._turn += 1
        return {key: self._latest[key]}


def pack(norms: dict[int, float], figure: dict[int, float], reported: dict[int, float]) -> bytes:
    """The statistics of one push."""
    return pack_statistics({**norms, **figure, **reported})
