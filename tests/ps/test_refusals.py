"""Whatever the server does not take is refused for a reason, is counted, and leaves no trace."""

import dataclasses

import numpy as np
import pytest
import torch

from protocol import Layout, snapshot
from protocol.layout import Entry as Tensor
from protocol.messages import REASONS, Entry, Farewell, Join, Mean, Refusal, Welcome
from protocol.segment import pack_exact

OTHER = Layout((Tensor("weight", (9,), "float32", "parameter"),))
SHORT = pack_exact(np.ones(4, np.float32))


def altered(frame, at):
    frame = frame.copy()
    frame[at] ^= 1
    return frame


def with_body(message, number, body):
    bodies = list(message.bodies)
    bodies[number] = body
    return dataclasses.replace(message, bodies=tuple(bodies))


# each gives a message that is wrong in a round of workers 0, 1 and 2 at version 1, in which 0 has pushed
WRONG = [
    ("frame", "noise", lambda one: np.arange(99, dtype=np.uint8)),
    ("frame", "nothing", lambda one: np.empty(0, np.uint8)),
    ("frame", "an altered frame", lambda one: altered(one.push(1).pack(), 40)),
    ("frame", "a truncated frame", lambda one: one.push(1).pack()[:-1]),
    ("frame", "another format version", lambda one: altered(one.push(1).pack(), 4)),
    ("frame", "a welcome", lambda one: Welcome(0, 0, {})),
    ("frame", "an entry", lambda one: Entry(1, 8, bodies=one.bodies(1.0), layout=one.layout.hash)),
    ("frame", "a mean", lambda one: Mean(1, 1.0)),
    ("frame", "a refusal", lambda one: Refusal("frame", "")),
    ("frame", "a farewell", lambda one: Farewell(1)),
    ("frame", "a malformed layout", lambda one: Join(5, [["weight", [3], "int9", 0]])),
    ("layout", "a push for another layout", lambda one: one.push(1, layout=OTHER.hash)),
    ("layout", "a push for no layout", lambda one: one.push(1, layout=bytes(8))),
    ("layout", "an average for another layout", lambda one: one.average(1, layout=OTHER.hash)),
    ("layout", "a leave for another layout", lambda one: dataclasses.replace(one.leave(1, 1.0), layout=OTHER.hash)),
    ("layout", "a join with another model", lambda one: one.join(5, layout=OTHER)),
    ("member", "a push of a stranger", lambda one: one.push(5)),
    ("member", "an average of a stranger", lambda one: one.average(5)),
    ("member", "a leave of a stranger", lambda one: one.leave(5)),
    ("version", "a push of an older version", lambda one: one.push(1, version=0)),
    ("version", "a push of a newer version", lambda one: one.push(1, version=2)),
    ("version", "an average of an older version", lambda one: one.average(1, version=0)),
    ("sequence", "a gap in the numbers", lambda one: one.push(1, sequence=3)),
    ("sequence", "an average behind a gap", lambda one: one.average(1, sequence=3)),
    ("sequence", "a number that has passed", lambda one: one.push(1, sequence=0)),
    ("sequence", "a second push before the first is answered", lambda one: one.push(0, sequence=3)),
    ("sequence", "an average before the push is answered", lambda one: one.average(0, sequence=3)),
    ("segment", "no bodies", lambda one: one.push(1, bodies=())),
    ("segment", "too many bodies", lambda one: one.push(1, bodies=(*one.bodies(1.0), SHORT))),
    ("segment", "a body of another size", lambda one: with_body(one.push(1, 1.0), 1, SHORT)),
    ("segment", "a truncated body", lambda one: with_body(one.push(1, 1.0), 0, one.bodies(1.0)[0][:-1])),
    ("segment", "an average's bad body", lambda one: with_body(one.average(1, 1.0), 2, SHORT)),
    ("segment", "a bad hand-over", lambda one: with_body(one.leave(1, 1.0), 0, SHORT)),
    ("segment", "bad statistics", lambda one: one.push(1, statistics=b"\x01")),
    ("segment", "statistics that are too long", lambda one: one.push(1, statistics=bytes(65))),
    ("replica", "another digest", lambda one: one.push(1, digest=snapshot.digest(one.w) ^ 1)),
]


def in_a_round(rig):
    """Version 1, worker 0 has pushed, and all of it deterministic."""
    one = rig(downlink="topk:0.5").start()
    one.round({0: 1.0, 1: torch.arange(25.0), 2: 3.0})
    return one, one.send(one.push(0, 7.0))


@pytest.mark.parametrize(("reason", "message"), [(r, m) for r, _, m in WRONG], ids=[name for _, name, _ in WRONG])
def test_what_is_refused_is_counted_and_leaves_no_trace(rig, reason, message):
    one, pushed = in_a_round(rig)
    before = dict(one.sequences)
    wire = one.vitals.wire.copy()
    sent = message(one)
    frame = sent if isinstance(sent, np.ndarray) else sent.pack()
    ticket = one.send(frame)
    refusal = one.answer(ticket)
    assert (type(refusal), refusal.reason) == (Refusal, reason)
    assert refusal.detail
    assert "\n" not in refusal.detail
    assert one.vitals.rejected == {reason: 1}
    kinds = {"Join": "snapshot", "Average": "average"}
    assert (
        one.vitals.wire - wire
        == {
            ("uplink", kinds.get(type(sent).__name__, "update")): frame.size,
            ("downlink", "update"): one.heard[ticket][0].size,
        }
        or not frame.size
    )
    # the round goes on as if nothing had been
    one.sequences.clear()
    one.sequences.update(before)
    other, _ = in_a_round(rig)
    for rest in (one, other):
        for worker in (1, 2):
            rest.send(rest.push(worker, torch.arange(25.0)))
    assert bytes(one.heard[pushed][0]) == bytes(other.answer(pushed).pack())
    assert torch.equal(one.w, other.w)
    assert one.vitals.position == other.vitals.position
    assert one.server.state.weights == other.server.state.weights


def test_a_non_finite_update_is_counted_and_ends_the_run_at_the_last_whole_version(rig):
    one, pushed = in_a_round(rig)
    version, before = one.server.state.version, one.w.clone()
    assert isinstance(one.ask(one.leave(1, cause="not_finite")), Farewell)
    assert one.vitals.rejected == {"not_finite": 1}
    assert one.vitals.leaves == {"not_finite": 1}
    refusal = one.answer(pushed)
    assert refusal.reason == "finished"
    assert "worker 1 found NaN or Inf" in refusal.detail
    assert one.server.finished
    assert one.server.state.version == version
    assert torch.equal(one.w, before)


@pytest.mark.parametrize("message", [lambda one: one.push(1), lambda one: one.average(1), lambda one: one.join(5)])
def test_a_run_that_has_ended_takes_nothing_more(rig, message):
    one = rig(rounds=1).start()
    one.round(dict.fromkeys((0, 1, 2), 1.0))
    assert one.ask(message(one)).reason == "finished"
    assert one.vitals.rejected == {"finished": 1}


@pytest.mark.parametrize("sequence", [0, 6, 99])
def test_a_worker_may_begin_at_any_number_but_has_one_message_at_a_time(rig, sequence):
    one = rig().start()
    first = one.send(one.push(1, 5.0, sequence=5))
    assert one.ask(one.push(1, sequence=sequence)).reason == "sequence"
    assert one.ask(one.average(1, sequence=sequence)).reason == "sequence"
    for worker in (0, 2):
        one.send(one.push(worker))
    assert torch.equal(one.dense(one.answer(first)), torch.full((25,), 5.0))


@pytest.mark.parametrize("message", [lambda one: one.push(1, version=0), lambda one: one.leave(1)])
def test_before_the_first_round_there_are_no_members(rig, message):
    one = rig()
    one.send(one.join(1))
    refusal = one.ask(message(one))
    assert (refusal.reason, refusal.detail) == ("member", "worker 1 has not joined, or has left")


def test_a_replica_that_differs_is_counted_on_its_own_and_one_that_agrees_is_not(rig):
    one, pushed = in_a_round(rig)
    one.send(one.push(1, digest=snapshot.digest(one.w)))
    assert one.vitals.replica_mismatches == 0
    assert one.ask(one.push(2, digest=0)).reason == "replica"
    assert one.vitals.replica_mismatches == 1
    assert one.waits(pushed)


def test_every_reason_is_tried():
    tried = {reason for reason, _, _ in WRONG} | {"not_finite", "finished"}
    assert tried == set(REASONS)


def test_the_details_name_who_and_what(rig):
    one, _ = in_a_round(rig)
    numbers, details = dict(one.sequences), {}
    for _, name, message in WRONG:
        one.sequences.clear()
        one.sequences.update(numbers)
        details[name] = one.ask(message(one)).detail
    assert details["a push of an older version"] == "worker 1 sent an update of version 0 in round 1"
    assert details["a gap in the numbers"] == "worker 1 sent number 3 after 1"
    assert details["a welcome"] == "a server takes no Welcome message"
    assert details["another format version"] == "the frame has format version 0; this side speaks version 1"
    assert details["a body of another size"] == (
        "the message of worker 1 is not valid: segment 'bias': the segment has 4 elements where the layout has 3"
    )
    assert details["a join with another model"] == (
        "the model of worker 5 has parameter 'weight' [9] float32 where the run has parameter 'weight' [4, 5] float32"
    )


def test_a_founder_that_is_no_worker_of_the_run_is_told_who_is(rig):
    one = rig(workers=(3, 4))
    assert one.ask(one.join(0)).detail == "worker 0 is not one of this run's workers, which are 3, 4"


def test_a_founder_that_is_refused_does_not_fix_the_layout(rig):
    one = rig(overrides={"nosuch*": "none"})
    assert one.ask(one.join(0)).detail.startswith("overrides has 'nosuch*', which matches no tensor")
    other = Layout((*one.layout.entries[:-1],))
    assert one.waits(one.send(one.join(1, layout=other)))


def test_an_error_of_the_servers_own_is_no_refusal_and_does_not_block_it(rig, monkeypatch):
    """Whatever is raised instead of answered ends the run; but metrics can still be read."""
    one, _ = in_a_round(rig)
    monkeypatch.setattr("ps.server.apply", lambda state, record: 1 // 0)
    one.send(one.push(1))
    with pytest.raises(ZeroDivisionError):
        one.send(one.push(2))
    assert one.vitals.lock.acquire(blocking=False)
