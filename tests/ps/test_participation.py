"""Weights by samples and client sampling, frame by frame: who counts how much, and who may leave when."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from protocol.messages import Entry, Farewell, Pull
from protocol.sampling import participants

FOUR = (0, 1, 2, 3)
HALF = {"workers": FOUR, "participation": 0.5}


def started(rig, samples, **plan):
    """A run whose workers said how many samples they have."""
    one = rig(workers=tuple(samples), **plan)
    for worker, count in samples.items():
        one.send(one.join(worker, samples=count))
    return one


def pull(one, worker, version=None):
    return Pull(worker, one.version if version is None else version, layout=one.layout.hash)


def sides(one, version=None):
    """Who takes part in the round and who does not."""
    version = one.version if version is None else version
    members = one.server.state.weights
    taking = participants(members, 0.5, 0, version)
    return taking, tuple(sorted(members.keys() - set(taking)))


# --- weights


def test_weights_are_the_shares_of_the_samples_and_follow_who_joins_leaves_and_comes_back(rig):
    one = started(rig, {0: 100, 1: 300, 2: 600})
    assert one.server.state.weights == {0: 0.1, 1: 0.3, 2: 0.6}
    one.send(one.join(7, samples=1000))
    assert one.round(dict.fromkeys(range(3), 0.0)).weights == {0: 0.05, 1: 0.15, 2: 0.3, 7: 0.5}
    one.send(one.leave(2))
    assert one.round(dict.fromkeys((0, 1, 7), 0.0)).weights == {0: 1 / 14, 1: 3 / 14, 7: 10 / 14}
    assert one.round(dict.fromkeys((0, 1, 7), 0.0)).weights is None
    one.send(one.join(2, samples=100))
    assert one.round(dict.fromkeys((0, 1, 7), 0.0)).weights == {0: 1 / 15, 1: 3 / 15, 2: 1 / 15, 7: 10 / 15}


def test_a_worker_that_comes_back_in_the_same_round_counts_by_what_it_has_now(rig):
    one = started(rig, {0: 100, 1: 300})
    one.send(one.leave(1))
    one.send(one.join(1, samples=100))
    entry = one.answer(one.send(one.push(0)))
    assert entry.weights == {0: 0.5, 1: 0.5}
    one.send(one.leave(1))
    one.send(one.join(1, samples=100))
    assert one.answer(one.send(one.push(0))).weights is None, "nothing has changed"


@pytest.mark.parametrize("unknown", [0, 2])
def test_everyone_counts_the_same_as_long_as_one_has_not_said(rig, unknown):
    one = started(rig, {0: 100, 1: 300, 2: 600} | {unknown: None})
    assert one.server.state.weights == dict.fromkeys(range(3), 1 / 3)
    one.send(one.leave(unknown))
    left = [worker for worker in range(3) if worker != unknown]
    known = {0: 100, 1: 300, 2: 600}
    first, _ = (one.send(one.push(worker)) for worker in left)
    entry = one.answer(first)
    assert entry.weights == {worker: known[worker] / sum(known[w] for w in left) for worker in left}


@pytest.mark.parametrize("samples", [-1, 2**32, 1.5])
def test_a_join_whose_samples_are_no_count_is_refused(rig, samples):
    one = rig()
    refusal = one.ask(one.join(0, samples=samples))
    assert (refusal.reason, one.server.state) == ("frame", None)
    assert "field 'samples' of a Join message is malformed" in refusal.detail


# --- sampling


def test_a_round_closes_when_those_who_take_part_have_pushed_and_the_others_get_the_same_entry(rig):
    one = rig(**HALF).start()
    for _ in range(6):
        (first, second), idle = sides(one)
        pulls = [one.send(pull(one, worker)) for worker in idle]
        pushed = [one.send(one.push(first, 1.0))]
        assert all(map(one.waits, pulls + pushed))
        pushed.append(one.send(one.push(second, 2.0)))
        frames = {bytes(one.heard[ticket][0]) for ticket in pulls + pushed}
        assert len(frames) == 1
        assert torch.equal(one.dense(one.answer(pulls[0])), torch.full((25,), 3.0))
    assert one.version == 6
    assert not one.vitals.rejected


def test_a_pull_that_comes_late_or_twice_is_answered_with_all_that_was_missed(rig):
    one = rig(**HALF).start()
    idle = sides(one)[1][0]
    tickets = [one.send(pull(one, idle)), one.send(pull(one, idle))]
    late = sides(one)[1][1]
    entries = []
    for _ in range(3):
        entries.append(one.round(dict.fromkeys(sides(one)[0], 1.0)))
    first, again = (one.answer(ticket) for ticket in tickets)
    assert first.version == again.version == entries[0].version == 1
    assert [entry.version for entry in one.answers(one.send(pull(one, late, version=0)))] == [1, 2, 3]
    counted = {way: sum(n for (d, _), n in one.vitals.wire.items() if d == way) for way in ("uplink", "downlink")}
    assert counted == dict(one.counted), "pulls and their answers count"


def test_an_idle_worker_that_leaves_neither_closes_the_round_nor_holds_it_up(rig):
    one = rig(**HALF).start()
    taking, idle = sides(one)
    waits = one.send(pull(one, idle[0]))
    assert isinstance(one.ask(one.leave(idle[0], residual=4.0)), Farewell)
    assert one.version == 0
    pushed = [one.send(one.push(worker, 1.0)) for worker in taking]
    entry = one.answer(pushed[0])
    assert entry.weights == dict.fromkeys((*taking, idle[1]), 1 / 3)
    assert torch.equal(one.dense(entry), torch.full((25,), 6.0)), "with what it handed over"
    assert one.answer(waits).reason == "member", "its pull is answered at once: it has left"
    assert one.ask(pull(one, idle[0])).reason == "member"


@pytest.mark.parametrize("pushed_first", [False, True])
def test_a_participant_that_leaves_does_not_hold_the_round_up(rig, pushed_first):
    one = rig(**HALF).start()
    (stays, leaves), idle = sides(one)
    waits = [one.send(pull(one, worker)) for worker in idle]
    if pushed_first:
        waits.append(one.send(one.push(stays, 1.0)))
    one.send(one.leave(leaves, residual=2.0))
    if not pushed_first:
        assert one.version == 0
        waits.append(one.send(one.push(stays, 1.0)))
    assert all(torch.equal(one.dense(one.answer(ticket)), torch.full((25,), 3.0)) for ticket in waits)
    assert sorted(one.server.state.weights) == sorted({*FOUR} - {leaves})


def test_when_all_who_take_part_leave_the_round_closes_with_what_they_hand_over_and_the_next_is_for_others(rig):
    one = rig(**HALF).start()
    taking, idle = sides(one)
    waits = [one.send(pull(one, worker)) for worker in idle]
    for worker in taking:
        assert one.version == 0
        one.send(one.leave(worker, residual=1.0))
    assert [one.answer(ticket).weights for ticket in waits] == [dict.fromkeys(idle, 0.5)] * 2
    assert torch.equal(one.w, one.model - 2)
    (next_,) = participants(idle, 0.5, 0, 1)
    assert isinstance(one.ask(one.push(next_)), Entry)


@pytest.mark.parametrize("leavers", [*itertools.permutations(FOUR, 2)], ids=str)
@pytest.mark.parametrize("moment", range(3))
def test_whoever_leaves_when_the_others_go_on_to_the_end(rig, leavers, moment):
    one = rig(rounds=5, **HALF).start()
    while not one.server.finished:
        (first, *others), idle = sides(one)
        version, gone = one.version, None
        events = [("pull", idle[0]), ("push", first), *(("pull", w) for w in idle[1:]), *(("push", w) for w in others)]
        if version < 2:
            events.insert(moment, ("leave", leavers[version]))
        for event, worker in events:
            if worker == gone or one.version > version:
                continue
            one.send({"pull": partial(pull, one), "push": one.push, "leave": one.leave}[event](worker))
            gone = worker if event == "leave" else gone
        assert one.version == version + 1
    assert sorted(one.server.state.weights) == sorted({*FOUR} - {*leavers})
    assert set(one.vitals.rejected) <= {"member"}, "of a pull that was waiting when its worker left"


def test_who_joins_late_may_be_idle_at_first_and_is_drawn_like_the_others(rig):
    one = rig(**HALF).start()
    joiner = one.send(one.join(9))
    one.round(dict.fromkeys(sides(one)[0], 0.0))
    assert one.answer(joiner).weights == dict.fromkeys((*FOUR, 9), 0.2)
    drawn = 0
    for _ in range(60):
        taking, idle = sides(one)
        assert len(taking) == 2
        drawn += 9 in taking
        pulled = [one.send(pull(one, worker)) for worker in idle]
        one.round(dict.fromkeys(taking, 0.0))
        assert not any(map(one.waits, pulled))
    assert 12 < drawn < 36


def test_when_the_run_is_stopped_idle_workers_get_the_last_entry_too(rig):
    one = rig(**HALF).start()
    waits = [one.send(pull(one, worker)) for worker in sides(one)[1]]
    one.take(one.server.stop())
    one.round(dict.fromkeys(sides(one)[0], 1.0))
    assert [one.answer(ticket).final for ticket in waits] == [True, True]
    assert one.ask(pull(one, 0)).reason == "finished"


def test_when_a_participant_finds_nan_idle_workers_are_told_that_the_run_has_ended(rig):
    one = rig(**HALF).start()
    waits = [one.send(pull(one, worker)) for worker in sides(one)[1]]
    one.send(one.leave(sides(one)[0][0], cause="not_finite"))
    assert [one.answer(ticket).reason for ticket in waits] == ["finished", "finished"]
