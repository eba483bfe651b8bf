"""``granularity: model``: all parameters are compressed as one vector, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

DATA = TensorDataset(
    torch.randn(48, 6, generator=torch.Generator().manual_seed(1)),
    torch.randn(48, 2, generator=torch.Generator().manual_seed(2)),
)
GRADIENT = ("ef21", "ef21_plus", "dgc")


def run(inline, rounds=6, **settings):
    """Where the replica is after every round, buffers included; and the parameters' share of the flat vector."""
    seen = []

    def train(session):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))
        groups = [{"params": model[0].parameters()}, {"params": [*model[1].parameters(), *model[2].parameters()]}]
        groups[1]["lr"] = 0.02
        optimizer = torch.optim.SGD(groups, lr=0.1)
        session.prepare(model, optimizer)
        for x, y in session.batches(DATA, 8):
            if session.rank == 0:
                seen.append(session._rounds.replica.w.clone())
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
        if session.rank == 0:
            seen.append(session._rounds.replica.w.clone())

    result = inline.train(train, rounds=rounds, **settings)
    return torch.stack(seen), inline.server.state.layout.trainable, result


@pytest.mark.parametrize("send", ["difference", "gradient"])
def test_without_compression_it_changes_no_bit(inline, send):
    layer, _, _ = run(inline, send=send)
    model, _, result = run(inline, send=send, granularity="model")
    assert torch.equal(layer, model)
    assert not torch.equal(model[0], model[-1])
    assert result.load_model()["2.weight"].shape == (2, 7)


@pytest.mark.parametrize("kind", ["none", "ef", "ef_momentum", *GRADIENT])
def test_what_is_sent_is_the_largest_of_the_whole_model(inline, kind):
    send = "gradient" if kind in GRADIENT else "difference"
    settings = {"feedback": {"kind": kind}, "send": send, "workers": {"count": 1}, "rounds": 1}
    dense, trained, _ = run(inline, **settings | {"feedback": {"kind": "ef"}})
    largest = (dense[1] - dense[0])[:trained].abs().topk(round(0.1 * trained)).indices
    model, _, _ = run(inline, uplink="topk:0.1", granularity="model", **settings)
    moved = (model[1] - model[0])[:trained].nonzero()[:, 0]
    assert moved.numel() == largest.numel()
    if send == "difference":  # else the server steps by learning rates of its own
        assert torch.equal(moved, largest.sort().values)
    layer, _, _ = run(inline, uplink="topk:0.1", **settings)
    assert (layer[1] - layer[0])[:trained].count_nonzero() > largest.numel()  # one at least of every layer


@pytest.mark.parametrize("kind", ["ef", "saef", "ef_momentum", *GRADIENT])
def test_a_run_with_it_balances(inline, kind):
    send = "gradient" if kind in GRADIENT else "difference"
    lossy = {"uplink": "topk:0.1+int4", "downlink": "topk:0.2+int4", "overrides": {"*running*": "f32"}}
    run(inline, rounds=12, feedback={"kind": kind}, send=send, granularity="model", **lossy)
    assert inline.summary["conservation_error"] <= 4
    assert inline.summary["worker_error_norm"] > 0
    assert len(inline.server.state.layout.segments) == 3  # parameters, mean and variance
