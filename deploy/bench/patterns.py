"""Which elements of a vector real selections take, and what every index code makes of that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from deploy.bench.frames import log2_selections
from protocol import compressor
from protocol.coding import indices as index_codes
from protocol.segment import unpack

Indices = npt.NDArray[np.int64]

DENSITIES = (0.1, 0.01, 0.001, 0.0001)
EMBEDDING, CHANNELS = 64, 512  # elements in a row


@dataclass(frozen=True)
class Pattern:
    """The bytes of a pattern in every index code."""

    name: str
    count: int
    sizes: dict[str, int]
    taken: str  # the code that a body takes
    selection_bits: float  # an index, if every selection of that size were as likely


def patterns(vector: Tensor) -> list[Pattern]:
    """Of indices below the number of elements of ``vector``."""
    numel = vector.numel()
    found = []
    for name, indices in _indices(vector):
        sizes = index_codes.sizes(indices, numel)
        taken = index_codes.NAMES[index_codes.encode(indices, numel)[0]]
        found.append(Pattern(name, indices.size, sizes, taken, log2_selections(numel, indices.size) / indices.size))
    return found


def _indices(vector: Tensor) -> Iterator[tuple[str, Indices]]:
    numel, generator = vector.numel(), np.random.default_rng(0)

    def some(share: float, of: int) -> Indices:
        return np.sort(generator.choice(of, max(1, round(share * of)), replace=False))

    for density in DENSITIES:
        yield f"uniform, {100 * density:g} %", some(density, numel)
    first = some(0.01, numel // EMBEDDING)[:, None] * EMBEDDING
    yield f"1 % of rows of {EMBEDDING}, whole", (first + np.arange(EMBEDDING)).reshape(-1)
    inside = (first + np.arange(EMBEDDING)).reshape(-1)
    yield f"1 % of rows of {EMBEDDING}, half of each", inside[some(0.5, inside.size)]
    yield "one run, 1 %", numel // 3 + np.arange(max(1, numel // 100))
    every = np.arange(numel // CHANNELS)[:, None] * CHANNELS
    yield f"1 % of {CHANNELS} columns, whole", (every + some(0.01, CHANNELS)).reshape(-1)
    for spec in ("blocktopk:0.01", "topk:0.01"):
        found = unpack(compressor(spec).encode(vector, (), 1)[0], numel).indices
        assert found is not None
        yield f"{spec} of cubed normals", found
