"""Every ``g_k`` of ``ef21`` and ``ef21_plus`` is the same at worker and server bit for bit, whatever happens.

Workers are feedback methods that talk to a real server frame by frame; chance decides who skips a step, is refused,
misses a round, leaves, joins or starts again without its memory.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from protocol import messages, snapshot
from protocol.messages import Join, Leave, Push, Refusal, Welcome
from ps.plan import Plan
from ps.server import Server
from ps.settings import ServerSettings

RATE, BUFFERS = 0.1, 5
SHAPES = ((6, 7), (5,))
EF21, PLUS = {"kind": "ef21"}, {"kind": "ef21_plus"}


class Group:
    """A server and the methods of its workers. ``samples`` gives every worker another weight."""

    def __init__(self, lone, feedback, uplink, memory="float32", founders=(0, 1, 2)):
        make = partial(lone, feedback, uplink, SHAPES, "float32", memory, BUFFERS)
        self.make, self.layout = make, make().layout
        server = ServerSettings()
        plan = Plan(10_000, founders, "gradient", "f32", {}, 0, 1, server, uplink, feedback["kind"])
        self.server = Server(plan, lambda: 0.0)
        self.workers, self.heard, self.samples = {}, {}, {}
        self.random = torch.Generator().manual_seed(1)
        self.given, self.sent = (defaultdict(lambda: torch.zeros(BUFFERS, dtype=torch.float64)) for _ in range(2))
        self.arrived = torch.zeros(BUFFERS, dtype=torch.float64)  # of the buffers, as the above by worker
        for worker in founders:
            self.join(worker)

    def send(self, message):
        """Deliver; whoever is answered has its answer in ``heard``."""
        for answer in self.server.receive(message.pack(), message.worker):
            self.heard[answer.ticket] = [messages.parse(frame) for frame in answer.frames]

    def join(self, worker):
        """Join, perhaps again, with nothing in memory."""
        names = [entry.name for entry in self.layout.entries if entry.role == "parameter"]
        optimizer = {"kind": "torch.optim.SGD", "groups": [{"params": names, "lr": RATE}]}
        bodies = snapshot.pack(self.layout, torch.zeros(self.layout.numel), ()) if worker == 0 else ()
        self.workers.pop(worker, None)
        self.samples[worker] = 10 + 7 * worker
        self.send(
            Join(
                worker, self.layout.describe(), optimizer, None, 10 + 7 * worker, bodies=bodies, layout=self.layout.hash
            )
        )
        self.welcome()

    def welcome(self):
        """Workers whose answer is a welcome begin anew."""
        for worker, frames in list(self.heard.items()):
            if isinstance(frames[-1], Welcome):
                del self.heard[worker]
                self.workers[worker] = self.make()
                self.given.pop(worker, None)
                self.sent.pop(worker, None)
                self.workers[worker].version = frames[-1].version

    def push(self, worker, skipped=False, refused=False):
        """A random gradient, near to the last or far from it; perhaps refused at first."""
        one, state = self.workers[worker], self.server.state
        scale = float(torch.rand((), generator=self.random)) ** 8
        near = -one.sender.residual[: self.layout.trainable] * float(torch.rand((), generator=self.random) > 0.2)
        given = scale * torch.randn(self.layout.numel, generator=self.random)
        given[: self.layout.trainable] += near
        given[self.layout.trainable :] = torch.randn(BUFFERS, generator=self.random)
        weight = state.weights[worker]
        for version in (999, state.version) if refused else (state.version,):
            message = one.stage(given, weight, len(state.weights), skipped)
            self.given[worker] += weight * given[-BUFFERS:].double()
            push = Push(worker, one._sequence + 1, version, 10, skipped=int(skipped), bodies=message.bodies)
            push = replace(push, replaced=list(message.replaced) or None, layout=self.layout.hash)
            self.send(push)
            if isinstance(self.heard.get(worker, [None])[-1], Refusal):
                one.method.refuse()
                del self.heard[worker]
        self.sent[worker] += message.updates[-1].dense().double()
        self.arrived += message.updates[-1].dense().double()
        return message

    def leave(self, worker):
        self.send(Leave(worker, "spot", layout=self.layout.hash))
        self.workers.pop(worker)
        self.heard.pop(worker)

    def commit(self):
        """The round has closed: all who pushed are answered."""
        for worker in [w for w, frames in self.heard.items() if isinstance(frames[-1], messages.Entry)]:
            del self.heard[worker]
            self.workers[worker].method.commit()
            self.workers[worker]._sequence += 1
        self.welcome()

    def estimates(self):
        """``g_k`` as the workers know them; of those that have had a gradient."""
        known = {w: -one.sender.residual[: self.layout.trainable] for w, one in sorted(self.workers.items())}
        return {w: g for w, g in known.items() if self.workers[w].method._begun}

    def check(self, agree=True):
        known = self.server.state.aggregate.known
        joined = self.server._joined  # what is known of them is forgotten before the next fold
        mine = self.estimates()
        assert (
            mine.keys() == known.keys() - joined and all(torch.equal(g, known[w]) for w, g in mine.items())
        ) == agree


def live(group, rounds, seed, check):
    """Random rounds; the numbers of what happened."""
    chance, happened = random.Random(seed), dict.fromkeys(("skip", "refuse", "leave", "join", "again", "replace"), 0)
    for _ in range(rounds):
        present = sorted(group.workers)
        event = chance.choice(["leave", "join", "again", "back", "nothing", "nothing"])
        others = [worker for worker in range(6) if worker not in present and worker not in group.samples]
        if event == "join" and others:
            group.join(others[0])
            happened["join"] += 1
        elif event in ("leave", "back") and len(present) > 2:
            gone = chance.choice(present[1:])
            group.leave(gone)
            present.remove(gone)
            happened["leave"] += 1
            if event == "back":
                group.join(gone)  # before the round closes
            else:
                del group.samples[gone]
        elif event == "again":
            group.join(chance.choice(present))  # its memory is lost, and it has not left
            happened["again"] += 1
        x, weights = group.server.state.w[: group.layout.trainable].clone(), dict(group.server.state.weights)
        everyone = chance.random() < 0.1
        skips = {worker: everyone or chance.random() < 0.2 for worker in present}
        old = {w: g.clone() for w, g in group.server.state.aggregate.known.items() if w not in group.workers}
        for worker in present:
            refused = chance.random() < 0.2
            message = group.push(worker, skips[worker], refused)
            happened["skip"] += skips[worker]
            happened["refuse"] += refused
            happened["replace"] += len(message.replaced)
        group.commit()
        check(group, x, weights, skips, old)
    return happened


def agrees(group, x, weights, skips, leaving):
    """Bit for bit the same estimates; and the step is their weighted mean over those that are known."""
    group.check()
    known = {**leaving, **{w: g for w, g in group.estimates().items() if w in weights}}
    step = x - group.server.state.w[: group.layout.trainable]
    if all(skips.values()) or not known:
        assert not step.any()
        return
    share = sum(weights[w] for w in known)
    mean = sum(weights[w] / share * g.double() for w, g in known.items())
    torch.testing.assert_close(step.double(), RATE * mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("uplink", ["topk:0.3+int4", "sign"])
@pytest.mark.parametrize(
    "feedback",
    [EF21, {**EF21, "initial": "full"}, {**EF21, "eta": 0.3}, PLUS, {**PLUS, "initial": "full", "eta": 0.5}],
    ids=str,
)
def test_worker_and_server_have_the_same_estimates_whatever_happens(lone, feedback, uplink):
    group = Group(lone, feedback, uplink)
    happened = live(group, 40, 5, agrees)
    plus = feedback["kind"] == "ef21_plus"
    assert all(happened[event] for event in happened.keys() - {"replace"})
    assert bool(happened["replace"]) == plus
    for one in group.workers.values():
        assert one.sender.conservation_error() <= 4


def test_estimates_in_sparse_memory_have_the_same_bits(lone):
    prints = []
    for memory in ("float32", "sparse"):
        group = Group(lone, PLUS, "topk:0.2", memory)
        live(group, 20, 5, agrees)
        prints.append(group.server.state.w.clone())
    assert torch.equal(*prints)


@pytest.mark.parametrize("way", ["stays", "comes back"])
def test_who_lost_its_memory_has_no_estimate_at_the_server_either(lone, way):
    group = Group(lone, EF21, "topk:0.2")
    for _ in range(3):
        for worker in (0, 1, 2):
            group.push(worker)
        group.commit()
    if way == "comes back":
        group.leave(1)
    group.join(1)
    for worker in sorted(group.workers):
        group.push(worker)
    group.commit()
    for worker in (0, 1, 2):
        group.push(worker)
    group.commit()
    group.check()
    assert group.estimates().keys() == {0, 1, 2}


def test_a_server_that_adds_where_it_should_replace_is_noticed(lone, monkeypatch):
    """Else the tests above would say little."""
    made = Server._contribution
    forgetful = lambda *of: replace(made(*of), replaced=())  # noqa: E731
    monkeypatch.setattr(Server, "_contribution", forgetful)
    group = Group(lone, PLUS, "topk:0.2")
    for _ in range(10):
        for worker in (0, 1, 2):
            group.push(worker)
        group.commit()
    group.check(agree=False)


# --- buffers, and a whole run


def test_buffers_go_by_plain_error_feedback_and_are_summed(lone):
    group, trained = Group(lone, PLUS, "topk:0.2"), 47
    live(group, 30, 5, lambda *_: None)
    for worker, one in group.workers.items():
        owed = group.given[worker] - group.sent[worker]
        torch.testing.assert_close(one.sender.residual[trained:].double(), owed, rtol=0, atol=1e-5)
        assert owed.abs().max() > 1e-4
    moved = (group.server.state.sender.residual - group.server.state.w)[trained:].double()
    torch.testing.assert_close(moved, group.arrived, rtol=0, atol=1e-5)
    assert moved.abs().max() > 1


def test_in_a_run_every_round_begins_with_the_same_estimates(inline):
    data = TensorDataset(torch.randn(64, 6), torch.randn(64, 4))
    seen, skips = [], [(1, 3), (0, 4), (1, 4), (2, 4), (0, 0)]

    def train(session):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        session.prepare(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        sender, trained = session._rounds.method.sender, session._rounds.replica.layout.trainable
        for x, y in session.batches(data, 8):
            known = inline.server.state.aggregate.known.get(session._plan.worker)
            if known is not None:
                assert torch.equal(known, -sender.residual[:trained])
                seen.append(float(known.abs().max()))
            loss = mse_loss(model(x), y)
            loss = loss * math.inf if (session.rank, session.version) in skips else loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    lossy = {"uplink": "topk:0.1+int4", "downlink": "topk:0.2", "send": "gradient"}
    settings = {"workers": {"count": 3}, "federated": {"participation": 0.67}, "feedback": PLUS}
    inline.train(train, rounds=16, **lossy, **settings)
    assert inline.summary["conservation_error"] <= 4
    assert inline.summary["skipped_steps"] > 1
    assert len(seen) > 20
    assert min(seen) > 0
