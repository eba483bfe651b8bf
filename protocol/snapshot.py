"""A whole model as bodies of a message: the replica in working precision, then the static tensors raw."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from protocol.errors import DecodeError, NotFiniteError
from protocol.layout import DTYPES, Layout
from protocol.segment import pack_dense, unpack

U8 = npt.NDArray[np.uint8]


def digest(w: Tensor) -> int:
    """63 bits of a replica, fast: equal for replicas that are equal bit for bit."""
    return xxhash.xxh3_64_intdigest(w.cpu().numpy().data) >> 1


def fingerprint(layout: Layout, w: Tensor) -> str:
    """The name of a model in a summary: 32 hexadecimal digits from its layout and all its bits."""
    return hashlib.blake2b(layout.hash + w.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def raw(tensor: Tensor) -> U8:
    """The bytes of a tensor in its own dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().copy()


def pack(layout: Layout, w: Tensor, statics: Sequence[U8]) -> tuple[U8, ...]:
    """Bodies that hold ``w`` exactly (shape ``(layout.numel,)``), and the raw static tensors.

    Raises:
        NotFiniteError: the model holds NaN or Inf.
    """
    flat = w.cpu().numpy()
    if not np.isfinite(flat).all():
        raise NotFiniteError("the model holds NaN or Inf")
    return (*(pack_dense(flat[s.start : s.stop]) for s in layout.tensors), *statics)


def unpack_snapshot(layout: Layout, bodies: Sequence[U8]) -> tuple[Tensor, tuple[U8, ...]]:
    """The replica and the raw static tensors.

    Raises:
        DecodeError: a body is missing, or is not valid for its place in the layout.
    """
    expected = len(layout.tensors) + len(layout.statics)
    if len(bodies) != expected:
        raise DecodeError(f"the snapshot has {len(bodies)} tensors where the layout has {expected}")
    w = layout.zeros()
    for place, body in zip(layout.tensors, bodies, strict=False):
        unpack(body, place.numel).add_to(w[place.start : place.stop])
    statics = tuple(bodies[len(layout.tensors) :])
    for entry, body in zip(layout.statics, statics, strict=True):
        if body.size != entry.nbytes:
            raise DecodeError(f"static tensor {entry.name!r} has {body.size} bytes instead of {entry.nbytes}")
    return w, statics


def restore_static(body: U8, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The inverse of ``raw``."""
    out = torch.empty(shape, dtype=DTYPES[dtype])
    out.view(-1).view(torch.uint8).copy_(torch.from_numpy(np.array(body)))
    return out
