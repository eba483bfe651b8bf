"""The values of a segment on the wire: the head of their code, then symbols in digits or entropy-coded.

::

    head      of a symbol code (none for a cast)
    -- not entropy-coded --
    data      the symbols in digits, or the numbers of a cast
    -- entropy-coded (bit 6 of the value code) --
    varint    length of a stream; one for symbols, one for each byte of a cast's number, the lowest first
    stream    ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from protocol.coding import digits, entropy, varint
from protocol.kernels import cuda_coding, kernels_of, on_device
from protocol.values import Cast, ValueCode
from protocol.values.code import U8, Reader, join, take
from protocol.values.decoded import Narrowed, Symbols

Values = Symbols | Narrowed


@dataclass(frozen=True)
class Packed:
    """Values as they travel, and the squared norms of what was sent and of what is left of them."""

    entropy: bool
    data: U8
    sent: float
    left: float


def pack(
    code: ValueCode,
    values: Any,
    key: int = 0,
    contract: bool = True,
    smaller: bool = False,
    indices: Any = None,
    out: Any = None,
) -> Packed:
    """Encode ``values`` and write what the receiver will not have of them to ``out``.

    Args:
        code: the value code.
        values: a non-empty array of finite values; not altered unless it is ``out``.
        key: fixes all randomness.
        contract: see ``SymbolCode.encode``.
        smaller: entropy-code what gets smaller by it.
        indices: where the values stand in ``out``; None if it is as long as they are.
        out: receives the rest of each value; without indices it is ``values`` itself. None if the rest is dropped.
    """
    kernels = kernels_of(values)
    if isinstance(code, Cast):
        data, sent, left = kernels.settle_cast(values, code.dtype, indices, out)
        planes = data.reshape(-1, code.dtype.itemsize).T
        head, base = b"", 256
    else:
        quantised = code.encode(values, key, contract)
        sent, left = kernels.settle(values, quantised.symbols, quantised.numbers, indices, out)
        head, base = quantised.head, quantised.base
        data = kernels.pack_digits(quantised.symbols, base)
        planes = kernels.to_host(quantised.symbols)[None] if smaller else data[None]
    if smaller:
        streams = [entropy.encode(np.ascontiguousarray(plane), base) for plane in planes]
        if sum(stream.size + len(varint.pack(stream.size)) for stream in streams) < data.size:
            coded = [part for stream in streams for part in (varint.pack(stream.size), stream)]
            return Packed(True, join(head, *coded), sent, left)
    return Packed(False, join(head, data) if head else data, sent, left)


def unpack_values(
    code: Cast | Reader,
    coded: bool,
    data: U8,
    at: int,
    count: int,
    dtype: np.dtype[Any],
    device: torch.device | None = None,
) -> tuple[Values, int]:
    """``count`` values from ``data[at:]``, and the place behind them; symbols on a device if one is given.

    Raises:
        DecodeError: the data is truncated, or not what any encoder writes.
    """
    if isinstance(code, Cast):
        if not coded:
            raw, at = take(data, at, count * code.dtype.itemsize)
            return Narrowed(raw, code, dtype).check(), at
        planes = []
        for _ in range(code.dtype.itemsize):
            stream, at = _stream(data, at)
            planes.append(entropy.decode(stream, count, 256))
        return Narrowed(np.stack(planes, axis=1).reshape(-1), code, dtype).check(), at
    base, numbers, at = code.read(data, at, count, dtype)
    if coded:
        stream, at = _stream(data, at)
        return Symbols(entropy.decode(stream, count, base), numbers), at
    raw, at = take(data, at, digits.size(count, base))
    if device is not None and on_device(device):
        return Symbols(cuda_coding.unpack_digits(torch.from_numpy(np.array(raw)).to(device), count, base), numbers), at
    return Symbols(digits.unpack(raw, count, base), numbers), at


def _stream(data: U8, at: int) -> tuple[U8, int]:
    length, at = varint.take(data, at)
    return take(data, at, length)
