"""The figures of a comparison: of every run, and their mean and spread over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from deploy.compare.runs import NOT_RUN, Failure
from deploy.compare.variations import Plan, Variation
from deploy.curves import Row, in_order, number, quantities, wire_bytes
from deploy.report import read_run
from protocol.errors import SettingsError

TENTH = 10  # what is reported in every round is judged by the mean of this part of the rounds, the last
WINDOW = 20  # a target is reached by the mean over this part of all reports
FROM_SUMMARY = ("rounds", "seconds", "uplink_bytes", "downlink_bytes", "uplink_ratio", "downlink_ratio")


@dataclass(frozen=True)
class Target:
    """A value of a reported quantity that a run is to reach."""

    quantity: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """From ``NAME=VALUE``.

        Raises:
            SettingsError: it is not of that form, or the value is not a finite number.
        """
        name, _, value = text.partition("=")
        if not name.strip() or not math.isfinite(number(value)):
            raise SettingsError(f"--target is {text!r}; valid is NAME=VALUE with a number, as in loss=0.1")
        return cls(name.strip(), float(value))


@dataclass(frozen=True)
class RunFigures:
    """What one run gave.

    Attributes:
        failure: why it did not finish; None if it did. The figures below are then empty.
        values: figures of summary.json by its keys; ``samples``, that all workers have trained on; and
            ``uplink_bytes_per_sample`` and ``downlink_bytes_per_sample``, bytes of all workers over samples of all.
        final: what was reported last, by name.
        last_tenth: means over the last tenth of the rounds of what was reported in all of these and not after them.
        reached: rounds, and bytes of both directions and all workers, until the target; None if it was not reached.
    """

    seed: int
    path: str
    failure: Failure
    fingerprint: str = ""
    values: dict[str, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    last_tenth: dict[str, float] = field(default_factory=dict)
    reached: dict[str, int] | None = None
    rows: Sequence[Row] = field(default=(), repr=False)  # of metrics.jsonl

    def record(self) -> dict[str, Any]:
        """For the file."""
        return {key: value for key, value in vars(self).items() if key != "rows"}


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds: mean, sample standard deviation (None for one value), and how many values."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Over at least one value; NaN where a value is."""
        each = list(values)
        if not all(map(math.isfinite, each)):
            return cls(math.nan, None, len(each))
        return cls(statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else None, len(each))


@dataclass(frozen=True)
class Result:
    """One variation and the figures of its runs, one a seed."""

    variation: Variation
    runs: tuple[RunFigures, ...]

    @property
    def finished(self) -> tuple[RunFigures, ...]:
        """The runs that have figures."""
        return tuple(run for run in self.runs if run.failure is None)

    def spread(self, figure: Callable[[RunFigures], float | None]) -> Spread | None:
        """A figure over the finished runs that have it; None if none has."""
        values = [value for run in self.finished if (value := figure(run)) is not None]
        return Spread.of(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """Everything that the tables and figures show."""

    plan: Plan
    results: tuple[Result, ...]
    target: Target | None
    is_falling: bool  # the target is reached from above

    @classmethod
    def read(cls, plan: Plan, failures: Mapping[str, Failure], target: Target | None) -> Comparison:
        """From the run directories; ``failures`` holds the names of the runs that have ended."""
        results = [
            [
                read(settings.storage.dir / settings.name, settings.seed, failures.get(settings.name, NOT_RUN))
                for settings in variation.runs
            ]
            for variation in plan.variations
        ]
        is_falling = target is not None and falls((run.rows for runs in results for run in runs), target)
        if target is not None:
            results = [[replace(run, reached=reach(run.rows, target, is_falling)) for run in runs] for runs in results]
        each = tuple(Result(v, tuple(runs)) for v, runs in zip(plan.variations, results, strict=True))
        return cls(plan, each, target, is_falling)

    def finished(self) -> list[RunFigures]:
        """All runs that have figures."""
        return [run for result in self.results for run in result.finished]

    def reported(self) -> list[str]:
        """What any run reported, in the order in which it is shown."""
        return in_order({name for run in self.finished() for name in run.final})

    def in_rounds(self) -> list[str]:
        """What any run reported in any round, and not only after the last."""
        return quantities({run.path: run.rows for run in self.finished()})

    def in_every_round(self) -> set[str]:
        """What all runs that report it report in every round, so that the mean of the last tenth stands for it."""
        names = self.reported()
        runs = self.finished()
        return {name for name in names if all(name in run.last_tenth for run in runs if name in run.final)}


def read(path: Path, seed: int, failure: Failure = None) -> RunFigures:
    """The figures of the run in a run directory, which need not be there if it failed. ``reached`` is left open."""
    if failure is not None:
        return RunFigures(seed, str(path), failure)
    run = read_run(path)
    values = {key: number(run.summary.get(key)) for key in FROM_SUMMARY}
    values["samples"] = number(run.rows[-1].get("position")) if run.rows else math.nan
    for way in ("uplink", "downlink"):
        values[f"{way}_bytes_per_sample"] = values[f"{way}_bytes"] / values["samples"]
    reported = run.summary.get("reported") or {}
    return RunFigures(
        seed,
        str(path),
        None,
        str(run.summary.get("fingerprint", "")),
        values,
        {name: number(value) for name, value in reported.items()},
        last_tenth(run.rows, reported),
        rows=run.rows,
    )


def last_tenth(rows: Sequence[Row], final: Mapping[str, Any]) -> dict[str, float]:
    """Means over the last tenth of the rounds, at least one, of what was reported in all of them and not after."""
    tail = [row.get("reported") or {} for row in rows[-math.ceil(len(rows) / TENTH) :]]
    names = [name for name in final if tail and all(name in reported for reported in tail)]
    return {
        name: float(np.mean([number(reported[name]) for reported in tail]))
        for name in names
        if tail[-1][name] == final[name]
    }


def falls(runs: Iterable[Sequence[Row]], target: Target) -> bool:
    """Whether the quantity has to fall to reach the target: it begins above it, in the mean over the runs."""
    firsts = (next((v for _, v in _reports(rows, target.quantity) if math.isfinite(v)), None) for rows in runs)
    found = [first for first in firsts if first is not None]
    return bool(found) and statistics.fmean(found) > target.value


def reach(rows: Sequence[Row], target: Target, is_falling: bool) -> dict[str, int] | None:
    """Rounds and bytes until the mean over the last twentieth of all reports first reaches the target; None if never.

    That many reports have to be there, and it is at least one. Bytes are those of both directions and all workers.
    """
    reports = _reports(rows, target.quantity)
    window = max(1, len(reports) // WINDOW)
    for end in range(window, len(reports) + 1):
        mean = statistics.fmean(value for _, value in reports[end - window : end])
        if mean <= target.value if is_falling else mean >= target.value:
            row = reports[end - 1][0]
            return {"rounds": int(row["version"]), "bytes": int(wire_bytes(row))}
    return None


def _reports(rows: Sequence[Row], quantity: str) -> list[tuple[Row, float]]:
    return [(row, number(row["reported"][quantity])) for row in rows if quantity in (row.get("reported") or {})]
