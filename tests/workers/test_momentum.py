"""``ef_momentum`` against its recursion, against momentum SGD without compression, and where there is no step."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from protocol.errors import RunFailed

K, ROUNDS, RATE = 3, 15, 0.1
DATA = TensorDataset(
    torch.randn(60, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    torch.randn(60, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
)
SENDS = ["difference", "gradient"]

sgd = partial(torch.optim.SGD, lr=RATE)
either_send = pytest.mark.parametrize("send", SENDS)
either_kind = pytest.mark.parametrize("nesterov", [True, False])


def net() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).clone()


def topk(v, ratio):
    out, places = np.zeros_like(v), np.argsort(-np.abs(v), kind="stable")[: max(1, round(ratio * v.size))]
    out[places] = v[places]
    return out


def updates(numel, seed=0):
    random = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(numel, generator=random, dtype=torch.float64) ** 3


class Reference:
    """``m' = mu m + a g``;  ``p = e + m'``, with Nesterov ``e + mu m' + a g``;  ``e' = p - C(p)``."""

    def __init__(self, spans, trained, mu, nesterov, ratio):
        self.spans, self.trained, self.mu, self.nesterov, self.ratio = spans, trained, mu, nesterov, ratio
        self.m, self.e = np.zeros(trained), np.zeros(spans[-1].stop)

    def give(self, g):
        """What joins the residual; the momentum is that of the next round."""
        given = g.copy()
        self.m = self.mu * self.m + g[: self.trained]
        given[: self.trained] = self.mu * self.m + g[: self.trained] if self.nesterov else self.m
        return given

    def send(self, given):
        p = self.e + given
        sent = np.concatenate([topk(p[span], self.ratio) for span in self.spans])
        self.e = p - sent
        return sent


@either_kind
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_it_follows_its_recursion_with_changing_weights_refusals_and_rounds_without_a_step(
    lone, mu, nesterov, granularity
):
    feedback = {"kind": "ef_momentum", "momentum": mu, "nesterov": nesterov}
    one = lone(feedback, "topk:0.2", granularity=granularity)
    reference = Reference(one.spans, 47, mu, nesterov, 0.2)
    for t, given in zip(range(25), updates(47), strict=False):
        weight = (0.25, 0.5, 0.2)[t % 3]
        if t % 6 == 4:
            one.stage(given, weight=weight)
            one.method.refuse()
            reference.e = reference.e + reference.give(weight * given.numpy())
        elif t % 6 == 5:
            sent = one.round(0 * given, weight=weight, skipped=True)
            assert sent.numpy() == pytest.approx(reference.send(0 * given.numpy()), abs=1e-12)
        else:
            sent = one.round(given, weight=weight)
            assert sent.numpy() == pytest.approx(reference.send(reference.give(weight * given.numpy())), abs=1e-12)
        assert one.sender.residual.numpy() == pytest.approx(reference.e, abs=1e-12)
    assert np.abs(reference.e).max() > 0.1


def test_buffers_have_no_momentum(lone):
    one = lone({"kind": "ef_momentum", "momentum": 0.5, "nesterov": False}, "none", buffers=5)
    given = next(updates(52))
    sent = sum(one.round(given, weight=0.5) for _ in range(4))
    factors = 1 + (1 + 0.5) + (1 + 0.5 + 0.25) + (1 + 0.5 + 0.25 + 0.125)
    torch.testing.assert_close(sent[:47], factors * 0.5 * given[:47], rtol=0, atol=1e-12)
    torch.testing.assert_close((sent + one.sender.residual)[47:], 4 * 0.5 * given[47:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", ["float32", "bfloat16", "int8", "sparse"])
@either_kind
def test_the_ledger_balances_in_every_memory(lone, memory, nesterov):
    feedback = {"kind": "ef_momentum", "nesterov": nesterov}
    one = lone(feedback, "topk:0.1+int4", ((30, 10), (50,)), "float32", memory)
    for t, given in zip(range(40), updates(350), strict=False):
        one.stage(given)
        if t % 7 == 3:
            one.method.refuse()
        one.round(given)
    assert one.sender.conservation_error() <= 4
    assert one.sender.ledger.scale > 0


# --- in a run


def watched(batches, ends, session, optimizer_of=sgd):
    """A loop that notes the batches by round and worker, and where the replica ends."""
    model = net()
    optimizer = optimizer_of(model.parameters())
    session.prepare(model, optimizer)
    for x, y in session.batches(DATA, 4):
        batches[session.version, session._plan.worker] = x.clone(), y.clone()
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    ends[session._plan.worker] = flat(model.parameters())


@either_send
@either_kind
def test_without_compression_it_is_momentum_sgd_on_the_server(inline, send, nesterov):
    batches, ends = {}, {}
    feedback = {"kind": "ef_momentum", "momentum": 0.8, "nesterov": nesterov}
    train = partial(watched, batches, ends)
    inline.train(train, rounds=ROUNDS, workers={"count": K}, feedback=feedback, send=send)
    model = net()
    optimizer = sgd(model.parameters(), momentum=0.8, nesterov=nesterov)
    for version in range(ROUNDS):
        optimizer.zero_grad()
        for worker in range(K):
            x, y = batches[version, worker]
            (mse_loss(model(x), y) / K).backward()
        optimizer.step()
    torch.testing.assert_close(ends[0], flat(model.parameters()), rtol=0, atol=1e-12)
    assert torch.equal(ends[0], ends[2])
    without = {}
    inline.train(partial(watched, {}, without), rounds=ROUNDS, workers={"count": K}, send=send)
    assert float((ends[0] - without[0]).abs().max()) > 1e-2


@either_send
@either_kind
def test_with_compression_the_workers_follow_the_recursion(inline, send, nesterov):
    def train(session):
        model = net()
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        sender = session._rounds.method.sender
        spans = [slice(place.start, place.stop) for place in sender.layout.segments]
        reference = Reference(spans, sender.layout.trainable, 0.9, nesterov, 0.1)
        for x, y in session.batches(DATA, 4):
            assert sender.residual.numpy() == pytest.approx(reference.e, abs=1e-12)
            before = flat(model.parameters())
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
            after, gradient = flat(model.parameters()), flat(p.grad for p in model.parameters())
            given = gradient if send == "gradient" else before - after
            reference.send(reference.give(given.numpy() / K))

    feedback = {"kind": "ef_momentum", "nesterov": nesterov}
    lossy = {"uplink": "topk:0.1", "downlink": "topk:0.2"}
    inline.train(train, rounds=ROUNDS, workers={"count": K}, feedback=feedback, send=send, **lossy)
    assert inline.summary["worker_error_norm"] > 1e-3


@pytest.mark.parametrize(("send", "steps"), [("gradient", 1), ("difference", 1), ("difference", 2)])
def test_a_round_in_which_a_scaler_skips_every_step_leaves_the_momentum_alone(inline, send, steps):
    momenta, carried = {}, {}

    def train(session):
        model = net().float()
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        method = session._rounds.method
        for x, y in session.batches(DATA, 4):
            momenta.setdefault((session.rank, session.version), method._momentum.clone())
            carried.setdefault((session.rank, session.version), method.sender.error_norm())
            loss = mse_loss(model(x.float()), y.float())
            if (session.rank, session.version) in [(1, 2), (0, 4), (1, 4)]:
                loss = loss * math.inf
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        momenta[session._plan.worker, 6] = method._momentum.clone()

    lossy = {"uplink": "topk:0.2", "downlink": "topk:0.2", "feedback": {"kind": "ef_momentum"}, "send": send}
    inline.train(train, rounds=6, workers={"count": 2, "local_steps": steps}, **lossy)
    assert inline.summary["skipped_steps"] == 3 * steps
    for rank in (0, 1):
        for version in range(6):
            skipped = (rank, version) in [(1, 2), (0, 4), (1, 4)]
            assert torch.equal(momenta[rank, version + 1], momenta[rank, version]) == skipped
            before = inline.rows[version]["update_norm"]["before"][str(rank)]
            if version:
                assert (before == pytest.approx(carried[rank, version], rel=1e-5)) == skipped  # gives 0


# --- who has momentum


@pytest.mark.parametrize(
    ("kind", "send"), [("ef_momentum", "difference"), ("ef_momentum", "gradient"), ("dgc", "gradient")]
)
@pytest.mark.parametrize("make", [partial(sgd, momentum=0.9), partial(torch.optim.RMSprop, momentum=0.5)])
@pytest.mark.filterwarnings("ignore::workers.hooks.StatefulOptimizerWarning")
def test_an_optimizer_with_momentum_of_its_own_is_refused_in_one_sentence(inline, send, kind, make):
    settings = {"feedback": {"kind": kind}, "uplink": "topk:0.1", "send": send}
    with pytest.raises(RunFailed) as failed:
        inline.train(partial(watched, {}, {}, optimizer_of=make), rounds=2, **settings)
    momentum = make([nn.Parameter(torch.zeros(1))]).param_groups[0]["momentum"]
    assert str(failed.value) == (
        f"feedback.kind {kind} keeps the momentum itself (feedback.momentum), and the optimizer given to "
        f"session.prepare has momentum {momentum}; give it momentum 0"
    )


@pytest.mark.parametrize("kind", ["ef", "ef_momentum", "dgc"])
def test_an_optimizer_without_momentum_is_taken(inline, kind):
    settings = {"feedback": {"kind": kind}, "uplink": "topk:0.1", "send": "gradient"}
    make = partial(sgd, momentum=0.9) if kind == "ef" else sgd
    inline.train(partial(watched, {}, {}, optimizer_of=make), rounds=2, **settings)
    assert inline.summary["rounds"] == 2
