"""The figure of a comparison: every reported quantity against rounds and against bytes, a line a variation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deploy.compare.figures import Comparison, Result
from deploy.curves import Curve, number, round_of, seeds_curve, wire_bytes_each
from deploy.plots import Panel, Plot, plot

APART = 0.15  # of the way to the next variation, half of what the dots of one take
BYTES = "bytes sent and received by each worker"


def whole(comparison: Comparison) -> Plot | None:
    """All panels in one figure; None if there is nothing to draw."""
    rows = [panels for _, panels in _rows(comparison)]
    return plot(f"{comparison.plan.name}: {_seeds(comparison)}", "", *rows) if rows else None


def each(comparison: Comparison) -> list[Plot]:
    """A figure for every reported quantity."""
    lines = f"The {_seeds(comparison)}."
    return [
        plot(name, "A dot is a run." if panels[0].has_dots else lines, panels) for name, panels in _rows(comparison)
    ]


def _seeds(comparison: Comparison) -> str:
    seeds = comparison.plan.seeds
    if len(seeds) == 1:
        return f"running mean of seed {seeds[0]}"
    return f"mean over {len(seeds)} seeds of their running means; bands span the seeds, smallest to largest"


def _rows(comparison: Comparison) -> list[tuple[str, Sequence[Panel]]]:
    return [(name, _curves(comparison, name) or _dots(comparison, name)) for name in comparison.reported()]


def _curves(comparison: Comparison, quantity: str) -> Sequence[Panel]:
    """Against rounds and against bytes; nothing if the quantity was reported only at the end."""
    halves = []
    for title, label, x in (("rounds", "round", round_of), ("bytes", BYTES, wire_bytes_each)):
        found = [
            seeds_curve(result.variation.label, look, [run.rows for run in result.finished], quantity, x)
            for look, result in enumerate(comparison.results)
        ]
        drawn = [curve for curve in found if curve.x.size or curve.left_out]
        axis = "bytes" if title == "bytes" else "rounds"
        halves.append(Panel(f"{quantity} against {title}", drawn, False, axis, label, quantity))  # type: ignore[arg-type]
    return halves if any(half.curves for half in halves) else ()


def _dots(comparison: Comparison, quantity: str) -> Sequence[Panel]:
    """A dot a run: side by side, and against the bytes that it took."""
    beside, against = [], []
    for place, result in enumerate(comparison.results):
        found = _finals(result, quantity)
        if found.size:
            label = result.variation.label
            beside.append(_dotted(label, place, place + np.linspace(-APART, APART, len(found)), found[:, 1]))
            against.append(_dotted(label, place, found[:, 0], found[:, 1]))
    return (
        Panel(f"{quantity} at the end", beside, False, "runs", "variation, a dot a seed", quantity, has_dots=True),
        Panel(f"{quantity} at the end against bytes", against, False, "bytes", BYTES, quantity, has_dots=True),
    )


def _finals(result: Result, quantity: str) -> np.ndarray:
    """Bytes for each worker and final value of every run that has both, shape (runs, 2), in the order of the seeds."""
    pairs = [(wire_bytes_each(run.rows[-1]), number(run.final.get(quantity))) for run in result.finished if run.rows]
    return np.array([pair for pair in pairs if np.isfinite(pair).all()], dtype=np.float64).reshape(-1, 2)


def _dotted(label: str, look: int, x: np.ndarray, y: np.ndarray) -> Curve:
    return Curve(label, look, x, y, y, y, over="seeds", is_smooth=True)
