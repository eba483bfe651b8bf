"""A worker's conversation with the server: frames out, checked messages in."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from protocol import messages
from protocol.errors import DecodeError, Refused
from protocol.layout import Layout
from protocol.messages import Average, Entry, Farewell, Join, Leave, Mean, Message, Pull, Push, Refusal, Welcome
from protocol.update import Update

U8 = npt.NDArray[np.uint8]
Bodies = tuple[U8, ...]
M = TypeVar("M", bound=Message)


class Transport(Protocol):
    """Carries one frame to the server and its answer back."""

    def call(self, frame: U8) -> list[U8]:
        """Blocks until the server answers.

        Raises:
            RunStopped: the run ended first.
        """


class News(NamedTuple):
    """What a worker's replica lacked: the entries after its version, or a snapshot and those after that."""

    snapshot: Welcome | None
    entries: tuple[Entry, ...]


class Exchange:
    """Numbers the messages of one worker, and refuses answers that do not fit.

    Args:
        transport: to the server.
        worker: id, which never changes.
        layout: of the worker's model.
    """

    def __init__(self, transport: Transport, worker: int, layout: Layout) -> None:
        self._transport = transport
        self._worker = worker
        self._layout = layout
        self.sequence = 0

    def join(self, optimizer: dict[str, Any] | None, model: Bodies, samples: int | None = None) -> Welcome:
        """Present the model; the answer comes when all founding workers have joined."""
        described, layout = self._layout.describe(), self._layout.hash
        join = Join(self._worker, described, optimizer, samples=samples, bodies=model, layout=layout)
        return self._expect(self._call(join), Welcome)

    def push(self, version: int, samples: int, bodies: Bodies, **fields: Any) -> News:
        """Push the next update; the answer holds the entry that folds it."""
        number = self.sequence + 1
        push = Push(self._worker, number, version, samples, **fields, bodies=bodies, layout=self._layout.hash)
        frames = self._ask(push)
        self.sequence = number  # a refused message does not use up its number
        return self._news(frames, version)

    def pull(self, version: int) -> News:
        """Wait for the next entry without an update of one's own."""
        return self._news(self._ask(Pull(self._worker, version, layout=self._layout.hash)), version)

    def average(self, version: int, bodies: Bodies) -> Mean:
        """Exchange residuals; the answer is their exact sum."""
        number = self.sequence + 1
        message = Average(self._worker, number, version, bodies=bodies, layout=self._layout.hash)
        mean = self._expect(self._call(message), Mean)
        self.sequence = number
        return mean

    def leave(self, cause: str, residual: Bodies = ()) -> Farewell:
        """Leave the run and hand over the residual, dense, if there is one."""
        leave = Leave(self._worker, cause, bodies=residual, layout=self._layout.hash)
        return self._expect(self._call(leave), Farewell)

    def updates(self, message: Message, device: torch.device) -> tuple[Update, ...]:
        """The message's bodies, decoded where they will be added."""
        return messages.updates(message, self._layout, device)

    def _call(self, message: Message) -> Message:
        answers = self._ask(message)
        if len(answers) != 1:
            raise DecodeError(f"the server answered a {type(message).__name__} with {len(answers)} frames instead of 1")
        return answers[0]

    def _ask(self, message: Message) -> list[Message]:
        answers = [messages.parse(frame) for frame in self._transport.call(message.pack())]
        for answer in answers:
            if isinstance(answer, Refusal):
                raise Refused(answer.reason, answer.detail)
            if answer.layout != self._layout.hash:
                raise DecodeError("the server's answer is for a model of another layout")
        return answers

    @classmethod
    def _news(cls, answers: list[Message], version: int) -> News:
        if answers and isinstance(answers[0], Welcome):
            welcome, version, answers = answers[0], answers[0].version, answers[1:]
        else:
            welcome = None
        entries = tuple(cls._expect(answer, Entry) for answer in answers)
        if not (entries or welcome) or any(e.version != version + 1 + i for i, e in enumerate(entries)):
            known = ", ".join(str(entry.version) for entry in entries)
            raise DecodeError(f"the answer to a worker at version {version} holds the entries {known or 'none'}")
        return News(welcome, entries)

    @staticmethod
    def _expect(answer: Message, kind: type[M]) -> M:
        if not isinstance(answer, kind):
            raise DecodeError(f"the server answered with {type(answer).__name__} instead of {kind.__name__}")
        return answer
