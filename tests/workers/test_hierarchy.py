"""Whole runs with relays: two tiers of residuals, and the same model as the laws demand."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ps.aggregate import Total
from ps.relay import Relay

INPUTS = torch.randn(96, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = TensorDataset(INPUTS, INPUTS @ torch.linspace(-2, 2, 40, dtype=torch.float64).unsqueeze(1))


def train(session):
    torch.manual_seed(0)
    model = nn.Linear(40, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session.prepare(model, optimizer)
    for x, y in session.batches(TARGETS, batch_size=8):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        session.report(loss=loss)


@pytest.fixture
def relays(monkeypatch):
    """The relays of the last run."""
    found = []
    initialise = Relay.__init__

    def observed(relay, plan):
        initialise(relay, plan)
        found.append(relay)

    monkeypatch.setattr(Relay, "__init__", observed)
    return found


TWO = {"rounds": 30, "workers": {"count": 4}, "relays": {"count": 2, "uplink": "topk:0.2"}, "uplink": "topk:0.5+int8"}


@pytest.mark.parametrize("feedback", [{"kind": "ef"}, {"kind": "saef"}, {"kind": "saef", "average_every": 3}])
def test_the_true_model_moves_by_what_the_workers_computed_through_both_tiers(inline, relays, feedback):
    """``w - (e + e_r + sum_k e_k)`` after the run is the start less all that was given, which both ledgers know."""
    inline.train(train, feedback=feedback, downlink="topk:0.3", **TWO)
    workers = [session._rounds.method.sender for session in inline.sessions.values()]
    tiers = [relay.sender for relay in relays]
    senders = [*workers, *tiers, inline.server.state.sender]
    assert all(float(sender.residual.norm()) > 1e-8 for sender in senders)
    assert max(sender.conservation_error() for sender in senders) <= 4
    rows = inline.rows[-1]
    assert rows["relay_error_norm"] == {
        str(relay.plan.relay): pytest.approx(relay.sender.error_norm(), rel=1e-6) for relay in relays
    }
    assert len({session.fingerprint() for session in inline.sessions.values()}) == 1


def test_without_compression_relays_change_the_model_by_rounding_alone(inline):
    """Adding up in groups first is another order of additions, and nothing else."""
    models = []
    for count in (0, 2, 3):
        inline.train(train, **{**TWO, "uplink": "none", "relays": {"count": count, "uplink": "none"}})
        models.append(inline.server.state.w.clone())
    assert torch.allclose(models[0], models[1], rtol=0, atol=1e-13)
    assert torch.allclose(models[0], models[2], rtol=0, atol=1e-13)


def test_the_relays_residual_is_what_lets_hard_compression_converge(inline, monkeypatch):
    """The same run with a relay that forgets what it did not send stays far behind."""
    hard = {**TWO, "rounds": 250, "relays": {"count": 2, "uplink": "topk:0.05"}}
    inline.train(train, **hard)
    with_residual = inline.summary["reported"]["loss"]
    fold = Total.fold

    def forgetful(total, *arguments):
        for relay in forgotten:
            relay.sender.residual.zero_()
        return fold(total, *arguments)

    forgotten = []
    initialise = Relay.__init__
    monkeypatch.setattr(Relay, "__init__", lambda relay, plan: (initialise(relay, plan), forgotten.append(relay))[0])
    monkeypatch.setattr(Total, "fold", forgetful)
    inline.train(train, **hard)
    assert inline.summary["conservation_error"] <= 4, "the server's and the workers' ledgers know nothing of it"
    assert inline.summary["reported"]["loss"] > 10 * with_residual


def test_the_outer_link_carries_one_message_a_group_and_the_inner_bytes_are_reported_apart(inline):
    inline.train(train, **{**TWO, "uplink": "none", "relays": {"count": 2, "uplink": "topk:0.2"}})
    summary = inline.summary
    assert summary["group_uplink_bytes"] > 30 * 4 * 8 * 41
    assert summary["uplink_bytes"] < summary["group_uplink_bytes"]
    assert summary["group_downlink_bytes"] == pytest.approx(2 * summary["downlink_bytes"], rel=1e-9)
    assert inline.server.vitals.dense["uplink"] == 30 * 2 * 4 * 41
