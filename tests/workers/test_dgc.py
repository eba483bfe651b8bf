"""``dgc`` against the recursion of its paper, written here line by line, and the extended ledger of its docstring.

Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression" (ICLR 2018), Algorithm 2 and section 3.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

K, ROUNDS, RATE = 3, 18, 0.1
DATA = TensorDataset(
    torch.randn(60, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    torch.randn(60, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
)

either_kind = pytest.mark.parametrize("nesterov", [False, True])


def updates(numel=47, seed=0):
    random = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(numel, generator=random, dtype=torch.float64)


def dgc(lone, uplink="topk:0.1", momentum=0.7, nesterov=False, clip=None, **more):
    return lone({"kind": "dgc", "momentum": momentum, "nesterov": nesterov, "clip": clip}, uplink, **more)


class Paper:
    """One worker of Algorithm 2, on vectors in float64."""

    def __init__(self, spans, ratio, m, nesterov=False, clip=None, masks=True):
        self.spans, self.ratio, self.m, self.nesterov, self.clip, self.masks = spans, ratio, m, nesterov, clip, masks
        self.u = np.zeros(spans[-1].stop)
        self.v = np.zeros(spans[-1].stop)

    def clipped(self, g, workers):
        norm, bound = np.linalg.norm(g), (self.clip or np.inf) / np.sqrt(workers)
        return g * min(1.0, bound / norm)  # line 7, before the accumulation

    def accumulate(self, g):
        self.u = self.m * self.u + g  # line 8; appendix B for Nesterov
        self.v = self.v + (self.m * self.u + g if self.nesterov else self.u)  # line 9

    def send(self):
        mask = np.zeros(self.v.size, bool)
        for span in self.spans:  # lines 10 to 12, for each layer
            size = span.stop - span.start
            largest = np.argsort(-np.abs(self.v[span]), kind="stable")[: max(1, round(self.ratio * size))]
            mask[span.start + largest] = True
        sent = np.where(mask, self.v, 0.0)
        self.v = np.where(mask, 0.0, self.v)  # line 13
        if self.masks:
            self.u = np.where(mask, 0.0, self.u)  # line 14
        return sent


@either_kind
@pytest.mark.parametrize("momentum", [0.0, 0.7, 0.9])
@pytest.mark.parametrize("clip", [None, 5.0])
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_it_follows_the_papers_recursion(lone, momentum, nesterov, clip, granularity):
    one = dgc(lone, "topk:0.1", momentum, nesterov, clip, granularity=granularity)
    paper = Paper(one.spans, 0.1, momentum, nesterov, clip)
    unmasked = Paper(one.spans, 0.1, momentum, nesterov, clip, masks=False)
    for t, given in zip(range(30), updates(), strict=False):
        weight, workers = (0.25, 4) if t % 3 else (0.5, 2)
        for each in (paper, unmasked):
            each.accumulate(weight * each.clipped(given.numpy(), workers))
        sent = one.round(given, weight=weight, workers=workers)
        assert sent.numpy() == pytest.approx(paper.send(), abs=1e-12)
        assert one.sender.residual.numpy() == pytest.approx(paper.v, abs=1e-12)
        assert one.method._velocity.numpy() == pytest.approx(paper.u, abs=1e-12)
        unmasked.send()
    assert (np.abs(unmasked.v - paper.v).max() > 0.1) == (momentum > 0)  # the masking matters here


@either_kind
def test_a_refused_update_joins_what_was_accumulated_and_a_skipped_step_accumulates_nothing(lone, nesterov):
    one = dgc(lone, nesterov=nesterov)
    paper = Paper(one.spans, 0.1, 0.7, nesterov)
    for t, given in zip(range(30), updates(), strict=False):
        if t % 5 == 4:
            sent = one.round(0 * given, weight=0.5, skipped=True).numpy()
            assert sent == pytest.approx(paper.send(), abs=1e-12)
        else:
            paper.accumulate(0.5 * given.numpy())
            if t % 5 == 2:
                one.stage(given, weight=0.5)
                one.method.refuse()
            else:
                assert one.round(given, weight=0.5).numpy() == pytest.approx(paper.send(), abs=1e-12)
        assert one.sender.residual.numpy() == pytest.approx(paper.v, abs=1e-12)
        assert one.method._velocity.numpy() == pytest.approx(paper.u, abs=1e-12)


def test_the_velocity_is_cleared_where_an_element_was_sent_and_nowhere_else(lone):
    one = dgc(lone, "topk:0.2+int4")
    for given, _ in zip(updates(), range(6), strict=False):
        expected = 0.7 * one.method._velocity + given
        sent = one.round(given) != 0
        assert 0 < sent.sum() < sent.numel()
        assert torch.equal(one.method._velocity, torch.where(sent, 0.0, expected))
        assert one.sender.residual[sent].abs().max() > 0  # the error of the value code stays


@pytest.mark.parametrize("clip", [None, 1.0, 100.0])
@pytest.mark.parametrize("workers", [1, 4, 9])
def test_each_worker_may_have_its_share_of_the_norm(lone, clip, workers):
    one = dgc(lone, "topk:1", 0.0, clip=clip)
    given = next(updates())
    norm = float(given.norm())
    expected = norm if clip is None else min(norm, clip / workers**0.5)
    assert float(one.round(given, workers=workers).norm()) == pytest.approx(expected)
    assert 1.0 < norm < 100.0 / 9**0.5


# --- without compression


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).clone()


def net() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def watched(batches, ends, session):
    """A loop that notes the batches by round and worker, and where the replica ends."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    session.prepare(model, optimizer)
    for x, y in session.batches(DATA, 4):
        batches[session.version, session._plan.worker] = x.clone(), y.clone()
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    ends[session._plan.worker] = flat(model.parameters())


def train(inline, **settings):
    batches, ends = {}, {}
    settings = {"send": "gradient", "workers": {"count": K}, **settings}
    inline.train(partial(watched, batches, ends), rounds=ROUNDS, **settings)
    assert torch.equal(ends[0], ends[K - 1])
    return batches, ends[0]


def gradients(model, batches, version):
    for worker in range(K):
        x, y = batches[version, worker]
        model.zero_grad()
        mse_loss(model(x), y).backward()
        yield flat(parameter.grad for parameter in model.parameters())


@either_kind
@pytest.mark.parametrize("full", [{"uplink": "topk:1"}, {"uplink": "topk:0.01", "schedule": {"start_round": 100}}])
def test_where_everything_is_sent_nothing_is_masked_and_it_is_momentum_sgd(inline, nesterov, full):
    feedback = {"kind": "dgc", "momentum": 0.8, "nesterov": nesterov}
    batches, end = train(inline, feedback=feedback, **full)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.8, nesterov=nesterov)
    for version in range(ROUNDS):
        mean = sum(gradients(model, batches, version)) / K
        nn.utils.vector_to_parameters(mean, (grads := net()).parameters())
        for parameter, gradient in zip(model.parameters(), grads.parameters(), strict=True):
            parameter.grad = gradient.detach()
        optimizer.step()
    torch.testing.assert_close(end, flat(model.parameters()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3])
def test_a_layer_that_is_so_small_that_all_of_it_is_always_sent_keeps_its_momentum(lone, size):
    one = dgc(lone, "topk:0.9", 0.5, shapes=((size,), (40,)))
    given = torch.ones(size + 40, dtype=torch.float64)
    given[0] = 0 if size > 1 else 1  # zeros are not sent, but they are not late either
    sent = [one.round(given)[size - 1] for _ in range(4)]
    assert sent == [1.0, 1.5, 1.75, 1.875]


# --- a whole run


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_run_follows_the_paper(inline, clip):
    feedback = {"kind": "dgc", "momentum": 0.7, "clip": clip}
    batches, end = train(inline, feedback=feedback, uplink="topk:0.1")
    model, x = net(), flat(net().parameters()).numpy()
    spans = [slice(0, 48), slice(48, 56), slice(56, 88), slice(88, 92)]
    workers = [Paper(spans, 0.1, 0.7, clip=clip) for _ in range(K)]
    for version in range(ROUNDS):
        nn.utils.vector_to_parameters(torch.from_numpy(x.copy()), model.parameters())
        for worker, gradient in zip(workers, gradients(model, batches, version), strict=True):
            worker.accumulate(worker.clipped(gradient.numpy(), K) / K)
        x = x - RATE * sum(worker.send() for worker in workers)
    assert end.numpy() == pytest.approx(x, abs=1e-11)
    assert inline.summary["conservation_error"] <= 4
    assert inline.summary["discarded_norm"] > 0


# --- the ledger


@either_kind
@pytest.mark.parametrize("clip", [None, 4.0])
@pytest.mark.parametrize("uplink", ["topk:0.1", "topk:0.2+int4", "randk:0.2", "dense at first"])
def test_the_extended_ledger_balances_and_what_is_discarded_is_reported(lone, nesterov, clip, uplink):
    """Given ``a g / (1 - m)``; residual ``v`` and what the velocity still brings; discarded what that loses."""
    m, weight, workers = 0.7, 0.5, 4
    dense = uplink == "dense at first"
    one = dgc(lone, "topk:0.1" if dense else uplink, m, nesterov, clip, schedule={"start_round": 1000 * dense})
    still = (m * m if nesterov else m) / (1 - m)
    balance = torch.zeros(47, dtype=torch.float64)  # given - sent - discarded
    for t, gradient in zip(range(30), updates(), strict=False):
        velocity, skipped, refused = one.method._velocity.clone(), t % 5 == 4, t % 5 == 2
        given = 0 * gradient if skipped else gradient
        balance += weight * given / (1 - m)
        cut = given * (1 - min(1.0, (clip or np.inf) / workers**0.5 / max(float(given.norm()), 1e-300)))
        discarded = one.stage(given, weight, workers, skipped).norms.discarded
        lost = weight * cut / (1 - m)
        balance -= lost
        if refused:
            one.method.refuse()
        else:
            balance -= one.round(given, weight=weight, workers=workers, skipped=skipped)
            moved = velocity if skipped else m * velocity + weight * (given - cut)
            cleared = still * (moved - one.method._velocity)
            balance -= cleared
            assert discarded == pytest.approx(float(cleared.norm() ** 2 + lost.norm() ** 2), rel=1e-9, abs=1e-18)
        residual = one.sender.residual + still * one.method._velocity
        torch.testing.assert_close(balance, residual, rtol=0, atol=1e-11)
    assert float(one.method._velocity.abs().max()) > 0.1


@pytest.mark.parametrize("memory", ["float32", "bfloat16", "int8", "sparse"])
def test_the_ledger_of_the_sender_balances_in_every_memory(lone, memory):
    one = dgc(lone, "topk:0.1+int4", 0.9, shapes=((30, 10), (50,)), dtype="float32", memory=memory)
    for t, given in zip(range(40), updates(350), strict=False):
        one.stage(given)
        if t % 7 == 3:
            one.method.refuse()
        one.round(given)
    assert one.sender.conservation_error() <= 4
    assert one.sender.ledger.scale > 0


# --- the warm-up of the sparsity


def test_the_sparsity_grows_in_the_papers_steps(lone):
    schedule = {"warmup_rounds": 8, "warmup_ratio": 0.25, "warmup_steps": 4}
    one = dgc(lone, "topk:0.001", shapes=((100, 100),), schedule=schedule)
    sparsities = []
    for given, _ in zip(updates(10_000), range(10), strict=False):
        sparsities.append(100 - int((one.round(given) != 0).sum()) / 100)
    assert sparsities[::2] == pytest.approx([75, 93.75, 98.4375, 99.6, 99.9], abs=0.05)  # section 3.3
    assert sparsities[::2] == sparsities[1::2]
