"""The figures of a report, drawn from the rows of metrics.jsonl."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator
from numpy.typing import NDArray

Row = Mapping[str, Any]
Runs = Mapping[str, Sequence[Row]]  # label -> rows of metrics.jsonl, in the order of their versions
Floats = NDArray[np.float64]

# Okabe and Ito's colours, apart for every common colour blindness; without yellow, which is faint on white.
# Dashes differ too, so that a curve shows through another that covers it.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("-", "--", "-.", ":")
MOST_LINES = len(COLOURS)  # more workers than this are drawn as a band
MOST_POINTS = 1000  # longer curves are binned, so that a report stays small
FEWEST_TO_SMOOTH = 60  # points
SMOOTHED_PART = 20  # the running mean is taken over a twentieth of the curve
LARGEST = 1e100  # beyond this a value counts as infinite: no axis can be laid out for it
LOG_SPREAD = 100  # values that span more than this factor are read on a logarithmic axis
LOG_BYTES = 8  # as are the bytes of runs whose totals differ by more than this factor
HEIGHT = 3.5  # inches, of a figure 10 inches wide
LEGEND_WIDTH = 120  # characters that fit side by side

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, and in a font that the reader has
    "svg.hashsalt": "carryover",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    """A figure of two panels, with its title and a sentence or two on what its lines are."""

    title: str
    note: str
    figure: Figure


@dataclass(frozen=True)
class Curve:
    """A line, `middle` against `x`, in the range `low` to `high`; arrays of shape (points,), all finite."""

    label: str
    look: int  # which colour and dash
    x: Floats
    low: Floats
    middle: Floats
    high: Floats
    over_workers: bool  # the range is that of the workers
    left_out: int  # values that were NaN or infinite


@dataclass(frozen=True)
class Panel:
    """Half a plot: what to draw and how its axes read."""

    title: str
    curves: Sequence[Curve]
    from_zero: bool = True
    in_bytes: bool = False  # x is bytes, not rounds


def plots(runs: Runs) -> list[Plot]:
    """Draw every plot that `runs` have values for: what was reported, then errors, ratios, contraction."""
    ways = ("workers to server", "server to workers")
    kinds = (
        (
            "Error norms",
            "Norm of the residual: what is not sent yet and is carried over.",
            {"each worker": ("worker_error_norm",), "server": ("server_error_norm",)},
        ),
        (
            "Compression ratio",
            "Dense float32 bytes over the bytes sent, both since the start.",
            dict(zip(ways, (("uplink_ratio",), ("downlink_ratio",)), strict=True)),
        ),
        (
            "Contraction",
            "The share of the squared norm that a message leaves for later: |p \u2212 decode(C(p))|² / |p|².",
            dict(zip(ways, (("contraction", "up"), ("contraction", "down")), strict=True)),
        ),
    )
    drawn = [reported_plot(runs, quantity) for quantity in quantities(runs)]
    for title, note, panels in kinds:
        halves = [Panel(name, _curves(runs, keys)) for name, keys in panels.items()]
        if any(half.curves for half in halves):
            drawn.append(_plot(title, note, halves))
    return drawn


def quantities(runs: Runs) -> list[str]:
    """List what the training loops reported, in any round, sorted by name with `loss` first."""
    names = {name for rows in runs.values() for row in rows for name in row.get("reported") or {}}
    return sorted(names, key=lambda name: (name != "loss", name))


def reported_plot(runs: Runs, quantity: str) -> Plot:
    """Draw a reported quantity against rounds and against the bytes that both directions had sent by then."""
    keys = ("reported", quantity)
    panels = [
        Panel("against rounds", _curves(runs, keys), from_zero=False),
        Panel("against bytes sent, both ways", _curves(runs, keys, _wire_bytes), from_zero=False, in_bytes=True),
    ]
    return _plot(quantity, "Mean over the workers, weighted by their samples.", panels)


def to_svg(figure: Figure, prefix: str) -> str:
    """Render an <svg> element to stand in HTML; `prefix` keeps its ids apart from those of other figures."""
    buffer = io.StringIO()
    _save(figure, buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    # Only inside tags: a run may be called anything, and its name stands between them.
    return re.sub(r"<[^<>]+>", lambda tag: _prefix_ids(tag.group(), prefix), text[text.index("<svg") :])


def to_png(plot: Plot, path: Path) -> None:
    """Write a plot with its title to a PNG file."""
    plot.figure.suptitle(_literal(plot.title), fontsize=11)
    _save(plot.figure, path, format="png", dpi=150, metadata={"Software": None})


def running_mean(values: Floats, reach: int) -> Floats:
    """Average each value, of shape (points,), with up to `reach` neighbours on either side.

    The window grows with the distance from the start, where curves are steep and a wide mean flattens them.
    """
    reaches = [min(i // 3, reach) for i in range(len(values))]
    return np.array([values[i - own : i + own + 1].mean() for i, own in enumerate(reaches)])


def _save(figure: Figure, target: Any, **options: Any) -> None:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A run may be named in a script that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, **options)


def _prefix_ids(tag: str, prefix: str) -> str:
    tag = re.sub(r'(\sid=")', rf"\1{prefix}-", tag)
    return re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", tag)


def _round(row: Row) -> float:
    return _number(row.get("version"))


def _wire_bytes(row: Row) -> float:
    return _number(row.get("uplink_bytes")) + _number(row.get("downlink_bytes"))


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return np.nan
    return number if abs(number) < LARGEST else np.nan


def _curves(runs: Runs, keys: tuple[str, ...], x: Callable[[Row], float] = _round) -> list[Curve]:
    """Make a curve of row[keys...] for each run, or for each worker of a single run that has few."""
    curves: list[Curve] = []
    for index, (label, rows) in enumerate(runs.items()):
        found = [(x(row), value) for row in rows if (value := _look_up(row, keys)) is not None]
        ids = {worker for _, value in found if isinstance(value, Mapping) for worker in value}
        if len(runs) == 1 and 0 < len(ids) <= MOST_LINES:
            for look, worker in enumerate(sorted(ids, key=lambda name: (len(name), name))):
                own = [(at, [value[worker]]) for at, value in found if worker in value]
                curves.append(_curve(f"worker {worker}", look, own, False))
        else:
            each = [(at, list(value.values()) if isinstance(value, Mapping) else [value]) for at, value in found]
            curves.append(_curve(label if len(runs) > 1 else "", index, each, len(ids) > 0))
    return [curve for curve in curves if curve.x.size or curve.left_out]


def _look_up(row: Row, keys: tuple[str, ...]) -> Any:
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _curve(label: str, look: int, found: list[tuple[float, list[Any]]], over_workers: bool) -> Curve:
    points, left_out = [], 0
    for at, values in found:
        finite = [number for value in values if np.isfinite(number := _number(value))]
        left_out += len(values) - len(finite)
        if finite and np.isfinite(at):
            points.append((at, min(finite), float(np.median(finite)), max(finite)))
    x, low, middle, high = np.array(points, dtype=np.float64).reshape(-1, 4).T
    if x.size > MOST_POINTS:
        starts = np.arange(0, x.size, -(-x.size // MOST_POINTS))
        counts = np.diff(starts, append=x.size)
        x, middle = (np.add.reduceat(values, starts) / counts for values in (x, middle))
        low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    return Curve(label, look, x, low, middle, high, over_workers, left_out)


def _plot(title: str, note: str, panels: Sequence[Panel]) -> Plot:
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(wspace=0.04)
        figure = Figure(figsize=(10, HEIGHT), layout=layout, facecolor="white")
        for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
            _draw(axes, panel)
        _add_legend(figure)
    curves = [curve for panel in panels for curve in panel.curves]
    if any(_reach(curve) for curve in curves):
        note += " Pale: every round; strong: running mean."
    if any(curve.over_workers for curve in curves):
        note += " The pale band spans the workers, smallest to largest; the line is their median."
    if left_out := max(sum(curve.left_out for curve in panel.curves) for panel in panels):
        note += f" Left out: {left_out} values that were NaN or infinite."
    return Plot(title, note, figure)


def _reach(curve: Curve) -> int:
    return curve.x.size // (2 * SMOOTHED_PART) if curve.x.size >= FEWEST_TO_SMOOTH else 0


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left")
    pale = 0.3 if len(panel.curves) <= len(DASHES) else 0.12
    for curve in panel.curves:
        colour, dash = COLOURS[curve.look % len(COLOURS)], DASHES[curve.look % len(DASHES)]
        if (curve.low < curve.high).any():
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=pale / 2, linewidth=0)
        elif _reach(curve):
            axes.plot(curve.x, curve.middle, color=colour, alpha=pale, linewidth=0.6)
        strong = running_mean(curve.middle, _reach(curve))
        marker = "o" if curve.x.size < FEWEST_TO_SMOOTH // 2 else ""
        (line,) = axes.plot(curve.x, strong, dash, color=colour, linewidth=1.6, marker=marker, markersize=3)
        line.set_label(_literal(curve.label))
    _scale(axes, panel)


def _scale(axes: Axes, panel: Panel) -> None:
    curves = [curve for curve in panel.curves if curve.x.size]
    if not curves:
        text = "no finite values" if panel.curves else "no values"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center")
        return
    if panel.in_bytes:
        totals = [curve.x[-1] for curve in curves]
        if min(curve.x[0] for curve in curves) > 0 and max(totals) > LOG_BYTES * min(totals):
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    else:
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    if _wants_log([running_mean(curve.middle, _reach(curve)) for curve in curves]):
        axes.set_yscale("log")
        # Plain numbers, not powers set as formulas; minor ticks are labelled only where major ones are few.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    elif panel.from_zero:
        axes.set_ylim(bottom=0)


def _wants_log(curves: Sequence[Floats]) -> bool:
    values = np.concatenate(curves)
    if values.min() <= 0 or values.max() <= LOG_SPREAD * values.min():
        return False
    # A share that rises, such as an accuracy, is read on a linear axis however small it began.
    return bool(values.max() > 1 or any(curve[-1] < curve[0] for curve in curves))


def _add_legend(figure: Figure) -> None:
    lines: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        lines.update(zip(labels, handles, strict=True))
    if len(lines) > 1:
        columns = max(1, min(len(lines), LEGEND_WIDTH // (6 + max(map(len, lines)))))
        # Each further row of names gets its own height, so that the panels keep theirs.
        figure.set_figheight(HEIGHT + 0.2 * (math.ceil(len(lines) / columns) - 1))
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns)


def _literal(text: str) -> str:
    """Keep matplotlib from reading a name as a formula ($) or as hidden from the legend (a leading _)."""
    printable = "".join(char if char.isprintable() else " " for char in text).replace("$", r"\$")
    return f" {printable}" if printable.startswith("_") else printable
