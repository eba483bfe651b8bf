"""The figures of a report, drawn from the rows of metrics.jsonl."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator, NullLocator

from deploy.curves import FEWEST_TO_SMOOTH, Curve, Floats, Runs, curves, quantities, running_mean, wire_bytes

# Okabe and Ito's colours, apart for every common colour blindness; without yellow, which is faint on white.
# Dashes differ too, so that a curve shows through another that covers it.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("-", "--", "-.", ":")
LOG_SPREAD = 100  # values that span more than this factor are read on a logarithmic axis
LOG_BYTES = 8  # as are the bytes of runs whose totals differ by more than this factor
HEIGHT = 3.5  # inches, of a row of panels 10 inches wide
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
    """A figure, with its title and a sentence or two on what its lines are."""

    title: str
    note: str
    figure: Figure


@dataclass(frozen=True)
class Panel:
    """Half a plot: what to draw and how its axes read."""

    title: str
    curves: Sequence[Curve]
    from_zero: bool = True
    axis: Literal["rounds", "bytes", "runs"] = "rounds"  # what x counts
    x_label: str = ""
    y_label: str = ""
    has_dots: bool = False  # each point is a run of its own: no line joins them


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
        halves = [Panel(name, curves(runs, keys), x_label="round") for name, keys in panels.items()]
        if any(half.curves for half in halves):
            drawn.append(plot(title, note, halves))
    return drawn


def reported_plot(runs: Runs, quantity: str) -> Plot:
    """Draw a reported quantity against rounds and against the bytes that both directions had sent by then."""
    keys = ("reported", quantity)
    panels = [
        Panel("against rounds", curves(runs, keys), from_zero=False, x_label="round"),
        Panel("against bytes sent, both ways", curves(runs, keys, wire_bytes), from_zero=False, axis="bytes"),
    ]
    return plot(quantity, "Mean over the workers, weighted by their samples.", panels)


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


def _save(figure: Figure, target: Any, **options: Any) -> None:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A run may be named in a script that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, **options)


def _prefix_ids(tag: str, prefix: str) -> str:
    tag = re.sub(r'(\sid=")', rf"\1{prefix}-", tag)
    return re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", tag)


def plot(title: str, note: str, *rows: Sequence[Panel]) -> Plot:
    """Draw rows of panels, each row as long as the first, and add to `note` what their lines and bands are."""
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(wspace=0.04, hspace=0.04)
        figure = Figure(figsize=(10, HEIGHT * len(rows)), layout=layout, facecolor="white")
        for places, row in zip(figure.subplots(len(rows), len(rows[0]), squeeze=False), rows, strict=True):
            for axes, panel in zip(places, row, strict=True):
                _draw(axes, panel)
        _add_legend(figure)
    drawn = [curve for row in rows for panel in row for curve in panel.curves]
    if any(curve.reach for curve in drawn):
        note += " Pale: every round; strong: running mean."
    if any(curve.over == "workers" for curve in drawn):
        note += " The pale band spans the workers, smallest to largest; the line is their median."
    if left_out := max(sum(curve.left_out for curve in panel.curves) for row in rows for panel in row):
        note += f" Left out: {left_out} values that were NaN or infinite."
    return Plot(title, note, figure)


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_title(_literal(panel.title), loc="left")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(_literal(panel.y_label))
    pale = 0.3 if len(panel.curves) <= len(DASHES) else 0.12
    for curve in panel.curves:
        colour, dash = COLOURS[curve.look % len(COLOURS)], DASHES[curve.look % len(DASHES)]
        if (curve.low < curve.high).any():
            # Seeds' bands are of running means, so they hide less of each other than those of every round.
            alpha = 0.15 if curve.over == "seeds" else pale / 2
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=alpha, linewidth=0)
        elif curve.reach:
            axes.plot(curve.x, curve.middle, color=colour, alpha=pale, linewidth=0.6)
        strong = running_mean(curve.middle, curve.reach)
        if panel.has_dots:
            (line,) = axes.plot(curve.x, strong, "o", color=colour, markersize=5, alpha=0.8, markeredgewidth=0)
        else:
            marker = "o" if curve.x.size < FEWEST_TO_SMOOTH // 2 else ""
            (line,) = axes.plot(curve.x, strong, dash, color=colour, linewidth=1.6, marker=marker, markersize=3)
        line.set_label(_literal(curve.label))
    _scale(axes, panel)


def _scale(axes: Axes, panel: Panel) -> None:
    drawn = [curve for curve in panel.curves if curve.x.size]
    if not drawn:
        text = "no finite values" if panel.curves else "no values"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center")
        return
    if panel.axis == "bytes":
        totals = [curve.x[-1] for curve in drawn]
        if min(curve.x[0] for curve in drawn) > 0 and max(totals) > LOG_BYTES * min(totals):
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    elif panel.axis == "runs":
        axes.xaxis.set_major_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    if _wants_log([running_mean(curve.middle, curve.reach) for curve in drawn]):
        axes.set_yscale("log")
        # Plain numbers, not powers set as formulas; minor ticks are labelled only where major ones are few.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    elif panel.from_zero:
        axes.set_ylim(bottom=0)


def _wants_log(lines: Sequence[Floats]) -> bool:
    values = np.concatenate(lines)
    if values.min() <= 0 or values.max() <= LOG_SPREAD * values.min():
        return False
    # A share that rises, such as an accuracy, is read on a linear axis however small it began.
    return bool(values.max() > 1 or any(line[-1] < line[0] for line in lines))


def _add_legend(figure: Figure) -> None:
    lines: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, handle)
    if len(lines) > 1:
        rows = math.ceil(len(lines) / max(1, LEGEND_WIDTH // (6 + max(map(len, lines)))))
        # Each further row of names gets its own height, so that the panels keep theirs.
        figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=math.ceil(len(lines) / rows))


def _literal(text: str) -> str:
    """Keep matplotlib from reading a name as a formula ($) or as hidden from the legend (a leading _)."""
    printable = "".join(char if char.isprintable() else " " for char in text).replace("$", r"\$")
    return f" {printable}" if printable.startswith("_") else printable
