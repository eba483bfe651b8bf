"""Random schedules of joins, pushes, averages, resends, restarts and leaves: nothing is lost, replicas agree.

The workers here are as simple as can be: a replica, a sender, and the last frame in case it must be sent
again. Hypothesis, or a seed, chooses what happens next.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import Layout, compressor, messages, snapshot
from protocol.carry import Dropped
from protocol.layout import Entry as Tensor
from protocol.messages import Average, Entry, Farewell, Join, Leave, Mean, Push, Refusal, Welcome
from protocol.segment import pack_exact
from protocol.sender import Sender
from ps.plan import Plan
from ps.server import Server
from ps.settings import ServerSettings

LAYOUT = Layout((Tensor("weight", (5, 3), "float64", "parameter"), Tensor("bias", (4,), "float64", "parameter")))
FOUNDERS, MANY = (0, 1, 2), 5  # ids at the start, and in all
UPLINK, DOWNLINK, AVERAGE = "topk:0.3", "topk:0.2+sign", "topk:0.5+sign"
MEMBER = ("idle", "pushed", "averaging")


def zeros():
    return torch.zeros(LAYOUT.numel, dtype=torch.float64)


def dense(message):
    """The bodies of a message as one vector."""
    return torch.cat([update.dense() for update in messages.updates(message, LAYOUT)])


def exact(vector):
    return tuple(pack_exact(vector[s.start : s.stop].numpy()) for s in LAYOUT.segments)


@dataclass
class Errand:
    """A message whose answer is due, and the calls that wait for it."""

    kind: str
    tickets: list = field(default_factory=list)


class Worker:
    """State is ``away``, ``joining`` or one of ``MEMBER``; ``owed`` is what it will owe when its push is answered."""

    def __init__(self, number):
        self.number, self.state, self.errands = number, "away", []
        self.sequence, self.version, self.w, self.weights = 0, None, None, {}
        self.frame = self.reply = self.leave = None
        self.restart()

    def restart(self):
        self.sender, self.owed = Sender(LAYOUT, [compressor(UPLINK)] * 2, self.number), None

    def residual(self):
        return self.sender.residual if self.owed is None else self.owed

    def follow(self, entry):
        assert entry.version == self.version + 1
        for place, update in zip(LAYOUT.segments, messages.updates(entry, LAYOUT), strict=True):
            update.subtract_from(self.w[place.start : place.stop])
        self.version = entry.version
        self.weights = self.weights if entry.weights is None else entry.weights


class Run:
    """One run, whose server steps by the sum, or by ``rate`` times it. Its actions are listed in ``ACTIONS``."""

    def __init__(self, rate):
        self.rate = 1.0 if rate is None else rate
        server = ServerSettings(optimizer={"kind": "torch.optim.SGD", "lr": rate} if rate else {"kind": "sum"})
        self.server = Server(Plan(10**6, FOUNDERS, "difference", DOWNLINK, {}, 3, 1, server), lambda: 0.0)
        self.start = torch.linspace(-1, 1, LAYOUT.numel, dtype=torch.float64)
        self.workers = [Worker(number) for number in range(MANY)]
        self.answered, self.ticket, self.version = {}, 0, 0
        self.counted, self.did = Counter(), Counter()
        # what workers were given, what the server took, what of that it folded, what went down with a worker
        self.given, self.taken, self.folded, self.lost = zeros(), zeros(), zeros(), zeros()
        for number in FOUNDERS:
            self.present(self.workers[number], None)

    # -- frames ------------------------------------------------------------------------------------

    def send(self, frame, errand=None):
        """Deliver a frame; every answer reaches its worker at once. The frames of this call's answer, if any."""
        self.ticket += 1
        ticket = self.ticket
        if errand is not None:
            errand.tickets.append(ticket)
        self.counted["uplink"] += frame.size
        for answer in self.server.receive(frame, ticket):
            assert answer.ticket not in self.answered, "a ticket was answered twice"
            self.answered[answer.ticket] = answer.frames
            self.counted["downlink"] += sum(f.size for f in answer.frames)
        if self.server.state is not None and self.server.state.version != self.version:
            self.version, self.folded = self.server.state.version, self.taken.clone()
        for worker in self.workers:
            for waiting in [e for e in worker.errands if e.tickets[0] in self.answered]:
                worker.errands.remove(waiting)
                self.hear(worker, waiting)
        return self.answered.get(ticket)

    def hear(self, worker, errand):
        frames = [tuple(bytes(f) for f in self.answered[ticket]) for ticket in errand.tickets]
        assert len(set(frames)) == 1, "all calls of one message get the same answer"
        first, *entries = (messages.parse(f) for f in self.answered[errand.tickets[0]])
        if errand.kind == "joining":
            assert isinstance(first, Welcome)
            if first.bodies:
                worker.w, _ = snapshot.unpack_snapshot(LAYOUT, first.bodies)
                self.did["snapshots"] += 1
            worker.version, worker.weights, worker.state = first.version, first.weights, "idle"
            for entry in entries:
                worker.follow(entry)
                self.did["caught up"] += 1
            worker.reply = None
        elif errand.kind == "stale":  # of a process that is gone
            assert isinstance(first, Entry | Refusal)
        else:
            worker.reply = frames[0]
            if errand.kind == "pushed":
                assert isinstance(first, Entry)
                worker.sender.commit()
                worker.follow(first)
            elif errand.kind == "averaging":
                assert isinstance(first, Mean)
                share = worker.weights[worker.number] / first.weight
                worker.sender.replace(worker.message, share * dense(first))
            worker.owed = None
            if errand.kind == worker.state:
                worker.state = "idle"

    # -- what may happen ---------------------------------------------------------------------------

    def present(self, worker, held):
        model = snapshot.pack(LAYOUT, self.start, ()) if worker.number == 0 else ()
        worker.join = Join(worker.number, LAYOUT.describe(), version=held, bodies=model, layout=LAYOUT.hash).pack()
        worker.state = "joining"
        worker.errands.append(Errand("joining"))
        self.send(worker.join, worker.errands[-1])

    def join(self, worker, number):
        worker.restart()
        self.present(worker, worker.version if number % 2 else None)
        self.did["join"] += 1

    def join_again(self, worker, number):
        self.send(worker.join, worker.errands[-1])

    def restart(self, worker, number):
        """The process dies with its residual and comes back, with or without its replica."""
        forgets = number % 2
        self.lost += worker.residual()
        for errand in worker.errands:
            errand.kind = "stale"
        worker.restart()
        worker.sequence = 0 if forgets else worker.sequence
        if worker.state == "averaging":
            self.did["withdrawn"] += 1
        self.present(worker, None if forgets else worker.version)
        self.did["restart"] += 1

    def push(self, worker, number):
        given = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        worker.sequence += 1
        message = worker.sender.stage(given, worker.sequence)
        digest = snapshot.digest(worker.w) if number % 2 else None
        push = Push(
            worker.number,
            worker.sequence,
            worker.version,
            8,
            digest=digest,
            bodies=message.bodies,
            layout=LAYOUT.hash,
        )
        worker.owed = worker.sender.residual + given - dense(push)
        worker.state, worker.frame, worker.reply = "pushed", push.pack(), None
        worker.errands.append(Errand("pushed"))
        self.given += given
        self.taken += dense(push)
        self.send(worker.frame, worker.errands[-1])
        self.did["push"] += 1

    def average(self, worker, number):
        worker.sequence += 1
        outgoing = Sender(LAYOUT, [compressor(AVERAGE)] * 2, 0, memory=None)
        worker.message = outgoing.stage(worker.sender.residual, worker.sequence, Dropped())
        at = (worker.number, worker.sequence, worker.version)
        worker.state, worker.reply = "averaging", None
        worker.frame = Average(*at, bodies=worker.message.bodies, layout=LAYOUT.hash).pack()
        worker.errands.append(Errand("averaging"))
        self.send(worker.frame, worker.errands[-1])
        self.did["average"] += 1

    def resend_before_the_answer(self, worker, number):
        assert self.send(worker.frame, worker.errands[-1]) is None
        self.did["resend"] += 1

    def resend_after_the_answer(self, worker, number):
        again = self.send(worker.frame)
        assert tuple(bytes(f) for f in again) == worker.reply
        self.did["resend"] += 1

    def leave(self, worker, number):
        hands_over = number % 2 == 1
        residual = worker.residual().clone()
        for errand in worker.errands:
            errand.kind = "last"  # its answer is still worth having
        bodies = exact(residual) if hands_over else ()
        if hands_over:
            self.taken += residual
        else:
            self.lost += residual
        worker.restart()
        worker.state = "away"
        worker.leave = Leave(worker.number, "spot", bodies=bodies, layout=LAYOUT.hash).pack()
        worker.farewell = bytes(self.farewell(worker))
        self.did["leave"] += 1
        self.did["hand-over"] += hands_over

    def leave_again(self, worker, number):
        assert bytes(self.farewell(worker)) == worker.farewell
        self.did["resend"] += 1

    def farewell(self, worker):
        (frame,) = self.send(worker.leave)
        assert isinstance(messages.parse(frame), Farewell)
        return frame

    # -- what holds at any time --------------------------------------------------------------------

    def the_true_model_moved_by_what_was_folded(self):
        if self.server.state is not None:
            x = self.server.state.w - self.server.state.sender.residual
            assert torch.allclose(self.start - x, self.rate * self.folded, rtol=0, atol=1e-9)

    def what_was_given_was_sent_is_owed_or_went_down_with_a_worker(self):
        owed = sum((w.residual() for w in self.workers), zeros())
        assert torch.allclose(self.given, self.taken + owed + self.lost, rtol=0, atol=1e-9)

    def every_ledger_balances(self):
        assert all(w.sender.conservation_error() <= 4 for w in self.workers)
        assert self.server.vitals.server_conservation <= 4

    def all_members_have_the_replica_of_the_server_bit_for_bit(self):
        for worker in self.workers:
            if worker.state in MEMBER:
                assert worker.version == self.server.state.version
                assert snapshot.digest(worker.w) == snapshot.digest(self.server.state.w)
                assert worker.weights == self.server.state.weights

    def somebody_can_always_go_on(self):
        states = [w.state for w in self.workers if w.state in MEMBER]
        assert not states or "idle" in states

    def the_counters_agree_with_what_happened(self):
        vitals = self.server.vitals
        for direction in ("uplink", "downlink"):
            counted = sum(size for (d, _), size in vitals.wire.items() if d == direction)
            assert counted == self.counted[direction]
        assert vitals.leaves["spot"] == self.did["leave"]
        assert vitals.handed_over == self.did["hand-over"]
        assert vitals.rejected["member"] == vitals.rejected.total() <= self.did["withdrawn"] * 9

    def check(self):
        self.the_true_model_moved_by_what_was_folded()
        self.what_was_given_was_sent_is_owed_or_went_down_with_a_worker()
        self.every_ledger_balances()
        self.all_members_have_the_replica_of_the_server_bit_for_bit()
        self.somebody_can_always_go_on()
        self.the_counters_agree_with_what_happened()

    def possible(self):
        """What can happen next: an action's name and a worker's number."""
        company = sum(worker.state in MEMBER for worker in self.workers) > 1
        return [
            (name, worker.number)
            for name, may in ACTIONS.items()
            for worker in self.workers
            if may(worker) and (name != "leave" or company)
        ]

    def step(self, action, worker, number):
        getattr(self, action)(self.workers[worker], number)
        self.check()


ACTIONS = {
    "push": lambda worker: worker.state == "idle",
    "average": lambda worker: worker.state == "idle",
    "resend_before_the_answer": lambda worker: worker.state in ("pushed", "averaging"),
    "resend_after_the_answer": lambda worker: worker.state in ("idle", "away") and worker.reply,
    "leave": lambda worker: worker.state in ("idle", "pushed"),
    "leave_again": lambda worker: worker.state == "away" and worker.leave is not None,
    "join": lambda worker: worker.state == "away",
    "join_again": lambda worker: worker.state == "joining",
    "restart": lambda worker: worker.state in MEMBER,
}


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([None, 0.5]), st.lists(st.tuples(st.integers(0, 127), st.integers(0, 99)), max_size=50))
def test_any_schedule_conserves_everything_and_keeps_replicas_equal(rate, choices):
    run = Run(rate)
    for choice, number in choices:
        possible = run.possible()
        run.step(*possible[choice % len(possible)], number)


@pytest.mark.parametrize(("rate", "seed"), [(None, 0), (0.5, 0), (None, 1), (0.5, 1)])
def test_a_long_schedule_does_so_too_and_does_everything(rate, seed):
    run, chance = Run(rate), random.Random(seed)
    for _ in range(700):
        run.step(*chance.choice(run.possible()), chance.randrange(100))
    for what in ("join", "restart", "push", "average", "resend", "leave", "withdrawn", "caught up", "snapshots"):
        assert run.did[what] > 5, what
    assert run.version > 20
