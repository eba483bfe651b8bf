"""The gradient mismatch in the rows of a run, against the exact norms of the residuals that the sessions hold."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

K, ROUNDS = 3, 8
SAMPLES = (10, 20, 50)  # of each worker: weights of 1/8, 1/4, 5/8


def run(inline, hidden, **settings):
    """By round: the server's residual, those of the workers, and the weights that are applied."""
    server, workers, weights = {}, defaultdict(dict), defaultdict(dict)
    random = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(80, 12, generator=random), torch.randn(80, 4, generator=random))

    def train(session):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(12, hidden), nn.Tanh(), nn.Linear(hidden, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        rank = session._plan.worker
        session.prepare(model, optimizer, samples=SAMPLES[rank])
        for x, y in session.batches(data, 4, shared=False):
            rounds = session._rounds
            server[session.version] = inline.server.state.sender.residual.double().clone()
            workers[session.version][rank] = rounds.method.sender.residual.double().clone()
            weights[session.version][rank] = rounds._weight()
            optimizer.zero_grad()
            mse_loss(model(x), y * (rank + 1)).backward()
            optimizer.step()

    lossy = {"uplink": "topk:0.1", "downlink": "topk:0.05"}
    inline.train(train, rounds=ROUNDS, workers={"count": K}, **lossy, **settings)
    return server, workers, weights


def paper(error, local, weights):
    """Equations (9) and (10) of the SAEF paper; its ``e_k`` is ours over ``a_k``."""
    total = error + sum(local.values())
    ahead = sum(a * float((total - local[k] / a).norm() ** 2) for k, a in weights.items())
    return float(total.norm()), ahead**0.5


@pytest.mark.parametrize("kind", [{"kind": "ef"}, {"kind": "saef"}, {"kind": "saef", "average_every": 3}], ids=str)
@pytest.mark.parametrize(("hidden", "share"), [(12, 1.0), (150, 1.0)])
def test_the_mismatch_in_a_row_is_that_of_the_residuals(inline, kind, hidden, share):
    """Sketches of up to 256 elements are exact, and a byte a column costs a percent; larger ones have 5 sigma."""
    tolerance = 0.02 if hidden == 12 else 5 * 0.044
    server, workers, weights = run(inline, hidden, feedback=kind, federated={"participation": share})
    assert {len(each) for each in weights.values()} == {round(K * share)}
    for row in inline.rows[2:]:
        at = row["version"] - 1
        assert sum(weights[at].values()) == pytest.approx(1)
        expected = paper(server[at], workers[at], weights[at])
        assert min(expected) > 1e-3
        found = row["mismatch"]["replica"], row["mismatch"]["ahead"]
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("feedback", [{"kind": "none"}, {"kind": "ef21"}])
def test_where_nothing_is_owed_there_is_no_mismatch(inline, feedback):
    run(inline, 12, feedback=feedback, send="gradient")
    assert {row["mismatch"] for row in inline.rows} == {None}


def test_it_is_measured_when_the_ledgers_are(inline):
    run(inline, 12, feedback={"kind": "ef"}, metrics={"port": None, "sketch_every": 4})
    found = [row["mismatch"]["replica"] for row in inline.rows]
    assert found == [found[0]] * 4 + [found[4]] * 4
    assert found[0] == 0.0 < found[4]
