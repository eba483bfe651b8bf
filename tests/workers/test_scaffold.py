"""SCAFFOLD against the paper's Algorithm 1, and what compression, leaving and skipped steps may not break."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import TensorDataset

from deploy.settings import load
from examples import federated_digits
from protocol import snapshot
from protocol.errors import Refused, RunFailed
from protocol.sampling import participants
from workers.rounds import Rounds

EXAMPLE = Path(__file__).parents[2] / "examples" / "federated_digits.yaml"
SIZES = (3, 5, 12, 4, 6)
LR, STEPS = 0.05, 5
SCAFFOLD = {"control_variates": True}
PARTS = (40, 60, 120)  # better conditioned than the small ones
FASTER = {"start_round": 1, "learning_rate": 1.5}
TWO = {"workers": {"count": 2, "local_steps": 2}}
APART = {"workers": {"count": 3, "local_steps": STEPS}}
LOCAL = {"workers": {"count": 5, "local_steps": STEPS}}
LOSSY = {"uplink": "topk:0.3+int4", "downlink": "topk:0.3+int4"}


def algorithm_1(problem, rounds, server_lr=1.0, share=1.0):
    """Lines 1 to 17 with option II: x and c of every round, all workers of the same weight."""
    everyone = range(len(problem.sizes))
    x = torch.zeros(problem.numel, dtype=torch.float64)
    c, own = torch.zeros_like(x), {k: torch.zeros_like(x) for k in everyone}
    models, variates = [x], [c]
    for t in range(rounds):
        taking = participants(everyone, share, 0, t)
        moves, news = [], []
        for k in taking:
            y = x
            for _ in range(STEPS):
                y = y - LR * (problem.gradient(k, y) - own[k] + c)
            new = own[k] - c + (x - y) / (STEPS * LR)
            moves.append(y - x)
            news.append(new - own[k])
            own[k] = new
        x = x + server_lr / len(taking) * sum(moves)
        c = c + len(taking) / len(everyone) * sum(news) / len(taking)
        models.append(x)
        variates.append(c)
    return models, variates


def split(problem, w):
    """A replica's model and its control variate."""
    return w[: problem.numel], w[problem.numel :]


def own(session):
    """``c_k``."""
    return session._rounds._local._own


def brought(inline):
    """``sum_k a_k c_k``, by the weights at the end of the run."""
    weights = inline.server.state.weights
    return sum(a * own(inline.sessions[k]) for k, a in weights.items())


# --- the algorithm


@pytest.mark.parametrize("server_lr", [1.0, 0.7])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_uncompressed_it_is_algorithm_1_of_the_paper_to_rounding(inline, clients, share, server_lr):
    problem = clients(SIZES)
    federated, optimizer = {**SCAFFOLD, "participation": share}, {"kind": "torch.optim.SGD", "lr": server_lr}
    train = problem.train(LR, samples=(None,) * 5)
    inline.train(train, rounds=40, federated=federated, server={"optimizer": optimizer}, **LOCAL)
    models, variates = algorithm_1(problem, 40, server_lr, share)
    for w, x, c in zip(problem.replicas(), models, variates, strict=True):
        assert torch.allclose(split(problem, w)[0], x, rtol=0, atol=1e-11)
        assert torch.allclose(split(problem, w)[1], c, rtol=0, atol=1e-11)
    assert variates[5].abs().max() > 1e-2


def test_the_shared_variate_is_the_weighted_mean_of_the_workers_own_in_every_round(inline, clients):
    problem, seen = clients(SIZES), defaultdict(dict)

    def each(session, model):
        seen[session.version][session.worker] = own(session)

    inline.train(problem.train(LR, each=each), rounds=10, federated=SCAFFOLD, **LOCAL)
    for version, variates in seen.items():
        mean = sum(a * variates[k] for k, a in problem.shares(range(5)).items())
        assert torch.allclose(split(problem, problem.w[version][0])[1], mean, rtol=0, atol=1e-13)
        assert (mean.abs().max() > 1e-3) == (version > 0)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_a_workers_variate_is_the_mean_of_its_gradients_whatever_optimizer_takes_the_steps(inline, clients, make):
    problem, gradients, controls = clients(SIZES), [], []

    def each(session, model):
        if session.worker == 2:
            gradients.append(problem.gradient(2, nn.utils.parameters_to_vector(model.parameters()).detach()))
            controls.append(own(session))

    inline.train(problem.train(LR, each=each, make=make), rounds=6, federated=SCAFFOLD, **LOCAL)
    for taken in range(STEPS, 6 * STEPS, STEPS):
        mean = sum(gradients[taken - STEPS : taken]) / STEPS
        assert torch.allclose(controls[taken], mean, rtol=0, atol=1e-12)


def test_it_goes_to_the_optimum_where_fedavg_does_not_also_compressed_both_ways(inline, clients):
    """Several local steps on different problems: the workers' own optima pull the average away."""
    problem, best = clients(PARTS), clients(PARTS).optimum(clients(PARTS).shares(range(3)))

    def distance(rounds, **extra):
        problem.w.clear()
        inline.train(problem.train(0.1), rounds=rounds, **{**APART, **extra})
        return float((split(problem, problem.replicas()[-1])[0] - best).abs().max())

    assert distance(40) > 0.1
    assert distance(40, federated=SCAFFOLD) < 1e-10
    assert distance(120, federated=SCAFFOLD, **LOSSY) < 1e-6


def test_on_digits_that_are_divided_unevenly_it_is_ahead_of_fedavg_both_compressed_both_ways(inline):
    def accuracy(controls):
        settings = load(EXAMPLE, [f"federated.control_variates={controls}", "rounds=30", "arguments.lr=0.2"])
        chosen = settings.model_dump(exclude={"train", "name", "arguments", "metrics", "storage", "backend"})
        chosen["metrics"] = {"port": None}
        inline.train(lambda session: federated_digits.train(session, **settings.arguments), **chosen)
        assert inline.summary["uplink_ratio"] > (20 if controls else 40)
        return inline.summary["reported"]["accuracy"]

    assert accuracy(True) > accuracy(False) + 3


# --- compressed


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("kind", ["ef", "saef"])
def test_compressed_both_ways_nothing_of_a_variate_is_lost_and_replicas_stay_equal(
    inline, clients, monkeypatch, kind, share
):
    """The shared variate less all that is still owed is the sum of what the workers brought, as for the model."""
    digests, receive = defaultdict(set), Rounds._receive

    def received(rounds, news):
        receive(rounds, news)
        digests[rounds.version].add(snapshot.digest(rounds.replica.w))

    monkeypatch.setattr(Rounds, "_receive", received)
    problem = clients(SIZES)
    federated = {**SCAFFOLD, "participation": share}
    inline.train(problem.train(LR), rounds=20, federated=federated, feedback={"kind": kind}, **LOCAL, **LOSSY)
    assert sorted(digests) == list(range(1, 21))
    assert all(len(seen) == 1 for seen in digests.values())
    owed = inline.server.state.sender.residual + sum(s._rounds.method.sender.residual for s in inline.sessions.values())
    c = split(problem, problem.replicas()[-1])[1]
    assert split(problem, owed)[1].abs().max() > 1e-3
    assert torch.allclose(c - split(problem, owed)[1], brought(inline), rtol=0, atol=1e-12)
    assert inline.summary["conservation_error"] <= 4


def test_before_compression_sets_in_variates_travel_uncompressed_too(inline, clients):
    problem = clients(SIZES)
    schedule = {"start_round": 12}
    train = problem.train(LR, samples=(None,) * 5)
    inline.train(train, rounds=16, federated=SCAFFOLD, schedule=schedule, **LOCAL, **LOSSY)
    for w, x, c in zip(problem.replicas()[:13], *algorithm_1(problem, 12), strict=True):
        assert torch.allclose(w, torch.cat([x, c]), rtol=0, atol=1e-11)
    assert inline.summary["server_error_norm"] > 0


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_the_saved_model_has_no_variates_and_loads_and_buffers_and_frozen_tensors_are_as_they_were(inline, granularity):
    def make():
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        model[0].bias.requires_grad_(False)
        return model

    ends = []

    def train(session):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.prepare(model, optimizer)
        own = TensorDataset(torch.randn(20, 6) + session.worker, torch.randn(20, 2))
        for x, y in session.batches(own, 5, shared=False):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        ends.append({name: value.clone() for name, value in model.state_dict().items()})

    common = {"workers": {"count": 3, "local_steps": 3}, "federated": SCAFFOLD, "granularity": granularity}
    result = inline.train(train, rounds=8, **common, **LOSSY)
    saved = safetensors.torch.load_file(result.path / "model.safetensors")
    make().load_state_dict(saved)
    assert set(saved) == set(make().state_dict())
    assert all(torch.equal(saved[n], v) for end in ends for n, v in end.items() if n != "1.num_batches_tracked")
    layout = inline.server.state.layout
    names = [place.entry.name for place in layout.tensors if place.entry.role == "control"]
    assert names == ["control/0.weight", "control/1.weight", "control/1.bias", "control/2.weight", "control/2.bias"]
    variates = [inline.server.state.w[p.start : p.stop] for p in layout.tensors if p.entry.role == "control"]
    assert all(part.abs().max() > 0 for part in variates)


# --- leaving, refusals, skipped steps


@pytest.mark.parametrize(("lossy", "rounds"), [({}, 50), (LOSSY, 130)], ids=("exact", "compressed"))
def test_a_worker_that_leaves_takes_its_part_out_and_the_others_go_to_their_own_optimum(inline, clients, lossy, rounds):
    """What it brought in would else pull the model away from it for ever."""
    problem = clients(PARTS)

    def each(session, model):
        if session.version == 10 and session.worker == 1:
            session.leave("spot")
            return True
        return None

    inline.train(problem.train(0.1, each=each), rounds=rounds, federated=SCAFFOLD, **APART, **lossy)
    x, c = split(problem, problem.replicas()[-1])
    weights = problem.shares((0, 2))
    assert inline.server.state.weights == pytest.approx(weights)
    assert torch.allclose(c, brought(inline), rtol=0, atol=1e-6)
    assert torch.allclose(x, problem.optimum(weights), rtol=0, atol=1e-6)
    assert (x - problem.optimum(problem.shares(range(3)))).abs().max() > 0.05


def test_after_a_refusal_the_residual_owes_what_the_workers_variate_has_moved(inline, clients):
    problem = clients((8,))
    seen = {}

    def each(session, model):
        seen["c"] = split(problem, session._rounds.replica.w)[1].clone()
        if session.version == 3:
            session._rounds.version = 99  # the server refuses an update of another version

    def train(session):
        with pytest.raises(Refused, match="sent an update of version 99 in round 3"):
            problem.train(LR, each=each)(session)

    with pytest.raises(RunFailed, match="before the run had done its rounds"):
        inline.train(train, federated=SCAFFOLD, workers={"count": 1})
    residual = split(problem, inline.sessions[0]._rounds.method.sender.residual)[1]
    assert residual.abs().max() > 1e-3
    assert torch.allclose(seen["c"] - residual, own(inline.sessions[0]), rtol=0, atol=1e-13)


def test_a_round_without_steps_moves_neither_variates_nor_the_model(inline, clients):
    """As when a GradScaler skips them all."""
    problem, idle = clients((4, 6)), range(3, 6)

    def make(parameters, lr):
        optimizer = torch.optim.SGD(parameters, lr=lr)
        optimizers.append((optimizer, optimizer.step))
        return optimizer

    def each(session, model):
        optimizer, step = optimizers[session.worker]
        optimizer.step = (lambda: None) if session.version in idle else step

    optimizers = []
    inline.train(problem.train(LR, each=each, make=make), rounds=8, federated=SCAFFOLD, **TWO)
    ws = problem.replicas()
    assert [torch.equal(one, other) for one, other in pairwise(ws)] == [version in idle for version in range(8)]
    assert torch.allclose(split(problem, ws[-1])[1], brought(inline), rtol=0, atol=1e-13)


def test_an_optimizer_whose_step_calls_its_parents_is_corrected_once(inline, clients):
    """Torch calls the hooks of both, if there ever was an instance of the parent."""

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    models = []
    for make in (torch.optim.SGD, Own):
        problem = clients((4, 6))
        federated = {**SCAFFOLD, "proximal": 0.5}
        inline.train(problem.train(LR, make=make), rounds=6, federated=federated, schedule=FASTER, **TWO)
        models.append(problem.replicas())
    assert all(torch.equal(one, other) for one, other in zip(*models, strict=True))
