"""A server without Ray: frames in, frames out, whole numbers as tickets, and a clock that stands still."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from protocol import Layout, messages, snapshot
from protocol.layout import Entry as Tensor
from protocol.messages import Average, Join, Leave, Pull, Push
from protocol.segment import pack_exact
from ps.plan import Plan
from ps.server import Server
from ps.settings import ServerSettings

MODEL = (
    Tensor("weight", (4, 5), "float32", "parameter"),
    Tensor("bias", (3,), "float32", "parameter"),
    Tensor("running_mean", (2,), "float32", "buffer"),
    Tensor("steps", (), "int64", "static"),
)
STEPS = np.array([41], "<i8").view(np.uint8)


class Rig:
    """A server and what is needed to talk to it; every ticket must be answered at most once.

    Attributes:
        heard: the frames of each ticket that was answered.
        counted: bytes by direction, counted here.
    """

    def __init__(self, workers=(0, 1, 2), layout=None, model=None, optimizer=None, server=None, **plan):
        self.layout = layout or Layout(MODEL)
        self.model = torch.arange(self.layout.numel, dtype=self.layout.dtype) if model is None else model
        self.now = 0.0
        buffers = {e.name: "none" for e in self.layout.entries if e.role == "buffer"}  # bf16 would round
        settings = {"rounds": 1000, "send": "difference", "downlink": "none", "overrides": buffers}
        settings |= {"seed": 0, "sketch_every": 1} | plan
        server = ServerSettings(**{"optimizer": optimizer or {"kind": "sum"}, **(server or {})})
        self.server = Server(Plan(workers=tuple(workers), server=server, **settings), lambda: self.now)
        self.vitals = self.server.vitals
        self.heard, self.counted = {}, Counter()
        self.sequences = Counter()
        self._tickets = itertools.count()

    # -- frames ------------------------------------------------------------------------------------

    def send(self, message):
        """Deliver a message, or a frame as it is; the ticket."""
        frame = message if isinstance(message, np.ndarray) else message.pack()
        ticket = next(self._tickets)
        self.counted["uplink"] += frame.size
        self.take(self.server.receive(frame, ticket))
        return ticket

    def take(self, answers):
        """Note the answers of a server."""
        for answer in answers:
            assert answer.ticket not in self.heard, "a ticket was answered twice"
            self.heard[answer.ticket] = answer.frames
            self.counted["downlink"] += sum(frame.size for frame in answer.frames)

    def waits(self, ticket):
        """Whether there is no answer yet."""
        return ticket not in self.heard

    def answers(self, ticket):
        """The messages of an answer."""
        return tuple(messages.parse(frame) for frame in self.heard[ticket])

    def answer(self, ticket):
        """The only message of an answer."""
        (message,) = self.answers(ticket)
        return message

    def ask(self, message):
        """The only message of an answer that comes at once."""
        return self.answer(self.send(message))

    # -- messages ----------------------------------------------------------------------------------

    def bodies(self, vector):
        """A vector exactly, one body a segment."""
        values = torch.as_tensor(vector, dtype=self.layout.dtype).expand(self.layout.numel).numpy()
        return tuple(pack_exact(np.ascontiguousarray(values[s.start : s.stop])) for s in self.layout.segments)

    def dense(self, message):
        """The bodies of a message as one vector."""
        return torch.cat([u.dense().to(self.layout.dtype) for u in messages.updates(message, self.layout)])

    def join(self, worker, version=None, model=None, **fields):
        layout = fields.pop("layout", self.layout)
        bodies = ()
        if worker == min(self.server.plan.workers):
            statics = (STEPS,) * len(layout.statics)
            bodies = snapshot.pack(layout, self.model if model is None else model, statics)
        return Join(worker, layout.describe(), version=version, bodies=bodies, layout=layout.hash, **fields)

    def push(self, worker, vector=0.0, samples=8, version=None, sequence=None, kind=Push, **fields):
        """The next push of a worker."""
        self.sequences[worker] = self.sequences[worker] + 1 if sequence is None else sequence
        at = (worker, self.sequences[worker], self.version if version is None else version)
        common = {"bodies": self.bodies(vector), "layout": self.layout.hash} | fields
        return Push(*at, samples, **common) if kind is Push else kind(*at, **common)

    def average(self, worker, vector=0.0, **fields):
        """The next average of a worker."""
        return self.push(worker, vector, kind=Average, **fields)

    def pull(self, worker, version=None, **fields):
        """Wait for what comes after a version."""
        return Pull(worker, self.version if version is None else version, **{"layout": self.layout.hash} | fields)

    def leave(self, worker, residual=None, cause="spot"):
        """Leave, with or without a residual to hand over."""
        bodies = () if residual is None else self.bodies(residual)
        return Leave(worker, cause, bodies=bodies, layout=self.layout.hash)

    # -- whole rounds ------------------------------------------------------------------------------

    def start(self):
        """Let all of the plan's workers join; self."""
        for worker in self.server.plan.workers:
            self.send(self.join(worker))
        assert self.server.state is not None
        return self

    def round(self, vectors, **fields):
        """Everyone pushes, in the order of the mapping; the entry."""
        tickets = [self.send(self.push(worker, vector, **fields)) for worker, vector in vectors.items()]
        entries = {id(frame) for ticket in tickets for frame in self.heard[ticket]}
        assert len(entries) == 1, "everyone is answered with one and the same frame"
        return self.answer(tickets[0])

    # -- state -------------------------------------------------------------------------------------

    @property
    def version(self):
        """Of the server's model."""
        return self.server.state.version

    @property
    def w(self):
        """A copy of the server's replica."""
        return self.server.state.w.clone()

    @property
    def x(self):
        """The true model, ``w - e``."""
        return self.server.state.w - self.server.state.sender.residual


@pytest.fixture(scope="session")
def rig():
    """The class, so that each test sets up what it needs."""
    return Rig
