"""Rounds: joining, folding, answering, resending, averaging, ending."""

import itertools

import pytest
import torch

from protocol import Layout, messages, snapshot
from protocol.layout import Entry as Tensor
from protocol.messages import Entry, Join, Mean, Refusal, Welcome

THREE = {0: 1.0, 1: 2.0, 2: 3.0}


def scattered(seed, numel=25, scale=1.0):
    """Values of all sizes, so that the order of additions shows."""
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn(numel, generator=random) * 10 ** (4 * torch.randn(numel, generator=random))


# -- joining -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [*itertools.permutations((0, 1, 2))])
def test_the_run_starts_with_the_model_of_rank_0_when_all_have_joined(rig, order):
    one = rig()
    tickets = [one.send(one.join(worker)) for worker in order[:2]]
    assert all(one.waits(ticket) for ticket in tickets)
    assert one.server.state is None
    tickets.append(one.send(one.join(order[2])))
    for ticket in tickets:
        welcome = one.answer(ticket)
        assert (type(welcome), welcome.version, welcome.position) == (Welcome, 0, 0)
        assert welcome.weights == {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}
        assert welcome.layout == one.layout.hash
        w, statics = snapshot.unpack_snapshot(one.layout, welcome.bodies)
        assert torch.equal(w, one.model)
        assert snapshot.restore_static(statics[0], (), "int64").item() == 41
    assert len({id(one.heard[ticket][0]) for ticket in tickets}) == 1, "the snapshot is packed once"
    assert (one.vitals.joins, one.vitals.members, one.vitals.state) == (3, (0, 1, 2), "training")


def test_a_join_that_comes_twice_is_answered_twice_and_counts_once(rig):
    one = rig()
    tickets = [one.send(one.join(worker)) for worker in (1, 1, 2, 0)]
    assert [type(one.answer(ticket)) for ticket in tickets] == [Welcome] * 4
    assert one.vitals.joins == 3


def test_the_workers_ids_need_not_begin_at_0(rig):
    one = rig(workers=(7, 9)).start()
    assert one.server.state.weights == {7: 0.5, 9: 0.5}
    assert torch.equal(one.w, one.model)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (Tensor("bias", (4,), "float32", "parameter"), "parameter 'bias' [4] float32 where the run has parameter"),
        (Tensor("bias", (3,), "bfloat16", "parameter"), "'bias' [3] bfloat16 where the run has parameter 'bias' [3] f"),
        (Tensor("bias", (3,), "float32", "static"), "static 'bias' [3] float32 where the run has parameter 'bias'"),
        (Tensor("offset", (3,), "float32", "parameter"), "'offset' [3] float32 where the run has parameter 'bias' [3]"),
        (None, "model of worker 1 has buffer 'running_mean' [2] float32 where the run has parameter 'bias' [3] float"),
    ],
)
def test_a_model_that_differs_is_refused_with_the_difference(rig, other, difference):
    one = rig()
    waiting = one.send(one.join(0))
    entries = [other if entry.name == "bias" else entry for entry in one.layout.entries]
    refusal = one.ask(one.join(1, layout=Layout(tuple(e for e in entries if e))))
    assert (type(refusal), refusal.reason) == (Refusal, "layout")
    assert difference in refusal.detail
    assert one.waits(waiting)


def test_who_was_refused_can_join_with_the_right_model(rig):
    one = rig()
    one.send(one.join(0))
    assert one.ask(one.join(1, layout=Layout(one.layout.entries[:1]))).reason == "layout"
    one.start()
    assert one.vitals.rejected == {"layout": 1}


def test_a_stranger_cannot_decide_what_the_model_is(rig):
    one = rig()
    assert one.ask(one.join(5, layout=Layout(one.layout.entries[:1]))).reason == "member"
    one.start()


def test_rank_0_without_a_model_is_refused_itself_and_the_others_wait(rig):
    one = rig()
    others = [one.send(one.join(worker)) for worker in (1, 2)]
    refusal = one.ask(Join(0, one.layout.describe(), layout=one.layout.hash))
    assert (refusal.reason, refusal.detail[:35]) == ("segment", "worker 0 has not sent its model: th")
    assert all(one.waits(ticket) for ticket in others)
    one.send(one.join(0))
    assert [type(one.answer(ticket)) for ticket in others] == [Welcome, Welcome]


# -- folding -----------------------------------------------------------------------------------------


def test_a_round_closes_with_the_last_push_and_moves_every_replica_by_the_sum(rig):
    one = rig().start()
    tickets = [one.send(one.push(worker, value)) for worker, value in list(THREE.items())[:2]]
    assert all(one.waits(ticket) for ticket in tickets)
    assert one.version == 0
    tickets.append(one.send(one.push(2, 3.0)))
    for ticket in tickets:
        entry = one.answer(ticket)
        assert (type(entry), entry.version, entry.position, entry.weights, entry.final) == (Entry, 1, 24, None, False)
        assert entry.layout == one.layout.hash
        assert torch.equal(one.dense(entry), torch.full((25,), 6.0))
    assert torch.equal(one.w, one.model - 6)


@pytest.mark.parametrize("downlink", ["none", "topk:0.2", "topk:0.2+int4", "sign"])
def test_the_order_of_arrival_changes_no_bit(rig, downlink):
    frames = []
    for order in itertools.permutations((0, 1, 2)):
        one = rig(downlink=downlink).start()
        for _ in range(3):
            entry = one.round({worker: scattered(worker + 10 * one.version) for worker in order})
        frames.append((bytes(entry.pack()), bytes(one.w.numpy())))
    assert len(set(frames)) == 1
    total = torch.zeros(25)
    for worker in (0, 1, 2):
        total += scattered(worker)
    first = rig().start().round({worker: scattered(worker) for worker in (2, 1, 0)})
    assert torch.equal(rig().dense(first), total), "one worker after the other, by their numbers"
    total = scattered(2) + scattered(1) + scattered(0)
    assert not torch.equal(rig().dense(first), total), "which another order would show"


def test_hand_overs_are_added_behind_the_pushes_by_their_numbers(rig):
    for order in itertools.permutations((0, 1, 2, 3)):
        one = rig(workers=(0, 1, 2, 3)).start()
        for worker in order:
            gone = worker in (0, 2)
            one.send(one.leave(worker, scattered(worker)) if gone else one.push(worker, scattered(worker)))
        total = torch.zeros(25)
        for worker in (1, 3, 0, 2):
            total += scattered(worker)
        assert torch.equal(one.w, one.model - total)


def test_what_compression_leaves_behind_is_carried_over(rig):
    one = rig(downlink="topk:0.1").start()
    w, given = one.model.clone(), torch.zeros(25)
    for value in range(1, 6):
        vector = scattered(value).clamp(-999, 999).round()  # whole numbers: every sum of them is exact
        w -= one.dense(one.round(dict.fromkeys((0, 1, 2), vector)))
        given += 3 * vector
        assert torch.equal(one.w, w)
        assert torch.equal(one.x, one.model - given)
        assert one.vitals.server_conservation == 0
    assert one.server.state.sender.error_norm() > 0
    assert one.vitals.server_left**0.5 == pytest.approx(one.server.state.sender.error_norm())


def test_overrides_hold_for_the_downlink(rig):
    one = rig(downlink="topk:0.04", overrides={"bias": "none"}).start()
    entry = one.round({worker: torch.arange(1.0, 26.0) for worker in (0, 1, 2)})
    sizes = [u.indices is None or u.indices.size for u in messages.updates(entry, one.layout)]
    assert sizes == [1, True, True]  # one of twenty; all of the bias; buffers whole


def test_samples_add_up_to_the_position(rig):
    one = rig().start()
    tickets = [one.send(one.push(worker, samples=worker + 10)) for worker in (0, 1, 2)]
    assert one.answer(tickets[0]).position == 33
    assert one.round(dict.fromkeys((0, 1, 2), 0.0)).position == 33 + 24


# -- resending ---------------------------------------------------------------------------------------


def test_a_resent_push_is_applied_once_and_everyone_who_asked_is_answered(rig):
    one = rig().start()
    push = one.push(0, 1.0).pack()
    tickets = [one.send(push), one.send(push), one.send(push)]
    assert all(one.waits(ticket) for ticket in tickets)
    for worker in (1, 2):
        tickets.append(one.send(one.push(worker, 1.0)))
    tickets.append(one.send(push))  # after the round has closed
    assert len({bytes(one.heard[ticket][0]) for ticket in tickets}) == 1
    assert torch.equal(one.w, one.model - 3)
    assert one.version == 1
    size = one.heard[tickets[0]][0].size
    assert one.vitals.wire["uplink", "resend"] == 3 * push.size
    assert one.vitals.wire["downlink", "resend"] == 3 * size
    assert one.vitals.wire["downlink", "update"] == 3 * size
    assert one.vitals.dense == {"uplink": 3 * 4 * 23, "downlink": 3 * 4 * 23}  # buffers are not what training sends
    assert not one.vitals.rejected


def test_the_same_number_gets_the_same_answer_until_the_next_one(rig):
    one = rig().start()
    first = one.push(0, 1.0)
    one.send(first)
    one.send(one.push(1))
    ticket = one.send(one.push(2))
    for _ in range(3):
        assert bytes(one.heard[one.send(first)][0]) == bytes(one.heard[ticket][0])
    second = one.send(one.push(0, 5.0))
    assert one.waits(one.send(one.push(0, 5.0, sequence=2)))
    assert one.waits(second)
    for worker in (1, 2):
        one.send(one.push(worker))
    assert one.answer(second).version == 2
    assert one.ask(first).reason == "sequence"


def test_a_resent_average_is_used_once(rig):
    one = rig().start()
    average = one.average(0, 1.0).pack()
    tickets = [one.send(average), one.send(average)]
    tickets += [one.send(one.average(worker, 1.0)) for worker in (1, 2)]
    tickets.append(one.send(average))
    assert len({bytes(one.heard[ticket][0]) for ticket in tickets}) == 1
    assert torch.equal(one.dense(one.answer(tickets[0])), torch.full((25,), 3.0))
    assert one.vitals.wire["uplink", "resend"] == 2 * average.size


def test_the_last_push_of_a_run_can_be_resent_after_its_end(rig):
    one = rig(rounds=1).start()
    push = one.push(0, 1.0)
    one.send(push)
    one.send(one.push(1))
    last = one.send(one.push(2))
    assert bytes(one.heard[one.send(push)][0]) == bytes(one.heard[last][0])
    assert not one.vitals.rejected


# -- averaging ---------------------------------------------------------------------------------------


def test_error_averaging_answers_the_exact_sum_and_moves_nothing(rig):
    one = rig(workers=(0, 1, 2, 3)).start()
    vectors = {worker: scattered(worker) for worker in (3, 1, 0, 2)}
    tickets = [one.send(one.average(worker, vector)) for worker, vector in vectors.items()]
    total = torch.zeros(25)
    for worker in (0, 1, 2, 3):
        total += vectors[worker]
    for ticket in tickets:
        mean = one.answer(ticket)
        assert (type(mean), mean.version, mean.weight) == (Mean, 0, 1.0)
        assert torch.equal(one.dense(mean), total)
    assert one.version == 0
    assert torch.equal(one.w, one.model)
    assert one.vitals.dense == {}
    assert one.vitals.wire["downlink", "average"] == 4 * one.heard[tickets[0]][0].size
    assert one.round(dict.fromkeys((0, 1, 2, 3), 1.0)).version == 1
    assert one.sequences == dict.fromkeys((0, 1, 2, 3), 2), "averages and pushes share their numbers"


def test_an_average_of_sparse_residuals_is_sent_sparse(rig):
    one = rig().start()
    sparse = torch.zeros(25)
    sparse[7] = 1.5
    tickets = [one.send(one.average(worker, sparse)) for worker in (0, 1, 2)]
    dense = [one.send(one.average(worker, scattered(worker))) for worker in (0, 1, 2)]
    assert one.heard[tickets[0]][0].size < one.heard[dense[0]][0].size / 2
    assert one.dense(one.answer(tickets[0]))[7] == 4.5


def test_who_has_pushed_takes_no_part_in_an_average_and_holds_nobody_up(rig):
    one = rig().start()
    pushed = one.send(one.push(1, 4.0))
    tickets = [one.send(one.average(worker, 1.0)) for worker in (0, 2)]
    mean = one.answer(tickets[0])
    assert mean.weight == pytest.approx(2 / 3)
    assert torch.equal(one.dense(mean), torch.full((25,), 2.0))
    assert one.waits(pushed)
    for worker in (0, 2):
        one.send(one.push(worker))
    assert one.answer(pushed).version == 1


# -- ending ------------------------------------------------------------------------------------------


def test_the_last_round_gives_the_final_entry(rig):
    one = rig(rounds=3).start()
    finals = [one.round(THREE).final for _ in range(3)]
    assert finals == [False, False, True]
    assert one.server.finished
    assert one.vitals.state == "finished"
    assert one.ask(one.push(0)).reason == "finished"
    assert one.ask(one.join(0)).reason == "finished"
    assert one.version == 3


def test_a_stopped_run_ends_with_its_next_entry(rig):
    one = rig().start()
    one.round(THREE)
    waiting = one.send(one.push(0))
    one.take(one.server.stop())
    assert one.waits(waiting)
    for worker in (1, 2):
        one.send(one.push(worker))
    assert one.answer(waiting).final
    assert one.server.finished


def test_a_run_that_is_stopped_before_its_first_round_turns_everyone_away(rig):
    one = rig()
    early = [one.send(one.join(worker)) for worker in (0, 1, 1)]
    one.take(one.server.stop())
    late = one.send(one.join(2))
    assert [one.answer(ticket).reason for ticket in (*early, late)] == ["finished"] * 4
    assert one.vitals.rejected == {"finished": 4}
    assert one.server.finished
    one.take(one.server.stop())


def test_a_joiner_is_turned_away_when_the_run_ends(rig):
    one = rig(rounds=1).start()
    joiner = one.send(one.join(7))
    entry = one.round(THREE)
    assert entry.final
    assert entry.weights is None
    assert one.answer(joiner).reason == "finished"
    assert (one.vitals.joins, one.vitals.members) == (3, (0, 1, 2))


# -- time --------------------------------------------------------------------------------------------


def test_rows_are_dated_from_the_first_round(rig):
    one = rig()
    one.now = 100.0
    one.start()
    one.now = 107.5
    one.round(THREE)
    (row,) = one.vitals.rows_since(0)
    assert (row["version"], row["seconds"], row["position"], row["samples"], row["workers"]) == (1, 7.5, 24, 24, 3)
