"""A sender carries over what it does not send, and its ledger balances at every step of the way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from protocol import Layout, NotFiniteError, compressor, ledger
from protocol.carry import OWED, Dropped
from protocol.layout import Entry
from protocol.segment import exact, unpack
from protocol.sender import Sender
from protocol.update import Update
from protocol.values.decoded import Narrowed

VALUES = ("none", "f64", "f32", "bf16", "int8", "int4", "sign")
SPECS = ("none", "f64", "f32", "bf16", "sign", *(f"topk:{r}+{v}" for r in ("0.1", "1e-9") for v in VALUES))
OTHERS = ("f16", "ternary", "natural", "qsgd:4", "randk:0.1", "blocktopk:0.1,block=64+int2", "threshold:0.5+sign")
ROUNDS = 60
HEALTHY, ALERT = 4, 16  # conservation errors
MEMORIES = ("float32", "bfloat16", "int8", "sparse")

every_spec = pytest.mark.parametrize("spec", SPECS)
every_memory = pytest.mark.parametrize("memory", MEMORIES)
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


def sender(spec, dtype="float32", seed=5, memory="float32"):
    place = layout(dtype)
    each = compressor(spec) if isinstance(spec, str) else spec
    return Sender(place, (each,) * len(place.segments), seed, memory=memory)


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
            one.replace(one.average(one.compressors, sequence), 0.1 * given)
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
    return Update(update.numel, update.indices, Narrowed(values.view(np.uint8), exact(values.dtype), values.dtype))


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
        assert books.error(ledger.sketch(one.residual)) > 100 * ALERT
    else:
        assert books.error(ledger.sketch(one.residual)) <= HEALTHY


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
    one = sender("topk:0.1", memory=None)
    one.stage(next(updates(one)), 0, Dropped())
    one.refuse()
    assert one.error_norm() == 0
    assert one.conservation_error() == 0


def test_without_feedback_the_residual_stays_zero_and_the_rest_counts_as_discarded():
    one = sender("topk:0.1", memory=None)
    given = next(updates(one))
    message = one.stage(given, 0, Dropped())
    one.commit()
    assert one.error_norm() == 0
    assert one.conservation_error() <= HEALTHY
    assert message.norms.left == 0
    dropped = float((given - dense(one, message)).norm())
    assert math.sqrt(message.norms.discarded) == pytest.approx(dropped, rel=1e-6)


@pytest.mark.parametrize("act", [Sender.commit, Sender.refuse])
def test_only_a_staged_message_can_be_committed_or_refused_and_only_once(act):
    one = sender("none")
    with pytest.raises(RuntimeError, match="no message is staged"):
        act(one)
    one.stage(next(updates(one)), 0)
    act(one)
    with pytest.raises(RuntimeError, match="no message is staged"):
        act(one)


def test_error_averaging_waits_until_a_staged_message_is_committed_or_refused():
    one = sender("topk:0.1")
    given = next(updates(one))
    one.stage(given, 0)
    with pytest.raises(RuntimeError, match="a message is staged"):
        one.replace(one.average(one.compressors, 1), given)
    one.commit()
    one.replace(one.average(one.compressors, 1), given)
    assert one.conservation_error() <= HEALTHY


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
    sent = [one.average((compressor("topk:0.3+sign"),) * 4, 1) for one in senders]
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
    exact = one.average((compressor("f32"),) * 4, 1)
    received = next(updates(one, 9))
    one.replace(exact, received)
    assert torch.equal(one.residual, received)


# -- memories ----------------------------------------------------------------------------------------


def act(one, what, sequence, given):
    """One step of a sender's life; the bodies that leave it."""
    if what == "average":
        message = one.average((compressor("topk:0.3+sign"),) * 4, sequence)
        one.replace(message, 0.3 * given)
        return message.bodies
    if what == "not finite":
        broken = given.clone()
        broken[-1] = math.nan
        with pytest.raises(NotFiniteError):
            one.stage(broken, sequence)
        return ()
    message = one.stage(given, sequence)
    if what == "staged twice":
        message = one.stage(given, sequence)
    one.refuse() if what == "refuse" else one.commit()
    return message.bodies


lives = st.lists(st.sampled_from(["commit", "refuse", "average", "staged twice", "not finite"]), min_size=1)


@every_memory
@settings(deadline=None, max_examples=40)
@drawn(
    life=lives,
    spec=st.sampled_from(["topk:0.1+int4", "sign", "bf16", "none"]),
    dtype=st.sampled_from(["float32", "float64"]),
    exponent=st.integers(-18, 18),
)
def test_the_ledger_balances_in_every_memory_whatever_happens(memory, life, spec, dtype, exponent):
    one = sender(spec, dtype=dtype, memory=memory)
    for sequence, (what, given) in enumerate(zip(life, updates(one), strict=False)):
        act(one, what, sequence, given * 10.0**exponent)
        assert one.conservation_error() <= HEALTHY, what


@settings(deadline=None, max_examples=40)
@drawn(life=lives, spec=st.sampled_from(["topk:0.1+int4", "sign", "bf16", "none"]), density=st.floats(0, 1))
def test_sparse_memory_is_the_working_precision_bit_for_bit(life, spec, density):
    one, other = sender(spec, memory="float32"), sender(spec, memory="sparse")
    random = torch.Generator().manual_seed(0)
    for sequence, (what, given) in enumerate(zip(life, updates(one), strict=False)):
        given *= torch.rand(given.shape, generator=random) < density
        bodies = [[bytes(b) for b in act(each, what, sequence, given)] for each in (one, other)]
        assert bodies[0] == bodies[1]
        assert torch.equal(one.residual, other.residual)


@pytest.mark.parametrize("spec", [*SPECS, *OTHERS])
@every_dtype
def test_every_compressor_may_leave_its_rest_in_the_vector_that_it_is_given(spec, dtype):
    """Which is how the compact memories call it: with the sum, and where it lies."""
    for seed in range(3):
        total = next(updates(sender(spec, dtype=dtype), seed))
        rest = torch.empty_like(total)
        apart, _ = compressor(spec).encode(total, (), 7, residual_out=rest)
        within = total.clone()
        body, _ = compressor(spec).encode(within, (), 7, residual_out=within)
        assert bytes(body) == bytes(apart)
        assert torch.equal(within, rest)


@every_memory
def test_a_memory_leaves_hardly_more_unsent_than_the_working_precision(memory):
    exact, one = sender("topk:0.1", dtype="float64"), sender("topk:0.1", dtype="float64", memory=memory)
    for sequence, given in zip(range(ROUNDS), updates(one), strict=False):
        left = []
        for each in (exact, one):
            left.append(each.stage(given, sequence).norms.left)
            each.commit()
        assert left[1] < 1.1 * left[0]


@every_memory
def test_equal_seeds_and_numbers_give_equal_residuals(memory):
    one, same, other = (sender("topk:0.1+sign", seed=seed, memory=memory) for seed in (5, 5, 6))
    for sequence, given in zip(range(10), updates(one), strict=False):
        for each in (one, same, other):
            act(each, ("commit", "refuse", "average")[sequence % 3], sequence, given)
    assert torch.equal(one.residual, same.residual)
    assert torch.equal(one.residual, other.residual) == (memory in ("float32", "sparse"))


@every_memory
def test_what_is_subtracted_is_the_residual_of_the_first_segments(memory):
    one = sender("topk:0.1", memory=memory)
    one.stage(next(updates(one)), 0)
    one.commit()
    assert torch.cat([part.clone() for _, part in one.parts()]).equal(one.residual)
    assert [place for place, _ in one.parts()] == list(one.layout.segments)
    for size in (0, 800, 807, 808):
        out = torch.ones(size)
        one.subtract_residual(out, 2.5)
        assert torch.allclose(out, 1 - 2.5 * one.residual[:size], rtol=0, atol=1e-5)


class Leaking:
    """At one call for the largest segment, what it sends gets lost on the way."""

    def __init__(self, call):
        self.inner, self.call, self.calls, self.fired = compressor("topk:0.1+int4"), call, 0, False

    def init(self, numel):
        return ()

    def encode(self, vector, state, key, residual=None, residual_out=None, norms=None):
        body, state = self.inner.encode(vector, state, key, residual, residual_out, norms)
        self.calls += vector.numel() == 800
        if self.calls == self.call and vector.numel() == 800:
            self.fired = True
            body, _ = self.inner.encode(torch.zeros_like(vector), state, key)
        return body, state


@every_memory
@pytest.mark.parametrize("call", [1, ROUNDS // 2, ROUNDS])
def test_one_segment_that_is_lost_in_one_of_many_rounds_shows_in_every_memory(memory, call):
    leaking = Leaking(call)
    one = sender(leaking, memory=memory)
    for sequence, given in zip(range(ROUNDS), updates(one), strict=False):
        one.stage(given, sequence)
        one.commit()
        assert (one.conservation_error() > HEALTHY) == leaking.fired
    assert leaking.fired
    assert one.conservation_error() > ALERT


@every_memory
def test_the_error_of_a_healthy_sender_is_near_one_at_most_and_does_not_grow(memory):
    one, found = sender("topk:0.1+int4", memory=memory), []
    for sequence, given in zip(range(600), updates(one), strict=False):
        one.stage(given, sequence)
        one.commit()
        found.append(one.conservation_error())
    assert max(found) < 1.5
    if memory in ("bfloat16", "int8"):
        assert min(found) > 0.2  # the bound is not idle


# -- states ------------------------------------------------------------------------------------------


class Counting:
    """A compressor whose state is how often it was used, and for how many elements."""

    def __init__(self):
        self.inner, self.seen = compressor("topk:0.1"), []

    def init(self, numel):
        return (numel, 0)

    def encode(self, vector, state, key, residual=None, residual_out=None, norms=None):
        assert state[0] == vector.numel()
        self.seen.append(state[1])
        body, _ = self.inner.encode(vector, (), key, residual, residual_out, norms)
        return body, (state[0], state[1] + 1)

    def saw(self):
        """The count of the last message, the same for all four segments."""
        first, *others = self.seen[-4:]
        assert others == [first] * 3
        return first


@every_memory
def test_a_compressors_state_is_adopted_with_the_message_and_forgotten_with_a_refusal(memory):
    counting = Counting()
    one = sender(counting, memory=memory)
    stream = updates(one)

    def staged(sequence, given):
        one.stage(given, sequence)
        return counting.saw()

    assert staged(0, next(stream)) == 0
    assert staged(0, next(stream)) == 0  # nothing is final yet
    one.commit()
    assert staged(1, next(stream)) == 1
    one.refuse()
    assert staged(2, next(stream)) == 1
    one.commit()
    broken = next(stream)
    broken[-1] = math.inf
    with pytest.raises(NotFiniteError):
        one.stage(broken, 3)
    assert staged(3, next(stream)) == 2
    one.commit()
    averaging = Counting()
    one.replace(one.average((averaging,) * 4, 4), next(stream))
    assert averaging.saw() == 0
    assert staged(5, next(stream)) == 3


class Watching:
    """Notes which of ``residual`` and ``residual_out`` it was given."""

    def __init__(self):
        self.inner, self.seen = compressor("topk:0.1"), set()

    def init(self, numel):
        return ()

    def encode(self, vector, state, key, residual=None, residual_out=None, norms=None):
        self.seen.add((residual is not None, residual_out is not None))
        return self.inner.encode(vector, state, key, residual, residual_out, norms)


@every_memory
def test_a_compressor_can_tell_whether_what_it_leaves_is_kept(memory):
    for rule, seen in ((Dropped(), {(False, False)}), (OWED, {(memory == "float32", True)})):
        watching = Watching()
        one = sender(watching, memory=memory)
        one.stage(next(updates(one)), 0, rule)
        assert watching.seen == seen
    averaging = Watching()
    one.average((averaging,) * 4, 1)
    assert averaging.seen == {(False, True)}


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
