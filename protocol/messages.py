"""The messages, as values. Each knows its kind on the wire and packs itself into a frame.

Fields have integer keys that never change their meaning; a field at its default does not travel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import msgpack
import numpy as np
import numpy.typing as npt
import torch

from protocol import wire
from protocol.errors import DecodeError
from protocol.layout import Layout
from protocol.segment import unpack
from protocol.update import Update

U8 = npt.NDArray[np.uint8]
Bodies = tuple[U8, ...]

REASONS = ("frame", "layout", "member", "version", "sequence", "segment", "not_finite", "replica", "finished")
"""Why a message is refused: the label of ``rejected_messages_total``."""

STATISTICS_LIMIT = 64  # bytes a push, reported values included
_LARGEST = float(np.finfo(np.float32).max)


class Stat:
    """Keys of the statistics that travel with a push: integer keys, float32 values."""

    BEFORE, SENT, ERROR, DISCARDED = 0, 1, 2, 3  # norms: |p_k|, |decode(c_k)|, |e_k|, dropped this round
    COMPUTE, ENCODE, EXCHANGE, APPLY = 4, 5, 6, 7  # seconds of the last round
    CONSERVATION = 8  # conservation_error of this sender
    REPORTED = 16  # and upwards: values that the user reported, by the order of their names

    PHASES: ClassVar[dict[int, str]] = {4: "compute", 5: "encode", 6: "exchange", 7: "apply"}


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _count(value: Any) -> bool:
    return _whole(value) and value < 2**32  # sums of counts must fit into 63 bits


def _weights(value: Any) -> bool:
    return isinstance(value, dict) and all(_whole(k) and isinstance(a, float) and 0 < a <= 1 for k, a in value.items())


def _ratios(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(ratio, float) and 0 <= ratio <= 1 for ratio in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_whole(number) for number in value)


def _frames(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(frame, bytes) for frame in value)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _groups(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(g, dict) and _names(list(g)) for g in value)


def _options(value: Any) -> bool:
    return _groups(value) and not any("params" in group for group in value)


def _optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("kind"), str)
        and _groups(value.get("groups"))
        and all(_names(group.get("params")) for group in value["groups"])
    )


def _field(key: int, valid: Callable[[Any], bool], **default: Any) -> Any:
    return dataclasses.field(metadata={"key": key, "valid": valid}, **default)


def _optional(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or valid(value)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


@dataclass(frozen=True)
class Message:
    """Base: packing and checked unpacking by the fields' keys. ``bodies`` are raw segments."""

    KIND: ClassVar[int] = 0

    bodies: Bodies = dataclasses.field(default=(), kw_only=True)
    layout: bytes = dataclasses.field(default=wire.NO_LAYOUT, kw_only=True)

    def pack(self) -> U8:
        """The frame of this message."""
        fields = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "key" in field.metadata and not (value is field.default or value == field.default):
                fields[field.metadata["key"]] = value
        return wire.pack(self.KIND, self.layout, fields, self.bodies)

    @classmethod
    def of(cls, frame: wire.Frame) -> Self:
        """The message in a frame of this kind.

        Raises:
            DecodeError: a field is missing, unknown or not of its type.
        """
        values, given = {}, dict(frame.fields)
        for field in dataclasses.fields(cls):
            if "key" not in field.metadata:
                continue
            key = field.metadata["key"]
            if key in given:
                value = given.pop(key)
                if not field.metadata["valid"](value):
                    raise DecodeError(f"field {field.name!r} of a {cls.__name__} message is malformed: {value!r:.80}")
                values[field.name] = value
            elif field.default is dataclasses.MISSING:
                raise DecodeError(f"a {cls.__name__} message lacks its field {field.name!r}")
        if given:
            raise DecodeError(f"a {cls.__name__} message has unknown fields {sorted(given)}")
        return cls(**values, bodies=frame.bodies, layout=frame.layout)


@dataclass(frozen=True)
class Join(Message):
    """A worker presents its model. Rank 0 of a new run sends the model itself as well."""

    KIND: ClassVar[int] = 1
    worker: int = _field(1, _whole)
    description: list[Any] = _field(2, _is(list))  # Layout.describe()
    optimizer: dict[str, Any] | None = _field(3, _optional(_optimizer), default=None)  # send: gradient only
    version: int | None = _field(4, _optional(_whole), default=None)  # of a replica that it still holds
    samples: int | None = _field(5, _optional(_count), default=None)  # of its own data, for its weight


@dataclass(frozen=True)
class Welcome(Message):
    """A snapshot: the model at a version, which the joiner takes over bit for bit.

    Without bodies it says that the joiner's own replica at that version is good; the entries that it
    lacks follow in the same answer.
    """

    KIND: ClassVar[int] = 2
    version: int = _field(1, _whole)
    position: int = _field(2, _whole)
    weights: dict[int, float] = _field(3, _weights)
    ratios: list[float] | None = _field(4, _optional(_ratios), default=None)  # see Entry
    final: bool = _field(5, _is(bool), default=False)  # the run has ended with this version


@dataclass(frozen=True)
class Push(Message):
    """A worker's compressed update for one round."""

    KIND: ClassVar[int] = 3
    worker: int = _field(1, _whole)
    sequence: int = _field(2, _whole)
    version: int = _field(3, _whole)  # of the replica that the update was computed from
    samples: int = _field(4, _count)
    statistics: bytes = _field(5, _is(bytes), default=b"")
    names: list[str] | None = _field(6, _optional(_names), default=None)  # newly reported quantities
    digest: int | None = _field(7, _optional(_whole), default=None)  # of the replica at ``version``
    options: list[dict[str, Any]] | None = _field(8, _optional(_options), default=None)  # optimizer, by group
    skipped: int = _field(9, _count, default=0)  # optimizer steps that did not happen
    replaced: list[int] | None = _field(10, _optional(_numbers), default=None)  # segments that replace (EF21+)
    sketch: bytes = _field(11, _is(bytes), default=b"")  # of the residual before the round, see protocol.ledger
    energies: bytes = _field(12, _is(bytes), default=b"")  # squared norms by segment, for the choice of ratios
    relayed: list[bytes] | None = _field(13, _optional(_frames), default=None)  # what a relay folded, without bodies


@dataclass(frozen=True)
class Entry(Message):
    """Entry ``version`` of the log: what every replica subtracts to reach that version."""

    KIND: ClassVar[int] = 4
    version: int = _field(1, _whole)
    position: int = _field(2, _whole)
    weights: dict[int, float] | None = _field(3, _optional(_weights), default=None)  # if they change here
    final: bool = _field(4, _is(bool), default=False)
    ratios: list[float] | None = _field(5, _optional(_ratios), default=None)  # of the uplink, if they change here


@dataclass(frozen=True)
class Average(Message):
    """A worker's compressed residual, for error averaging."""

    KIND: ClassVar[int] = 5
    worker: int = _field(1, _whole)
    sequence: int = _field(2, _whole)
    version: int = _field(3, _whole)


@dataclass(frozen=True)
class Mean(Message):
    """The exact sum of the residuals that were sent, and the sum of their senders' weights."""

    KIND: ClassVar[int] = 6
    version: int = _field(1, _whole)
    weight: float = _field(2, lambda value: isinstance(value, float) and 0 < value < math.inf)


@dataclass(frozen=True)
class Refusal(Message):
    """The server did not take a message; nothing of it was kept."""

    KIND: ClassVar[int] = 7
    reason: str = _field(1, lambda value: value in REASONS)
    detail: str = _field(2, _is(str))


@dataclass(frozen=True)
class Leave(Message):
    """A worker leaves. Its bodies, if any, are its residual, dense: it enters the next fold."""

    KIND: ClassVar[int] = 8
    worker: int = _field(1, _whole)
    cause: str = _field(2, _is(str))


@dataclass(frozen=True)
class Farewell(Message):
    """The server's answer to a worker that left."""

    KIND: ClassVar[int] = 9
    version: int = _field(1, _whole)


@dataclass(frozen=True)
class Pull(Message):
    """A worker that has nothing to push this round waits for the entries after its version."""

    KIND: ClassVar[int] = 10
    worker: int = _field(1, _whole)
    version: int = _field(2, _whole)


_KINDS: dict[int, type[Message]] = {
    m.KIND: m for m in (Join, Welcome, Push, Entry, Average, Mean, Refusal, Leave, Farewell, Pull)
}


def parse(frame: U8) -> Message:
    """The message in a frame.

    Raises:
        DecodeError: the frame or a field of the message is not valid.
    """
    parts = wire.unpack(frame)
    if parts.kind not in _KINDS:
        raise DecodeError(f"the frame has kind {parts.kind}; valid are {', '.join(map(str, _KINDS))}")
    return _KINDS[parts.kind].of(parts)


def updates(message: Message, layout: Layout, device: torch.device | None = None) -> tuple[Update, ...]:
    """The message's bodies decoded, one for each segment of the layout; see ``segment.unpack`` for the device.

    Raises:
        DecodeError: a body is not valid for its segment; the message names the segment.
    """
    if len(message.bodies) != len(layout.segments):
        raise DecodeError(f"the message has {len(message.bodies)} segments where the layout has {len(layout.segments)}")
    decoded = []
    for body, place in zip(message.bodies, layout.segments, strict=True):
        try:
            update = unpack(body, place.numel, device)
            if update.dtype.itemsize > layout.dtype.itemsize:
                raise DecodeError("it holds float64 values where the model has float32")
            decoded.append(update)
        except DecodeError as error:
            raise DecodeError(f"segment {place.entry.name!r}: {error}") from None
    return tuple(decoded)


def pack_statistics(values: dict[int, float]) -> bytes:
    """Integer keys and float32 values, clamped to its range, in at most ``STATISTICS_LIMIT`` bytes."""
    clamped = {k: max(-_LARGEST, min(v, _LARGEST)) if math.isfinite(v) else v for k, v in values.items()}
    data: bytes = msgpack.packb(clamped, use_single_float=True)
    assert len(data) <= STATISTICS_LIMIT, f"{len(values)} statistics take {len(data)} bytes"
    return data


def unpack_statistics(data: bytes) -> dict[int, float]:
    """The inverse. Values may be NaN or infinite, as what a user reports may be.

    Raises:
        DecodeError: too long, or not a map from integers to floats.
    """
    if not data:
        return {}
    if len(data) > STATISTICS_LIMIT:
        raise DecodeError(f"statistics take {len(data)} bytes; at most {STATISTICS_LIMIT} are allowed")
    try:
        values = msgpack.unpackb(data, strict_map_key=False)
    except (TypeError, ValueError, msgpack.UnpackException) as error:
        raise DecodeError(f"the statistics are not valid msgpack: {error}") from None
    if not isinstance(values, dict) or not all(_whole(k) and isinstance(v, float) for k, v in values.items()):
        raise DecodeError("the statistics are not a map from whole numbers to floats")
    if any(key < Stat.REPORTED and not math.isfinite(value) for key, value in values.items()):
        raise DecodeError("the statistics hold a norm or a duration that is not finite")
    return values
