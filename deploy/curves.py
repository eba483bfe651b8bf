"""What a figure shows: curves of numbers, taken from the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = Mapping[str, Any]
Runs = Mapping[str, Sequence[Row]]  # label -> rows of metrics.jsonl, in the order of their versions
Floats = NDArray[np.float64]

MOST_LINES = 7  # more workers than this are drawn as a band
MOST_POINTS = 1000  # longer curves are binned, so that a report stays small
FEWEST_TO_SMOOTH = 60  # points
SMOOTHED_PART = 20  # the running mean is taken over a twentieth of the curve
LARGEST = 1e100  # beyond this a value counts as infinite: no axis can be laid out for it


@dataclass(frozen=True)
class Curve:
    """A line, `middle` against `x`, in the range `low` to `high`; arrays of shape (points,), all finite."""

    label: str
    look: int  # which colour and dash
    x: Floats
    low: Floats
    middle: Floats
    high: Floats
    over: str = ""  # what the range spans: workers, seeds, or the points of one place in a long curve
    left_out: int = 0  # values that were NaN or infinite
    is_smooth: bool = False  # it is drawn as it stands, without a running mean

    @property
    def reach(self) -> int:
        """How many neighbours on either side the running mean takes in."""
        return 0 if self.is_smooth else _reach(self.x.size)


def quantities(runs: Runs) -> list[str]:
    """List what the training loops reported, in any round, sorted by name with `loss` first."""
    names = {name for rows in runs.values() for row in rows for name in row.get("reported") or {}}
    return in_order(names)


def in_order(names: set[str]) -> list[str]:
    """Sort reported quantities by name with `loss` first."""
    return sorted(names, key=lambda name: (name != "loss", name))


def round_of(row: Row) -> float:
    """The round of a row; NaN if it does not say."""
    return number(row.get("version"))


def wire_bytes(row: Row) -> float:
    """The bytes of both directions since the start, over all workers; NaN if the row does not say."""
    return number(row.get("uplink_bytes")) + number(row.get("downlink_bytes"))


def wire_bytes_each(row: Row) -> float:
    """The bytes of both directions since the start, for each worker; NaN if the row does not say."""
    return wire_bytes(row) / (number(row.get("workers")) or np.nan)


def number(value: Any) -> float:
    """A value as a number; NaN for what is none and for what no axis can be laid out for."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return np.nan
    return found if abs(found) < LARGEST else np.nan


def curves(runs: Runs, keys: tuple[str, ...], x: Callable[[Row], float] = round_of) -> list[Curve]:
    """Make a curve of row[keys...] for each run, or for each worker of a single run that has few."""
    made: list[Curve] = []
    for index, (label, rows) in enumerate(runs.items()):
        found = [(x(row), value) for row in rows if (value := _look_up(row, keys)) is not None]
        ids = {worker for _, value in found if isinstance(value, Mapping) for worker in value}
        if len(runs) == 1 and 0 < len(ids) <= MOST_LINES:
            for look, worker in enumerate(sorted(ids, key=lambda name: (len(name), name))):
                own = [(at, [value[worker]]) for at, value in found if worker in value]
                made.append(_curve(f"worker {worker}", look, own))
        else:
            each = [(at, list(value.values()) if isinstance(value, Mapping) else [value]) for at, value in found]
            made.append(_curve(label if len(runs) > 1 else "", index, each, "workers" if ids else ""))
    return [curve for curve in made if curve.x.size or curve.left_out]


def seeds_curve(
    label: str, look: int, runs: Sequence[Sequence[Row]], quantity: str, x: Callable[[Row], float] = round_of
) -> Curve:
    """Make one curve of the runs of several seeds: the mean and range of their running means, round by round.

    `x` is the mean over the seeds. A round is a point only where every seed has a finite value.
    """
    each: list[dict[float, tuple[float, float]]] = []  # of every seed: round -> x and running mean
    left_out = 0
    for rows in runs:
        values = [(row, number(value)) for row in rows if (value := _look_up(row, ("reported", quantity))) is not None]
        kept = [(row, value) for row, value in values if np.isfinite(value) and np.isfinite(x(row))]
        left_out += len(values) - len(kept)
        smooth = running_mean(np.array([value for _, value in kept], dtype=np.float64), _reach(len(kept)))
        each.append({round_of(row): (x(row), mean) for (row, _), mean in zip(kept, smooth, strict=True)})
    points = []
    for version in sorted(set.intersection(*(set(found) for found in each)) if each else ()):
        at, means = np.array([found[version] for found in each]).T
        points.append((at.mean(), means.min(), means.mean(), means.max()))
    return Curve(label, look, *_binned(points), over="seeds", left_out=left_out, is_smooth=True)


def running_mean(values: Floats, reach: int) -> Floats:
    """Average each value, of shape (points,), with up to `reach` neighbours on either side.

    The window grows with the distance from the start, where curves are steep and a wide mean flattens them.
    """
    reaches = [min(i // 3, reach) for i in range(len(values))]
    return np.array([values[i - own : i + own + 1].mean() for i, own in enumerate(reaches)])


def _reach(points: int) -> int:
    return points // (2 * SMOOTHED_PART) if points >= FEWEST_TO_SMOOTH else 0


def _look_up(row: Row, keys: tuple[str, ...]) -> Any:
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _curve(label: str, look: int, found: list[tuple[float, list[Any]]], over: str = "") -> Curve:
    points, left_out = [], 0
    for at, values in found:
        finite = [one for value in values if np.isfinite(one := number(value))]
        left_out += len(values) - len(finite)
        if finite and np.isfinite(at):
            points.append((at, min(finite), float(np.median(finite)), max(finite)))
    return Curve(label, look, *_binned(points), over=over, left_out=left_out)


def _binned(points: Sequence[tuple[float, float, float, float]]) -> tuple[Floats, Floats, Floats, Floats]:
    """Arrays of x, low, middle and high, each of shape (points,), at most `MOST_POINTS`; peaks stay in the range."""
    x, low, middle, high = np.array(points, dtype=np.float64).reshape(-1, 4).T
    if x.size > MOST_POINTS:
        starts = np.arange(0, x.size, -(-x.size // MOST_POINTS))
        counts = np.diff(starts, append=x.size)
        x, middle = (np.add.reduceat(values, starts) / counts for values in (x, middle))
        low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    return x, low, middle, high
