"""The body of one segment: self-describing bytes, and what they decode to.

::

    byte 0     index code   0 every element, 1 no element (all zero), 2 Golomb-Rice gaps
    byte 1     value code, plus 128 if the values are float64
    varint     number of elements of the segment
    -- index code 2 only --
    varint     number of values sent
    byte       Rice parameter
    -- index codes 0 and 2 --
    values     exactly ``size(count)`` bytes of the value code
    -- index code 2 only --
    indices    the rest
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol.coding import rice
from protocol.errors import DecodeError
from protocol.kernels.cpu import add_at
from protocol.values import BY_ID, F32, F64, ValueCode

U8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]

ALL, NOTHING, RICE = 0, 1, 2
WIDE = 128


@dataclass(frozen=True)
class Update:
    """A decoded segment of ``numel`` elements: dense if ``indices`` is None, else sparse.

    ``indices`` are ascending int64; ``values`` have the working precision, float32 or float64.
    """

    numel: int
    indices: npt.NDArray[np.int64] | None
    values: Floats

    def add_to(self, out: Tensor) -> None:
        """``out += update``; ``out`` has shape ``(numel,)``. Values are rounded to its dtype first."""
        self._apply(out, torch.from_numpy(self.values).to(out.dtype))

    def subtract_from(self, out: Tensor) -> None:
        """``out -= update``, in the same way."""
        self._apply(out, -torch.from_numpy(self.values).to(out.dtype))

    def _apply(self, out: Tensor, values: Tensor) -> None:
        if self.indices is None:
            out += values.to(out.device)
        elif out.device.type == "cpu":
            add_at(out.numpy(), self.indices, values.numpy())
        else:  # indices are distinct, so the order of additions cannot matter
            out.index_add_(0, torch.from_numpy(self.indices).to(out.device), values.to(out.device))

    def dense(self) -> Tensor:
        """Shape ``(numel,)``, in the working precision of the message."""
        out = torch.zeros(self.numel, dtype=torch.from_numpy(self.values).dtype)
        self.add_to(out)
        return out


def pack_varint(number: int) -> bytes:
    """LEB128: seven bits a byte, lowest first."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def take_varint(data: U8, at: int) -> tuple[int, int]:
    """The number at ``data[at:]`` and the place behind it.

    Raises:
        DecodeError: the data ends first, the number has over 63 bits, or it is padded with zeros.
    """
    number = 0
    for shift in range(0, 63, 7):
        if at >= data.size:
            raise DecodeError("the segment ends inside a number")
        byte = int(data[at])
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            if byte == 0 and shift:
                break
            return number, at
    raise DecodeError("the segment holds a malformed number")


def _head(index_code: int, code: ValueCode, dtype: np.dtype[Any], numel: int) -> bytes:
    wide = WIDE if dtype == np.float64 else 0
    return bytes([index_code, code.wire_id | wide]) + pack_varint(numel)


def _join(*parts: bytes | U8) -> U8:
    return np.concatenate([np.frombuffer(p, np.uint8) if isinstance(p, bytes) else p for p in parts])


def pack_dense(code: ValueCode, values: Floats) -> tuple[U8, Floats]:
    """The body that sends every element, and the values as the receiver will read them."""
    if not values.any():
        return _join(_head(NOTHING, code, values.dtype, values.size)), np.zeros_like(values)
    data, sent = code.encode(values)
    return _join(_head(ALL, code, values.dtype, values.size), data), sent


def pack_sparse(code: ValueCode, numel: int, indices: npt.NDArray[np.int64], values: Floats) -> tuple[U8, Floats]:
    """The body that sends ``values`` (none of them zero) at ascending ``indices``."""
    if not values.size:
        return _join(_head(NOTHING, code, values.dtype, numel)), values
    data, sent = code.encode(values)
    b, gaps = rice.encode(indices, numel)
    head = _head(RICE, code, values.dtype, numel) + pack_varint(values.size) + bytes([b])
    return _join(head, data, gaps), sent


def pack_exact(values: Floats) -> U8:
    """The smaller of the bodies that hold ``values`` exactly: every element, or those that are not zero."""
    code = F64 if values.dtype == np.float64 else F32
    indices = np.flatnonzero(values)
    if indices.size < values.size:
        sparse, _ = pack_sparse(code, values.size, indices, values[indices])
        if sparse.size < values.nbytes:
            return sparse
    return pack_dense(code, values)[0]


def unpack(body: U8, numel: int) -> Update:
    """Decode a body. Nothing is allocated before the lengths are known to be right.

    Raises:
        DecodeError: the body is truncated, altered, or of a segment of another size.
    """
    if body.size < 3:
        raise DecodeError(f"a segment of {body.size} bytes is too short for any code")
    index_code, value_id = int(body[0]), int(body[1])
    code = BY_ID.get(value_id & ~WIDE)
    if code is None or index_code not in (ALL, NOTHING, RICE):
        raise DecodeError(f"the segment has unknown codes {index_code} and {value_id}")
    dtype = np.dtype(np.float64 if value_id & WIDE else np.float32)
    announced, at = take_varint(body, 2)
    if announced != numel:
        raise DecodeError(f"the segment has {announced} elements where the layout has {numel}")
    nothing = np.empty(0, np.int64), np.empty(0, dtype)
    if index_code == NOTHING:
        if at != body.size:
            raise DecodeError(f"an empty segment is followed by {body.size - at} bytes")
        return Update(numel, *nothing)
    if index_code == ALL:
        expected = code.size(numel, dtype)
        if numel == 0 or body.size - at != expected:
            raise DecodeError(f"a dense segment has {body.size - at} bytes of values instead of {expected}")
        return Update(numel, None, code.decode(body[at:], numel, dtype))
    count, at = take_varint(body, at)
    if not 0 < count <= numel or at >= body.size:
        raise DecodeError(f"the segment announces {count} values of {numel}")
    b = int(body[at])
    split = at + 1 + code.size(count, dtype)
    if split > body.size:
        raise DecodeError(f"the segment ends inside its {count} values")
    indices = rice.decode(body[split:], b, count, numel)
    return Update(numel, indices, code.decode(body[at + 1 : split], count, dtype))
