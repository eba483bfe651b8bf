"""The frame: one contiguous block of bytes around every message. ``docs/protocol.md`` specifies it.

::

    0   4  magic "CRRY"
    4   1  format version
    5   1  kind of message
    6   2  zero
    8   8  layout hash (zero where no layout is agreed yet)
    16  4  length of the map
    20  8  length of all bodies together
    28     msgpack map with integer keys; key 0 is the packed lengths of the bodies
    ..     bodies, one after the other
    -4  4  CRC-32 of everything before it

Little endian. Only msgpack is ever decoded; nothing that arrives is unpickled.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from protocol.coding import varint
from protocol.errors import DecodeError

U8 = npt.NDArray[np.uint8]

MAGIC = b"CRRY"
FORMAT_VERSION = 1
HEADER = struct.Struct("<4sBBH8sIQ")
CRC = struct.Struct("<I")
NO_LAYOUT = bytes(8)
LENGTHS = 0


@dataclass(frozen=True)
class Frame:
    """A frame taken apart. ``bodies`` are views into the frame, not copies."""

    kind: int
    layout: bytes
    fields: dict[int, Any]
    bodies: tuple[U8, ...]


def pack(kind: int, layout: bytes, fields: dict[int, Any], bodies: Sequence[U8] = ()) -> U8:
    """One frame as a 1-D uint8 array."""
    if bodies:
        fields = {LENGTHS: b"".join(varint.pack(body.size) for body in bodies), **fields}
    table = msgpack.packb(fields)
    size = sum(body.size for body in bodies)
    frame = np.empty(HEADER.size + len(table) + size + CRC.size, np.uint8)
    HEADER.pack_into(frame.data, 0, MAGIC, FORMAT_VERSION, kind, 0, layout, len(table), size)
    at = HEADER.size
    for part in (np.frombuffer(table, np.uint8), *bodies):
        frame[at : at + part.size] = part
        at += part.size
    CRC.pack_into(frame.data, at, zlib.crc32(frame[:at].data))
    return frame


def unpack(frame: U8) -> Frame:
    """Take a frame apart; every length is checked before it is used.

    Raises:
        DecodeError: the frame is truncated, altered, or of another format version.
    """
    if frame.size < HEADER.size + CRC.size:
        raise DecodeError(f"a frame of {frame.size} bytes is truncated: the header alone takes {HEADER.size}")
    magic, version, kind, zero, layout, table_size, body_size = HEADER.unpack_from(frame.data)
    if magic != MAGIC:
        raise DecodeError(f"the frame begins with {bytes(magic)!r} instead of {MAGIC!r}")
    if version != FORMAT_VERSION:
        raise DecodeError(f"the frame has format version {version}; this side speaks version {FORMAT_VERSION}")
    expected = HEADER.size + table_size + body_size + CRC.size
    if frame.size != expected:
        raise DecodeError(f"the frame has {frame.size} bytes where its header announces {expected}")
    (announced,) = CRC.unpack_from(frame[-CRC.size :].data)
    if zero or zlib.crc32(frame[: -CRC.size].data) != announced:
        raise DecodeError("the frame was altered on its way: its CRC does not match")
    split = HEADER.size + table_size
    try:
        fields = msgpack.unpackb(frame[HEADER.size : split], strict_map_key=False, object_pairs_hook=_distinct)
    except (TypeError, ValueError, msgpack.UnpackException) as error:  # TypeError: a map or list as key
        raise DecodeError(f"the frame's map is not valid msgpack: {error}") from None
    if not isinstance(fields, dict) or not all(type(key) is int for key in fields):
        raise DecodeError("the frame's map has keys that are not integers")
    bodies = _cut(fields.pop(LENGTHS, b""), frame[split : -CRC.size])
    return Frame(kind, layout, fields, bodies)


def _distinct(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    if len(fields := dict(pairs)) != len(pairs):
        raise ValueError("a key comes twice")
    return fields


def _cut(lengths: Any, data: U8) -> tuple[U8, ...]:
    if not isinstance(lengths, bytes):
        raise DecodeError("the lengths of the frame's bodies are malformed")
    packed, at, start = np.frombuffer(lengths, np.uint8), 0, 0
    bodies = []
    while at < packed.size:
        size, at = varint.take(packed, at)
        bodies.append(data[start : start + size])
        start += size
    if start != data.size:
        raise DecodeError(f"the frame's bodies take {start} bytes of {data.size}")
    return tuple(bodies)
