"""Runs in this process, with the server and the sessions in reach of the test."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

import deploy.report  # noqa: F401  (imported when a run ends; here its plots are left out)
from deploy import launch
from deploy.settings import validate
from protocol import Layout
from protocol.compression import Compression
from protocol.layout import Entry
from protocol.sender import Message
from ps.inline import InlineServer, Order, first_come
from ps.server import Server
from workers import Session
from workers.feedback import Round, feedback_for

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


class Lone:
    """One worker's feedback method without model and server: what a test gives it, it stages and commits.

    Attributes:
        version: of the next round.
        spans: the places of the segments in the flat vector.
    """

    def __init__(
        self,
        feedback: dict[str, Any],
        uplink: str,
        shapes: tuple[tuple[int, ...], ...] = ((6, 7), (5,)),
        dtype: str = "float64",
        memory: Any = "float32",
        buffers: int = 0,
        **settings: Any,
    ) -> None:
        send = "gradient" if feedback["kind"] in ("ef21", "ef21_plus", "dgc") else "difference"
        valid = validate({"train": "m:f", "send": send, "feedback": feedback, "uplink": uplink, **settings})
        entries = [Entry(f"w{n}", shape, dtype, "parameter") for n, shape in enumerate(shapes)]
        entries += [Entry("running_mean", (buffers,), dtype, "buffer")] if buffers else []
        self.layout = Layout(tuple(entries), valid.granularity)
        self.spans = [slice(place.start, place.stop) for place in self.layout.segments]
        self._compression = Compression(self.layout, uplink, {}, valid.schedule)
        compressors, device = self._compression.final, torch.device("cpu")
        self.method = feedback_for(valid.feedback, self.layout, compressors, 3, device, memory)
        self.sender = self.method.sender
        self.version = self._sequence = 0

    def stage(self, given: Tensor, weight: float = 1.0, workers: int = 1, skipped: bool = False) -> Message:
        """Stage the update of the next round; ``given`` is not altered."""
        compressors = self._compression.at(self.version)
        at = Round(self.version, self._sequence + 1, weight, workers, skipped, compressors)
        return self.method.stage(given.to(self.layout.dtype, copy=True), at)

    def round(self, given: Tensor, **at: Any) -> Tensor:
        """Stage and commit; what was sent, shape ``(layout.numel,)``."""
        message = self.stage(given, **at)
        self.method.commit()
        self.version, self._sequence = self.version + 1, self._sequence + 1
        return torch.cat([update.dense().to(self.layout.dtype) for update in message.updates])


@pytest.fixture
def lone() -> type[Lone]:
    """The class, so that each test sets up what it needs."""
    return Lone


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


class Clients:
    """Workers with a least-squares problem of their own each, in float64; batches are whole parts: gradients are known.

    Args:
        sizes: samples of each worker.
        numel: parameters; the last is a tensor of its own.

    Attributes:
        w: the replica by version, as every worker saw it at the beginning of its rounds and at the end.
    """

    def __init__(self, sizes: Sequence[int], numel: int = 7) -> None:
        random = torch.Generator().manual_seed(len(sizes))
        draw = partial(torch.randn, generator=random, dtype=torch.float64)
        self.sizes, self.numel = tuple(sizes), numel
        self.x = [draw(n, numel - 1) * (0.5 + k / len(sizes)) for k, n in enumerate(sizes)]  # curvatures differ
        self.y = [draw(n, 1) + 3 * draw(1) for n in sizes]  # and so do the optima
        self.w: dict[int, list[Tensor]] = defaultdict(list)

    def gradient(self, worker: int, at: Tensor) -> Tensor:
        """Of the worker's mean squared error; shape ``(numel,)``."""
        x = torch.cat([self.x[worker], torch.ones(self.sizes[worker], 1, dtype=torch.float64)], 1)
        return 2 / self.sizes[worker] * x.T @ (x @ at - self.y[worker][:, 0])

    def optimum(self, weights: Mapping[int, float]) -> Tensor:
        """Of the weighted sum of the workers' errors."""
        eye = torch.eye(self.numel, dtype=torch.float64)
        zero = torch.zeros(self.numel, dtype=torch.float64)
        at_zero = sum(a * self.gradient(k, zero) for k, a in weights.items())
        curvature = sum(
            a * torch.stack([self.gradient(k, row) - self.gradient(k, zero) for row in eye]) for k, a in weights.items()
        )
        return torch.linalg.solve(curvature, -at_zero)

    def shares(self, workers: Iterable[int]) -> dict[int, float]:
        """FedAvg's weights of these workers."""
        workers = tuple(workers)
        return {k: self.sizes[k] / sum(self.sizes[j] for j in workers) for k in workers}

    def train(
        self,
        lr: float = 0.05,
        samples: Sequence[int | None] | None = None,
        each: Callable[[Session, nn.Module], Any] = lambda session, model: None,
        make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    ) -> Callable[[Session], None]:
        """A training function; ``each`` is called before every step, and ends it for the worker if it returns True."""

        def train(session: Session) -> None:
            k = session.worker
            model = nn.Linear(self.numel - 1, 1, dtype=torch.float64)
            nn.init.zeros_(model.weight)
            nn.init.zeros_(model.bias)
            optimizer = make(model.parameters(), lr=lr)
            session.prepare(model, optimizer, samples=(samples or self.sizes)[k])
            for x, y in session.batches(TensorDataset(self.x[k], self.y[k]), self.sizes[k], shared=False):
                self.w[session.version].append(session._rounds.replica.w.clone())
                if each(session, model):
                    return
                optimizer.zero_grad()
                mse_loss(model(x), y).backward()
                optimizer.step()
            self.w[session.version].append(session._rounds.replica.w.clone())

        return train

    def replicas(self) -> list[Tensor]:
        """``w`` of versions 0, 1, ..., of which all who saw it saw the same bits."""
        for seen in self.w.values():
            assert all(torch.equal(seen[0], other) for other in seen)
        return [self.w[version][0] for version in range(max(self.w) + 1)]


@pytest.fixture
def clients() -> type[Clients]:
    """See ``Clients``."""
    return Clients
