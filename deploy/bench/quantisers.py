"""How far value codes are from the best quantiser with the same number of magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol import compressor
from protocol.segment import unpack
from protocol.values.decoded import Symbols

Floats = npt.NDArray[np.floating[Any]]

CODES = ("int8", "int4", "int2")
DENSE = 1_000_000  # values at most that are looked at where all are sent
ROUNDS = 3000  # of Lloyd's iteration at most
SETTLED = 1e-10  # a round that gains a smaller share is the last


@dataclass(frozen=True)
class Fit:
    """Mean squared errors of one code on some values."""

    values: str
    count: int
    code: str
    magnitudes: int
    lloyd_max: float  # to the mean square
    ours: float  # to that of Lloyd-Max
    uniform: float  # of a uniform grid of as many magnitudes, to that of Lloyd-Max


def fits(vector: Tensor) -> list[Fit]:
    """Of every code on what ``topk:0.01`` selects of ``vector``, on its elements, and on normal numbers."""
    return [fit(name, values, code) for name, values in _values(vector) for code in CODES]


def _values(vector: Tensor) -> Iterator[tuple[str, Floats]]:
    selected = unpack(compressor("topk:0.01").encode(vector, (), 1)[0], vector.numel()).values
    yield "cubed normals, the largest 1 %", selected
    yield "cubed normals, all", vector[:DENSE].numpy()
    normal = torch.randn(min(DENSE, vector.numel()), generator=torch.Generator().manual_seed(0))
    yield "normals, all", normal.numpy()


def fit(name: str, values: Floats, code: str) -> Fit:
    """The errors of one code on some values, none of them zero."""
    body = compressor(code).encode(torch.from_numpy(values), (), 1)[0]
    update = unpack(body, values.size)
    assert isinstance(update.coded, Symbols)
    levels = update.coded.numbers.table.size // 2
    ours = _error(values, update.values)
    step = np.abs(values).max() / (levels - 1)
    uniform = _error(values, np.round(values / step) * step)
    exact = np.abs(values).astype(np.float64)
    best = lloyd_max(exact, levels, np.abs(update.coded.numbers.table.astype(np.float64)))
    return Fit(name, values.size, code, levels, best / np.square(exact).mean(), ours / best, uniform / best)


def _error(values: Floats, received: Floats) -> float:
    return float(np.square(values.astype(np.float64) - received).mean())


def lloyd_max(magnitudes: Floats, levels: int, start: Floats) -> float:
    """The least mean squared error of ``levels`` magnitudes that Lloyd's iteration finds from several starts.

    Args:
        magnitudes: float64, not negative.
        levels: as many magnitudes are fitted.
        start: one more start beside the quantiles, equal ratios, and the density of Panter and Dite (1951).
    """
    ordered = np.sort(magnitudes)
    shares = (np.arange(levels) + 0.5) / levels
    spread = np.cumsum(np.cbrt(np.diff(ordered)) ** 2)  # a density to the power 1/3, by its quantiles
    places = np.searchsorted(spread, shares * spread[-1])
    low = max(ordered[0], ordered[-1] * 2.0**-14)
    starts = [np.unique(start), np.quantile(ordered, shares), ordered[places], np.geomspace(low, ordered[-1], levels)]
    return min(_descend(ordered, np.unique(centres)) for centres in starts)


def _descend(ordered: Floats, centres: Floats) -> float:
    """Lloyd's iteration: every magnitude to its nearest centre, every centre to the mean of its own."""
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    square, last = float(np.square(ordered).sum()), np.inf
    for _ in range(ROUNDS):
        borders = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        borders = np.concatenate([[0], borders, [ordered.size]])
        counts = np.diff(borders)
        centres = (np.diff(sums[borders])[counts > 0]) / counts[counts > 0]
        error = square - float((np.square(centres) * counts[counts > 0]).sum())
        if error >= last * (1 - SETTLED):
            break
        last = error
    return float(error / ordered.size)
