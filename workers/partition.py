"""Ways to divide a data set among workers, so that each has its own and no two are alike: non-IID data.

All are pure functions of their arguments. They return one array of indices a worker: int64, ascending, disjoint,
together all samples, and never empty. A training function takes its own by ``session.worker``::

    mine = dirichlet(labels, session.workers, alpha=0.3, seed=0)[session.worker]
    session.prepare(model, optimizer, samples=len(mine))  # FedAvg weighs workers by their samples
    for batch in session.batches(Subset(dataset, mine), batch_size, shared=False): ...
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.errors import SettingsError

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

TINY = 1e-300  # the least concentration that can be drawn by
LITTLE = 1e-9  # a share of a mix that is too small to draw by


def contiguous(n: int, workers: int) -> list[Indices]:
    """Equal parts in the order of the data set; the last takes the rest too.

    Args:
        n: samples; at least one a worker.
        workers: parts.

    Raises:
        SettingsError: a number is out of range.
    """
    _check(n, workers)
    size = n // workers
    ends = [size * (worker + 1) for worker in range(workers - 1)] + [n]
    return [np.arange(size * worker, end, dtype=np.int64) for worker, end in enumerate(ends)]


def by_label(labels: Any, workers: int, classes_per_worker: int = 2, seed: int = 0) -> list[Indices]:
    """Label shards: sort by label, cut into ``workers * classes_per_worker`` equal shards, deal as many to each worker.

    McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from
    Decentralized Data" (AISTATS 2017), section 3, "pathological non-IID". A shard may straddle labels, so a worker has
    ``classes_per_worker`` of them where shards fit into labels evenly, and few more where they do not. Differences:
    samples of one label are shuffled first; where the number of samples is no multiple of that of shards, shards
    differ by at most one sample.

    Args:
        labels: of the samples, shape ``(n,)``: an array, a tensor on the CPU or a list.
        workers: parts.
        classes_per_worker: shards a worker.
        seed: fixes the shuffling and the dealing.

    Raises:
        SettingsError: an argument is out of range, or there are fewer samples than shards.
    """
    numbers = _numbers(labels)
    _check(len(numbers), workers)
    if type(classes_per_worker) is not int or not 1 <= classes_per_worker <= len(numbers) // workers:
        raise SettingsError(
            f"classes_per_worker is {classes_per_worker!r}; valid is a whole number from 1 to "
            f"{len(numbers) // workers}, the samples a worker"
        )
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(numbers))
    shards = np.array_split(shuffled[np.argsort(numbers[shuffled], kind="stable")], workers * classes_per_worker)
    dealt = random.permutation(len(shards)).reshape(workers, classes_per_worker)
    return [np.sort(np.concatenate([shards[shard] for shard in hand])).astype(np.int64) for hand in dealt]


def dirichlet(labels: Any, workers: int, alpha: float, seed: int = 0) -> list[Indices]:
    """Equal parts, each with a mix of labels of its own, drawn from ``Dirichlet(alpha p)``; p: shares of the whole.

    Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification"
    (2019), section 3. ``alpha`` towards 0: one label a worker; towards infinity: every worker like the whole. Parts
    differ by at most one sample. Difference: samples are drawn without replacement, so where a label has run out the
    rest of a part is drawn by what its mix says of the other labels, and the last workers get what is left.

    Args:
        labels: of the samples, shape ``(n,)``: an array, a tensor on the CPU or a list.
        workers: parts.
        alpha: concentration, above 0.
        seed: fixes all draws.

    Raises:
        SettingsError: an argument is out of range.
    """
    numbers = _numbers(labels)
    _check(len(numbers), workers)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0.0 < alpha < math.inf:
        raise SettingsError(f"alpha is {alpha!r}; valid is a number above 0")
    random = np.random.default_rng(seed)
    pools = [random.permutation(np.flatnonzero(numbers == label)) for label in range(numbers.max() + 1)]
    left = np.array([len(pool) for pool in pools])
    concentrations = np.maximum(alpha * (left / len(numbers)), TINY)
    parts = []
    for worker in range(workers):
        size = len(numbers) // workers + (worker < len(numbers) % workers)
        counts = _draw(concentrations, left, size, random)
        taken = [pool[rest - count : rest] for pool, rest, count in zip(pools, left, counts, strict=True)]
        left = left - counts
        parts.append(np.sort(np.concatenate(taken)).astype(np.int64))
    return parts


def _draw(concentrations: Floats, left: Indices, size: int, random: np.random.Generator) -> Indices:
    """How many of each label a part of ``size`` gets: by a mix of its own, but no more than are ``left``."""
    counts, mix = np.zeros_like(left), random.dirichlet(concentrations)
    while (lacking := size - int(counts.sum())) > 0:
        open_ = counts < left
        if not mix[open_].sum() > LITTLE:  # among themselves, the other labels have a Dirichlet mix too: draw it anew
            mix[open_] = random.dirichlet(concentrations[open_])
        wanted = np.where(open_, mix, 0.0)
        if not wanted.sum() > LITTLE:  # concentrations that are too large to draw by
            wanted = np.where(open_, concentrations, 0.0) / concentrations.max()
        counts += np.minimum(random.multinomial(lacking, wanted / wanted.sum()), left - counts)
    return counts


def _numbers(labels: Any) -> Indices:
    """The labels as whole numbers from 0, in their order."""
    values = np.asarray(labels)
    if values.ndim != 1:
        raise SettingsError(f"labels have the shape {list(values.shape)}; valid is one label a sample, shape [n]")
    return np.unique(values, return_inverse=True)[1]


def _check(n: int, workers: int) -> None:
    if type(workers) is not int or workers < 1:
        raise SettingsError(f"workers is {workers!r}; valid is a whole number above 0")
    if type(n) is not int or n < workers:
        raise SettingsError(f"{n!r} samples cannot be divided among {workers} workers; each needs at least one")
