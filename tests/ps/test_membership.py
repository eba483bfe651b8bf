"""Joining late, leaving, coming back: nothing is lost and every replica stays the same."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from protocol import Layout, messages, snapshot
from protocol.messages import Entry, Farewell, Refusal, Welcome
from ps.log import Log

ALL = {0: 1.0, 1: 2.0, 2: 3.0}


def ramp(scale=1.0):
    return scale * torch.arange(25.0)


# -- leaving -----------------------------------------------------------------------------------------


def test_a_hand_over_enters_the_next_fold(rig):
    one = rig().start()
    farewell = one.ask(one.leave(1, ramp()))
    assert (type(farewell), farewell.version, farewell.layout) == (Farewell, 0, one.layout.hash)
    assert torch.equal(one.w, one.model), "not at once"
    tickets = [one.send(one.push(worker, 1.0)) for worker in (0, 2)]
    entry = one.answer(tickets[0])
    assert torch.equal(one.dense(entry), ramp() + 2)
    assert entry.weights == {0: 0.5, 2: 0.5}
    assert one.vitals.members == (0, 2)
    assert (one.vitals.leaves, one.vitals.handed_over) == ({"spot": 1}, 1)


def test_a_hand_over_goes_through_the_optimizer_and_never_into_the_residual(rig):
    """With a learning rate of one half, what is handed over must count half like everything else."""
    one = rig(optimizer={"kind": "torch.optim.SGD", "lr": 0.5}).start()
    one.send(one.leave(1, ramp()))
    for worker in (0, 2):
        one.send(one.push(worker))
    expected = ramp(0.5)
    expected[23:] = ramp()[23:]  # buffers are not optimized
    assert torch.equal(one.x, one.model - expected)


def test_a_leave_can_close_the_round(rig):
    one = rig().start()
    tickets = [one.send(one.push(worker, 1.0)) for worker in (0, 2)]
    assert all(one.waits(ticket) for ticket in tickets)
    one.send(one.leave(1))
    assert [one.answer(ticket).weights for ticket in tickets] == [{0: 0.5, 2: 0.5}] * 2
    assert torch.equal(one.w, one.model - 2)
    assert (one.vitals.leaves, one.vitals.handed_over) == ({"spot": 1}, 0)


def test_a_pending_push_of_a_leaver_is_folded_and_answered(rig):
    """The residual that it hands over is what remains after that push."""
    one = rig().start()
    push = one.push(1, 5.0)
    pushed = one.send(push)
    assert isinstance(one.ask(one.leave(1, 0.5)), Farewell)
    for worker in (0, 2):
        one.send(one.push(worker))
    assert torch.equal(one.dense(one.answer(pushed)), torch.full((25,), 5.5))
    assert one.server.state.sequences[1] == 1, "a hand-over does not turn the count back"
    assert bytes(one.heard[one.send(push)][0]) == bytes(one.heard[pushed][0]), "resent after its worker was let go"
    assert not one.vitals.rejected


def test_a_pending_average_of_a_leaver_is_taken_back(rig):
    """Its residual comes whole with the hand-over, so the average must not give it away as well."""
    one = rig().start()
    averages = [one.send(one.average(worker, 1.0)) for worker in (0, 1)]
    assert isinstance(one.ask(one.leave(1, 1.0)), Farewell)
    assert one.answer(averages[1]).reason == "member"
    averages.append(one.send(one.average(2, 1.0)))
    mean = one.answer(averages[0])
    assert mean.weight == pytest.approx(2 / 3)
    assert torch.equal(one.dense(mean), torch.full((25,), 2.0))
    for worker in (0, 2):
        one.send(one.push(worker))
    assert torch.equal(one.w, one.model - 1)


def test_a_leave_can_complete_an_average(rig):
    one = rig().start()
    averages = [one.send(one.average(worker, 1.0)) for worker in (0, 2)]
    one.send(one.leave(1))
    assert one.answer(averages[0]).weight == pytest.approx(2 / 3)


@pytest.mark.parametrize("closed", [False, True], ids=("in the same round", "after it"))
def test_a_leave_that_comes_twice_counts_once(rig, closed):
    one = rig().start()
    leave = one.leave(1, ramp()).pack()
    first = one.send(leave)
    if closed:
        for worker in (0, 2):
            one.send(one.push(worker))
    again = one.send(leave)
    assert bytes(one.heard[again][0]) == bytes(one.heard[first][0])
    if not closed:
        for worker in (0, 2):
            one.send(one.push(worker))
    assert torch.equal(one.w, one.model - ramp())
    assert (one.vitals.leaves, one.vitals.handed_over) == ({"spot": 1}, 1)
    assert one.vitals.wire["uplink", "resend"] == leave.size
    assert not one.vitals.rejected


def test_who_has_left_can_neither_push_nor_average(rig):
    one = rig().start()
    one.send(one.leave(1))
    assert one.ask(one.push(1)).reason == "member"
    for worker in (0, 2):
        one.send(one.push(worker))
    assert one.ask(one.push(1)).reason == "member"
    assert one.ask(one.average(1)).reason == "member"


def test_when_the_last_one_leaves_the_run_ends_with_what_was_handed_over(rig):
    one = rig().start()
    for worker in (0, 2):
        one.send(one.leave(worker, 1.0))
    assert not one.server.finished
    farewell = one.ask(one.leave(1, 1.0))
    assert isinstance(farewell, Farewell)
    assert one.server.finished
    assert torch.equal(one.w, one.model - 3)
    assert (one.vitals.members, one.vitals.state) == ((), "finished")
    assert one.server.state.weights == {}


@pytest.mark.parametrize("cause", ["spot", "not_finite"])
def test_a_leave_after_the_end_is_answered_and_folds_nothing(rig, cause):
    one = rig(rounds=1).start()
    one.round(ALL)
    w = one.w
    assert isinstance(one.ask(one.leave(1, 1.0, cause)), Farewell)
    assert torch.equal(one.w, w)
    assert one.vitals.handed_over == 0, "it was not folded"
    assert one.vitals.state == "finished"


# -- joining late ------------------------------------------------------------------------------------


def test_a_late_joiner_enters_with_the_next_version(rig):
    one = rig().start()
    one.round(ALL)
    joiner = one.send(one.join(7))
    assert one.waits(joiner)
    entry = one.round(ALL)
    quarter = dict.fromkeys((0, 1, 2, 7), 0.25)
    assert (entry.version, entry.weights) == (2, quarter)
    welcome = one.answer(joiner)
    assert (welcome.version, welcome.position, welcome.weights) == (2, 48, quarter)
    w, statics = snapshot.unpack_snapshot(one.layout, welcome.bodies)
    assert torch.equal(w, one.w)
    assert snapshot.restore_static(statics[0], (), "int64").item() == 41
    assert (one.vitals.joins, one.vitals.members) == (4, (0, 1, 2, 7))
    tickets = [one.send(one.push(worker)) for worker in ALL]
    assert all(one.waits(ticket) for ticket in tickets), "the joiner counts from now on"
    assert one.answer(one.send(one.push(7))).weights is None


def test_weights_are_announced_with_the_entry_from_which_they_hold(rig):
    one = rig().start()
    seen = [one.round(ALL).weights]
    one.send(one.join(7))
    one.send(one.join(5))
    seen.append(one.round(ALL).weights)
    seen.append(one.round(dict.fromkeys((0, 1, 2, 5, 7), 0.0)).weights)
    one.send(one.leave(0))
    seen.append(one.round(dict.fromkeys((1, 2, 5, 7), 0.0)).weights)
    seen.append(one.round(dict.fromkeys((1, 2, 5, 7), 0.0)).weights)
    assert seen == [None, dict.fromkeys((0, 1, 2, 5, 7), 0.2), None, dict.fromkeys((1, 2, 5, 7), 0.25), None]
    assert list(seen[1]) == [0, 1, 2, 5, 7]


def one_hot(one, place):
    return torch.eye(one.layout.numel)[place]


def sparse_run(rig):
    """Four versions that differ little from each other."""
    entries = [dataclasses.replace(e, shape=(6, 10)) if e.name == "weight" else e for e in rig().layout.entries]
    one = rig(layout=Layout(tuple(entries)), downlink="topk:0.01").start()
    replicas, frames = [one.w], []
    for n in range(4):
        frames.append(one.round(dict.fromkeys(ALL, one_hot(one, n))).pack())
        replicas.append(one.w)
    return one, replicas, frames


def follow(one, replica, answer):
    """What a worker that held a replica holds after an answer to its join: replica, version, weights."""
    welcome, *entries = answer
    version, weights = welcome.version, welcome.weights
    if welcome.bodies:
        replica, _ = snapshot.unpack_snapshot(one.layout, welcome.bodies)
    for entry in entries:
        version += 1
        assert (type(entry), entry.version) == (Entry, version)
        for place, update in zip(one.layout.segments, messages.updates(entry, one.layout), strict=True):
            update.subtract_from(replica[place.start : place.stop])
        weights = weights if entry.weights is None else entry.weights
    return replica, version, weights


@pytest.mark.parametrize("held", [None, 0, 1, 2, 3, 4, 5, 99])
def test_a_joiner_gets_the_entries_that_it_lacks_or_a_snapshot_whichever_is_smaller(rig, held):
    one, replicas, _ = sparse_run(rig)
    joiner = one.send(one.join(7, version=held))
    one.round(dict.fromkeys(ALL, one_hot(one, 9)))
    replicas.append(one.w)
    frames, sizes = one.heard[joiner], []
    kept = replicas[held].clone() if held is not None and held <= 5 else torch.full_like(one.w, torch.nan)
    replica, version, weights = follow(one, kept, one.answers(joiner))
    assert torch.equal(replica, one.w)
    assert (version, weights) == (5, dict.fromkeys((0, 1, 2, 7), 0.25))
    # the sizes of both ways, packed here
    common = {"weights": weights, "layout": one.layout.hash}
    whole = Welcome(5, 5 * 24, bodies=snapshot.pack(one.layout, one.w, one.server.state.statics), **common).pack()
    sizes.append(whole.size)
    if held is not None and held <= 5:
        entries = one.server.state.log.since(held)
        sizes.append(Welcome(held, 5 * 24, **common).pack().size + sum(entry.size for entry in entries))
    assert sum(frame.size for frame in frames) == min(sizes)
    assert bool(one.answers(joiner)[0].bodies) == (min(sizes) == sizes[0])


def test_both_ways_of_catching_up_occur(rig):
    ways = set()
    for held in (0, 4):
        one, *_ = sparse_run(rig)
        joiner = one.send(one.join(7, version=held))
        one.round(ALL)
        ways.add(len(one.heard[joiner]))
    assert ways == {1, 2}


def test_a_replica_older_than_the_log_gets_a_snapshot(rig):
    one, _, _ = sparse_run(rig)
    one.server.state.log.window = 2
    joiner = one.send(one.join(7, version=3))
    farther = one.send(one.join(8, version=2))
    one.round(dict.fromkeys(ALL, one_hot(one, 0)))
    assert [len(one.heard[ticket]) for ticket in (joiner, farther)] == [3, 1]


def test_an_empty_log_does_not_pass_for_no_news(rig):
    """As after a restart from a snapshot."""
    one, _, _ = sparse_run(rig)
    one.server.state.log = Log()
    (welcome,) = one.answers(one.send(one.join(1, version=3)))
    assert (welcome.version, len(welcome.bodies)) == (4, 4)
    (welcome,) = one.answers(one.send(one.join(1, version=4)))
    assert (welcome.version, len(welcome.bodies)) == (4, 0)


def test_entries_for_a_joiner_are_the_frames_that_were_broadcast(rig):
    one, _, frames = sparse_run(rig)
    joiner = one.send(one.join(7, version=3))
    one.round(dict.fromkeys(ALL, one_hot(one, 0)))
    assert bytes(one.heard[joiner][1]) == bytes(frames[3])


def test_a_joiner_waits_once_however_often_it_asks(rig):
    one = rig().start()
    tickets = [one.send(one.join(7)) for _ in range(3)]
    one.round(ALL)
    assert len({bytes(one.heard[ticket][0]) for ticket in tickets}) == 1
    assert one.vitals.joins == 4


# -- coming back -------------------------------------------------------------------------------------


def test_a_member_whose_welcome_was_lost_is_welcomed_again_at_once(rig):
    """Otherwise it would wait for a round that waits for its push."""
    one = rig().start()
    one.round(ALL)
    for other in (0, 2):
        one.send(one.push(other))
    welcome = one.ask(one.join(1))
    assert (welcome.version, welcome.weights) == (1, dict.fromkeys(ALL, 1 / 3))
    assert torch.equal(snapshot.unpack_snapshot(one.layout, welcome.bodies)[0], one.w)
    assert one.vitals.joins == 3
    entry = one.ask(one.push(1, sequence=1))  # it may have lost count
    assert (entry.version, entry.weights) == (2, None)


def test_a_member_that_comes_back_with_its_replica_need_not_get_it_again(rig):
    one = rig().start()
    one.round(ALL)
    (welcome,) = one.answers(one.send(one.join(1, version=1)))
    assert (welcome.version, welcome.bodies) == (1, ())


def test_a_member_that_comes_back_after_its_push_is_welcomed_when_the_round_has_closed(rig):
    one = rig().start()
    pushed = one.send(one.push(1, 2.0))
    back = one.send(one.join(1))
    assert one.waits(back)
    for worker in (0, 2):
        one.send(one.push(worker))
    assert one.answer(pushed).weights is None
    assert one.answer(back).version == 1
    assert torch.equal(one.w, one.model - 2)
    assert one.vitals.joins == 3


def test_a_member_that_comes_back_during_an_average_starts_it_anew(rig):
    one = rig().start()
    tickets = [one.send(one.average(worker, 1.0)) for worker in (0, 1)]
    assert isinstance(one.ask(one.join(1)), Welcome)
    assert isinstance(one.answer(tickets[1]), Refusal)
    tickets += [one.send(one.average(worker, 4.0, sequence=1)) for worker in (1, 2)]
    assert torch.equal(one.dense(one.answer(tickets[0])), torch.full((25,), 9.0))


@pytest.mark.parametrize("closed", [False, True], ids=("in the same round", "after it"))
def test_a_leaver_can_come_back(rig, closed):
    one = rig().start()
    one.round(ALL)
    one.send(one.leave(1, ramp()))
    if closed:
        for worker in (0, 2):
            one.send(one.push(worker))
    back = one.send(one.join(1))
    assert one.waits(back)
    tickets = [one.send(one.push(worker)) for worker in (0, 2)]
    entry = one.answer(tickets[0])
    assert entry.weights == (dict.fromkeys(ALL, 1 / 3) if closed else None)
    assert one.answer(back).weights == dict.fromkeys(ALL, 1 / 3)
    assert one.vitals.joins == 4
    assert torch.equal(one.w, one.model - 6 - ramp())
    one.round({0: 0.0, 2: 0.0, 1: 0.0})
    assert isinstance(one.ask(one.leave(1)), Farewell), "a leave of its second stay is no repetition of the first"
    assert one.vitals.leaves == {"spot": 2}


def test_names_of_reported_values_start_anew_with_a_new_start(rig):
    one = rig(workers=(0,)).start()
    one.round({0: 0.0}, names=["loss", "accuracy"], statistics=messages.pack_statistics({16: 1.0, 17: 0.5}))
    one.send(one.join(0))
    one.round({0: 0.0}, names=["accuracy"], statistics=messages.pack_statistics({16: 0.75}))
    assert one.vitals.reported == {"loss": 1.0, "accuracy": 0.75}


# -- the order of events -----------------------------------------------------------------------------


def test_joins_and_leaves_in_any_order_give_the_same_bits(rig):
    frames = set()
    for order in itertools.permutations(range(5)):
        one = rig(downlink="topk:0.3").start()
        events = (
            lambda one: one.push(0, ramp(0.1)),
            lambda one: one.push(2, ramp(0.7)),
            lambda one: one.leave(1, ramp(0.3)),
            lambda one: one.join(8),
            lambda one: one.join(7),
        )
        if order[-1] >= 3:  # who joins last would miss the round
            continue
        for number in order:
            one.send(events[number](one))
        assert one.version == 1
        frames.add((bytes(one.server.state.log.since(0)[0]), one.w.numpy().tobytes()))
    assert len(frames) == 1
    assert np.frombuffer(next(iter(frames))[1], np.float32).size == 25
