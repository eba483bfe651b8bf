"""A budget of bytes in a run: it is kept, everyone uses the announced ratios, and errors are less than without."""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from protocol.compression import ratio_of
from protocol.errors import RunStopped
from ps.inline import InlineTransport
from workers import Session

K, ROUNDS = 2, 24
DATA = TensorDataset(
    torch.randn(90, 40, generator=torch.Generator().manual_seed(1)),
    torch.randn(90, 20, generator=torch.Generator().manual_seed(2)),
)


class Scaled(nn.Module):
    """Layers whose gradients are of very different size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second, self.third = (nn.Linear(40, 20 * n) for n in (1, 2, 3))

    def forward(self, x):
        second, third = self.second(x).view(-1, 2, 20).sum(1), self.third(x).view(-1, 3, 20).sum(1)
        return self.first(x) + 0.05 * torch.tanh(second) + 0.002 * torch.tanh(third)


def loop(session, each=None):
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session.prepare(model, optimizer)
    for x, y in session.batches(DATA, 8):
        if each:
            each(session)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()


def pushes(inline):
    """Mean bytes of a push, by round; frames on the way up are pushes."""
    total = [row["uplink_bytes"] for row in inline.rows]
    return np.diff(total) / K


@pytest.mark.parametrize(
    ("kind", "budget", "every"), [("ef", 700, 1), ("ef", 1800, 4), ("none", 1800, 1), ("saef", 700, 4)]
)
def test_the_bytes_of_a_push_come_to_the_budget_on_average(inline, budget, every, kind):
    settings = {"feedback": {"kind": kind}, "uplink": "topk:0.02+int4", "downlink": "topk:0.1"}
    metrics = {"port": None, "sketch_every": every}
    inline.train(loop, rounds=4 * every + 20, budget={"bytes": budget}, metrics=metrics, **settings)
    assert np.mean(pushes(inline)[-16:]) == pytest.approx(budget, rel=0.05)


@pytest.mark.parametrize("kind", ["ef", "none"])
def test_at_equal_bytes_the_squared_errors_are_less_than_at_the_same_ratio_for_all(inline, kind):
    """Without error feedback the error is what was discarded."""

    def errors():
        left = [row["worker_error_norm"] for row in inline.rows[-8:]]
        contraction = [row["contraction"]["up"] for row in inline.rows[-8:]]
        before = [row["update_norm"]["before"] for row in inline.rows[-8:]]
        if kind == "ef":
            return sum(norm**2 for each in left for norm in each.values())
        pairs = [(c[w], b[w]) for c, b in zip(contraction, before, strict=True) for w in c]
        return sum(share * norm**2 for share, norm in pairs)

    settings = {"feedback": {"kind": kind}, "downlink": "none", "rounds": ROUNDS}
    settings["metrics"] = {"port": None, "sketch_every": 4}
    inline.train(loop, uplink="topk:0.05", **settings)
    uniform, size = errors(), np.mean(pushes(inline)[-8:])
    inline.train(loop, uplink="topk:0.05", budget={"bytes": round(size)}, **settings)
    assert np.mean(pushes(inline)[-8:]) < 1.03 * size
    assert errors() < 0.75 * uniform


def used(session):
    """The ratios by which this worker compresses now."""
    rounds = session._rounds
    return tuple(ratio_of(one) for one in rounds._compression.at(rounds.version, rounds._ratios))


def test_announced_ratios_hold_from_their_version_on_for_all_workers_and_joiners(inline):
    seen, late = defaultdict(dict), []

    def each(session):
        seen[session.version][session._plan.worker] = used(session)
        if session._plan.worker == 0 and session.version == 9 and not late:
            late.append(join(session, lambda joiner: loop(joiner, each)))

    settings = {
        "uplink": "topk:0.02",
        "downlink": "topk:0.1",
        "budget": {"bytes": 900, "smallest": 0.01, "largest": 0.3},
    }
    inline.train(loop_with(each), rounds=ROUNDS, metrics={"port": None, "sketch_every": 3}, **settings)
    late[0].join(10)
    assert {worker for each in seen.values() for worker in each} == {0, 1, 7}
    assert min(version for version, each in seen.items() if 7 in each) in (10, 11)  # not at an announcement
    for version in range(ROUNDS):
        assert len(set(seen[version].values())) == 1, version
        changed = version > 0 and seen[version][0] != seen[version - 1][0]
        assert changed == (version % 3 == 1)  # the round after the energies
    every = [ratio for each in seen.values() for ratio in each[0]]
    assert 0.01 <= min(every) < 0.02 < max(every) <= 0.3
    assert inline.summary["rejected"] == {}


def loop_with(each):
    return lambda session: loop(session, each)


def join(session, train, worker=7):
    """Another worker that joins now, in a thread that waits for its turns like the others."""
    shell = session._transport._server
    shell._turn[worker] = threading.Event()
    shell._ready.append(worker)
    plan = replace(session._plan, worker=worker, founder=False)

    def run():
        shell.enter(worker)
        with suppress(RunStopped):  # nobody waits for its end
            train(Session(plan, InlineTransport(shell, worker), session.device))
            shell.exit(worker)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
