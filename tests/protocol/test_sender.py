"""A sender carries over what it does not send, and its ledger balances at every step of the way."""

import math

import numpy as np
import pytest
import torch

from protocol import Layout, NotFiniteError, compressor, ledger
from protocol.layout import Entry
from protocol.segment import unpack
from protocol.update import Update
from protocol.sender import Sender

VALUES = ("none", "f64", "f32", "bf16", "int8", "int4", "sign")
SPECS = ("none", "f64", "f32", "bf16", "sign", *(f"topk:{r}+{v}" for r in ("0.1", "1e-9") for v in VALUES))
ROUNDS = 60
HEALTHY, ALERT = 4, 16  # conservation errors

every_spec = pytest.mark.parametrize("spec", SPECS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def layout(dtype="float32"):
    return Layout(
        (
            Entry("weight", (40, 20), dtype, "parameter"),
            Entry("bias", (7,), dtype, "parameter"),
            Entry("nothing", (0, 3), dtype, "parameter"),
            Entry("one", (), dtype, "parameter"),
        )
    )


def sender(spec, keep=True, dtype="float32", seed=5):
    place = layout(dtype)
    return Sender(place, (compressor(spec),) * len(place.segments), seed, keep)


def updates(sender, seed=0):
    """Random updates with a heavy tail, for ever."""
    random = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(sender.layout.numel, generator=random, dtype=sender.layout.dtype) ** 3


def dense(sender, message):
    parts = [update.dense().to(sender.layout.dtype) for update in message.updates]
    return torch.cat(parts)


@every_dtype
@every_spec
@pytest.mark.parametrize("keep", [True, False], ids=("carried", "dropped"))
def test_the_ledger_balances_through_commits_refusals_and_averages(spec, keep, dtype):
    one = sender(spec, keep, dtype)
    random = np.random.default_rng(0)
    for sequence, given in zip(range(ROUNDS), updates(one), strict=False):
        one.stage(given, sequence)
        assert one.conservation_error() <= HEALTHY, "staged"
        if random.random() < 0.3:
            one.refuse()
        else:
            one.commit()
        assert one.conservation_error() <= HEALTHY
        if keep and random.random() < 0.3:
            averaged = Sender(one.layout, one.compressors, 1, keep=False)
            one.replace(averaged.stage(one.residual, sequence), 0.1 * given)
            assert one.conservation_error() <= HEALTHY, "averaged"
    if keep and spec not in ("none", "f64", "f32"):
        assert one.error_norm() > 0


@every_spec
def test_what_is_sent_and_what_is_kept_add_up(spec):
    one = sender(spec, dtype="float64")
    for sequence, given in zip(range(5), updates(one), strict=False):
        owed = one.residual + given
        message = one.stage(given, sequence)
        one.commit()
        assert torch.allclose(dense(one, message) + one.residual, owed, rtol=0, atol=1e-12)
        assert math.sqrt(message.norms.before) == pytest.approx(float(owed.norm()), rel=1e-6)
        assert math.sqrt(message.norms.sent) == pytest.approx(float(dense(one, message).norm()), rel=1e-6)
        assert math.sqrt(message.norms.left) == pytest.approx(one.error_norm(), rel=1e-5, abs=1e-9)


FAULTS = {
    "lost": lambda arrived: [],
    "doubled": lambda arrived: [*arrived, *arrived],
    "altered": lambda arrived: [(_altered(arrived[0][0]), arrived[0][1]), *arrived[1:]],
}


def _altered(update):
    values = update.values.copy()
    values[np.argmax(np.abs(values))] *= -1
    return Update(update.numel, update.indices, values)


@pytest.mark.parametrize("fault", [None, *FAULTS])
@every_spec
def test_the_imbalance_is_large_if_one_message_of_many_is_lost_doubled_or_altered(spec, fault):
    """The books are kept from what arrives, as when a receiver's are held against a sender's."""
    one, books, fired = sender(spec), ledger.Ledger(), False
    for sequence, given in zip(range(ROUNDS), updates(one), strict=False):
        message = one.stage(given, sequence)
        one.commit()
        arrived = [(update, place.start) for update, place in zip(message.updates, one.layout.segments, strict=True)]
        if fault and sequence == ROUNDS // 2:
            arrived, fired = FAULTS[fault](arrived), True
        sent = sum((ledger.sketch_update(*part) for part in arrived), np.zeros(ledger.COLUMNS))
        books.enter(ledger.sketch(given), sent, None, math.sqrt(message.norms.before))
    assert fired == bool(fault)
    if fault:
        assert books.error(one.residual) > 100 * ALERT
    else:
        assert books.error(one.residual) <= HEALTHY


def test_the_imbalance_is_large_if_a_single_residual_goes_wrong():
    one = sender("topk:0.1+int4")
    for sequence, given in zip(range(ROUNDS), updates(one), strict=False):
        one.stage(given, sequence)
        one.commit()
    one.residual[3] += 0.1
    assert one.conservation_error() > ALERT


# -- stage, commit, refuse, replace ------------------------------------------------------------------


def test_staging_changes_nothing_that_counts():
    one = sender("topk:0.1+sign")
    given, again = (next(updates(one, seed)) for seed in (1, 2))
    one.stage(given, 0)
    one.commit()
    residual, difference = one.residual.clone(), one.ledger.difference.copy()
    first = one.stage(again, 1)
    assert torch.equal(one.residual, residual)
    assert np.array_equal(one.ledger.difference, difference)
    second = one.stage(again, 1)  # the same again, as after a crash
    assert [bytes(b) for b in first.bodies] == [bytes(b) for b in second.bodies]
    one.commit()
    assert not torch.equal(one.residual, residual)


def test_a_refused_update_joins_the_residual_whole():
    one = sender("topk:0.1+sign")
    stream = updates(one)
    one.stage(next(stream), 0)
    one.commit()
    residual, given = one.residual.clone(), next(stream)
    one.stage(given, 1)
    one.refuse()
    assert torch.equal(one.residual, residual + given)


def test_a_refused_update_is_discarded_if_nothing_is_carried_over():
    one = sender("topk:0.1", keep=False)
    one.stage(next(updates(one)), 0)
    one.refuse()
    assert one.error_norm() == 0
    assert one.conservation_error() == 0


def test_without_feedback_the_residual_stays_zero_and_the_rest_counts_as_discarded():
    one = sender("topk:0.1", keep=False)
    given = next(updates(one))
    message = one.stage(given, 0)
    one.commit()
    assert one.error_norm() == 0
    assert one.conservation_error() <= HEALTHY
    assert math.sqrt(message.norms.left) == pytest.approx(float((given - dense(one, message)).norm()), rel=1e-6)


@pytest.mark.parametrize("act", [Sender.commit, Sender.refuse])
def test_only_a_staged_message_can_be_committed_or_refused_and_only_once(act):
    one = sender("none")
    with pytest.raises(RuntimeError, match="no message is staged"):
        act(one)
    one.stage(next(updates(one)), 0)
    act(one)
    with pytest.raises(RuntimeError, match="no message is staged"):
        act(one)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_spec
def test_an_update_that_is_not_finite_is_named_and_leaves_everything_as_it_was(spec, bad):
    one = sender(spec)
    stream = updates(one)
    one.stage(next(stream), 0)
    one.commit()
    residual, error = one.residual.clone(), one.conservation_error()
    given = next(stream)
    given[802] = bad
    with pytest.raises(NotFiniteError, match="the update of 'bias' holds NaN or Inf"):
        one.stage(given, 1)
    assert torch.equal(one.residual, residual)
    assert one.conservation_error() == error
    with pytest.raises(RuntimeError, match="no message is staged"):
        one.commit()


def test_error_averaging_neither_adds_to_nor_takes_from_the_sum_of_residuals():
    shares = (0.5, 0.25, 0.25)
    senders = [sender("topk:0.1+int4", seed=k) for k in range(3)]
    for k, one in enumerate(senders):
        one.stage(next(updates(one, k)), 0)
        one.commit()
    before = sum(one.residual.double() for one in senders)
    sent = [Sender(o.layout, (compressor("topk:0.3+sign"),) * 4, 0, keep=False).stage(o.residual, 1) for o in senders]
    total = sum(dense(o, m) for o, m in zip(senders, sent, strict=True))
    for one, message, share in zip(senders, sent, shares, strict=True):
        one.replace(message, share * total)
        assert one.conservation_error() <= HEALTHY
    after = sum(one.residual.double() for one in senders)
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-6)


def test_error_averaging_without_compression_gives_everyone_a_share_of_the_sum():
    one = sender("topk:0.1+int4")
    one.stage(next(updates(one)), 0)
    one.commit()
    exact = Sender(one.layout, (compressor("f32"),) * 4, 0, keep=False).stage(one.residual, 1)
    received = next(updates(one, 9))
    one.replace(exact, received)
    assert torch.equal(one.residual, received)


# -- randomness and bodies ---------------------------------------------------------------------------


@every_spec
def test_equal_seeds_and_numbers_give_equal_bytes(spec):
    one, other = sender(spec), sender(spec)
    for sequence, given in zip(range(3), updates(one), strict=False):
        pair = [s.stage(given, sequence) for s in (one, other)]
        assert [bytes(b) for b in pair[0].bodies] == [bytes(b) for b in pair[1].bodies]
        one.commit()
        other.commit()


def test_there_is_one_body_a_segment_and_it_decodes_to_the_update():
    one = sender("topk:0.1+int4")
    message = one.stage(next(updates(one)), 0)
    assert len(message.bodies) == len(one.layout.segments) == 4
    for body, update, place in zip(message.bodies, message.updates, one.layout.segments, strict=True):
        assert torch.equal(unpack(body, place.numel).dense(), update.dense())
