"""What a message must be to be taken, and for which reason it is refused otherwise."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from protocol import energies, messages, snapshot
from protocol.errors import DecodeError, Refused
from protocol.messages import Average, Leave, Pull, Push
from protocol.update import Update
from ps.barrier import Barrier
from ps.state import ServerState


def check_sender(
    message: Push | Average | Pull | Leave, state: ServerState | None, barrier: Barrier, parts: Sequence[Push] = ()
) -> ServerState:
    """The state that the message is about.

    Raises:
        Refused: it is not of a member, or stands for one that is none, or is not for the run's model.
    """
    for worker in [part.worker for part in parts] or [message.worker]:
        gone = worker in barrier.leaving and not isinstance(message, Leave)
        if state is None or worker not in state.weights or gone:
            raise Refused("member", f"worker {worker} has not joined, or has left")
    assert state is not None
    if message.layout != state.layout.hash:
        raise Refused("layout", f"the message of worker {worker} is for a model of another layout")
    return state


def parts_of(message: Push | Average, relays: Mapping[int, Collection[int]]) -> tuple[Push, ...]:
    """The workers' pushes in a push: itself, or those that a relay of this run has folded into it.

    Raises:
        Refused: a relay has folded what it must not.
    """
    if not isinstance(message, Push):
        return ()
    if message.relayed is None:
        return (message,)
    group = relays.get(message.worker, ())
    try:
        parts = [messages.parse(np.frombuffer(frame, np.uint8)) for frame in message.relayed]
    except DecodeError as error:
        raise Refused("frame", f"what relay {message.worker} has folded is not valid: {error}") from None
    pushes = tuple(part for part in parts if isinstance(part, Push) and part.worker in group)
    if not parts or len({push.worker for push in pushes}) < len(parts) or any(push.relayed for push in pushes):
        raise Refused("member", f"relay {message.worker} has folded what is not one push of each of its group")
    return pushes


def check_update(
    message: Push | Average, parts: tuple[Push, ...], state: ServerState, barrier: Barrier, last: int | None
) -> tuple[Update, ...]:
    """The bodies, decoded.

    Args:
        parts: the workers' pushes that the message stands for.
        last: the number of the worker's last message that was answered, since it joined.

    Raises:
        Refused: it is not the worker's next message, or not of the version that it must be of, or not valid.
    """
    worker, arrived = message.worker, barrier.arrived()
    if worker in arrived or any(part.worker in arrived for part in parts):
        raise Refused("sequence", f"worker {worker} sent a message while its last one waits for an answer")
    if last is not None and message.sequence != last + 1:
        raise Refused("sequence", f"worker {worker} sent number {message.sequence} after {last}")
    for one in parts or (message,):
        expected = barrier.version(state, one.worker)
        if one.version != expected or message.version != expected:
            raise Refused("version", f"worker {worker} sent an update of version {one.version} in round {expected}")
        if one.worker not in barrier.asked(state):
            raise Refused("member", f"worker {one.worker} takes no part in the round at version {state.version}")
    if isinstance(message, Average) and barrier.asynchronous:
        raise Refused("frame", "an asynchronous server takes no Average message")
    for part in parts:
        if part.digest not in (None, _digest(state, part)):
            raise Refused(
                "replica", f"the replica of worker {part.worker} differs from the server's at version {part.version}"
            )
    try:
        decoded = messages.updates(message, state.layout)
        for push in (message, *parts) if isinstance(message, Push) else ():
            _check_statistics(push, len(state.layout.segments))
    except DecodeError as error:
        raise Refused("segment", f"the message of worker {worker} is not valid: {error}") from None
    return decoded


def _digest(state: ServerState, push: Push) -> int | None:
    """Of the model at the version of a push; what the push says where it is not known any more."""
    known = state.log.digest(push.version)
    if known is None:
        return snapshot.digest(state.w) if push.version == state.version else push.digest
    return known


def _check_statistics(push: Push, segments: int) -> None:
    messages.unpack_statistics(push.statistics)
    if push.sketch:
        energies.unpack_sketch(push.sketch)
    if push.energies:
        energies.unpack_energies(push.energies, segments)
    if any(number >= segments for number in push.replaced or ()):
        raise DecodeError(f"it replaces segments {push.replaced} of {segments}")
