"""Asynchronous rounds: when a fold happens, what is in it, who gets which entries; and pulls.

A plain reference of the recursion follows random schedules of pushes, pulls, joins, leaves, restarts and resends::

    u = sum of f(s_k) c_k over the pushes in worker order, then what was handed over
    p = e + u;   c = C(p);   e = p - c;   w = w - c          s_k: the versions that push k is behind
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import Layout, energies, ledger, messages, snapshot
from protocol.layout import Entry as Tensor
from protocol.messages import Entry, Farewell, Welcome
from protocol.sampling import participants
from ps.log import Log
from ps.settings import Staleness

LAYOUT = Layout((Tensor("weight", (5, 3), "float64", "parameter"), Tensor("bias", (4,), "float64", "parameter")))
START = torch.linspace(-1, 1, LAYOUT.numel, dtype=torch.float64)
WEIGHTS = {  # the formulas of FedAsync, section 5.2, written out
    "constant": (Staleness(), lambda s: 1.0),
    "polynomial": (Staleness(kind="polynomial", a=0.7), lambda s: (1 + s) ** -0.7),
    "hinge": (Staleness(kind="hinge", a=2.0, b=1), lambda s: 1.0 if s <= 1 else 1 / (2.0 * (s - 1) + 1)),
}
FOUNDERS, MANY = (0, 1, 2, 3), 6


def asynchronous(buffer=None, most=None, staleness=None):
    """Settings of the server."""
    return {"mode": "async", "buffer": buffer, "max_staleness": most, "staleness": staleness or Staleness()}


def dense(message):
    """The bodies of a message as one vector."""
    return torch.cat([update.dense() for update in messages.updates(message, LAYOUT)])


def largest(p, ratio=0.2):
    """``topk``: of each segment the k elements of largest magnitude, ties to the lowest index."""
    kept = torch.zeros_like(p)
    for place in LAYOUT.segments:
        part = p[place.start : place.stop]
        chosen = sorted(range(part.numel()), key=lambda i: (-abs(part[i]), i))[: max(1, round(ratio * part.numel()))]
        kept[[place.start + i for i in chosen]] = part[chosen]
    return kept


@dataclass
class Worker:
    """``away``, ``joining``, or a member: ``idle``, ``pushed`` or ``pulling``."""

    number: int
    state: str = "away"
    version: int = 0
    w: torch.Tensor = None
    last: tuple = None  # the frame of its last push, and the answer to it
    calls: list = field(default_factory=list)  # tickets of the message that waits
    due: str = ""  # what the answer to them is for


class Schedule:
    """A server, its workers, and the reference beside them."""

    def __init__(self, rig, buffer, most, kind, window=64):
        staleness, self.factor = WEIGHTS[kind]
        self.buffer, self.most = buffer, most
        server = asynchronous(buffer, most, staleness)
        self.rig = rig(workers=FOUNDERS, layout=LAYOUT, model=START, server=server, downlink="topk:0.2", rounds=10**6)
        self.workers = [Worker(number) for number in range(MANY)]
        self.w, self.e, self.version = START.clone(), torch.zeros_like(START), 0
        self.waiting, self.handed = {}, {}  # worker -> (version, c); what leavers have handed over
        self.prints = {0: snapshot.digest(START)}
        self.accepted, self.discarded, self.dropped = torch.zeros_like(START), torch.zeros_like(START), 0.0
        self.did = Counter()
        for number in FOUNDERS:
            self.join(self.workers[number], 0)
        self.rig.server.state.log.window = window

    # -- messages ----------------------------------------------------------------------------------

    def send(self, worker, message, due):
        """Deliver a message whose answer may be a while in coming; then everything must be as the reference says."""
        worker.due = due
        worker.calls.append(self.rig.send(message))
        self.settle()

    def settle(self):
        if self.rig.server.state is None:
            return
        if self.rig.version != self.version:
            self.fold()
        for worker in self.workers:
            if worker.calls and not self.rig.waits(worker.calls[0]):
                self.hear(worker)
        assert (self.rig.version, self.should_fold()) == (self.version, False), "a fold came too early or too late"

    def should_fold(self):
        able = [worker for worker in self.workers if worker.state == "idle"]
        held = self.most is not None and any(self.version + 1 - worker.version > self.most for worker in able)
        enough = len(self.waiting) >= self.buffer if able else self.waiting or self.handed
        return bool(enough) and not held

    def fold(self):
        before = {worker.number: worker.state for worker in self.workers}
        assert self.should_fold(), before
        if any(state == "idle" for state in before.values()) and self.most is None:
            assert len(self.waiting) == self.buffer
        u = torch.zeros_like(START)
        for _, (version, c) in sorted(self.waiting.items()):
            staleness = self.version - version
            assert self.most is None or staleness <= self.most
            f = self.factor(staleness)
            u = u + f * c
            self.accepted += c
            self.discarded += (1 - f) * c
            self.dropped += (1 - f) * float(c.norm())
            self.did[f"stale by {staleness}"] += 1
        for _, residual in sorted(self.handed.items()):
            u = u + residual
            self.accepted += residual
        p = self.e + u
        c = largest(p)
        self.e, self.w, self.version = p - c, self.w - c, self.version + 1
        self.waiting.clear()
        self.handed.clear()
        self.prints[self.version] = snapshot.digest(self.rig.w)
        self.did["fold"] += 1

    def hear(self, worker):
        """The answer to the message that waited, the same to every call of it."""
        frames = [tuple(bytes(frame) for frame in self.rig.heard[ticket]) for ticket in worker.calls]
        assert len(set(frames)) == 1
        answer = self.rig.answers(worker.calls[0])
        worker.calls = []
        if worker.due == "last":  # of a process that is gone
            return
        if isinstance(answer[0], Welcome):
            worker.w, _ = snapshot.unpack_snapshot(LAYOUT, answer[0].bodies)
            worker.version, answer = answer[0].version, answer[1:]
            self.did["snapshot"] += worker.due != "join"
        for entry in answer:
            assert (type(entry), entry.version) == (Entry, worker.version + 1), "each entry once, in order"
            worker.w = worker.w - dense(entry)
            worker.version = entry.version
        self.did["many entries"] += len(answer) > 1
        behind = self.version - worker.version  # an answer that is due at once may be what lets the next fold happen
        assert behind <= (worker.due != "push"), "nothing is left to get"
        worker.last = (worker.last[0], frames[0]) if worker.due == "push" else None
        worker.state = "idle"

    # -- what may happen ---------------------------------------------------------------------------

    def join(self, worker, number):
        worker.state, worker.last = "joining", None
        self.send(worker, self.rig.join(worker.number), "join")

    def restart(self, worker, number):
        """The process dies and comes back without its memory; what it has sent is folded all the same."""
        worker.calls, worker.last = [], None  # nobody hears the answer
        self.did["restart of " + worker.state] += 1
        worker.state = "joining"
        self.rig.sequences[worker.number] = number
        self.send(worker, self.rig.join(worker.number), "join")

    def push(self, worker, number):
        c = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        c[number % 7 :: 3] = 0.0
        digest = snapshot.digest(worker.w) if number % 2 else None
        frame = self.rig.push(worker.number, c, version=worker.version, digest=digest).pack()
        self.waiting[worker.number] = worker.version, c
        worker.state, worker.last = "pushed", (frame, None)
        self.send(worker, frame, "push")

    def pull(self, worker, number):
        worker.state, worker.last = "pulling", None
        self.send(worker, self.rig.pull(worker.number, worker.version), "pull")

    def resend(self, worker, number):
        frame, answer = worker.last
        ticket = self.rig.send(frame)
        if answer is None:
            assert self.rig.waits(ticket)
            worker.calls.append(ticket)
        else:
            assert tuple(bytes(frame) for frame in self.rig.heard[ticket]) == answer
            self.did["resent, of many entries"] += len(answer) > 1
        self.did["resend"] += 1
        self.settle()

    def leave(self, worker, number):
        residual = torch.full_like(START, number / 64) if number % 2 else None
        if residual is not None:
            self.handed[worker.number] = residual
        worker.state, worker.due = "leaving", "last"
        ticket = self.rig.send(self.rig.leave(worker.number, residual))
        worker.state, worker.last = "away", None
        assert isinstance(self.rig.answer(ticket), Farewell)
        self.settle()

    # -- what holds at any time --------------------------------------------------------------------

    def check(self):
        state, vitals = self.rig.server.state, self.rig.vitals
        assert torch.equal(state.w, self.w)
        assert torch.equal(state.sender.residual, self.e)
        for worker in self.workers:
            if worker.state in ("idle", "pushed", "pulling"):
                assert snapshot.digest(worker.w) == self.prints[worker.version]
                assert self.most is None or self.version - worker.version <= self.most or worker.state != "idle"
        moved = START - self.rig.x
        assert torch.allclose(moved, self.accepted - self.discarded, rtol=0, atol=1e-9)
        assert vitals.discarded["staleness"] == pytest.approx(self.dropped, abs=1e-9)
        assert vitals.server_conservation <= 4
        for direction in ("uplink", "downlink"):
            counted = sum(size for (d, _), size in vitals.wire.items() if d == direction)
            assert counted == self.rig.counted[direction]
        members = [worker.state for worker in self.workers if worker.number in state.weights]
        assert not members or "idle" in members, "all of them wait for ever"

    def possible(self):
        """What can happen next: an action and a worker."""
        idle = sum(worker.state == "idle" for worker in self.workers)
        for worker in self.workers:
            if worker.state == "idle":
                yield from [("push", worker)] * 6
                if idle > 1 or self.waiting:
                    yield "pull", worker
            if worker.state in ("idle", "pushed", "pulling"):
                yield "restart", worker
                if idle > 1:
                    yield "leave", worker
            if worker.last is not None:
                yield from [("resend", worker)] * 2
            if worker.state == "away" and not worker.calls:
                yield "join", worker

    def step(self, choice, number):
        possible = list(self.possible())
        action, worker = possible[choice % len(possible)]
        getattr(self, action)(worker, number)
        self.did[action] += 1
        self.check()


# -- schedules ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 5),
    st.sampled_from([None, 1, 2, 4]),
    st.sampled_from([*WEIGHTS]),
    st.sampled_from([1, 3, 64]),
    st.lists(st.tuples(st.integers(0, 255), st.integers(0, 63)), max_size=60),
)
def test_any_schedule_folds_each_push_once_with_its_weight_and_keeps_replicas_equal(
    rig, buffer, most, kind, window, choices
):
    schedule = Schedule(rig, buffer, most, kind, window)
    for choice in choices:
        schedule.step(*choice)
    for _ in range(2 * MANY):  # whoever is able to, pushes: nobody can be left waiting
        before = schedule.version
        while schedule.version == before:
            able = [worker for worker in schedule.workers if worker.state == "idle"]
            schedule.push(min(able, key=lambda worker: worker.version), 1)
    assert all(not worker.calls for worker in schedule.workers if worker.state != "pushed")


@pytest.mark.parametrize(("buffer", "most", "kind", "window"), [(2, None, "polynomial", 3), (3, 2, "hinge", 64)])
def test_a_long_schedule_does_so_too_and_does_everything(rig, buffer, most, kind, window):
    schedule, numbers = Schedule(rig, buffer, most, kind, window), random.Random(buffer)
    for _ in range(700):
        schedule.step(numbers.randrange(256), numbers.randrange(64))
    everything = ["join", "push", "pull", "resend", "leave", "fold", "many entries", "resent, of many entries"]
    everything += [f"restart of {state}" for state in ("idle", "pushed", "pulling")]
    everything += [f"stale by {staleness}" for staleness in range(3 if most else 4)] + ["snapshot"] * (window == 3)
    for what in everything:
        assert schedule.did[what], what
    assert not most or not schedule.did[f"stale by {most + 1}"]


# -- folding -----------------------------------------------------------------------------------------


def four(rig, *given, **plan):
    """A run of four workers; the replica's version of each."""
    return rig(workers=FOUNDERS, server=asynchronous(*given), **plan).start(), dict.fromkeys(FOUNDERS, 0)


def test_one_fold_is_due_after_a_quarter_of_the_workers_unless_the_settings_say_otherwise(rig):
    found = {count: rig(workers=range(count), server=asynchronous()).server.plan.buffer for count in range(1, 13)}
    assert found == {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 2, 9: 2, 10: 2, 11: 2, 12: 3}
    assert rig(workers=range(12), server=asynchronous(buffer=7)).server.plan.buffer == 7


@pytest.mark.parametrize("buffer", [1, 2, 3, 4])
def test_every_bth_push_is_answered_and_closes_a_fold(rig, buffer):
    one, versions = four(rig, buffer)
    waiting = []
    for number in range(24):
        worker = number % 4
        waiting.append((worker, one.send(one.push(worker, 1.0, version=versions[worker]))))
        assert one.version == (number + 1) // buffer
        assert all(one.waits(ticket) for _, ticket in waiting) == bool((number + 1) % buffer)
        if one.version * buffer == number + 1:
            for worker, ticket in waiting:
                entries = one.answers(ticket)
                assert [entry.version for entry in entries] == [*range(versions[worker] + 1, one.version + 1)]
                versions[worker] = one.version
            waiting = []
    assert torch.equal(one.w, one.model - 24)
    assert sum(one.vitals.staleness.counts) == 24


def test_the_weights_are_those_of_the_paper():
    polynomial, hinge = Staleness(kind="polynomial", a=0.5), Staleness(kind="hinge", a=10, b=4)
    assert [Staleness().weight(s) for s in (0, 1, 99)] == [1, 1, 1]
    assert [polynomial.weight(s) for s in (0, 3, 8, 15)] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert [hinge.weight(s) for s in (0, 4, 5, 6, 14)] == pytest.approx([1, 1, 1 / 11, 1 / 21, 1 / 101])


def test_what_a_weight_takes_away_is_counted_as_discarded_and_what_is_handed_over_keeps_all_of_its_own(rig):
    one, _ = four(rig, 1, None, Staleness(kind="polynomial", a=1.0))
    one.send(one.push(0, 1.0, version=0))
    one.send(one.push(1, 4.0, version=0))  # one version late: the half of it counts
    assert torch.equal(one.w, one.model - 1 - 2)
    one.send(one.leave(2, 8.0))
    one.send(one.push(3, 3.0, version=0))  # two late: a third, and all of the hand-over
    assert torch.allclose(one.w, one.model - 1 - 2 - 1 - 8)
    assert one.vitals.discarded == {"compression": 0, "staleness": pytest.approx(25**0.5 * (2 + 2))}
    assert one.vitals.summary()["discarded_norm"] == pytest.approx(20)
    assert one.vitals.staleness.counts[:4] == [1, 1, 1, 0]
    assert one.vitals.staleness.total == 3


def test_each_product_is_rounded_and_added_in_the_order_of_the_workers(rig):
    one, _ = four(rig, 3, None, Staleness(kind="hinge", a=0.3, b=0))
    for worker in (0, 1, 3):
        one.send(one.push(worker, version=0))
    vectors = {worker: torch.randn(25, generator=torch.Generator().manual_seed(worker)) for worker in FOUNDERS}
    total = torch.zeros(25)
    for worker in (0, 2, 3):  # 2 is late, between two that are not
        total = total + vectors[worker] * (1 / 1.3 if worker == 2 else 1.0)
    tickets = [one.send(one.push(worker, vectors[worker], version=int(worker != 2))) for worker in (3, 2, 0)]
    assert torch.equal(one.dense(one.answers(tickets[0])[-1]), total)


def test_a_synchronous_server_folds_no_late_push(rig):
    one = rig().start()
    for _ in range(3):
        one.round(dict.fromkeys((0, 1, 2), 1.0))
    assert one.vitals.staleness.counts[0] == 9
    assert one.vitals.staleness.total == one.vitals.discarded["staleness"] == 0


def test_an_average_needs_a_round_that_all_are_in(rig):
    one, _ = four(rig, 2)
    refusal = one.ask(one.average(0, 1.0))
    assert (refusal.reason, refusal.detail) == ("frame", "an asynchronous server takes no Average message")


def test_an_update_must_be_of_the_version_that_its_worker_was_given(rig):
    one, _ = four(rig, 1)
    for version in range(2):
        one.send(one.push(0, version=version))
    wrong = [one.ask(one.push(1, version=version, sequence=1)).detail for version in (1, 2, 3)]
    assert wrong == [f"worker 1 sent an update of version {version} in round 0" for version in (1, 2, 3)]
    one.send(one.pull(1, 0))
    assert one.ask(one.push(1, version=0, sequence=1)).reason == "version"
    assert one.answer(one.send(one.push(1, version=2, sequence=1))).version == 3


# -- the bound on staleness --------------------------------------------------------------------------


def bounded(rig):
    """Worker 0 is slow, the others wait for it at version 2."""
    one, _ = four(rig, 1, 2)
    for version in range(2):
        one.send(one.push(1, 1.0, version=version))
    tickets = [one.send(one.push(worker, 1.0, version=2 * (worker == 1))) for worker in (1, 2, 3)]
    assert one.version == 2
    assert all(one.waits(ticket) for ticket in tickets)
    return one, tickets


def test_who_is_ahead_waits_for_the_slowest_and_no_longer(rig):
    one, tickets = bounded(rig)
    tickets.append(one.send(one.push(0, 1.0, version=0)))
    assert [len(one.answers(ticket)) for ticket in tickets] == [1, 3, 3, 3]
    assert one.version == 3
    assert torch.equal(one.w, one.model - 6), "all who waited are in one fold"
    assert one.vitals.staleness.counts[:4] == [3, 0, 3, 0]


def test_a_slow_worker_that_leaves_holds_nobody_up(rig):
    one, tickets = bounded(rig)
    one.send(one.leave(0, 5.0))
    assert [one.answers(ticket)[-1].weights for ticket in tickets] == [dict.fromkeys((1, 2, 3), 1 / 3)] * 3
    assert torch.equal(one.w, one.model - 10)


@pytest.mark.parametrize("way", ["join", "pull"])
def test_a_slow_worker_that_catches_up_holds_nobody_up(rig, way):
    one, tickets = bounded(rig)
    slow = one.send(one.join(0) if way == "join" else one.pull(0, 0))
    assert one.answers(slow)[-1].version == 2
    assert not any(one.waits(ticket) for ticket in tickets)
    assert one.answers(one.send(one.push(0, version=2)))[-1].version == 4


def test_a_buffer_of_more_than_are_present_is_full_when_all_of_them_have_pushed(rig):
    one, _ = four(rig, 4)
    for worker in (2, 3):
        one.send(one.leave(worker))
    first = one.send(one.push(0, 1.0))
    assert one.waits(first)
    one.send(one.push(1, 1.0))
    assert one.answer(first).weights == {0: 0.5, 1: 0.5}
    first = one.send(one.push(0, 1.0))
    one.send(one.leave(1))
    assert one.answer(first).weights == {0: 1.0}


def test_the_push_of_a_leaver_counts_as_one_of_b(rig):
    one, _ = four(rig, 3)
    pushed = one.send(one.push(0, 1.0))
    for worker in (0, 1):
        one.send(one.leave(worker))
    one.send(one.push(2, 1.0))
    assert one.waits(pushed), "worker 3 is still at work"
    one.send(one.push(3, 1.0))
    assert one.answer(pushed).version == 1
    assert torch.equal(one.w, one.model - 3)


# -- pulls -------------------------------------------------------------------------------------------


def partial(rig, **plan):
    """Half of four workers take part; who does, and who does not, in the first round."""
    one = rig(workers=FOUNDERS, participation=0.5, **plan).start()
    taking = participants(FOUNDERS, 0.5, 0, 0)
    return one, taking, tuple(worker for worker in FOUNDERS if worker not in taking)


def test_who_takes_no_part_gets_the_entry_of_those_who_do(rig):
    one, taking, others = partial(rig)
    tickets = [one.send(one.pull(others[0])), *(one.send(one.push(worker, 1.0)) for worker in taking)]
    late = one.send(one.pull(others[1], 0))
    assert len({bytes(one.heard[ticket][0]) for ticket in (*tickets, late)}) == 1
    assert torch.equal(one.w, one.model - 2)
    assert one.version == 1


def test_a_worker_that_is_not_asked_cannot_push(rig):
    one, taking, others = partial(rig)
    refusal = one.ask(one.push(others[0], 1.0))
    assert (refusal.reason, refusal.detail[9:]) == ("member", "takes no part in the round at version 0")
    for worker in taking:
        one.send(one.push(worker, 1.0))
    assert torch.equal(one.w, one.model - 2)


def test_a_pull_that_comes_again_waits_with_the_first_and_both_are_resends(rig):
    one, taking, others = partial(rig)
    pull = one.pull(others[0]).pack()
    tickets = [one.send(pull), one.send(pull)]
    for worker in taking:
        one.send(one.push(worker, 1.0))
    size = one.heard[tickets[0]][0].size
    assert bytes(one.heard[tickets[1]][0]) == bytes(one.heard[tickets[0]][0])
    assert (one.vitals.wire["uplink", "resend"], one.vitals.wire["downlink", "resend"]) == (pull.size, size)
    assert one.vitals.wire["downlink", "update"] == 3 * size


def test_a_pull_of_any_content_disturbs_nobody(rig):
    one, taking, others = partial(rig)
    tickets = [one.send(one.pull(others[0], bodies=one.bodies(float(n)))) for n in (1, 2)]
    assert one.ask(one.pull(others[0], layout=bytes(8))).reason == "layout"
    assert one.ask(one.pull(others[0], 1)).reason == "version"
    assert one.ask(one.pull(9)).reason == "member"
    for worker in taking:
        one.send(one.push(worker, 1.0))
    assert [one.answer(ticket).version for ticket in tickets] == [1, 1]


@pytest.mark.parametrize("way", ["leave", "join"])
def test_who_leaves_or_comes_back_has_no_pull_that_waits(rig, way):
    one, _ = four(rig, 2)
    pull = one.send(one.pull(0))
    one.send(getattr(one, way)(0))
    assert one.answer(pull).reason == "member"
    tickets = [one.send(one.push(worker, 1.0)) for worker in (0, 1) if (worker, way) != (0, "leave")]
    assert one.version == (way == "join"), "who came back is at work"
    assert all(one.waits(ticket) for ticket in tickets) == (way == "leave")


def test_a_pull_and_a_push_of_one_worker_are_both_answered(rig):
    one, _ = four(rig, 2)
    tickets = [one.send(one.pull(0)), one.send(one.push(0, 1.0)), one.send(one.push(1, 1.0))]
    assert [one.answer(ticket).version for ticket in tickets] == [1, 1, 1]
    assert bytes(one.heard[one.send(one.push(0, 1.0, version=0, sequence=1))][0]) == bytes(one.heard[tickets[1]][0])


def test_pulls_of_all_who_are_left_are_answered_when_the_last_one_at_work_goes(rig):
    one, _ = four(rig, 3)
    pulls = [one.send(one.pull(worker)) for worker in (0, 1, 2)]
    one.send(one.leave(3, 2.0))
    assert [one.answer(ticket).version for ticket in pulls] == [1] * 3
    assert torch.equal(one.w, one.model - 2)


# -- ending ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True])
def test_who_comes_after_the_last_entry_is_refused_and_pulls_the_rest(rig, stopped):
    one, _ = four(rig, 2, rounds=1000 if stopped else 2)
    for worker in (0, 1):
        one.send(one.push(worker, 1.0))
    waiting = one.send(one.push(2, 1.0, version=0))
    if stopped:
        one.take(one.server.stop())
        assert one.waits(waiting)
    one.send(one.push(0, 1.0, version=1))
    assert [entry.final for entry in one.answers(waiting)] == [False, True]
    refusal = one.ask(one.push(3, 1.0, version=0))
    assert (refusal.reason, refusal.detail) == ("finished", "the run has ended")
    rest = one.answers(one.send(one.pull(3, 0)))
    assert [(entry.version, entry.final) for entry in rest] == [(1, False), (2, True)]
    assert one.ask(one.pull(0, 2)).reason == "finished", "it has everything"
    assert torch.equal(one.w, one.model - 4)


def test_pulls_that_wait_get_the_final_entry_of_a_stopped_run(rig):
    one, taking, others = partial(rig)
    pulls = [one.send(one.pull(worker)) for worker in others]
    one.take(one.server.stop())
    for worker in taking:
        one.send(one.push(worker))
    assert [one.answer(ticket).final for ticket in pulls] == [True, True]


def test_a_run_that_has_failed_says_why_to_everyone_who_pushes_pulls_or_joins(rig):
    """Otherwise a worker that is behind would take the last whole version for a good end."""
    one, _ = four(rig, 2)
    for worker in (0, 1):
        one.send(one.push(worker))
    waiting = [one.send(one.pull(1, 1)), one.send(one.push(2, 1.0, version=0)), one.send(one.join(9))]
    one.send(one.leave(0, cause="not_finite"))
    for message in (one.push(3, version=0), one.pull(3, 0), one.pull(1, 1), one.join(8)):
        waiting.append(one.send(message))
    for ticket in waiting:
        refusal = one.answer(ticket)
        assert (refusal.reason, refusal.detail) == (
            "finished",
            "the run has ended: worker 0 found NaN or Inf in its update",
        )
    assert one.version == 1


def test_a_fold_that_fails_admits_and_dismisses_nobody(rig):
    one, _ = four(rig, 2, optimizer={"kind": "torch.optim.SGD", "lr": 1e38})
    one.send(one.join(7))
    one.send(one.leave(3))
    tickets = [one.send(one.push(worker, 1e6)) for worker in (0, 1)]
    assert [one.answer(ticket).reason for ticket in tickets] == ["finished"] * 2
    assert (one.vitals.joins, one.server.state.samples.keys()) == (4, set(FOUNDERS))


# -- a short log -------------------------------------------------------------------------------------


def evicted(rig, **plan):
    """Workers 2 and 3 are at version 0 when the log begins with entry 3."""
    one, _ = four(rig, 1, **plan)
    one.server.state.log.window = 2
    for version in range(3):
        one.send(one.push(0, 1.0, version=version))
    return one


def test_a_worker_that_is_older_than_the_log_gets_a_snapshot(rig):
    one = evicted(rig)
    (welcome,) = one.answers(one.send(one.push(2, 1.0, version=0)))
    assert (type(welcome), welcome.version, welcome.final) == (Welcome, 4, False)
    assert torch.equal(snapshot.unpack_snapshot(one.layout, welcome.bodies)[0], one.w)
    assert [entry.version for entry in one.answers(one.send(one.push(0, version=3)))] == [4, 5]
    (welcome,) = one.answers(one.send(one.pull(1, 0)))
    assert welcome.version == 5
    size = one.vitals.wire["downlink", "snapshot"]
    assert size == sum(frame.size for ticket in range(4) for frame in one.heard[ticket]), "only of those who joined"


def test_a_snapshot_for_several_is_packed_once(rig):
    one, _ = four(rig, 2)
    one.server.state.log.window = 1
    for version in range(3):
        for worker in (0, 1):
            one.send(one.push(worker, version=version))
    tickets = [one.send(one.push(worker, version=0)) for worker in (2, 3)]
    assert one.heard[tickets[0]][0] is one.heard[tickets[1]][0]
    assert isinstance(one.answer(tickets[0]), Welcome)


def test_a_snapshot_says_that_the_run_has_ended(rig):
    one = evicted(rig, rounds=4)
    (welcome,) = one.answers(one.send(one.push(2, 1.0, version=0)))
    assert (welcome.version, welcome.final) == (4, True)
    (welcome,) = one.answers(one.send(one.pull(3, 0)))
    assert (welcome.version, welcome.final) == (4, True)


def test_an_empty_log_is_no_answer(rig):
    """As after a restart from a snapshot."""
    one, _ = four(rig, 1)
    for version in range(2):
        one.send(one.push(0, version=version))
    one.server.state.log = Log()
    assert isinstance(one.answer(one.send(one.pull(1, 0))), Welcome)


# -- measuring ---------------------------------------------------------------------------------------


def test_a_replica_of_an_older_version_is_checked_as_well(rig):
    one, _ = four(rig, 1, sketch_every=99)
    one.send(one.push(0, 1.0, version=0))
    one.send(one.pull(1, 0))
    digest = snapshot.digest(one.w)
    for version in (1, 2):
        one.send(one.push(0, 1.0, version=version))
    refusal = one.ask(one.push(1, version=1, digest=digest ^ 1))
    assert (refusal.reason, refusal.detail[-12:]) == ("replica", "at version 1")
    assert isinstance(one.answers(one.send(one.push(1, version=1, sequence=1, digest=digest)))[-1], Entry)
    assert one.vitals.replica_mismatches == 1


def test_the_mismatch_counts_those_who_did_not_push_with_what_they_owed_last(rig):
    one, _ = four(rig, 1)
    residuals = [torch.randn(25, generator=torch.Generator().manual_seed(worker)) for worker in FOUNDERS]
    for worker in FOUNDERS:
        assert one.vitals.mismatch is None
        sketch = energies.pack_sketch(ledger.sketch(residuals[worker]))
        one.send(one.push(worker, version=0, sketch=sketch))
    assert one.vitals.mismatch.replica == pytest.approx(float(sum(residuals).norm()), rel=0.1)
    one.send(one.join(2))  # its residual is lost
    one.send(one.push(0, version=1, sketch=energies.pack_sketch(ledger.sketch(residuals[0]))))
    assert one.vitals.mismatch.replica == pytest.approx(float(sum(residuals).norm()), rel=0.1)
