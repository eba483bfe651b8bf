"""Replicas are equal bit for bit, a seed fixes a run, and a replica that differs is noticed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from protocol.errors import RunFailed

DATA = TensorDataset(
    torch.randn(60, 8, generator=torch.Generator().manual_seed(1)),
    torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(2)),
)
LOSSY = {"uplink": "topk:0.1+int4", "downlink": "topk:0.1+int4"}
RUNS = {
    "no compression": {},
    "ef": LOSSY,
    "saef": {**LOSSY, "feedback": {"kind": "saef"}},
    "saef with averaging": {**LOSSY, "feedback": {"kind": "saef", "average_every": 2}},
    "sign without feedback": {"uplink": "sign", "downlink": "sign", "feedback": {"kind": "none"}},
    "gradients": {**LOSSY, "send": "gradient"},
}


def train(session, each=None, fixed=False):
    if fixed:
        torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.prepare(model, optimizer)
    for x, y in session.batches(DATA, 5):
        if each is not None:
            each(session)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    if each is not None:
        each(session)


@pytest.mark.parametrize("name", RUNS)
def test_all_replicas_are_equal_bit_for_bit_after_every_round(inline, name):
    seen = {}

    def each(session):
        w = session._rounds.replica.w
        assert torch.equal(w.view(torch.int32), inline.server.state.w.view(torch.int32))
        seen.setdefault(session.version, []).append(session.fingerprint())

    result = inline.train(partial(train, each=each), rounds=8, workers={"count": 3}, **RUNS[name])
    assert {version: len(prints) for version, prints in seen.items()} == dict.fromkeys(range(9), 3)
    assert all(len(set(prints)) == 1 for prints in seen.values())
    assert len({prints[0] for prints in seen.values()}) == 9  # and each version is another model
    assert result.summary["fingerprint"] == seen[8][0]
    assert result.summary["replica_mismatches"] == 0


@pytest.mark.parametrize("name", RUNS)
def test_the_seed_fixes_the_fingerprint(inline, name):
    def fingerprint(seed, **options):
        return inline.train(partial(train, **options), workers={"count": 3}, seed=seed, **RUNS[name]).summary[
            "fingerprint"
        ]

    first = fingerprint(5)
    assert fingerprint(5) == first
    assert fingerprint(6) != first
    assert fingerprint(5, fixed=True) != fingerprint(6, fixed=True)  # the same model, other batches and noise


@pytest.mark.parametrize("place", [0, 150, -1])  # a weight, a scale of the norm, a running variance
@pytest.mark.parametrize("worker", [0, 1, 2])
def test_one_flipped_bit_of_a_replica_is_refused_and_fails_the_run(inline, worker, place):
    def flip(session):
        if (session.version, session._plan.worker) == (3, worker):
            session._rounds.replica.w.view(torch.int32)[place] ^= 1

    with pytest.raises(RunFailed, match=f"^the replica of worker {worker} differs from the server's at version 3$"):
        inline.train(partial(train, each=flip), workers={"count": 3}, **RUNS["saef"])
    assert inline.summary["status"] == "failed"
    assert inline.summary["rounds"] == 3
    assert inline.summary["rejected"] == {"replica": 1}
    assert inline.summary["replica_mismatches"] == 1


def test_a_flipped_bit_is_noticed_at_the_next_check_or_at_the_end(inline):
    def flip(session):
        if (session.version, session.rank) == (2, 1):
            session._rounds.replica.w.view(torch.int32)[0] ^= 1

    def run(every):
        metrics = {"port": None, "sketch_every": every}
        inline.train(partial(train, each=flip), workers={"count": 3}, rounds=8, metrics=metrics, **RUNS["ef"])

    with pytest.raises(RunFailed, match="the replica of worker 1 differs from the server's at version 5"):
        run(every=5)
    assert inline.summary["replica_mismatches"] == 1
    with pytest.raises(RunFailed, match="the workers' replicas differ at the end"):
        run(every=100)
    assert inline.summary["status"] == "failed"
