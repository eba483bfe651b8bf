"""The tables of a comparison, as text: what the variations reached, and what they took."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from deploy.compare.figures import Comparison, Result, RunFigures, Spread
from deploy.compare.runs import INTERRUPTED, NOT_RUN
from deploy.display import bytes_text, number_text, seconds_text

TEXTS = ("variation", "status")  # columns that are not figures
Column = Callable[[Result], str]  # the cell of a variation


@dataclass(frozen=True)
class Table:
    """Cells of plain text; the first column names the variation."""

    head: list[str]
    rows: list[list[str]]


def tables(comparison: Comparison) -> list[Table]:
    """What the variations reached, and what they took."""
    return [_outcomes(comparison), _costs(comparison)]


def note(comparison: Comparison) -> str:
    """A few sentences on how to read the figures."""
    seeds = comparison.plan.seeds
    many = f"\u00b1 is the sample standard deviation over the seeds {seeds[0]} to {seeds[-1]}."
    parts = [many if len(seeds) > 1 else f"There is one seed, {seeds[0]}, and so no spread."]
    parts.append("Bytes and samples are those of all workers; ratios are dense float32 bytes over bytes sent.")
    if comparison.in_every_round():
        parts.append('"Last 10 %" is the mean over the last tenth of the rounds.')
    if comparison.target is not None:
        parts.append("The target is reached where the mean over a twentieth of a run's reports first reaches it.")
        parts.append("Figures are those of the seeds that reached it; bytes are of both directions.")
    return " ".join(parts)


def markdown(comparison: Comparison) -> str:
    """The tables and the note."""
    parts = [f"# {comparison.plan.name}: comparison"]
    for table in tables(comparison):
        rule = ["---" if name in TEXTS else "---:" for name in table.head]
        lines = [table.head, rule, *table.rows]
        parts.append("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))
    return "\n\n".join([*parts, note(comparison)]) + "\n"


def show(comparison: Comparison, screen: Console) -> None:
    """Print the tables and the note."""
    for table in tables(comparison):
        drawn = RichTable(*table.head, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for column in drawn.columns:
            column.justify, column.no_wrap = ("left", False) if column.header in TEXTS else ("right", True)
            column.overflow, column.vertical = "fold", "bottom"
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        screen.print(drawn)
        screen.print()
    screen.print(Text(note(comparison)), soft_wrap=True)


def spread_text(found: Spread | None) -> str:
    """Mean and deviation, to two digits of the deviation; the mean alone where there is one value."""
    if found is None:
        return ""
    mean, deviation = found.mean, found.deviation
    if deviation is None or not math.isfinite(deviation):
        return number_text(mean)
    digits = 1 - math.floor(math.log10(deviation)) if deviation else None
    if digits is None or digits > 6 or digits < -4:
        return f"{mean:.4g} \u00b1 {deviation:.2g}"
    return f"{mean:,.{max(0, digits)}f} \u00b1 {deviation:,.{max(0, digits)}f}"


def status(result: Result) -> str:
    """Why runs of a variation did not finish; empty if all did."""
    failures = [run.failure for run in result.runs if run.failure not in (None, INTERRUPTED, NOT_RUN)]
    total = len(result.runs)
    parts = [f"{count} of {total} failed: {reason}" for reason, count in Counter(failures).items()]
    if missing := total - len(result.finished) - len(failures):
        parts.append(f"{missing} of {total} not finished")
    return "; ".join(" ".join(part.split()) for part in parts)


def _outcomes(comparison: Comparison) -> Table:
    columns: dict[str, Column] = {}
    for name in comparison.reported():
        if name in comparison.in_every_round():
            columns[f"{name}, last 10 %"] = _reported("last_tenth", name)
        else:
            columns[f"{name}, final"] = _reported("final", name)
    if (target := comparison.target) is not None and target.quantity in comparison.in_rounds():
        sign = "\u2264" if comparison.is_falling else "\u2265"
        text = f"{target.quantity} {sign} {target.value:g}"
        columns[f"rounds to {text}"] = _rounds_to_target
        columns[f"bytes to {text}"] = lambda result: _mean(result, lambda run: _reached(run, "bytes"), bytes_text)
    columns["ratio up"] = lambda result: _mean(result, lambda run: run.values["uplink_ratio"], _times)
    columns["ratio down"] = lambda result: _mean(result, lambda run: run.values["downlink_ratio"], _times)
    if any(map(status, comparison.results)):
        columns["status"] = status
    return _table(comparison, columns)


def _costs(comparison: Comparison) -> Table:
    def mean(key: str, write: Callable[[float], str]) -> Column:
        return lambda result: _mean(result, lambda run: run.values[key], write)

    return _table(
        comparison,
        {
            "rounds": mean("rounds", _whole),
            "samples": mean("samples", _whole),
            "bytes up": mean("uplink_bytes", bytes_text),
            "bytes down": mean("downlink_bytes", bytes_text),
            "up a sample": mean("uplink_bytes_per_sample", bytes_text),
            "down a sample": mean("downlink_bytes_per_sample", bytes_text),
            "time a run": mean("seconds", seconds_text),
        },
    )


def _table(comparison: Comparison, columns: dict[str, Column]) -> Table:
    rows = [[result.variation.label, *(write(result) for write in columns.values())] for result in comparison.results]
    return Table(["variation", *columns], rows)


def _reported(group: str, name: str) -> Column:
    return lambda result: spread_text(result.spread(lambda run: getattr(run, group).get(name)))


def _rounds_to_target(result: Result) -> str:
    found = result.spread(lambda run: _reached(run, "rounds"))
    if not result.finished:
        return ""
    return "not reached" if found is None else f"{spread_text(found)} ({found.count} of {len(result.finished)})"


def _reached(run: RunFigures, key: str) -> float | None:
    return None if run.reached is None else run.reached[key]


def _mean(result: Result, figure: Callable[[RunFigures], float | None], write: Callable[[float], str]) -> str:
    found = result.spread(figure)
    return "" if found is None else write(found.mean) if math.isfinite(found.mean) else "nan"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _times(ratio: float) -> str:
    return f"{ratio:.4g}x"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
