"""Forms in which one segment of a residual is kept in less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from protocol.kernels import compact
from protocol.kernels.sketch import COLUMNS, Sketch
from protocol.kernels.sums import as_bits
from protocol.kernels.threads import over, spans

Floats = npt.NDArray[np.floating[Any]]
Arrays = tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True)
class Rounding:
    """What rounding has taken away: a sketch, see ``protocol.ledger``, and a bound of its expected square."""

    changed: Sketch
    expected: float

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(self.changed + other.changed, self.expected + other.expected)


class Form(Protocol):
    """How one segment is kept: ``numel`` values as arrays."""

    def zeros(self, numel: int, dtype: np.dtype[Any]) -> Arrays:
        """Zeros in this form."""

    def store(self, values: Floats, key: int, position: int, room: Arrays) -> tuple[Arrays, Rounding | None]:
        """The values in this form, and what rounding has taken away; None if the form is exact.

        Args:
            values: not altered.
            key: fixes the rounding.
            position: of the first value in the flat vector, for the sketch.
            room: what an earlier call or ``zeros`` gave; written over if it fits.
        """

    def load(self, arrays: Arrays, added: Floats, out: Floats) -> None:
        """``out`` = the values, ``+ added`` unless that is empty."""

    def most(self, numel: int, itemsize: int) -> int:
        """Bytes at most of values of ``itemsize`` bytes in this form."""


class BFloat16:
    """See ``Form``. Beyond the largest bfloat16, 3.39e38, values are clamped; float64 becomes float32 first."""

    def zeros(self, numel: int, dtype: np.dtype[Any]) -> Arrays:
        """See ``Form``."""
        return (np.zeros(numel, np.uint16),)

    def store(self, values: Floats, key: int, position: int, room: Arrays) -> tuple[Arrays, Rounding | None]:
        """See ``Form``."""
        (codes,) = room
        return room, _rounded(values.size, partial(compact.to_bfloat16, values, np.uint64(key), codes, position))

    def load(self, arrays: Arrays, added: Floats, out: Floats) -> None:
        """See ``Form``."""
        (codes,) = arrays
        over(spans(out.size, compact.BLOCK), partial(compact.from_bfloat16, codes, added, out))

    def most(self, numel: int, itemsize: int) -> int:
        """See ``Form``."""
        return 2 * numel


class Int8:
    """See ``Form``. Multiples from -127 to 127 of a scale in the working precision, one for each 256 values."""

    def zeros(self, numel: int, dtype: np.dtype[Any]) -> Arrays:
        """See ``Form``."""
        return np.zeros(numel, np.int8), np.zeros(-(-numel // compact.BLOCK), dtype)

    def store(self, values: Floats, key: int, position: int, room: Arrays) -> tuple[Arrays, Rounding | None]:
        """See ``Form``."""
        codes, scales = room
        bits, mask = as_bits(values)
        kernel = partial(compact.to_int8, values, bits, mask, np.uint64(key), codes, scales, position)
        return room, _rounded(values.size, kernel)

    def load(self, arrays: Arrays, added: Floats, out: Floats) -> None:
        """See ``Form``."""
        codes, scales = arrays
        over(spans(out.size, compact.BLOCK), partial(compact.from_int8, codes, scales, added, out))

    def most(self, numel: int, itemsize: int) -> int:
        """See ``Form``."""
        return numel + -(-numel // compact.BLOCK) * itemsize


class Sparse:
    """See ``Form``. The numbers of the patches that hold anything and their values; or all values, if that is less."""

    def zeros(self, numel: int, dtype: np.dtype[Any]) -> Arrays:
        """See ``Form``."""
        return np.zeros(0, np.int32), np.zeros((0, compact.PATCH), dtype)

    def store(self, values: Floats, key: int, position: int, room: Arrays) -> tuple[Arrays, Rounding | None]:
        """See ``Form``."""
        numbers = np.empty(-(-values.size // compact.PATCH), np.int32)
        count = compact.occupied(as_bits(values)[0], numbers)
        if count * (numbers.itemsize + compact.PATCH * values.itemsize) >= values.nbytes:
            (whole,) = room if len(room) == 1 else (np.empty_like(values),)
            np.copyto(whole, values)
            return (whole,), None
        patches = np.empty((count, compact.PATCH), values.dtype)
        compact.gather(values, numbers[:count], patches)
        return (numbers[:count].copy(), patches), None

    def load(self, arrays: Arrays, added: Floats, out: Floats) -> None:
        """See ``Form``."""
        if len(arrays) == 2:
            compact.scatter(*arrays, added, out)
        elif added.size:
            np.add(arrays[0], added, out=out)
        else:
            np.copyto(out, arrays[0])

    def most(self, numel: int, itemsize: int) -> int:
        """See ``Form``."""
        return numel * itemsize


def _rounded(size: int, kernel: Callable[[Sketch, int, int], float]) -> Rounding:
    """Round all blocks; every thread has a sketch of its own."""

    def part(start: int, stop: int) -> Rounding:
        changed = np.zeros(COLUMNS)
        return Rounding(changed, kernel(changed, start, stop))

    first, *others = over(spans(size, compact.BLOCK), part)
    return sum(others, first)


FORMS: dict[str, Form] = {"bfloat16": BFloat16(), "int8": Int8(), "sparse": Sparse()}
