"""How durations are taken: contenders take turns, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

COPY_BYTES = 8  # a float32 that is copied is read once and written once


@dataclass(frozen=True)
class Contender:
    """One call that is timed; ``before`` restores what it alters, and is not timed."""

    group: str
    name: str
    call: Callable[[], Any]
    before: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Durations:
    """Milliseconds of every call, by group and name of the contender."""

    milliseconds: dict[str, dict[str, list[float]]]

    def median(self, group: str, name: str) -> float:
        """The median in ms."""
        return median(self.milliseconds[group][name])

    def low(self, group: str, name: str) -> float:
        """The shortest in ms."""
        return min(self.milliseconds[group][name])


def take_turns(
    contenders: Sequence[Contender],
    repeats: int,
    synchronise: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Durations:
    """Time every contender ``repeats`` times, in rounds; a first round, which compiles, is not counted.

    Args:
        contenders: called in this order in every round.
        repeats: rounds that count.
        synchronise: waits for the device, before the clock is read.
        clock: gives seconds.
    """
    taken: dict[str, dict[str, list[float]]] = {}
    for turn in range(repeats + 1):
        gc.collect()
        for contender in contenders:
            if contender.before:
                contender.before()
            synchronise()
            begin = clock()
            contender.call()
            synchronise()
            milliseconds = 1e3 * (clock() - begin)
            if turn:
                taken.setdefault(contender.group, {}).setdefault(contender.name, []).append(milliseconds)
    return Durations(taken)


def copier(out: Tensor, source: Tensor, threads: int) -> Callable[[], Any]:
    """``out = source`` by ``threads`` threads of equal shares, or by the device: what its memory can do."""
    if out.is_cuda:
        return lambda: out.copy_(source)
    borders = np.linspace(0, out.numel(), threads + 1).astype(int)
    shares = [(out[a:b].numpy(), source[a:b].numpy()) for a, b in pairwise(borders)]
    pool = ThreadPoolExecutor(threads)

    def copy() -> None:
        others = [pool.submit(np.copyto, *share) for share in shares[1:]]  # numpy releases the GIL
        np.copyto(*shares[0])
        for other in others:
            other.result()

    return copy


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch, and our kernels with it, use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
