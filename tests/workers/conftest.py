"""Runs in this process, with the server and the sessions in reach of the test."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import deploy.report  # noqa: F401  (imported when a run ends; here its plots are left out)
from deploy import launch
from ps.inline import InlineServer, Order, first_come
from ps.server import Server
from workers import Session

DEFAULTS = {
    "backend": "inline",
    "rounds": 5,
    "workers": {"count": 2},
    "feedback": {"kind": "ef"},
    "uplink": "none",
    "downlink": "none",
    "metrics": {"port": None, "sketch_every": 1},
}


class Inline:
    """Runs a training function; what it leaves is in reach, whether the run failed or not.

    Attributes:
        server: of the last run.
        sessions: of the last run, by worker id.
        rows: of the last run, as in ``metrics.jsonl``.
        order: who takes the next turn, in runs to come.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: Server | None = None
        self.sessions: dict[int, Session] = {}
        self.rows: list[Mapping[str, Any]] = []
        self.order: Order = first_come

    def train(self, train: Callable[[Session], Any], **settings: Any) -> Any:
        """``launch`` with no compression, ``ef`` and two workers where ``settings`` do not say otherwise."""
        self.sessions, self.rows = {}, []

        def watched(session: Session) -> None:
            self.sessions[session._plan.worker] = session
            train(session)

        settings = {**DEFAULTS, "storage": {"dir": self.folder}, **settings}
        return launch(watched, settings, observe=self.rows.append)

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json`` of the last run."""
        summary: dict[str, Any] = json.loads((self.folder / "run" / "summary.json").read_text())
        return summary


@pytest.fixture
def inline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inline:
    """Runs a training function; the report, which has tests of its own and takes a second, is left out."""
    runs = Inline(tmp_path)
    initialise, shell = Server.__init__, InlineServer.__init__

    def observed(server: Server, *given: Any) -> None:
        initialise(server, *given)
        runs.server = server

    def ordered(server: InlineServer, *given: Any) -> None:
        shell(server, *given, order=lambda ready: runs.order(ready))

    monkeypatch.setattr(Server, "__init__", observed)
    monkeypatch.setattr(InlineServer, "__init__", ordered)
    for module in [m for name, m in sys.modules.items() if name.startswith("deploy.") and hasattr(m, "write_report")]:
        monkeypatch.setattr(module, "write_report", lambda paths: None)
    return runs
