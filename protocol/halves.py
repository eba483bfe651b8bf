"""What two halves of a cut model say to each other: kinds from 64 on, which no server takes.

The first half sends ``Activations``, the second half answers with ``Gradients``. The 8 bytes that name the
layout in other frames name the cut's settings here. See ``docs/protocol.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from protocol import wire
from protocol.errors import DecodeError
from protocol.messages import Message

U8 = npt.NDArray[np.uint8]

DTYPES = ("float32", "float64", "float16", "bfloat16")


def _field(key: int, valid: Callable[[Any], bool], **default: Any) -> Any:
    return dataclasses.field(metadata={"key": key, "valid": valid}, **default)


def _sequence(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _rows(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**32


def _bits(value: Any) -> bool:
    return isinstance(value, bytes)


@dataclass(frozen=True)
class Activations(Message):
    """One batch at the cut, on its way to the second half."""

    KIND: ClassVar[int] = 64
    sequence: int = _field(1, _sequence)
    rows: int = _field(2, _rows)  # samples of the batch
    dtype: str = _field(3, lambda value: value in DTYPES, default="float32")  # that the second half computes with
    indices: bytes = _field(4, _bits, default=b"")  # ``pack_numbers``, one a row; empty: of no data set
    fresh: bytes = _field(5, _bits, default=b"")  # a bit a row: its memory counts as zeros; empty: of none
    awaited: bool = _field(6, lambda value: isinstance(value, bool), default=True)  # a gradient is


@dataclass(frozen=True)
class Gradients(Message):
    """The gradient of one batch at the cut, on its way back."""

    KIND: ClassVar[int] = 65
    sequence: int = _field(1, _sequence)  # of the activations that it belongs to
    fresh: bytes = _field(2, _bits, default=b"")


_KINDS: dict[int, type[Message]] = {kind.KIND: kind for kind in (Activations, Gradients)}


def parse(frame: U8) -> Message:
    """The message in a frame between two halves.

    Raises:
        DecodeError: the frame or a field of the message is not valid.
    """
    parts = wire.unpack(frame)
    if parts.kind not in _KINDS:
        raise DecodeError(
            f"the frame has kind {parts.kind}; between two halves {', '.join(map(str, _KINDS))} are valid"
        )
    return _KINDS[parts.kind].of(parts)


def pack_numbers(numbers: npt.NDArray[np.int64], below: int) -> bytes:
    """Numbers in ``[0, below)``, in any order, each in as many bits as ``below - 1`` needs, lowest bit first."""
    bits = (numbers[:, None] >> np.arange(_width(below))) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def unpack_numbers(data: bytes, count: int, below: int) -> npt.NDArray[np.int64]:
    """The inverse.

    Raises:
        DecodeError: the data is not ``count`` numbers below ``below``, each as ``pack_numbers`` writes it.
    """
    width = _width(below)
    if len(data) != -(-count * width // 8):
        raise DecodeError(f"{count} numbers of {width} bits have {len(data)} bytes instead of {-(-count * width // 8)}")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    numbers = bits[: count * width].reshape(count, width) @ (np.int64(1) << np.arange(width))
    if bits[count * width :].any() or (count and numbers.max() >= below):
        raise DecodeError(f"the numbers hold one that is not below {below}, or padding that is not empty")
    return numbers


def _width(below: int) -> int:
    return max(1, (below - 1).bit_length())
