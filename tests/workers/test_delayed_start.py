"""Delayed compression, the learning rate that comes with it, and batches that grow, in runs of both send modes."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import TensorDataset

ROUNDS, START, FACTOR, GAMMA = 10, 4, 0.25, 0.9
DATA = TensorDataset(
    torch.randn(60, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    torch.randn(60, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
)
SCHEDULE = {"start_round": START, "learning_rate": FACTOR}
LOSSY = {"uplink": "topk:0.1", "downlink": "topk:0.1"}

either_send = pytest.mark.parametrize("send", ["difference", "gradient"])
sgd = partial(torch.optim.SGD, lr=0.2, momentum=0.5)
adam = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)

pytestmark = pytest.mark.filterwarnings("ignore::workers.hooks.StatefulOptimizerWarning")


def net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def groups(model):
    """Two groups with learning rates of their own."""
    return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.03}]


class Run:
    """What worker 0 sees: ``w`` and batch at every version, and the learning rates after every step."""

    def __init__(self, inline, make=sgd, skips=(), **settings):
        self.w, self.batches, self.rates, self.make, self.skips = [], [], [], make, skips
        inline.train(self._train, rounds=ROUNDS, **settings)

    def _train(self, session):
        model = net()
        optimizer = self.make(groups(model))
        session.prepare(model, optimizer)
        scheduler = ExponentialLR(optimizer, GAMMA)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        for x, y in session.batches(DATA, 5):
            if session._plan.worker == 0:
                self.w.append(session._rounds.replica.w.clone())
                self.batches.append((x.clone(), y.clone()))
            loss = mse_loss(model(x), y)
            loss = loss * math.inf if (session._plan.worker, session.version) in self.skips else loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if session._plan.worker == 0:
                self.rates.append([group["lr"] for group in optimizer.param_groups])
            scheduler.step()


def plain(batches, make, factor=FACTOR):
    """The same in plain torch: ``w`` at every version. Learning rates are set by hand before every step."""
    model = net()
    optimizer = make(groups(model))
    initial, found = [group["lr"] for group in optimizer.param_groups], []
    for version, (x, y) in enumerate(batches):
        found.append(flat(model))
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = rate * GAMMA**version * (factor if version >= START else 1.0)
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return torch.stack(found)


@either_send
@pytest.mark.parametrize("make", [sgd, adam], ids=["sgd", "adamw"])
def test_the_learning_rate_has_its_factor_from_the_start_on_and_schedulers_do_not_notice(inline, send, make):
    seen = Run(inline, make, send=send, workers={"count": 1}, schedule=SCHEDULE)
    torch.testing.assert_close(torch.stack(seen.w), plain(seen.batches, make), rtol=0, atol=1e-12)
    assert (plain(seen.batches, make, factor=1.0)[-1] - seen.w[-1]).abs().max() > 1e-3
    initial = [group["lr"] for group in make(groups(net())).param_groups]
    for version, rates in enumerate(seen.rates):
        assert rates == pytest.approx([rate * GAMMA**version for rate in initial])


@either_send
def test_nothing_is_compressed_before_the_start(inline, send):
    settings = {"send": send, "workers": {"count": 2}, "feedback": {"kind": "ef"}}
    late = Run(inline, schedule={"start_round": START}, **LOSSY, **settings)
    sizes = [row["uplink_bytes"] for row in inline.rows]
    assert all(norm == 0 for row in inline.rows[:START] for norm in row["worker_error_norm"].values())
    assert all(norm > 0 for row in inline.rows[START:] for norm in row["worker_error_norm"].values())
    assert [row["server_error_norm"] > 0 for row in inline.rows] == [False] * START + [True] * (ROUNDS - START)
    assert sizes[START - 1] - sizes[START - 2] > 1.4 * (sizes[START + 1] - sizes[START])
    dense = Run(inline, **settings)
    equal = [torch.equal(a, b) for a, b in zip(late.w, dense.w, strict=True)]
    assert equal == [version <= START for version in range(ROUNDS)]


def test_the_factor_is_announced_even_if_rank_0_skips_the_step_in_which_it_sets_in(inline):
    """Learning rates come from rank 0; the others' gradients must not be stepped at the old ones."""
    settings = {"send": "gradient", "workers": {"count": 2}, "schedule": SCHEDULE}
    never = {"start_round": START, "learning_rate": 1e-9}  # from there on the model stands still
    seen = Run(inline, partial(torch.optim.SGD, lr=0.2), skips=[(0, START)], **settings | {"schedule": never})
    moved = [float((b - a).abs().max()) for a, b in zip(seen.w, seen.w[1:], strict=False)]
    assert min(moved[:START]) > 1e-4
    assert max(moved[START:]) < 1e-8


@either_send
def test_with_a_factor_from_round_0_on_it_is_the_smaller_learning_rate(inline, send):
    schedule = {"start_round": 0, "learning_rate": 0.5}
    seen = Run(inline, partial(torch.optim.SGD, lr=0.2), send=send, workers={"count": 1}, schedule=schedule)
    first, second = flat(net()), seen.w[1]
    model = net()
    mse_loss(model(seen.batches[0][0]), seen.batches[0][1]).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    expected = torch.cat([0.2 * gradient[:56], 0.03 * gradient[56:]]) * 0.5
    torch.testing.assert_close(first - second, expected, rtol=0, atol=1e-14)


# --- batches


def test_batches_follow_their_course_and_every_sample_comes_once_an_epoch(inline):
    sizes, taken = {}, []

    def train(session):
        model = net()
        session.prepare(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
        for (x, y), indices in session.batches(DATA, 4, indices=True):
            assert len(x) == len(indices)
            sizes.setdefault(session.version, set()).add(len(x))
            taken.append((session.version, session.rank, indices.tolist()))
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()

    schedule = {"batch": {"first": 0.5, "last": 2.0, "begin": 1, "rounds": 3}}
    inline.train(train, rounds=6, workers={"count": 2, "local_steps": 2}, schedule=schedule)
    expected = [2, 2, 4, 6, 8, 8]
    assert sizes == {version: {size} for version, size in enumerate(expected)}
    assert [row["samples"] for row in inline.rows] == [4 * size for size in expected]
    assert inline.rows[-1]["position"] == 4 * sum(expected) == 120
    first = [index for _, _, indices in sorted(taken, key=lambda one: one[0]) for index in indices]
    assert sorted(first) == sorted([*range(60), *range(60)])
