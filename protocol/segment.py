"""The body of one segment: self-describing bytes, and what they decode to.

::

    byte 0     index code   0 every element, 1 no element (all zero), 2 to 5 see ``coding.indices``,
                            6 drawn from a key, 7 a product of two matrices
    byte 1     value code, plus 64 if entropy-coded, plus 128 if the values are float64
    varint     number of elements of the segment
    -- index codes 2 to 6 --
    varint     number of values sent
    -- index codes 2 to 5 --
    byte       parameter of the index code
    -- index code 6 --
    8 bytes    key
    -- index code 7 --
    varint     rows
    varint     rank
    -- all but 1 --
    values     see ``values.section``; index code 7 has two of them, of the two matrices
    -- index codes 2 to 5 --
    indices    the rest
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from protocol.coding import indices as index_codes
from protocol.coding import varint
from protocol.errors import DecodeError
from protocol.kernels import cuda_coding, kernels_of, on_device
from protocol.kernels.permutation import chosen
from protocol.kernels.product import Product
from protocol.update import Update
from protocol.values import BY_ID, F32, F64, Cast, ValueCode
from protocol.values.code import Reader, join
from protocol.values.decoded import Narrowed
from protocol.values.section import Packed, pack, unpack_values

U8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.int64]

ALL, NOTHING, KEYED, PRODUCT = 0, 1, 6, 7
CODED, WIDE = 64, 128


def exact(dtype: np.dtype[Any]) -> Cast:
    """The value code that leaves values of the working precision as they are."""
    return F64 if dtype == np.float64 else F32


def _head(index_code: int, code: ValueCode, coded: bool, dtype: np.dtype[Any], numel: int) -> bytes:
    flags = (WIDE if dtype == np.float64 else 0) | (CODED if coded else 0)
    return bytes([index_code, code.wire_id | flags]) + varint.pack(numel)


def nothing(code: ValueCode, dtype: np.dtype[Any], numel: int) -> U8:
    """The body that says that all elements are zero."""
    return join(_head(NOTHING, code, False, dtype, numel))


def dense(code: ValueCode, dtype: np.dtype[Any], numel: int, values: Packed) -> U8:
    """The body that sends every element."""
    return join(_head(ALL, code, values.entropy, dtype, numel), values.data)


def sparse(code: ValueCode, dtype: np.dtype[Any], numel: int, indices: Any, values: Packed) -> U8:
    """The body that sends values at ascending indices (int64), in the index code that takes the fewest bytes."""
    index_code, parameter, places = kernels_of(indices).pack_indices(indices, numel)
    head = _head(index_code, code, values.entropy, dtype, numel)
    return join(head + varint.pack(len(indices)) + bytes([parameter]), values.data, places)


def keyed(code: ValueCode, dtype: np.dtype[Any], numel: int, key: int, count: int, values: Packed) -> U8:
    """The body that sends values at the ``count`` elements which the key chooses."""
    head = _head(KEYED, code, values.entropy, dtype, numel) + varint.pack(count)
    return join(head + key.to_bytes(8, "little"), values.data)


def product(code: ValueCode, dtype: np.dtype[Any], rows: int, columns: int, rank: int, parts: list[Packed]) -> U8:
    """The body that sends a matrix as the product of two; their values in the same code, both entropy-coded or none."""
    head = _head(PRODUCT, code, parts[0].entropy, dtype, rows * columns)
    return join(head + varint.pack(rows) + varint.pack(rank), parts[0].data, parts[1].data)


def pack_exact(values: Floats) -> U8:
    """The smaller of the bodies that hold ``values`` exactly: every element, or those that are not zero."""
    indices = np.flatnonzero(values)
    if 0 < indices.size < values.size:
        code = exact(values.dtype)
        body = sparse(code, values.dtype, values.size, indices, pack(code, values[indices]))
        if body.size < values.nbytes:
            return body
    return pack_dense(values)


def pack_dense(values: Floats) -> U8:
    """The body that holds every element of ``values`` exactly, or says that all are zero."""
    code = exact(values.dtype)
    if not values.any():
        return nothing(code, values.dtype, values.size)
    return dense(code, values.dtype, values.size, pack(code, values))


def unpack(body: U8, numel: int, device: torch.device | None = None) -> Update:
    """Decode a body. Nothing is allocated before the lengths are known to be right.

    Args:
        body: of one segment; what is returned may hold views of it, so it must not change.
        numel: elements that the layout says.
        device: where the update will be added: on a GPU, what usually arrives is decoded there.

    Raises:
        DecodeError: the body is truncated, altered, or of a segment of another size.
    """
    if body.size < 3:
        raise DecodeError(f"a segment of {body.size} bytes is too short for any code")
    index_code, value_id = int(body[0]), int(body[1])
    code, coded = BY_ID.get(value_id & ~(WIDE | CODED)), bool(value_id & CODED)
    if code is None or index_code not in (ALL, NOTHING, KEYED, PRODUCT, *index_codes.NAMES):
        raise DecodeError(f"the segment has unknown codes {index_code} and {value_id}")
    dtype = np.dtype(np.float64 if value_id & WIDE else np.float32)
    announced, at = varint.take(body, 2)
    if announced != numel:
        raise DecodeError(f"the segment has {announced} elements where the layout has {numel}")
    if index_code == NOTHING:
        return _finish(Update(numel, np.empty(0, np.int64), Narrowed(body[:0], exact(dtype), dtype)), body, at)
    if numel == 0:
        raise DecodeError("a segment without elements has values")
    if index_code == ALL:
        values, at = unpack_values(code, coded, body, at, numel, dtype, device)
        return _finish(Update(numel, None, values), body, at)
    if index_code == PRODUCT:
        return _unpack_product(code, coded, body, at, numel, dtype)
    count, at = varint.take(body, at)
    if not 0 < count <= numel:
        raise DecodeError(f"the segment announces {count} values of {numel}")
    head = 8 if index_code == KEYED else 1
    if body.size < at + head:
        raise DecodeError("the segment ends before its values")
    parameter = int.from_bytes(body[at : at + head].tobytes(), "little")
    values, at = unpack_values(code, coded, body, at + head, count, dtype, device)
    if index_code == KEYED:
        return _finish(Update(numel, chosen(parameter, count, numel), values), body, at)
    if index_code == index_codes.RICE and device is not None and on_device(device):
        stream = torch.from_numpy(np.array(body[at:])).to(device)
        return Update(numel, cuda_coding.rice_unpack(stream, parameter, count, numel), values)
    return Update(numel, index_codes.decode(index_code, parameter, body[at:], count, numel), values)


def _unpack_product(code: Cast | Reader, coded: bool, body: U8, at: int, numel: int, dtype: np.dtype[Any]) -> Update:
    rows, at = varint.take(body, at)
    rank, at = varint.take(body, at)
    if not rows or numel % rows or not 0 < rank <= min(rows, numel // rows):
        raise DecodeError(f"the segment announces {rows} rows and rank {rank} for {numel} elements")
    values, at = unpack_values(code, coded, body, at, rows * rank, dtype)
    left = values.array().reshape(rows, rank)
    values, at = unpack_values(code, coded, body, at, numel // rows * rank, dtype)
    right = values.array().reshape(-1, rank).T.copy()
    if float(np.abs(left).max()) * float(np.abs(right).max()) * rank > float(np.finfo(dtype).max):
        raise DecodeError("the segment's product may overflow")
    return _finish(Update(numel, None, Product(left, right)), body, at)


def _finish(update: Update, body: U8, at: int) -> Update:
    if at != body.size:
        raise DecodeError(f"the segment is followed by {body.size - at} bytes")
    return update
