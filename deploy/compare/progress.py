"""What a comparison shows while it runs: a line for every run that has ended, and on a terminal a bar below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from deploy.compare.runs import Failure
from deploy.display import number_text, seconds_text
from deploy.settings import RunSettings


class Shown:
    """Use it as a context manager; ``advanced`` and ``ended`` are those of ``Runs``."""

    def __init__(self, screen: Console, todo: Sequence[RunSettings]) -> None:
        self._screen = screen
        self._done, self._total = 0, len(todo)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,}/{task.total:,} rounds"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=screen,
            expand=True,
            disable=not screen.is_terminal or screen.is_dumb_terminal,
        )
        self._task = self._progress.add_task(self._title(), total=sum(settings.rounds for settings in todo))

    def __enter__(self) -> Shown:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advanced(self, rounds: int) -> None:
        """Move the bar."""
        self._progress.advance(self._task, rounds)

    def ended(self, name: str, failure: Failure, summary: Mapping[str, Any]) -> None:
        """Say how a run ended; ``summary`` is that of its run directory."""
        self._done += 1
        if failure is None:
            facts = [f"{key} {number_text(value)}" for key, value in summary.get("reported", {}).items()]
            outcome = ", ".join([f"finished in {seconds_text(summary.get('seconds', 0.0))}", *facts])
        else:
            outcome = f"did not finish: {failure}"
        self.say(f"{self._done}/{self._total} {name} {outcome}")
        self._progress.update(self._task, description=self._title())

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        line = "".join(char if char.isprintable() else " " for char in text)
        self._screen.print(Text(line), soft_wrap=True)

    def _title(self) -> str:
        return f"{self._done}/{self._total} runs"
