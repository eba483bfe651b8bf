"""Nothing is lost unseen: ledgers balance, the true model moves by what the workers computed, refusals put back."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from protocol import compressors
from protocol.errors import Refused, RunFailed

DATA = TensorDataset(
    torch.randn(90, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    torch.randn(90, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
)
FEEDBACK = {
    "none": {"kind": "none"},
    "ef": {"kind": "ef"},
    "saef": {"kind": "saef"},
    "saef, averaging in f32": {"kind": "saef", "average_every": 2},
    "saef, averaging in topk": {"kind": "saef", "average_every": 3, "average": "topk:0.1+int4"},
}
SPECS = ["none", "f32", "bf16", "sign", "topk:0.1", "topk:0.1+bf16", "topk:0.1+int8", "topk:0.1+int4", "topk:0.1+sign"]
NO_RESIDUAL = ("none", "worker")
CARRYING = [name for name in FEEDBACK if name != "none"]

sgd = partial(torch.optim.SGD, lr=0.1)


def net(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30, dtype=dtype), nn.Tanh(), nn.Linear(30, 10, dtype=dtype))


def flat(model) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def loop(session, each=None, dtype=torch.float32, make=net):
    """Train; ``each`` is called at the start of a round, and what it returns at its end."""
    model = make(dtype)
    optimizer = sgd(model.parameters())
    session.prepare(model, optimizer)
    for x, y in session.batches(DATA, 4):
        end = each(session, model) if each else None
        optimizer.zero_grad()
        mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()
        if end is not None:
            end()


def senders(inline):
    return [*(session._rounds.method.sender for session in inline.sessions.values()), inline.server.state.sender]


def worst(inline) -> float:
    return max(sender.conservation_error() for sender in senders(inline))


# --- ledgers


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", FEEDBACK)
def test_the_ledger_of_every_sender_balances(inline, name, spec):
    inline.train(loop, rounds=8, workers={"count": 3}, feedback=FEEDBACK[name], uplink=spec, downlink=spec)
    assert all(sender.ledger.scale > 0 for sender in senders(inline))
    assert worst(inline) <= 4
    assert inline.summary["conservation_error"] <= 4
    if spec not in ("none", "f32"):
        assert inline.summary["server_error_norm"] > 0
        assert (inline.summary["worker_error_norm"] > 0) == (name != "none")
        assert (inline.summary["discarded_norm"] > 0) == (name == "none")


@pytest.mark.parametrize("spec", ["sign", "topk:0.1+int4"])
@pytest.mark.parametrize("name", ["none", "ef"])
def test_the_ledgers_balance_when_gradients_are_sent(inline, name, spec):
    settings = {"feedback": FEEDBACK[name], "uplink": spec, "downlink": spec}
    inline.train(loop, rounds=12, send="gradient", **settings)
    assert worst(inline) <= 4


def test_the_ledgers_balance_with_buffers_and_in_float64(inline):
    def make(dtype):
        return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 10)).to(dtype)

    settings = {"feedback": FEEDBACK["saef"], "uplink": "topk:0.1+int4", "downlink": "topk:0.1+int4"}
    inline.train(partial(loop, dtype=torch.float64, make=make), rounds=12, **settings)
    assert worst(inline) <= 4


def drop(sender):
    """What the sender owes of its first segment is lost."""
    memory = sender._residual
    for number in range(len(sender.layout.segments)):
        owed = memory.copy(number)
        memory.stage(number, owed.zero_() if number == 0 else owed, number)
    memory.adopt()


@pytest.mark.parametrize("memory", ["float32", "bfloat16", "int8", "sparse"])
@pytest.mark.parametrize("who", [None, "worker", "server"])
def test_the_ledgers_balance_in_every_memory_and_notice_a_lost_segment(inline, memory, who):
    fired = []

    def each(session, model):
        if who and session.version == 20 and session.rank == 1:
            fired.append(session._rounds.method.sender if who == "worker" else inline.server.state.sender)
            drop(fired[0])

    settings = {
        "feedback": FEEDBACK["saef, averaging in topk"],
        "workers": {"count": 3, "residual": memory},
        "server": {"residual": memory},
        "uplink": "topk:0.1+int4",
        "downlink": "topk:0.1+int4",
    }
    inline.train(partial(loop, each=each), rounds=40, **settings)
    assert len(fired) == bool(who)
    assert (inline.summary["conservation_error"] > 16) == bool(who)
    for sender in senders(inline):
        error = sender.conservation_error()
        assert error > 16 if sender in fired else error <= 4


@pytest.mark.parametrize("name", ["ef", "saef, averaging in topk"])
def test_memories_that_are_exact_give_the_same_model_and_those_that_round_a_similar_one(inline, name):
    found, reported = {}, {}

    def train(session):
        model = net(torch.float32)
        session.prepare(model, sgd(model.parameters()))
        optimizer = sgd(model.parameters())
        for x, y in session.batches(DATA, 8):
            optimizer.zero_grad()
            loss = mse_loss(model(x.float()), y.float())
            loss.backward()
            optimizer.step()
            session.report(loss=loss)

    for memory in ("float32", "sparse", "bfloat16", "bfloat16", "int8", "int8"):
        settings = {"workers": {"count": 2, "residual": memory}, "server": {"residual": memory}}
        inline.train(
            train, rounds=60, feedback=FEEDBACK[name], uplink="topk:0.05+int4", downlink="topk:0.05+int4", **settings
        )
        found.setdefault(memory, set()).add(inline.summary["fingerprint"])
        reported[memory] = float(np.mean([row["reported"]["loss"] for row in inline.rows[-20:]]))
    assert {memory: len(prints) for memory, prints in found.items()} == dict.fromkeys(found, 1)
    assert found["float32"] == found["sparse"]
    assert len({print_ for prints in found.values() for print_ in prints}) == 3
    start = inline.rows[0]["reported"]["loss"]
    for loss in reported.values():
        assert loss == pytest.approx(reported["float32"], rel=0.02)
        assert loss < 0.97 * start


def test_sparse_memory_of_an_embedding_grows_with_the_rows_that_were_seen(inline):
    seen, sizes = 40, {}
    words = TensorDataset(torch.arange(64) % seen * 50, torch.randn(64, 1, generator=torch.Generator().manual_seed(3)))

    def train(session):
        model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 1))
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        for x, y in session.batches(words, 16):
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()

    for memory in ("float32", "sparse"):
        settings = {"workers": {"count": 2, "residual": memory}, "server": {"residual": memory}}
        inline.train(train, rounds=10, uplink="topk:0.001", downlink="topk:0.001", **settings)
        sizes[memory] = [sender._residual.nbytes for sender in senders(inline)]
        sizes[memory].append(inline.summary["fingerprint"])
        assert worst(inline) <= 4
    assert sizes["float32"].pop() == sizes["sparse"].pop()
    scratch, rows = 2000 * 64 * 4, seen * 64 * 4
    for size in sizes["sparse"]:
        assert scratch + rows < size < scratch + 2 * 1.2 * rows
    assert set(sizes["float32"]) == {2 * (scratch + 65 * 4)}


def test_rounding_does_not_pile_up_over_many_rounds(inline):
    settings = {"feedback": FEEDBACK["saef, averaging in topk"], "uplink": "topk:0.1+int4", "downlink": "topk:0.1+int4"}
    inline.train(loop, rounds=150, **settings)
    assert worst(inline) <= 4


@pytest.mark.parametrize("spec", ["sign", "topk:0.1+int4"])
@pytest.mark.parametrize(
    ("name", "who"), [(n, w) for n in FEEDBACK for w in ("worker", "server") if (n, w) != NO_RESIDUAL]
)
def test_a_residual_that_was_tampered_with_shows_in_the_conservation_error(inline, name, spec, who):
    def each(session, model):
        if session.version == 4 and session.rank == 1:
            sender = session._rounds.method.sender if who == "worker" else inline.server.state.sender
            assert sender.conservation_error() <= 4
            sender.residual[7] += 0.01

    settings = {"feedback": FEEDBACK[name], "uplink": spec, "downlink": spec}
    inline.train(partial(loop, each=each), rounds=11, workers={"count": 3}, **settings)
    assert inline.summary["conservation_error"] > 16
    tampered = inline.sessions[1]._rounds.method.sender if who == "worker" else inline.server.state.sender
    for sender in senders(inline):
        assert (sender.conservation_error() > 16) == (sender is tampered)


def test_a_compressor_that_keeps_too_little_shows_in_the_conservation_error(inline, monkeypatch):
    encode = compressors.Pipeline.encode

    def careless(self, vector, state, key, residual=None, residual_out=None, norms=None):
        result = encode(self, vector, state, key, residual, residual_out, norms)
        if residual_out is not None:
            residual_out *= 0.999
        return result

    monkeypatch.setattr(compressors.Pipeline, "encode", careless)
    inline.train(loop, rounds=12, uplink="topk:0.1", downlink="none")
    assert inline.summary["conservation_error"] > 16


# --- the true model


def copy(vector) -> torch.Tensor:
    return vector.to(torch.float64, copy=True)


class History:
    """``w``, ``e`` and ``sum_k e_k`` at the start of every round, and what the workers computed in it."""

    def __init__(self, inline) -> None:
        self.inline = inline
        self.w: dict[int, torch.Tensor] = {}
        self.owed: dict[int, torch.Tensor] = {}
        self.local: dict[int, torch.Tensor] = {}
        self.given: dict[int, torch.Tensor] = {}

    def see(self, session) -> None:
        version, state = session.version, self.inline.server.state
        assert state.version == version
        assert torch.equal(state.w, session._rounds.replica.w)
        self.w[version], self.owed[version] = copy(state.w), copy(state.sender.residual)
        self.local[version] = self.local.get(version, 0) + copy(session._rounds.method.sender.residual)

    def gave(self, version: int, update: torch.Tensor) -> None:
        self.given[version] = self.given.get(version, 0) + update

    def true_model(self, version: int, rate: float = 1.0) -> torch.Tensor:
        """``w - (e + rate * sum_k e_k)``."""
        return self.w[version] - (self.owed[version] + rate * self.local[version])

    def off(self, rate: float = 1.0) -> list[float]:
        """By how much each round did not move the true model by ``- rate * sum_k a_k d_k``."""
        moves = [self.true_model(v + 1, rate) - self.true_model(v, rate) for v in range(max(self.w))]
        return [float((move + rate * self.given[v]).abs().max()) for v, move in enumerate(moves)]


def watch(history, session, model):
    """The ``each`` of ``loop`` that keeps a history."""
    history.see(session)
    version, weight, y = session.version, 1 / session.world_size, flat(model).double()
    return lambda: history.gave(version, weight * (y - flat(model).double()))


def moves(inline, dtype=torch.float64, **settings) -> History:
    history = History(inline)

    def train(session):
        loop(session, partial(watch, history), dtype)
        history.see(session)

    inline.train(train, rounds=7, workers={"count": 3}, **settings)
    assert len(history.w) == 8
    return history


@pytest.mark.parametrize("spec", ["f32", "bf16", "sign", "topk:0.1", "topk:0.1+int4"])
@pytest.mark.parametrize("name", CARRYING)
def test_the_true_model_moves_by_exactly_what_the_workers_computed(inline, name, spec):
    history = moves(inline, feedback=FEEDBACK[name], uplink=spec, downlink=spec)
    assert min(float(given.abs().max()) for given in history.given.values()) > 1e-3
    assert max(history.off()) <= 1e-13
    assert max(float(owed.abs().max()) for owed in history.owed.values()) > 1e-10
    assert max(float(local.abs().max()) for local in history.local.values()) > 1e-10


@pytest.mark.parametrize("name", ["ef", "saef"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrower_model_moves_the_true_one_by_the_difference_that_it_shows(inline, name, dtype):
    # a bfloat16 model shows w rounded to 8 bits: a difference from w itself would be off by up to 0.001
    history = moves(inline, dtype, feedback=FEEDBACK[name], uplink="topk:0.1+int4", downlink="topk:0.1+int4")
    assert max(history.off()) <= 1e-6


@pytest.mark.parametrize("spec", ["sign", "topk:0.1+int4"])
def test_without_feedback_the_true_model_does_not_follow(inline, spec):
    history = moves(inline, feedback=FEEDBACK["none"], uplink=spec, downlink=spec)
    assert min(history.off()) > 1e-4


def test_with_gradients_and_sgd_on_the_server_the_true_model_moves_by_the_rate_times_their_mean(inline):
    history = History(inline)

    def each(session, model):
        history.see(session)
        version, weight = session.version, 1 / session.world_size
        return lambda: history.gave(version, weight * torch.cat([p.grad.reshape(-1) for p in model.parameters()]))

    def train(session):
        loop(session, each, torch.float64)
        history.see(session)

    inline.train(train, send="gradient", rounds=10, uplink="topk:0.1+int4", downlink="sign")
    assert max(history.off(rate=0.1)) <= 1e-13
    assert min(float(local.abs().max()) for version, local in history.local.items() if version) > 1e-3


def test_the_true_model_takes_a_leaving_workers_residual_along(inline):
    history, leaving = History(inline), 4

    def each(session, model):
        end = watch(history, session, model)
        if (session.version, session._plan.worker) == (leaving, 1):
            session.leave("told to go")
            raise Leave
        return end

    def train(session):
        with suppress(Leave):
            loop(session, each, torch.float64)
            history.see(session)

    lossy = {"uplink": "topk:0.1+int4", "downlink": "topk:0.1+int4", "feedback": FEEDBACK["saef"]}
    with suppress(RunFailed):  # whoever has left keeps an older replica
        inline.train(train, rounds=8, workers={"count": 3}, **lossy)
    assert inline.server.state.version == 8
    assert set(inline.server.state.weights) == {0, 2}
    assert max(history.off()) <= 1e-13
    assert inline.sessions[1]._rounds.method.sender.residual.abs().max() > 1e-3


class Leave(Exception):
    """A worker's training function ends here."""


# --- refusals


@pytest.mark.parametrize(
    ("name", "send"),
    [("none", "difference"), ("ef", "difference"), ("saef", "difference"), ("none", "gradient"), ("ef", "gradient")],
)
def test_a_refused_update_joins_the_residual_and_the_ledger_still_balances(inline, name, send):
    kept = {}

    def each(session, model):
        if session.version != 3:
            return None
        sender, y = session._rounds.method.sender, flat(model)
        kept["residual"], kept["w"] = sender.residual.clone(), session._rounds.replica.w.clone()
        session._rounds.version = 99  # the server refuses an update of another version

        def end():
            gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
            kept["given"] = gradient if send == "gradient" else y - flat(model)

        return end

    def train(session):
        with pytest.raises(Refused, match="sent an update of version 99 in round 3") as refused:
            loop(session, each)
        assert refused.value.reason == "version"

    lossy = {"uplink": "topk:0.1+int4", "downlink": "topk:0.1+int4", "feedback": FEEDBACK[name], "send": send}
    with pytest.raises(RunFailed, match="before the run had done its rounds"):
        inline.train(train, workers={"count": 1}, **lossy)
    sender = inline.sessions[0]._rounds.method.sender
    expected = kept["residual"] + kept["given"] if name != "none" else torch.zeros_like(kept["given"])
    assert kept["given"].abs().max() > 1e-3
    assert torch.equal(sender.residual, expected)
    assert torch.equal(inline.sessions[0]._rounds.replica.w, kept["w"])
    assert sender.conservation_error() <= 4
    assert np.abs(sender.ledger.difference).max() > 0 or name == "none"
    assert inline.summary["rejected"] == {"version": 1}
