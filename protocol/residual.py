"""What a sender still owes, and how it is kept in memory.

``float32``
    The working precision, whatever the layout's is. The compressor reads the old residual and writes the new
    one where they lie.
``bfloat16``, ``int8``
    Two bytes a value; one byte, and a scale for each 256 values. Rounding is stochastic and unbiased, so that
    updates far below the spacing of a large residual still count on average, where rounding to nearest would
    lose them round after round (Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep Learning with Limited
    Numerical Precision", ICML 2015, section 3).
``sparse``
    Exact. A segment of which few blocks of 32 values hold anything, such as an embedding whose gradients are
    sparse, keeps those blocks and their numbers; any other is kept whole.

There are two halves: the residual that counts, and the one that is staged. The compact memories keep both in
their own form, in the host's memory, and work on one segment at a time in a scratch vector of the size of the
largest.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from protocol.forms import FORMS, Form, Rounding
from protocol.layout import Layout

Memory = Literal["float32", "bfloat16", "int8", "sparse"]


class Operands(NamedTuple):
    """What a compressor is called with for one segment; ``out`` may be ``vector`` itself."""

    vector: Tensor
    residual: Tensor | None  # to be added to the vector
    out: Tensor | None  # receives what is left


class Residual(Protocol):
    """One vector in two halves, by segments; ``number`` is that of a segment."""

    @property
    def nbytes(self) -> int:
        """Bytes of both halves and of the scratch vector."""

    def dense(self) -> Tensor:
        """Shape ``(layout.numel,)`` in the working precision: the whole, in ``float32`` itself, else a copy."""

    def load(self, number: int) -> Tensor:
        """One segment in the working precision: to be read only, and before anything else is called."""

    def begin(self, number: int, given: Tensor) -> Operands:
        """``given``, which is not altered, and the residual of a segment, for a compressor.

        If there is no error feedback, neither ``residual`` nor ``out``, so that the compressor knows.
        """

    def copy(self, number: int) -> Tensor:
        """One segment, to be altered in place and staged."""

    def stage(self, number: int, values: Tensor | None, key: int) -> None:
        """Stage a segment: the ``out`` of the last ``begin``, or the last ``copy``; ``key`` fixes the rounding."""

    def adopt(self) -> Rounding | None:
        """What is staged counts from now on; every segment must have been staged.

        Returns:
            What rounding has taken away; None if the memory is exact.
        """


def residual_for(memory: Memory, layout: Layout, device: torch.device | str = "cpu") -> Residual:
    """A residual of zeros. ``device`` is that of the vectors that it is given."""
    return Whole(layout, device) if memory == "float32" else Compact(layout, FORMS[memory], device)


def footprint(memory: Memory, layout: Layout) -> int:
    """``nbytes`` of such a residual, for ``sparse`` at most; nothing is allocated."""
    itemsize = layout.dtype.itemsize
    if memory == "float32":
        return 2 * layout.numel * itemsize
    sizes = [place.numel for place in layout.segments]
    return sum(2 * FORMS[memory].most(numel, itemsize) for numel in sizes) + max(sizes, default=0) * itemsize


class Whole:
    """See ``Residual``: both halves in the working precision, on the device."""

    def __init__(self, layout: Layout, device: torch.device | str) -> None:
        self._places = [slice(place.start, place.stop) for place in layout.segments]
        self._old, self._new = layout.zeros(device), layout.zeros(device)

    @property
    def nbytes(self) -> int:
        """See ``Residual``."""
        return self._old.nbytes + self._new.nbytes

    def dense(self) -> Tensor:
        """See ``Residual``."""
        return self._old

    def load(self, number: int) -> Tensor:
        """See ``Residual``."""
        return self._old[self._places[number]]

    def begin(self, number: int, given: Tensor) -> Operands:
        """See ``Residual``."""
        place = self._places[number]
        return Operands(given, self._old[place], self._new[place])

    def copy(self, number: int) -> Tensor:
        """See ``Residual``."""
        place = self._places[number]
        return self._new[place].copy_(self._old[place])

    def stage(self, number: int, values: Tensor | None, key: int) -> None:
        """See ``Residual``. It lies there already."""

    def adopt(self) -> None:
        """See ``Residual``."""
        self._old, self._new = self._new, self._old


class Nothing:
    """See ``Residual``: what is left is dropped, and the compressor can see that it will be."""

    nbytes = 0

    def __init__(self, layout: Layout, device: torch.device | str) -> None:
        self._layout, self._device = layout, device

    def dense(self) -> Tensor:
        """See ``Residual``."""
        return self._layout.zeros(self._device)

    def load(self, number: int) -> Tensor:
        """See ``Residual``."""
        return torch.zeros(self._layout.segments[number].numel, dtype=self._layout.dtype, device=self._device)

    def begin(self, number: int, given: Tensor) -> Operands:
        """See ``Residual``."""
        return Operands(given, None, None)

    def copy(self, number: int) -> Tensor:
        """See ``Residual``."""
        return self.load(number)

    def stage(self, number: int, values: Tensor | None, key: int) -> None:
        """See ``Residual``."""

    def adopt(self) -> None:
        """See ``Residual``."""


class Compact:
    """See ``Residual``: both halves in a form that is smaller than the working precision."""

    def __init__(self, layout: Layout, form: Form, device: torch.device | str) -> None:
        self._form, self._device = form, torch.device(device)
        self._layout, sizes = layout, [place.numel for place in layout.segments]
        self._scratch = torch.empty(max(sizes, default=0), dtype=layout.dtype)
        self._rooms = [self._scratch[:numel] for numel in sizes]
        dtype = self._scratch.numpy().dtype
        self._old = [form.zeros(numel, dtype) for numel in sizes]
        self._new = [form.zeros(numel, dtype) for numel in sizes]
        self._rounding: list[Rounding | None] = [None] * len(sizes)

    @property
    def nbytes(self) -> int:
        """See ``Residual``."""
        return self._scratch.nbytes + sum(array.nbytes for arrays in (*self._old, *self._new) for array in arrays)

    def dense(self) -> Tensor:
        """See ``Residual``."""
        whole = self._layout.zeros(self._device)
        for number, place in enumerate(self._layout.segments):
            whole[place.start : place.stop] = self.load(number)
        return whole

    def load(self, number: int) -> Tensor:
        """See ``Residual``."""
        return self._sum(number, None)

    def _sum(self, number: int, given: Tensor | None) -> Tensor:
        """The residual ``+ given``, in a vector that may be altered."""
        room = self._rooms[number]
        here = given is not None and not given.is_cuda
        added = given.numpy() if given is not None and here else room.numpy()[:0]
        self._form.load(self._old[number], added, room.numpy())
        total = room.to(self._device)
        return total if given is None or here else total.add_(given)

    def begin(self, number: int, given: Tensor) -> Operands:
        """See ``Residual``."""
        total = self._sum(number, given)
        return Operands(total, None, total)

    def copy(self, number: int) -> Tensor:
        """See ``Residual``."""
        return self._sum(number, None)

    def stage(self, number: int, values: Tensor | None, key: int) -> None:
        """See ``Residual``."""
        assert values is not None
        position = self._layout.segments[number].start
        stored = self._form.store(values.cpu().numpy(), key, position, self._new[number])
        self._new[number], self._rounding[number] = stored

    def adopt(self) -> Rounding | None:
        """See ``Residual``."""
        self._old, self._new = self._new, self._old
        rounded = [one for one in self._rounding if one is not None]
        return sum(rounded[1:], rounded[0]) if rounded else None
