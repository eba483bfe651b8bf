"""Asynchronous runs, and rounds in which only some take part: real sessions, with one worker that is slow."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from protocol import messages
from protocol.errors import RunFailed
from protocol.messages import Stat
from protocol.sampling import participants
from ps.aggregate import Total

INPUTS = torch.randn(96, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = INPUTS @ torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
DATA = TensorDataset(INPUTS, TARGETS)
LOSSY = {"uplink": "topk:0.3+int4", "downlink": "topk:0.3+int4"}
FOUR = {"workers": {"count": 4}}


class Slow:
    """Worker 0 takes one turn in so many, unless nobody else can take one. A turn is a round."""

    def __init__(self, turns):
        self.turns, self.since = turns, 0

    def __call__(self, ready):
        self.since += 1
        others = [worker for worker in ready if worker]
        if 0 in ready and (self.since >= self.turns or not others):
            self.since = 0
            return 0
        return others[0]


def asynchronous(buffer=None, most=None, **staleness):
    """Settings of the server; polynomial weights with an exponent ``a``."""
    weights = {"staleness": {"kind": "polynomial", **staleness}} if staleness else {}
    return {"mode": "async", "buffer": buffer, "max_staleness": most, **weights}


def net():
    return nn.Linear(6, 2, dtype=torch.float64)


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def loop(session, each=None, make=net, lr=0.05):
    """Train; ``each`` is called at the start of a round, and what it returns at its end."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    session.prepare(model, optimizer)
    dtype = next(model.parameters()).dtype
    for x, y in session.batches(DATA, 4):
        end = each(session, model) if each else None
        optimizer.zero_grad()
        loss = mse_loss(model(x.to(dtype)), y.to(dtype))
        loss.backward()
        optimizer.step()
        session.report(loss=loss)
        if end is not None:
            end()
    return model


def models(inline, start):
    """The model at every version, by the log."""
    layout, found = inline.server.state.layout, [start]
    for frame in inline.server.state.log.since(0):
        updates = messages.updates(messages.parse(frame), layout)
        found.append(found[-1] - torch.cat([update.dense() for update in updates]))
    return found


class Folds:
    """What the server folds: (worker, sequence) -> (decoded, factor); and what was handed over."""

    def __init__(self, monkeypatch):
        self.pushes, self.handed = {}, []
        fold = Total.fold

        def spied(total, contributions, weights):
            for one in contributions:
                decoded = torch.cat([update.dense() for update in one.updates])
                if one.samples:
                    assert (one.worker, one.sequence) not in self.pushes, "a push was folded twice"
                    self.pushes[one.worker, one.sequence] = decoded, one.factor
                else:
                    self.handed.append((decoded, one.factor))
            return fold(total, contributions, weights)

        monkeypatch.setattr(Total, "fold", spied)

    def discarded(self):
        return sum((1 - factor) * decoded for decoded, factor in self.pushes.values())


# -- laws --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "kind"),
    [
        (asynchronous(), "saef"),
        (asynchronous(3, 2), "ef"),
        (asynchronous(1, None, a=0.5), "ef"),
        (asynchronous(2, 3, a=1.0), "saef"),
    ],
    ids=["buffer of 1", "of 3, bounded", "weighted", "of 2, bounded and weighted"],
)
def test_replicas_follow_the_server_and_the_true_model_moves_by_what_was_given_less_what_was_discarded(
    inline, monkeypatch, server, kind
):
    folds, seen, given, unsent = Folds(monkeypatch), [], [], {}
    inline.order = Slow(6)

    def each(session, model):
        seen.append((session.version, session._rounds.replica.w.clone()))
        owed, weight, y = session._rounds.method.sender.residual.clone(), 1 / session.world_size, flat(model)

        def end():
            given.append(weight * (y - flat(model)))
            unsent[session] = owed + given[-1]

        return end

    inline.train(partial(loop, each=each), rounds=30, server=server, feedback={"kind": kind}, **FOUR, **LOSSY)
    state, summary, sessions = inline.server.state, inline.summary, inline.sessions.values()
    history = models(inline, seen[0][1])
    assert seen[0][0] == 0
    for version, w in [*seen, *((session.version, session._rounds.replica.w) for session in sessions), (30, state.w)]:
        assert torch.equal(w, history[version])
    assert [session.version for session in sessions] == [30] * 4
    owed = [session._rounds.method.sender.residual for session in sessions]
    moved = history[0] - (state.w - state.sender.residual - sum(owed))
    assert torch.allclose(moved, sum(given) - folds.discarded(), rtol=0, atol=1e-12)
    dropped = sum((1 - factor) * float(decoded.norm()) for decoded, factor in folds.pushes.values())
    assert summary["discarded_norm"] == pytest.approx(dropped, abs=1e-12)
    assert (dropped > 0.01) == ("staleness" in server)
    # who came after the last entry was refused and keeps its update
    late = summary["rejected"]["finished"]
    assert late == len(given) - len(folds.pushes) > 0
    assert sum(torch.equal(residual, unsent[session]) for residual, session in zip(owed, sessions, strict=True)) == late
    assert summary["conservation_error"] <= 4
    assert summary["status"] == "finished"


@pytest.mark.parametrize("rounds", range(12, 16))
@pytest.mark.parametrize("most", [None, 3])
def test_a_run_ends_for_everyone_whoever_closes_the_last_fold(inline, rounds, most):
    """Even for one that is so far behind that its last answer is a snapshot."""
    inline.order = Slow(13)
    window, jumps = 2, []

    def train(session):
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
        inline.server.state.log.window = window
        versions = []
        for x, y in session.batches(DATA, 4):
            versions.append(session.version)
            mse_loss(model(x.float()), y.float()).backward()
        jumps.extend(after - before for before, after in itertools.pairwise([*versions, session.version]))
        assert int(model[1].num_batches_tracked) == len(versions), "what is not exchanged stays the worker's own"

    inline.train(train, rounds=rounds, server=asynchronous(1, most), **FOUR, **LOSSY)
    assert max(jumps) > window
    assert inline.summary["status"] == "finished"
    assert all(session.finished and session.version == rounds for session in inline.sessions.values())
    assert len({session.fingerprint() for session in inline.sessions.values()}) == 1


def test_workers_with_versions_of_their_own_divide_the_data_set_all_the_same(inline):
    seen = {}

    def train(session):
        model = net()
        session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
        for _, indices in session.batches(DATA, 4, indices=True):
            seen.setdefault(session._plan.worker, []).append(indices.tolist())

    inline.order = Slow(6)
    inline.train(train, rounds=6 * 13, server=asynchronous(1), **FOUR)
    assert [len(batches) >= 6 for batches in seen.values()] == [True] * 4
    first = [index for batches in seen.values() for batch in batches[:6] for index in batch]
    assert sorted(first) == list(range(96)), "six batches of four, of each of four workers, are one epoch"


# -- a slow worker -----------------------------------------------------------------------------------


def with_a_slow_worker(inline, rounds, server, turns=13):
    """Rounds by worker, and the loss of the model at the end."""
    took, losses = Counter(), []

    def each(session, model):
        took[session._plan.worker] += 1

    def train(session):
        model = loop(session, each)
        with session.evaluating(model), torch.no_grad():
            losses.append(float(mse_loss(model(INPUTS), TARGETS)))

    inline.order = Slow(turns)
    inline.train(train, rounds=rounds, server=server, **FOUR, **LOSSY)
    assert len(set(losses)) == 1
    return took, losses[0]


def test_fast_workers_wait_for_a_slow_one_in_synchronous_mode_alone(inline):
    took, _ = with_a_slow_worker(inline, 10, {})
    assert took == dict.fromkeys(range(4), 10)
    took, _ = with_a_slow_worker(inline, 130, asynchronous(1))
    assert took[0] in (10, 11)
    assert all(took[worker] >= 4 * took[0] - 4 for worker in (1, 2, 3)), "twelve turns of theirs for one of its own"


@pytest.mark.parametrize("most", [1, 3, 6])
def test_with_a_bound_on_staleness_they_wait_once_they_are_that_far_ahead(inline, most):
    with_a_slow_worker(inline, 60, asynchronous(1))
    late = inline.server.vitals.staleness.counts
    assert sum(late[4:]) > 0, "without a bound the slow worker is more than four versions behind"
    took, _ = with_a_slow_worker(inline, 60, asynchronous(1, most))
    bounds, counts = inline.server.vitals.staleness.bounds, inline.server.vitals.staleness.counts
    assert sum(count for bound, count in zip(bounds, counts, strict=False) if bound >= 2 * most) == counts[-1] == 0
    fast = max(took[worker] for worker in (1, 2, 3))
    assert fast <= took[0] * (most + 1) + most, "so many versions, and one update that waits"
    assert fast > took[0] or most == 1


def test_an_asynchronous_run_learns_more_in_each_round_of_the_slow_worker(inline):
    took, synchronous = with_a_slow_worker(inline, 10, {})
    assert took[0] == 10
    took, free = with_a_slow_worker(inline, 130, asynchronous(1))
    assert took[0] in (10, 11)
    took, weighted = with_a_slow_worker(inline, 130, asynchronous(1, None, a=0.5))
    assert took[0] in (10, 11)
    start = float(mse_loss(torch.zeros_like(TARGETS), TARGETS))
    assert free < 0.5 * synchronous < 0.5 * start
    assert weighted < 0.5 * synchronous


# -- what goes wrong ---------------------------------------------------------------------------------


def test_a_server_whose_step_is_not_finite_fails_the_run_of_those_who_are_behind_as_well(inline):
    """Everyone is refused with ``finished``, which must not pass for a good end."""
    settings = {"kind": "torch.optim.SGD", "lr": 1e38}

    def train(session):
        inline.order = Slow(5)
        loop(session)

    with pytest.raises(RunFailed, match=r"^the run has ended: the update of 'weight' holds NaN or Inf, after the serv"):
        inline.train(train, rounds=50, server={**asynchronous(1), "optimizer": settings}, **FOUR, **LOSSY)
    assert inline.summary["status"] == "failed"
    assert inline.summary["rounds"] < 50
    assert not any(session.finished for session in inline.sessions.values())


def test_an_update_that_is_not_finite_fails_the_run_and_names_the_worker(inline):
    def each(session, model):
        if (session._plan.worker, session.version > 9) == (2, True):
            nn.init.constant_(model.weight, float("inf"))

    inline.order = Slow(5)
    with pytest.raises(RunFailed, match=r"holds NaN or Inf in round 1\d of worker 2$"):
        inline.train(partial(loop, each=each), rounds=50, server=asynchronous(2), **FOUR, **LOSSY)
    assert inline.summary["status"] == "failed"


def test_a_stopped_run_ends_with_its_next_entry_for_everyone(inline):
    def each(session, model):
        if session.version == 9:
            inline.server.stop()

    inline.order = Slow(5)
    inline.train(partial(loop, each=each), rounds=500, server=asynchronous(2), **FOUR, **LOSSY)
    assert 9 < inline.summary["rounds"] < 14
    assert len({session.fingerprint() for session in inline.sessions.values()}) == 1


def test_a_worker_that_leaves_hands_over_what_it_owes_and_the_others_go_on(inline, monkeypatch):
    folds, owed = Folds(monkeypatch), []

    def each(session, model):
        if session._plan.worker == 0 and session.version > 5 and not session.left:
            owed.append(session._rounds.method.sender.residual.clone())
            session.leave("told to go")

    inline.order = Slow(5)
    inline.train(partial(loop, each=each), rounds=30, server=asynchronous(1, 8, a=1.0), **FOUR, **LOSSY)
    ((decoded, factor),) = folds.handed
    assert torch.equal(decoded, owed[0])
    assert factor == 1.0, "only updates are late"
    assert inline.server.state.version == 30
    assert inline.server.state.weights == dict.fromkeys((1, 2, 3), 1 / 3)


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [
        {"server": asynchronous(1)},
        {"server": asynchronous(2, 3, a=1.0)},
        {"federated": {"participation": 0.5}},
        {},
    ],
    ids=["asynchronous", "bounded", "partial", "synchronous"],
)
def test_a_worker_that_has_lost_its_memory_joins_again_and_the_run_goes_on(inline, settings, worker):
    died, back = [], []

    def dies(session, model):
        if session._plan.worker == worker and session.version > 5:
            died.append(session.version)
            raise Died

    def follows(session, model):
        assert torch.equal(session._rounds.replica.w, inline.server.state.w) or "server" in settings
        back.append(session.version)

    def train(session):
        try:
            loop(session, dies)
        except Died:
            session._rounds, session._taken, session._consumed = None, 0, 0
            loop(session, follows)

    inline.order = Slow(5)
    inline.train(train, rounds=30, **settings, **FOUR, **LOSSY)
    assert len(died) == 1
    assert died[0] <= min(back) < 29
    assert inline.summary["status"] == "finished"
    assert set(inline.summary["rejected"]) <= {"finished"}
    assert inline.server.vitals.joins == 4
    assert len({session.fingerprint() for session in inline.sessions.values()}) == 1
    assert inline.summary["conservation_error"] <= 4


class Died(Exception):
    """A worker's process ends here."""


# -- checks ------------------------------------------------------------------------------------------


def test_ledgers_and_replicas_are_checked_though_workers_skip_versions(inline):
    seen, settings = [], {"server": asynchronous(1), "metrics": {"port": None, "sketch_every": 10}, **FOUR, **LOSSY}

    def tamper(session, model):
        if session._plan.worker == 2:
            seen.append(session.version)
            if 20 < session.version < 25:
                session._rounds.method.sender.residual[0] += 1.0

    inline.train(partial(loop, each=tamper), rounds=60, **settings)
    assert all(version % 10 for version in seen[1:]), "it never is at a version at which a check is due"
    assert Stat.CONSERVATION in inline.server.vitals.workers[2].latest
    noticed = [row["version"] for row in inline.rows if row["conservation_error"] > 16]
    assert 30 <= min(noticed) < 55
    assert inline.server.vitals.mismatch is not None

    def flip(session, model):
        if session._plan.worker == 2 and session.version > 30:
            session._rounds.replica.w[0] += 1e-9

    with pytest.raises(RunFailed, match=r"^the replica of worker 2 differs from the server's at version \d+$"):
        inline.train(partial(loop, each=flip), rounds=60, **settings)
    assert inline.summary["replica_mismatches"] == 1


# -- rounds in which only some take part -------------------------------------------------------------


HALF = {"workers": {"count": 5}, "federated": {"participation": 0.4}, **LOSSY}  # two of five


def test_those_who_take_no_part_follow_and_the_true_model_moves_by_the_updates_of_the_others(inline):
    start, given, took = [], [], Counter()

    def each(session, model):
        w, y = session._rounds.replica.w, flat(model)
        assert torch.equal(w, inline.server.state.w)
        assert session._plan.worker in participants(range(5), 0.4, 0, session.version)
        start.append(w.clone())
        took[session.version] += 1
        return lambda: given.append((y - flat(model)) / 2)

    def train(session):
        loop(session, each)
        drawn.add(float(torch.rand(())))

    drawn = set()
    inline.train(train, rounds=20, **HALF)
    assert took == dict.fromkeys(range(20), 2)
    assert len(drawn) == 1, "what comes after the loop is random alike, whether they took part in the last round or not"
    state, sessions = inline.server.state, inline.sessions.values()
    assert all(torch.equal(session._rounds.replica.w, state.w) for session in sessions)
    assert all(session._rounds._exchange.sequence < 20 for session in sessions)
    owed = sum(session._rounds.method.sender.residual for session in sessions)
    moved = start[0] - (state.w - state.sender.residual - owed)
    assert torch.allclose(moved, sum(given), rtol=0, atol=1e-12)
    assert inline.summary["conservation_error"] <= 4
    assert inline.summary["rejected"] == {}


def test_a_run_in_which_some_wait_for_the_others_stops_and_fails_for_all(inline):
    def stop(session, model):
        if session.version == 7:
            inline.server.stop()

    inline.train(partial(loop, each=stop), rounds=20, **HALF)
    assert (inline.summary["status"], inline.summary["rounds"]) == ("finished", 8)
    assert len({session.fingerprint() for session in inline.sessions.values()}) == 1

    def fail(session, model):
        if session.version == 7:
            nn.init.constant_(model.weight, float("nan"))

    with pytest.raises(RunFailed, match=r"holds NaN or Inf in round 7 of worker \d$"):
        inline.train(partial(loop, each=fail), rounds=20, **HALF)
    assert (inline.summary["status"], inline.summary["rounds"]) == ("failed", 7)
