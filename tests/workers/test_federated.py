"""FedAvg, FedProx, server optimizers and client sampling against plain recursions, with gradients that are known."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy.settings import validate
from protocol import messages, snapshot
from protocol.errors import RunFailed, SettingsError
from protocol.messages import Pull
from protocol.sampling import participants
from ps.inline import InlineTransport
from ps.optimizer import optimizer_class
from workers.rounds import Rounds

LR, STEPS, ROUNDS = 0.05, 4, 12
LOCAL = {"rounds": ROUNDS, "workers": {"count": 3, "local_steps": STEPS}}
SIZES = (3, 5, 12)
LOSSY = {"uplink": "topk:0.3+int4", "downlink": "topk:0.3+int4"}
ASYNC = {"server": {"mode": "async"}}


def local(problem, worker, start, mu=0.0):
    """Where a worker's steps lead from ``start``."""
    x = start.clone()
    for _ in range(STEPS):
        x = x - LR * (problem.gradient(worker, x) + mu * (x - start))
    return x


def averaging(problem, rounds, weights, mu=0.0, who=None, step=lambda x, change: x - change):
    """The models of FedAvg: each the weighted mean of where the workers of a round come to."""
    models = [torch.zeros(problem.numel, dtype=torch.float64)]
    for version in range(rounds):
        taking = sorted(weights) if who is None else who(version)
        share, x = sum(weights[k] for k in taking), models[-1]
        change = sum(weights[k] / share * (x - local(problem, k, x, mu)) for k in taking)
        models.append(step(x, change))
    return models


def apart(models, others):
    """The largest difference."""
    return max(float((one - other).abs().max()) for one, other in zip(models, others, strict=True))


# --- FedAvg


def test_fedavg_is_the_mean_of_the_workers_models_weighted_by_their_samples(inline, clients):
    problem = clients(SIZES)
    inline.train(problem.train(LR), **LOCAL)
    assert apart(problem.replicas(), averaging(problem, ROUNDS, problem.shares(range(3)))) < 1e-12
    assert apart(problem.replicas(), averaging(problem, ROUNDS, dict.fromkeys(range(3), 1 / 3))) > 1e-2


def test_everyone_counts_the_same_where_one_worker_does_not_say_how_many_samples_it_has(inline, clients):
    problem = clients(SIZES)
    inline.train(problem.train(LR, samples=(3, None, 12)), **LOCAL)
    assert apart(problem.replicas(), averaging(problem, ROUNDS, dict.fromkeys(range(3), 1 / 3))) < 1e-12


def test_the_weight_of_a_worker_that_leaves_goes_to_the_others_by_their_samples(inline, clients):
    problem, leaving = clients(SIZES), 3

    def each(session, model):
        if (session.version, session.worker) == (leaving, 1):
            session.leave("spot")
            return True
        return None

    inline.train(problem.train(LR, each=each), **LOCAL)
    whole, rest = problem.shares(range(3)), problem.shares((0, 2))
    models = averaging(problem, leaving, whole)
    x = models[-1]
    models.append(x - sum(whole[k] * (x - local(problem, k, x)) for k in rest))  # it was announced for one more round
    for _ in range(ROUNDS - leaving - 1):
        models.append(sum(a * local(problem, k, models[-1]) for k, a in rest.items()))
    assert apart(problem.replicas(), models) < 1e-12
    assert inline.server.state.weights == pytest.approx(rest)


@pytest.mark.parametrize("samples", [0, -3, 2.0, True, "5"])
def test_a_number_of_samples_that_is_none_is_refused_in_one_sentence(inline, clients, samples):
    with pytest.raises(RunFailed, match=r"samples=.*; valid is a whole number above 0, or None$"):
        inline.train(clients(SIZES).train(samples=(samples,) * 3), **LOCAL)


# --- FedProx


@pytest.mark.parametrize("mu", [0.0, 0.5, 4.0])
def test_fedprox_takes_its_steps_on_the_loss_and_the_distance_from_where_the_round_began(inline, clients, mu):
    problem, weights = clients(SIZES), clients(SIZES).shares(range(3))
    inline.train(problem.train(LR), federated={"proximal": mu}, **LOCAL)
    assert apart(problem.replicas(), averaging(problem, ROUNDS, weights, mu)) < 1e-12
    plain = apart(problem.replicas(), averaging(problem, ROUNDS, weights))
    assert plain < 1e-12 if mu == 0.0 else plain > 1e-2


@pytest.mark.parametrize("kind", ["ef", "saef"])
def test_under_compression_fedprox_pulls_to_the_point_that_the_feedback_has_chosen(inline, clients, kind):
    problem, seen = clients(SIZES), defaultdict(list)

    def each(session, model):
        at = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        seen[session.version, session.worker].append(at)

    inline.train(problem.train(LR, each=each), federated={"proximal": 2.0}, feedback={"kind": kind}, **LOCAL, **LOSSY)
    moved = 0.0
    for (version, worker), (start, *steps) in seen.items():
        x = start
        for at in steps:
            x = x - LR * (problem.gradient(worker, x) + 2.0 * (x - start))
            assert torch.allclose(at, x, rtol=0, atol=1e-12)
        moved = max(moved, float((start - problem.w[version][0]).abs().max()))
    assert moved > 1e-3 if kind == "saef" else moved == 0.0


@pytest.mark.parametrize("federated", [{"proximal": 0.1}, {"control_variates": True}], ids=str)
@pytest.mark.parametrize("given", [((lambda: None,), {}), ((), {"closure": lambda: None})], ids=("place", "name"))
def test_a_closure_whose_gradients_nobody_could_correct_is_refused(inline, federated, given):
    def train(session):
        model = nn.Linear(6, 1)
        optimizer = session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))[1]
        for _ in session.batches([torch.zeros(6)], 1):
            model(torch.zeros(1, 6)).sum().backward()
            optimizer.step(None)
            optimizer.step(*given[0], **given[1])

    with pytest.raises(RunFailed, match=r"optimizer\.step got a closure, .*; call backward before optimizer\.step"):
        inline.train(train, federated=federated, workers={"count": 1, "local_steps": 2})


# --- server optimizers


SERVERS = {
    "FedAvgM": ("torch.optim.SGD", {"lr": 0.5, "momentum": 0.9}),
    "Nesterov, as in DiLoCo": ("torch.optim.SGD", {"lr": 0.5, "momentum": 0.9, "nesterov": True}),
    "FedAdam": ("torch.optim.Adam", {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3}),
    "FedAdagrad": ("torch.optim.Adagrad", {"lr": 0.1, "eps": 1e-3}),
    "FedYogi": ("ps.yogi.Yogi", {"lr": 0.1}),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_federated_optimizer_is_that_optimizer_fed_with_the_mean_change_of_the_workers(inline, clients, name):
    problem, (path, options) = clients(SIZES), SERVERS[name]
    parts = [torch.zeros(6, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    optimizer = optimizer_class(path)([part.requires_grad_() for part in parts], **options)

    def step(x, change):
        parts[0].grad, parts[1].grad = change[:6].clone(), change[6:].clone()
        optimizer.step()
        return torch.cat(parts).detach()

    inline.train(problem.train(LR), server={"optimizer": {"kind": path, **options}}, **LOCAL)
    weights = problem.shares(range(3))
    assert apart(problem.replicas(), averaging(problem, ROUNDS, weights, step=step)) < 1e-12
    assert apart(problem.replicas(), averaging(problem, ROUNDS, weights)) > 1e-2


# --- client sampling


@given(st.sets(st.integers(0, 99), min_size=1, max_size=12), st.floats(0.01, 1.0), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_who_takes_part_is_a_sample_and_a_newcomer_displaces_one_at_most(members, share, seed, version):
    chosen = participants(members, share, seed, version)
    assert chosen == participants(sorted(members, reverse=True), share, seed, version) == tuple(sorted(set(chosen)))
    assert set(chosen) <= members
    assert len(chosen) == max(1, round(share * len(members)))
    assert len(set(chosen) - set(participants(members | {100}, share, seed, version))) <= 1


def test_over_rounds_every_worker_takes_part_equally_often_and_so_does_every_pair():
    rounds, alone, pairs = 4000, Counter(), Counter()
    for version in range(rounds):
        chosen = participants(range(6), 0.5, 1, version)
        alone.update(chosen)
        pairs.update(combinations(chosen, 2))
    for counts, likely, number in ((alone, 1 / 2, 6), (pairs, 1 / 5, 15)):
        assert len(counts) == number
        assert all(abs(n - rounds * likely) < 5 * math.sqrt(rounds * likely * (1 - likely)) for n in counts.values())


def sampled(inline, problem, monkeypatch, **extra):
    """A run with two of five workers a round: replicas by version, as every worker had them, and bytes by direction."""
    replicas, wire, pulls = defaultdict(list), Counter(), []
    receive, call = Rounds._receive, InlineTransport.call

    def received(rounds, news):
        receive(rounds, news)
        replicas[rounds.version].append(snapshot.digest(rounds.replica.w))

    def called(transport, frame):
        wire["uplink"] += frame.size
        pulls.append(isinstance(messages.parse(frame), Pull))
        answer = call(transport, frame)
        wire["downlink"] += sum(one.size for one in answer)
        return answer

    monkeypatch.setattr(Rounds, "_receive", received)
    monkeypatch.setattr(InlineTransport, "call", called)
    settings = {"rounds": ROUNDS, "workers": {"count": 5, "local_steps": STEPS}, "federated": {"participation": 0.4}}
    inline.train(problem.train(LR), **settings, **extra)
    return replicas, wire, sum(pulls)


def test_in_a_round_the_mean_is_over_its_participants(inline, clients, monkeypatch):
    problem = clients((3, 5, 12, 4, 6))
    _, _, pulls = sampled(inline, problem, monkeypatch)

    def who(version):
        return participants(range(5), 0.4, 0, version)

    assert apart(problem.replicas(), averaging(problem, ROUNDS, problem.shares(range(5)), who=who)) < 1e-12
    assert {v: len(seen) for v, seen in problem.w.items()} == dict.fromkeys(range(ROUNDS), 2 * STEPS) | {ROUNDS: 5}
    assert pulls == 3 * ROUNDS, "the others pull"


@pytest.mark.parametrize("feedback", [{"kind": "ef"}, {"kind": "saef", "average_every": 3, "average": "f64"}], ids=str)
def test_idle_workers_stay_bit_identical_and_every_byte_counts(inline, clients, monkeypatch, feedback):
    replicas, wire, _ = sampled(inline, clients((3, 5, 12, 4, 6)), monkeypatch, feedback=feedback, **LOSSY)
    assert {version: len(seen) for version, seen in replicas.items()} == dict.fromkeys(range(1, ROUNDS + 1), 5)
    assert all(len(set(seen)) == 1 for seen in replicas.values())
    assert len({seen[0] for seen in replicas.values()}) == ROUNDS
    for way in ("uplink", "downlink"):
        counted = sum(size for (direction, _), size in inline.server.vitals.wire.items() if direction == way)
        assert counted == wire[way]
        snapshots = inline.server.vitals.wire[way, "snapshot"]
        assert inline.summary[f"{way}_bytes"] == wire[way] - snapshots
    assert (inline.server.vitals.wire["uplink", "average"] > 0) == (feedback["kind"] == "saef")


@pytest.mark.parametrize("feedback", [{"kind": "ef"}, {"kind": "saef", "average_every": 3, "average": "f64"}], ids=str)
def test_with_sampling_the_true_model_moves_by_what_the_participants_computed(inline, clients, monkeypatch, feedback):
    given, weights = [], clients((3, 5, 12, 4, 6)).shares(range(5))
    compute = Rounds._given

    def noted(rounds, steps):
        share = sum(weights[k] for k in participants(range(5), 0.4, 0, rounds.version))
        given.append(weights[rounds._plan.worker] / share * (change := compute(rounds, steps)))
        return change

    monkeypatch.setattr(Rounds, "_given", noted)
    problem = clients((3, 5, 12, 4, 6))
    sampled(inline, problem, monkeypatch, feedback=feedback, **LOSSY)
    owed = inline.server.state.sender.residual + sum(s._rounds.method.sender.residual for s in inline.sessions.values())
    assert owed.abs().max() > 1e-3
    assert torch.allclose(problem.replicas()[-1] - owed, -sum(given), rtol=0, atol=1e-12)
    assert inline.summary["conservation_error"] <= 4


# --- settings


@pytest.mark.parametrize(
    ("federated", "others", "part"),
    [
        ({"participation": 0.0}, {}, "federated.participation is 0.0; input should be greater than 0"),
        ({"participation": 1.5}, {}, "federated.participation is 1.5; input should be less than or equal to 1"),
        ({"proximal": -1.0}, {}, "federated.proximal is -1.0; input should be greater than or equal to 0"),
        ({"fedprox": 1.0}, {}, "federated.fedprox is not a setting; valid in federated are participation, proximal"),
        ({"proximal": 1.0}, {"send": "gradient"}, "federated.proximal needs send: difference"),
        ({"control_variates": True}, {"send": "gradient"}, "federated.control_variates needs send: difference"),
        ({"control_variates": True}, ASYNC, "federated.control_variates needs server.mode: sync"),
        ({"participation": 0.5}, ASYNC, "federated.participation needs server.mode: sync"),
    ],
)
def test_federated_settings_that_make_no_sense_are_refused_in_one_sentence(federated, others, part):
    with pytest.raises(SettingsError) as refused:
        validate({"train": "m:f", "feedback": {"kind": "ef"}, "federated": federated, **others})
    assert str(refused.value).startswith(part)
    assert "\n" not in str(refused.value)
