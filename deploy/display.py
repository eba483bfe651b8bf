"""What a run shows while it trains: a live display on a terminal, complete plain lines anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

REFRESHES_PER_SECOND = 8
PLAIN_LINES_A_RUN = 10
PLAIN_SECONDS_APART = 1.0
RATE_WINDOW_SECONDS = 30

# What a run directory may hold, in the order in which a reader wants it.
RUN_FILES = {
    "report.html": "plots and figures, for a browser",
    "model.safetensors": "the trained model",
    "summary.json": "the figures above",
    "metrics.jsonl": "one line a round",
    "config.yaml": "the resolved settings",
}


def number_text(value: Any) -> str:
    """Write a number with four significant digits; whole numbers in full, anything else as it prints."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def bytes_text(count: float) -> str:
    """Write a count of bytes in decimal units (1 kB = 1000 B)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if abs(count) < 999.5 else f"{count:,.0f} {unit}"


def seconds_text(seconds: float) -> str:
    """Write a duration given in seconds, in the two largest units that it fills."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def worker_mean(norms: Any) -> float | None:
    """Average a norm over workers; `norms` is a number or a mapping from worker id to number."""
    values = list(norms.values()) if isinstance(norms, Mapping) else [norms]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if numbers else None


class Display:
    """Shows a run of `rounds` rounds called `name` on `stream` (default: standard output).

    Use it as a context manager. `update` only remembers the row, so it may be called at any rate: a terminal
    is redrawn at most `REFRESHES_PER_SECOND` times a second, by rich's own thread. Elsewhere a line without
    escape codes is written about every tenth of the rounds, at most one a second apart from the first and the
    last. `clock` gives seconds; it decides only when lines are written and how the elapsed time ticks.
    """

    def __init__(
        self,
        rounds: int,
        name: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rounds = rounds
        self._name = _one_line(name)
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._console = Console(file=self._stream, highlight=False)
        self._row: Mapping[str, Any] = {}
        self._reported: dict[str, Any] = {}
        self._marks: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW_SECONDS)
        self._started = self._updated = clock()
        self._line_written = -math.inf
        self._next_line_version = 0
        # The environment can tell rich to colour a pipe; a log file must never get escape codes, so ask both.
        is_terminal = self._stream.isatty() and self._console.is_terminal
        is_drawn = is_terminal and not self._console.is_dumb_terminal
        # Last, since rich asks at once for what there is to draw.
        self._live = self._new_live() if is_drawn else None

    def __enter__(self) -> Display:
        self._started = self._updated = self._clock()
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Take in one row of metrics.jsonl; every key may be missing."""
        self._row = row
        self._updated = self._clock()
        # What is reported in some rounds only stays on show until it is reported again; a new dict, since the
        # drawing thread may be reading the old one.
        self._reported = {**self._reported, **(row.get("reported") or {})}
        version, seconds = self._version(), float(row.get("seconds") or 0.0)
        if not self._marks or seconds >= self._marks[-1][0] + 1.0:
            self._marks.append((seconds, version))
        if self._live is None:
            self._write_line_if_due(version)

    def message(self, text: str) -> None:
        """Show a one-line notice; on a terminal it stays above the progress bar."""
        if self._live is None:
            self._write(f"{self._name}: {_one_line(text)}")
        else:
            self._console.print(Text(_one_line(text)))

    def finish(self, summary: Mapping[str, Any], path: Path) -> None:
        """Show the outcome from summary.json's content and name the files that run directory `path` holds."""
        self._stop()
        lines = summary_lines(self._name, summary, path)
        if self._live is None:
            for line in lines:
                self._write(line)
        else:
            self._console.print(Text("\n".join(_one_line(line) for line in lines)), soft_wrap=True)

    def _new_live(self) -> Live:
        return Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=REFRESHES_PER_SECOND,
            # What is printed meanwhile moves above the bar, unless it was going somewhere else, as to a file.
            redirect_stdout=self._stream is sys.stdout,
            redirect_stderr=sys.stderr.isatty(),
        )

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _version(self) -> int:
        return int(self._row.get("version") or 0)

    def _rounds_per_second(self) -> float | None:
        """Rounds a second over about the last `RATE_WINDOW_SECONDS` of training; None while unknown."""
        if not self._marks:
            return None
        seconds, version = self._marks[0]
        elapsed = float(self._row.get("seconds") or 0.0) - seconds
        done = self._version() - version
        return done / elapsed if elapsed > 0 and done > 0 else None

    def _seconds_left(self) -> float | None:
        rate = self._rounds_per_second()
        if rate is None:
            return None
        return max(0.0, (self._rounds - self._version()) / rate - (self._clock() - self._updated))

    def _facts(self) -> list[tuple[str, str]]:
        """Pairs of a name and a value to show, without those that the row lacks."""
        row = self._row
        values = {
            "up": row.get("uplink_ratio"),
            "down": row.get("downlink_ratio"),
            "worker residual": worker_mean(row.get("worker_error_norm")),
            "server residual": row.get("server_error_norm"),
            "workers": row.get("workers"),
            "rounds/s": self._rounds_per_second(),
        }
        suffix = {"up": "x", "down": "x"}
        shown = [(_one_line(str(name)), number_text(value)) for name, value in self._reported.items()]
        return shown + [
            (name, f"{number_text(value)}{suffix.get(name, '')}") for name, value in values.items() if value is not None
        ]

    def _write_line_if_due(self, version: int) -> None:
        now = self._clock()
        is_due = version >= self._next_line_version and now >= self._line_written + PLAIN_SECONDS_APART
        if not is_due and version < self._rounds:
            return
        step = max(1, math.ceil(self._rounds / PLAIN_LINES_A_RUN))
        self._line_written, self._next_line_version = now, (version // step + 1) * step
        parts = [f"round {version}/{self._rounds}", seconds_text(float(self._row.get("seconds") or 0.0))]
        parts += [f"{name} {value}" for name, value in self._facts()]
        left = self._seconds_left()
        if left is not None and version < self._rounds:
            parts.append(f"{seconds_text(left)} left")
        self._write(f"{self._name}: {', '.join(parts)}")

    def _write(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        safe = _one_line(line).encode(encoding, "replace").decode(encoding)
        self._stream.write(safe + "\n")
        self._stream.flush()

    def _render(self) -> RenderableType:
        version = self._version()
        left = self._seconds_left()
        times = [f"{seconds_text(self._clock() - self._started)} elapsed"]
        if left is not None and version < self._rounds:
            times.append(f"{seconds_text(left)} left")
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True, max_width=30)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_column(no_wrap=True)
        bar = ProgressBar(total=max(1, self._rounds), completed=min(version, self._rounds))
        head.add_row(Text(self._name, style="bold"), bar, Text(f"{version}/{self._rounds}"), Text(", ".join(times)))
        # No-break spaces keep a name and its value on one line of a narrow terminal.
        facts = Text("   ").join(
            Text.assemble((name.replace(" ", "\u00a0"), "dim"), "\u00a0", (value, "bold"))
            for name, value in self._facts()
        )
        return Group(head, facts)


def summary_lines(name: str, summary: Mapping[str, Any], path: Path) -> list[str]:
    """Write the outcome of a run as aligned lines; names only those files of `path` that are there."""
    facts = [(str(key), number_text(value)) for key, value in (summary.get("reported") or {}).items()]
    for way in ("up", "down"):
        count, ratio = summary.get(f"{way}link_bytes"), summary.get(f"{way}link_ratio")
        if count is not None:
            compressed = "" if ratio is None else f", compressed {number_text(ratio)}x"
            facts.append((f"sent {way}", bytes_text(count) + compressed))
    if (error := summary.get("conservation_error")) is not None:
        facts.append(("conservation error", f"{number_text(error)} (at most 4 is sound)"))
    if summary.get("fingerprint"):
        facts.append(("fingerprint", str(summary["fingerprint"])))
    facts.append(("run directory", str(path)))
    files = [(file, meaning) for file, meaning in RUN_FILES.items() if (path / file).exists()]
    head = f"{name}: {summary.get('status', 'finished')} after {_counted(summary.get('rounds', 0), 'round')}"
    if summary.get("workers") is not None:
        head += f" with {_counted(summary['workers'], 'worker')}"
    if summary.get("seconds") is not None:
        head += f" in {seconds_text(summary['seconds'])}"
    return [head, *_aligned(facts, indent="  "), *_aligned(files, indent="    ")]


def _counted(count: int, thing: str) -> str:
    return f"{number_text(count)} {thing}{'' if count == 1 else 's'}"


def _aligned(pairs: list[tuple[str, str]], indent: str) -> list[str]:
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"{indent}{name:<{width}}  {value}" for name, value in pairs]


def _one_line(text: str) -> str:
    """Replace what could move the cursor or break the line: control characters and line ends."""
    return "".join(char if char.isprintable() else " " for char in text)
