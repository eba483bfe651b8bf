"""The options of ``ef``: each against the recursion of its docstring, written here in numpy; and nothing gets lost."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from protocol.ledger import Ledger

ROUNDS, WEIGHT = 24, 0.25
HEALTHY, ALERT = 4, 16  # conservation errors
RISING = {"first": 0.1, "last": 1.0, "begin": 3, "rounds": 8}
OPTIONS = {
    "none": {},
    "decay": {"decay": 0.7},
    "clip": {"clip": 0.6},
    "reset": {"reset_every": 5},
    "delayed": {"start_round": 6},
    "strength": {"strength": 0.3},
    "rising": {"strength": RISING},
    "all": {"decay": 0.9, "clip": 0.8, "reset_every": 7, "start_round": 2, "strength": RISING},
}
DISCARDING = ("decay", "clip", "reset", "all")
MEMORIES = ("float32", "bfloat16", "int8", "sparse")

every_option = pytest.mark.parametrize("option", OPTIONS)


def topk(v, ratio=0.2):
    out, places = np.zeros_like(v), np.argsort(-np.abs(v), kind="stable")[: max(1, round(ratio * v.size))]
    out[places] = v[places]
    return out


def sign(v):
    return np.abs(v).mean() * np.where(v < 0, -1.0, 1.0)


COMPRESS = {"topk:0.2": topk, "sign": sign, "none": np.copy}


class Reference:
    """``p = s b e + g``, ``c = C(p)``, ``e' = (1 - s) b e + p - c``, segment by segment."""

    def __init__(self, options, compress, spans):
        self.options, self.compress, self.spans = options, compress, spans
        self.e = np.zeros(spans[-1].stop)
        self.sent = self.discarded = self.e

    def round(self, t, g):
        o = self.options
        if t < o.get("start_round", 0):
            self.sent = self._compressed(g)
            self.discarded = g - self.sent
            return
        s = o.get("strength", 1.0)
        if isinstance(s, dict):
            s = np.interp(t, [s["begin"], s["begin"] + s["rounds"]], [s["first"], s["last"]])
        kept = o.get("decay", 1.0) * self.e
        if t and "reset_every" in o and t % o["reset_every"] == 0:
            kept = 0.0 * self.e
        for span in self.spans if "clip" in o else ():
            bound = o["clip"] * np.abs(g[span]).max()
            kept[span] = kept[span].clip(-bound, bound)
        self.discarded = self.e - kept
        p = s * kept + g
        self.sent = self._compressed(p)
        self.e = (1 - s) * kept + p - self.sent

    def _compressed(self, v):
        return np.concatenate([self.compress(v[span]) for span in self.spans])


def updates(one, seed=0):
    """Random updates for ever, with a heavy tail."""
    random = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(one.layout.numel, generator=random, dtype=torch.float64) ** 3


def ef(lone, option, uplink, **more):
    return lone({"kind": "ef", **OPTIONS.get(option, {})}, uplink, **more)


@every_option
@pytest.mark.parametrize("spec", COMPRESS)
@pytest.mark.parametrize(("granularity", "memory"), [("layer", "float32"), ("layer", "sparse"), ("model", "float32")])
def test_each_option_follows_its_recursion(lone, option, spec, granularity, memory):
    one = ef(lone, option, spec, granularity=granularity, memory=memory)
    reference = Reference(OPTIONS[option], COMPRESS[spec], one.spans)
    assert len(one.spans) == (2 if granularity == "layer" else 1)
    for t, given in zip(range(ROUNDS), updates(one), strict=False):
        reference.round(t, WEIGHT * given.numpy())
        discarded = one.stage(given, weight=WEIGHT).norms.discarded ** 0.5
        assert one.round(given, weight=WEIGHT).numpy() == pytest.approx(reference.sent, abs=1e-12)
        assert one.sender.residual.numpy() == pytest.approx(reference.e, abs=1e-12)
        assert discarded == pytest.approx(np.linalg.norm(reference.discarded), abs=1e-12)
    assert (np.abs(reference.e).max() > 0) == (spec != "none")


def test_the_options_are_told_apart_by_these_updates(lone):
    """Else the test above would say little."""
    ends = []
    for option in OPTIONS:
        one = ef(lone, option, "topk:0.2")
        for given, _ in zip(updates(one), range(ROUNDS), strict=False):
            one.round(given)
        ends.append(one.sender.residual.clone())
        assert all(float((ends[-1] - other).abs().max()) > 1e-2 for other in ends[:-1])


@pytest.mark.parametrize("send", ["difference", "gradient"])
def test_the_workers_of_a_run_follow_the_recursion(inline, send):
    data = TensorDataset(torch.randn(60, 6, dtype=torch.float64), torch.randn(60, 2, dtype=torch.float64))
    options, seen = OPTIONS["all"], []

    def flat(tensors):
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).clone()

    def train(session):
        torch.manual_seed(1)
        model = nn.Linear(6, 2, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        session.prepare(model, optimizer)
        sender = session._rounds.method.sender
        reference = Reference(options, topk, [slice(0, 12), slice(12, 14)])
        for x, y in session.batches(data, 4):
            assert sender.residual.numpy() == pytest.approx(reference.e, abs=1e-13)
            before = flat(model.parameters())
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
            given = (
                flat(p.grad for p in model.parameters()) if send == "gradient" else before - flat(model.parameters())
            )
            reference.round(session.version, given.numpy() / 3)
            seen.append((np.linalg.norm(reference.discarded), np.linalg.norm(reference.e)))

    settings = {"feedback": {"kind": "ef", **options}, "uplink": "topk:0.2", "downlink": "topk:0.2", "send": send}
    inline.train(train, rounds=15, workers={"count": 3}, **settings)
    assert inline.summary["discarded_norm"] == pytest.approx(sum(discarded for discarded, _ in seen), rel=1e-5)
    assert inline.summary["worker_error_norm"] == pytest.approx(np.linalg.norm([e for _, e in seen[-3:]]), rel=1e-5)
    assert inline.summary["conservation_error"] <= HEALTHY


# --- the ledger


@every_option
@pytest.mark.parametrize(("granularity", "memory"), [("model", "int8"), *(("layer", memory) for memory in MEMORIES)])
@pytest.mark.parametrize("spec", ["sign", "topk:0.1+int4"])
def test_the_ledger_balances_with_every_option_in_every_memory_refusals_included(
    lone, option, memory, granularity, spec
):
    one = ef(lone, option, spec, granularity=granularity, memory=memory, dtype="float32", shapes=((30, 10), (50,)))
    for t, given in zip(range(ROUNDS), updates(one), strict=False):
        if t % 7 == 3:
            one.stage(given, weight=WEIGHT)
            one.method.refuse()
            assert one.sender.conservation_error() <= HEALTHY
        one.round(given, weight=WEIGHT)
    assert one.sender.conservation_error() <= HEALTHY
    assert one.sender.ledger.scale > 0
    assert float(one.sender.residual.abs().max()) > 0


@pytest.mark.parametrize("option", DISCARDING)
@pytest.mark.parametrize("memory", MEMORIES)
def test_what_is_discarded_would_show_if_it_were_not_booked(lone, monkeypatch, option, memory):
    enter = Ledger.enter

    def careless(self, given, sent, discarded, scale, rounding=None):
        enter(self, given, sent, None, scale, rounding)

    monkeypatch.setattr(Ledger, "enter", careless)
    one = ef(lone, option, "topk:0.1+int4", memory=memory, dtype="float32")
    for given, _ in zip(updates(one), range(ROUNDS), strict=False):
        one.round(given)
    assert one.sender.conservation_error() > ALERT


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("strength", [0.0, 0.02])
def test_a_residual_that_waits_for_long_does_not_look_like_an_imbalance(lone, memory, strength):
    """It is then far larger than what is sent, and so is the rounding of it."""
    one = lone({"kind": "ef", "strength": strength}, "sign", ((400,),), "float32", memory)
    always = torch.randn(400, generator=torch.Generator().manual_seed(1))
    worst = 0.0
    for given, _ in zip(updates(one), range(400), strict=False):
        one.round(given + 3 * always)
        worst = max(worst, one.sender.conservation_error())
    assert worst < 1.5
    assert one.sender.error_norm() > 60 * float(always.norm())


@pytest.mark.parametrize("strength", [0.0, 0.3, {"first": 0.0, "last": 1.0, "begin": 10, "rounds": 5}])
def test_the_strength_holds_back_but_loses_nothing(lone, strength):
    one = lone({"kind": "ef", "strength": strength}, "topk:0.1")
    plain = lone({"kind": "ef"}, "topk:0.1")
    given_, sent, held = torch.zeros(47, dtype=torch.float64), torch.zeros(47, dtype=torch.float64), []
    for given, _ in zip(updates(one), range(20), strict=False):
        assert one.stage(given).norms.discarded == 0.0
        given_ += given
        sent += one.round(given)
        plain.round(given)
        torch.testing.assert_close(sent + one.sender.residual, given_, rtol=0, atol=1e-11)
        held.append(one.sender.error_norm() / plain.sender.error_norm())
    assert held[9] > 1.05  # more waits than would have to


# --- refusals


@every_option
@pytest.mark.parametrize("refused_at", [1, 5, 10])
def test_a_refused_update_joins_the_residual_whatever_the_option_and_the_next_goes_on_from_there(
    lone, option, refused_at
):
    one = ef(lone, option, "topk:0.2")
    reference = Reference(OPTIONS[option], topk, one.spans)
    for t, given in zip(range(ROUNDS), updates(one), strict=False):
        if t == refused_at:
            lost = next(updates(one, seed=9))
            one.stage(lost, weight=WEIGHT)
            one.method.refuse()
            if t >= OPTIONS[option].get("start_round", 0):
                reference.e = reference.e + WEIGHT * lost.numpy()
            assert one.sender.residual.numpy() == pytest.approx(reference.e, abs=1e-12)
        reference.round(t, WEIGHT * given.numpy())
        assert one.round(given, weight=WEIGHT).numpy() == pytest.approx(reference.sent, abs=1e-12)


# --- single options


def test_a_round_without_an_update_does_not_clip_the_residual_away(lone):
    one = ef(lone, "clip", "topk:0.1")
    for given, _ in zip(updates(one), range(5), strict=False):
        one.round(given)
    before = one.sender.residual.clone()
    given = torch.zeros(47, dtype=torch.float64)
    given[:42] = before[:42]  # the second segment has no gradient
    assert one.stage(0 * given).norms.discarded == 0.0
    sent = one.round(given)
    assert torch.equal(one.sender.residual[42:], (before - sent)[42:])
    assert before[42:].abs().max() > 0


@pytest.mark.parametrize("versions", [(0, 3, 6, 9, 12), (4, 5, 6, 11, 14, 15)])
def test_a_worker_that_misses_the_round_of_a_reset_resets_in_its_next(lone, versions):
    """As with partial participation, and in asynchronous runs."""
    one, period = ef(lone, "reset", "topk:0.1"), 0
    for version, given in zip(versions, updates(one), strict=False):
        before, one.version = one.sender.error_norm(), version
        discarded = one.stage(given).norms.discarded ** 0.5
        one.round(given)
        due, period = version // 5 > period, version // 5
        assert discarded == (pytest.approx(before) if due else 0.0)
    assert period > 1


def test_a_reset_that_was_refused_is_still_due(lone):
    one = ef(lone, "reset", "topk:0.1")
    for given, _ in zip(updates(one), range(5), strict=False):
        one.round(given)
    one.stage(next(updates(one)))
    one.method.refuse()
    one.version, before = 6, one.sender.error_norm()
    assert one.stage(next(updates(one, 1))).norms.discarded ** 0.5 == pytest.approx(before)


@pytest.mark.parametrize("spec", ["topk:0.2+int4", "sign", "randk:0.3+qsgd:4"])
def test_before_its_start_there_is_no_error_feedback_and_then_it_begins_with_nothing(lone, spec):
    """An unbiased compressor does not scale itself down where nothing is kept."""
    make = partial(lone, uplink=spec, dtype="float32")
    late, without, fresh = make({"kind": "ef", "start_round": 6}), make({"kind": "none"}), make({"kind": "ef"})
    for t, given in zip(range(ROUNDS), updates(late), strict=False):
        if t < 6:
            message, other = late.stage(given), without.stage(given)
            assert message.norms == other.norms
            assert torch.equal(late.round(given), without.round(given))
            assert not late.sender.residual.any()
            continue
        fresh.version, fresh._sequence = late.version, late._sequence
        assert torch.equal(late.round(given), fresh.round(given))
        assert late.sender.residual.any()
