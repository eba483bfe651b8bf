"""Whole numbers in as few bytes as they need: LEB128, seven bits a byte, lowest first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protocol.errors import DecodeError

U8 = npt.NDArray[np.uint8]


def pack(number: int) -> bytes:
    """The bytes of a number in ``[0, 2**63)``: bit 7 is set in each but the last."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def take(data: U8, at: int) -> tuple[int, int]:
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
