"""The layout of a model: what is exchanged, in which order, and how it is told apart from any other.

A layout is agreed in the handshake. After that every length in every frame is checked against it
before memory is allocated, and its hash travels in every frame.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any, Literal, cast

import msgpack
import torch

from protocol.errors import DecodeError, LayoutError

Role = Literal["parameter", "buffer", "static", "control"]
ROLES: tuple[Role, ...] = ("parameter", "buffer", "static", "control")
Granularity = Literal["layer", "model"]

WHOLE = "parameters"  # name of the one segment of all parameters
CONTROL = "control/"  # before the name of a parameter: its control variate; no tensor of torch's has a slash

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of the model.

    ``parameter`` and ``buffer`` entries are exchanged every round; so are ``control`` ones, which belong to a
    method and not to the model (control variates). ``static`` ones (frozen parameters, integer buffers) travel
    only in the snapshot.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its own dtype."""
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Segment:
    """An exchanged entry, or all parameters as one, and its place ``[start, stop)`` in the flat vector."""

    entry: Entry
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """Names, shapes and dtypes of a model, in order. Equal layouts have equal hashes.

    ``granularity`` says what is compressed as one vector: each tensor, or all parameters together.
    """

    entries: tuple[Entry, ...]
    granularity: Granularity = "layer"

    @cached_property
    def tensors(self) -> tuple[Segment, ...]:
        """The exchanged entries with their places in the flat vector, parameters first."""
        found, start = [], 0
        for entry in self.entries:
            if entry.role != "static":
                found.append(Segment(entry, start, start + entry.numel))
                start += entry.numel
        return tuple(found)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The units of compression in the order of the flat vector."""
        if self.granularity == "layer":
            return self.tensors
        dtype = DTYPE_NAMES[self.dtype]
        whole = Segment(Entry(WHOLE, (self.trainable,), dtype, "parameter"), 0, self.trainable)
        return (whole, *(place for place in self.tensors if place.entry.role != "parameter"))

    @cached_property
    def statics(self) -> tuple[Entry, ...]:
        """The entries that travel only in snapshots."""
        return tuple(entry for entry in self.entries if entry.role == "static")

    @cached_property
    def numel(self) -> int:
        """Elements of the flat vector: parameters and floating-point buffers."""
        return sum(place.numel for place in self.tensors)

    @cached_property
    def trainable(self) -> int:
        """Elements of the parameters alone, which is what dense training would send."""
        return sum(place.numel for place in self.tensors if place.entry.role == "parameter")

    @cached_property
    def dtype(self) -> torch.dtype:
        """The working precision: float64 if any parameter has it, else float32."""
        wide = any(e.dtype == "float64" for e in self.entries if e.role == "parameter")
        return torch.float64 if wide else torch.float32

    @cached_property
    def hash(self) -> bytes:
        """8 bytes that name this layout in every frame."""
        return hashlib.blake2b(cast(bytes, msgpack.packb(self.describe())), digest_size=8).digest()

    def zeros(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """A flat vector of zeros: shape ``(numel,)`` in the working precision."""
        return torch.zeros(self.numel, dtype=self.dtype, device=device)

    def describe(self) -> list[list[Any]]:
        """The layout as msgpack can carry it."""
        entries = [[e.name, list(e.shape), e.dtype, ROLES.index(e.role)] for e in self.entries]
        return entries if self.granularity == "layer" else [*entries, [self.granularity]]

    @classmethod
    def restore(cls, description: Any) -> Layout:
        """The inverse of ``describe``, for input that is not trusted.

        Raises:
            DecodeError: the description is malformed.
        """
        try:
            if not isinstance(description, list):
                raise ValueError("it is not a list")
            entries = []
            granularity: Granularity = "layer"
            if description and description[-1] == ["model"]:
                granularity, description = "model", description[:-1]
            for name, shape, dtype, role in description:
                if not isinstance(name, str) or dtype not in DTYPES:
                    raise ValueError(f"entry {name!r} has dtype {dtype!r}")
                if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
                    raise ValueError(f"entry {name!r} has shape {shape!r}")
                if type(role) is not int or not 0 <= role < len(ROLES):
                    raise ValueError(f"entry {name!r} has role {role!r}")
                if ROLES[role] != "static" and not DTYPES[dtype].is_floating_point:
                    raise ValueError(f"{ROLES[role]} {name!r} has dtype {dtype!r}, which is not floating-point")
                entries.append(Entry(name, tuple(shape), dtype, ROLES[role]))
        except (TypeError, ValueError) as error:
            raise DecodeError(f"the layout in the message is malformed: {error}") from None
        if len({entry.name for entry in entries}) != len(entries):
            raise DecodeError("the layout in the message is malformed: two entries have the same name")
        if granularity == "model" and any(e.name == WHOLE and e.role != "static" for e in entries):
            raise DecodeError(f"the layout in the message is malformed: an entry has the name {WHOLE!r}")
        return cls(tuple(entries), granularity)

    def difference(self, other: Layout) -> str:
        """One clause that names the first entry in which two layouts differ (empty if equal)."""
        for mine, theirs in zip_longest(self.entries, other.entries):
            if mine != theirs:
                return f"{_show(theirs)} where the run has {_show(mine)}"
        if self.granularity != other.granularity:
            return f"granularity {other.granularity} where the run has {self.granularity}"
        return ""


def _show(entry: Entry | None) -> str:
    return f"{entry.role} {entry.name!r} {list(entry.shape)} {entry.dtype}" if entry else "nothing"


def _entry(name: str, tensor: torch.Tensor, role: Role) -> Entry:
    if tensor.dtype not in DTYPE_NAMES:
        raise LayoutError(f"{name!r} has dtype {tensor.dtype}; valid are {', '.join(DTYPES)}")
    return Entry(name, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], role)


def layout_of(
    parameters: Iterable[tuple[str, torch.Tensor]],
    buffers: Iterable[tuple[str, torch.Tensor]] = (),
    granularity: Granularity = "layer",
    controls: bool = False,
) -> Layout:
    """The layout of named parameters and buffers (``module.named_parameters()``, ``named_buffers()``).

    Parameters that require grad and floating-point buffers are exchanged; the rest is static. A tied
    tensor appears once, since ``named_parameters`` yields it once.

    Args:
        granularity: what is compressed as one vector.
        controls: add one ``control`` entry for each parameter that is exchanged.

    Raises:
        LayoutError: there is no parameter that requires grad, a dtype is not supported, or a name is taken.
    """
    parameters = list(parameters)
    trained = [_entry(n, p, "parameter") for n, p in parameters if p.requires_grad]
    if not any(entry.numel for entry in trained):
        raise LayoutError("the model has no parameters that require grad, so there is nothing to train")
    frozen = [_entry(n, p, "static") for n, p in parameters if not p.requires_grad]
    kept = [_entry(n, b, "buffer" if b.dtype.is_floating_point else "static") for n, b in buffers]
    variates = [replace(entry, name=f"{CONTROL}{entry.name}", role="control") for entry in trained if controls]
    entries = (*trained, *kept, *variates, *frozen)
    if granularity == "model" and any(entry.name == WHOLE for entry in entries):
        raise LayoutError(f"{WHOLE!r} is the name of the whole model with granularity model; rename that tensor")
    return Layout(entries, granularity)
