"""A relay between a rig's server and a group: who sends what, what is folded, and that nothing is lost or doubled."""

import itertools

import numpy as np
import pytest
import torch

from protocol import messages
from protocol.messages import Average, Entry, Farewell, Mean, Push, Refusal, Welcome
from protocol.sampling import participants
from protocol.settings import Schedule
from ps.relay import Forward, Relay, RelayPlan

NUMEL = 25
GROUP = (1, 2)


class Tier:
    """A rig with worker 0 at the server and workers 1 and 2 behind relay 3.

    Attributes:
        heard: the frames of each ticket of the group that was answered.
        passed: the frames that the relay sent on.
    """

    def __init__(self, rig, uplink="none", **plan):
        self.rig = rig(workers=(0, 1, 2), relays={3: GROUP}, **plan)
        share = plan.get("participation", 1.0)
        self.relay = Relay(
            RelayPlan(3, GROUP, uplink, self.rig.server.plan.overrides, Schedule(), 0, share, "float32", 2)
        )
        self.heard, self.passed = {}, []
        self._tickets = itertools.count(1000)
        self._waiting = {}  # ticket at the server -> token of the relay

    def send(self, message):
        """Deliver a message of the group to its relay; the ticket."""
        ticket = next(self._tickets)
        self.perform(self.relay.receive(message.pack(), ticket))
        return ticket

    def perform(self, deeds):
        for deed in deeds:
            if isinstance(deed, Forward):
                self.passed.append(messages.parse(deed.frame))
                self._waiting[self.rig.send(deed.frame)] = deed.token
            else:
                assert deed.ticket not in self.heard, "a ticket was answered twice"
                self.heard[deed.ticket] = deed.frames
        self.settle()

    def settle(self):
        """Bring the relay what the server has answered since."""
        while ready := [ticket for ticket in self._waiting if not self.rig.waits(ticket)]:
            token = self._waiting.pop(ready[0])
            self.perform(self.relay.answered(token, self.rig.heard[ready[0]]))

    def direct(self, message):
        """Deliver a message of worker 0 to the server itself; the ticket."""
        ticket = self.rig.send(message)
        self.settle()
        return ticket

    def answer(self, ticket):
        (frame,) = self.heard[ticket]
        return messages.parse(frame)

    def start(self):
        joins = [self.send(self.rig.join(worker)) for worker in GROUP]
        self.direct(self.rig.join(0))
        assert all(isinstance(self.answer(ticket), Welcome) for ticket in joins)
        return self

    @property
    def owed(self):
        return self.relay.sender.residual.clone()


@pytest.fixture
def tier(rig):
    return lambda **plan: Tier(rig, **plan).start()


def vector(seed):
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))


def test_a_group_counts_at_the_server_as_its_members(tier):
    two = tier()
    before, given = two.rig.w, [vector(n) for n in range(3)]
    tickets = [two.send(two.rig.push(worker, given[worker])) for worker in GROUP]
    assert all(ticket not in two.heard for ticket in tickets), "the round waits for worker 0"
    two.direct(two.rig.push(0, given[0]))
    assert torch.allclose(two.rig.w, before - sum(given), atol=1e-6)
    entries = [two.answer(ticket) for ticket in tickets]
    assert all(isinstance(entry, Entry) and entry.version == 1 for entry in entries)
    assert two.rig.server.state.position == 3 * 8
    assert set(two.rig.server.state.weights) == {0, 1, 2}


def test_the_relay_sends_one_message_for_its_group_and_only_when_it_is_complete(tier):
    two = tier()
    two.passed.clear()
    two.send(two.rig.push(1, vector(1)))
    assert two.passed == []
    two.send(two.rig.push(2, vector(2)))
    (push,) = two.passed
    assert isinstance(push, Push)
    assert (push.worker, push.samples) == (3, 16)
    assert [messages.parse(np.frombuffer(f, np.uint8)).worker for f in push.relayed] == [1, 2]


def test_what_a_relay_leaves_behind_is_carried_to_its_next_message(tier):
    """``p = e_r + sum c_k``, ``e_r' = p - decode(c_r)``: over all rounds the sum arrives but for the residual."""
    two = tier(uplink="topk:0.2")
    start, total = two.rig.w, torch.zeros(NUMEL)
    for version in range(12):
        given = [vector(10 * version + worker) for worker in range(3)]
        for worker in GROUP:
            two.send(two.rig.push(worker, given[worker]))
        two.direct(two.rig.push(0, given[0]))
        total += sum(given)
    assert float(two.owed.norm()) > 1
    assert torch.allclose(start - two.rig.w + two.owed, total, atol=1e-4)
    assert two.relay.sender.conservation_error() <= 4
    sparse = messages.updates(two.passed[-1], two.rig.layout)
    assert len(sparse[0].values) == 4  # topk:0.2 of the 20 elements of the first tensor


def test_every_replica_gets_the_servers_entry_byte_for_byte(tier):
    two = tier(uplink="topk:0.2", downlink="topk:0.2")
    tickets = [two.send(two.rig.push(worker, vector(worker))) for worker in GROUP]
    ticket = two.direct(two.rig.push(0, vector(0)))
    (entry,) = two.rig.heard[ticket]
    assert all(bytes(two.heard[t][0]) == bytes(entry) for t in tickets)


def test_a_push_that_comes_again_is_folded_once_and_gets_the_same_answer(tier):
    two = tier()
    before, push = two.rig.w, two.rig.push(1, vector(1))
    first, again = two.send(push), two.send(push)
    two.send(two.rig.push(2, vector(2)))
    waiting = two.send(push)
    two.direct(two.rig.push(0, vector(0)))
    late = two.send(push)
    answers = {bytes(two.heard[ticket][0]) for ticket in (first, again, waiting, late)}
    assert len(answers) == 1
    assert torch.allclose(two.rig.w, before - vector(0) - vector(1) - vector(2), atol=1e-6)


def test_a_push_that_the_server_refuses_leaves_the_relay_as_it_was(tier):
    two = tier(uplink="topk:0.2")
    for worker in GROUP:
        two.send(two.rig.push(worker, vector(worker)))
    two.direct(two.rig.push(0, 0.0))
    owed, before = two.owed, two.rig.w
    tickets = [two.send(two.rig.push(worker, vector(worker), digest=1)) for worker in GROUP]
    refusals = [two.answer(ticket) for ticket in tickets]
    assert [one.reason for one in refusals] == ["replica", "replica"]
    assert torch.equal(two.owed, owed)
    for worker in GROUP:  # the number was not used up
        two.send(two.rig.push(worker, vector(5 + worker), sequence=two.rig.sequences[worker]))
    two.direct(two.rig.push(0, 0.0))
    assert torch.allclose(before - two.rig.w + two.owed - owed, vector(6) + vector(7), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 5}, "version"),
        ({"sequence": 9}, "sequence"),
        ({"bodies": ()}, "segment"),
        ({"layout": bytes(8)}, "layout"),
    ],
)
def test_a_push_that_does_not_fit_is_refused_and_leaves_no_trace(tier, change, reason):
    two = tier()
    for worker in GROUP:
        two.send(two.rig.push(worker, 0.0))
    two.direct(two.rig.push(0, 0.0))
    before = two.rig.w
    refusal = two.answer(two.send(two.rig.push(1, vector(1), **change)))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason
    two.rig.sequences[1] = 1
    for worker in GROUP:
        two.send(two.rig.push(worker, vector(2)))
    two.direct(two.rig.push(0, 0.0))
    assert torch.allclose(two.rig.w, before - 2 * vector(2), atol=1e-6)


def test_a_relay_that_is_not_of_this_run_is_refused(tier):
    two = tier()
    inner = two.rig.push(1, vector(1))
    for sender, folded in ((4, inner), (3, two.rig.push(0, vector(0)))):
        push = Push(sender, 1, 0, 8, relayed=[folded.pack().tobytes()], bodies=inner.bodies, layout=inner.layout)
        refusal = two.rig.ask(push)
        assert (refusal.reason, "relay" in refusal.detail) == ("member", True)


def test_averages_go_through_and_leave_the_relays_residual_alone(tier):
    two = tier(uplink="topk:0.2")
    given = [vector(n) for n in range(3)]
    for worker in GROUP:
        two.send(two.rig.push(worker, given[worker]))
    two.direct(two.rig.push(0, given[0]))
    owed = two.owed
    tickets = [two.send(two.rig.average(worker, given[worker])) for worker in GROUP]
    two.direct(two.rig.push(0, given[0], kind=Average))
    mean = two.answer(tickets[0])
    assert isinstance(mean, Mean)
    assert torch.allclose(two.rig.dense(mean), sum(given), atol=1e-5)
    assert torch.equal(two.owed, owed)
    for worker in GROUP:
        two.send(two.rig.push(worker, 0.0))
    two.direct(two.rig.push(0, 0.0))
    assert two.rig.version == 2


def test_one_that_leaves_is_not_waited_for_and_the_last_takes_the_relays_residual_along(tier):
    two = tier(uplink="topk:0.2")
    start = two.rig.w
    for worker in GROUP:
        two.send(two.rig.push(worker, vector(worker)))
    two.direct(two.rig.push(0, 0.0))
    assert isinstance(two.answer(two.send(two.rig.leave(2, vector(20)))), Farewell)
    two.send(two.rig.push(1, vector(3)))
    two.direct(two.rig.push(0, 0.0))
    assert set(two.rig.server.state.weights) == {0, 1}
    assert float(two.owed.norm()) > 0.5
    assert isinstance(two.answer(two.send(two.rig.leave(1, vector(21)))), Farewell)
    two.direct(two.rig.push(0, 0.0))
    given = vector(1) + vector(2) + vector(3) + vector(20) + vector(21)
    assert torch.allclose(start - two.rig.w, given, atol=1e-5), "nothing has stayed at the relay"


def test_a_member_that_leaves_completes_the_group_of_the_others(tier):
    two = tier()
    before = two.rig.w
    ticket = two.send(two.rig.push(1, vector(1)))
    two.direct(two.rig.push(0, 0.0))
    assert ticket not in two.heard
    two.send(two.rig.leave(2))
    assert isinstance(two.answer(ticket), Entry)
    assert torch.allclose(two.rig.w, before - vector(1), atol=1e-6)


def test_a_new_member_joins_through_the_relay(tier):
    two = tier()
    two.send(two.rig.leave(2))
    for worker in (1, 0):
        (two.send if worker else two.direct)(two.rig.push(worker, 0.0))
    ticket = two.send(two.rig.join(2))
    for worker in (1, 0):
        (two.send if worker else two.direct)(two.rig.push(worker, 0.0))
    assert isinstance(two.answer(ticket), Welcome)
    two.rig.sequences[2] = 0
    before = two.rig.w
    for worker in GROUP:
        two.send(two.rig.push(worker, vector(worker)))
    two.direct(two.rig.push(0, 0.0))
    assert torch.allclose(two.rig.w, before - vector(1) - vector(2), atol=1e-6)


def test_only_those_of_a_group_who_take_part_are_waited_for(tier):
    two = tier(participation=0.67)
    for version in range(6):
        taking, before = participants((0, 1, 2), 0.67, 0, version), two.rig.w
        assert len(taking) == 2
        for worker in sorted(set(taking) & set(GROUP)):
            two.send(two.rig.push(worker, vector(worker)))
        if 0 in taking:
            two.direct(two.rig.push(0, vector(0)))
        assert two.rig.version == version + 1
        assert torch.allclose(two.rig.w, before - sum(vector(worker) for worker in taking), atol=1e-5)


def test_the_bytes_of_both_tiers_are_counted_apart(tier):
    two = tier()
    pushes = [two.rig.push(worker, vector(worker)) for worker in GROUP]
    tickets = [two.send(push) for push in pushes]
    mine = two.rig.push(0, 0.0)
    two.direct(mine)
    inner = two.relay.vitals
    assert inner.bytes("uplink") == sum(push.pack().size for push in pushes)
    assert inner.bytes("downlink") == sum(frame.size for ticket in tickets for frame in two.heard[ticket])
    assert inner.dense["uplink"] == 2 * 4 * two.rig.layout.trainable
    outer = two.rig.server.vitals
    assert outer.bytes("uplink") == mine.pack().size + two.passed[-1].pack().size
    assert outer.dense["uplink"] == 2 * 4 * two.rig.layout.trainable
