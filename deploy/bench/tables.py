"""Tables and goals as they are printed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 120  # of a file or a pipe, where there is no terminal to ask


def console(width: int = WIDTH) -> Console:
    """Standard output; no escape codes, and ``width`` columns, unless it is a terminal."""
    is_terminal = sys.stdout.isatty()  # asked here, since the environment can tell rich to colour a pipe
    columns = None if is_terminal else width
    return Console(highlight=False, markup=False, force_terminal=is_terminal, width=columns)


def show(screen: Console, columns: Sequence[str], *sections: Sequence[Sequence[str]]) -> None:
    """Print a table of sections of rows: the first column is text, the others are numbers."""
    drawn = Table(*columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in drawn.columns[1:]:
        column.justify = "right"
    for column in drawn.columns:
        column.no_wrap = True
        column.vertical = "bottom"
    for rows in sections:
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        drawn.add_section()
    screen.print(drawn)
    screen.print()


@dataclass(frozen=True)
class Goal:
    """A figure and its bound."""

    what: str
    figure: float
    bound: float
    unit: str
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether the figure keeps to the bound."""
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound

    def line(self) -> str:
        """One line for a reader."""
        bound = f"{'at least' if self.at_least else 'at most'} {self.bound:g}{self.unit}"
        return f"{'reached' if self.reached else 'MISSED '}  {self.what}: {self.figure:.5g}{self.unit} ({bound})"

    def record(self) -> dict[str, Any]:
        """For the file."""
        return {**self.__dict__, "reached": self.reached}


def show_goals(screen: Console, goals: Sequence[Goal], stated_for: str) -> None:
    """One line a goal, or why there is none."""
    screen.print(
        f"goals, stated for {stated_for}:" if goals else f"goals are stated for {stated_for}, not for this run"
    )
    for goal in goals:
        screen.print(f"  {goal.line()}", style=None if goal.reached else "bold")
    screen.print()
