"""Which samples a worker sees: a pure function of seed, position, rank and step in the round.

``position`` counts the samples that all workers together have consumed, and is announced with each
version. Sample ``position + (step * world + rank) * size + i`` of an endless sequence of shuffled
epochs belongs to place ``i`` of the batch. There is no loader state: a resumed or resized run goes on
where the position says.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset, default_collate

from protocol.errors import SettingsError

Collate = Callable[[list[Any]], Any]


class Samples:
    """The endless shuffled sequence over a map-style data set.

    Args:
        dataset: has ``len`` and indexing.
        size: samples a batch.
        seed: fixes the shuffling of every epoch.
        collate: makes a batch of a list of samples; by default torch's.

    Raises:
        SettingsError: the data set has no length, or fewer samples than one batch, or ``size`` is no int.
    """

    def __init__(self, dataset: Any, size: int, seed: int, collate: Collate | None = None) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise SettingsError(
                f"session.batches got a {type(dataset).__name__}; valid is a map-style data set with len() and indexing"
            )
        if type(size) is not int or not 0 < size <= len(dataset):
            raise SettingsError(
                f"batch_size {size!r} is not an int between 1 and the data set's {len(dataset)} samples"
            )
        self.dataset = dataset
        self._seed = seed
        self._collate = collate
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def indices(self, start: int, size: int) -> list[int]:
        """The data set's indices for the ``size`` places from ``start`` of the sequence."""
        chosen: list[int] = []
        length = len(self.dataset)
        while len(chosen) < size:
            epoch, offset = divmod(start + len(chosen), length)
            self._shuffle(epoch)
            chosen += self._order[offset : offset + size - len(chosen)].tolist()
        return chosen

    def batch(self, chosen: list[int]) -> Any:
        """The collated samples at these indices."""
        if type(self.dataset) is TensorDataset and self._collate is None:
            return [tensor[chosen] for tensor in self.dataset.tensors]
        return (self._collate or default_collate)([self.dataset[i] for i in chosen])

    def _shuffle(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng(seed_of(self._seed, "epoch", epoch)).permutation(len(self.dataset))


def seed_of(*parts: int | str) -> int:
    """64 bits that depend on all parts."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def seed_everything(*parts: int | str) -> None:
    """Seed Python, numpy and torch from all parts."""
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same for the CPU's generator alone, without the half millisecond that looking for others takes
        torch.default_generator.manual_seed(seed)


def to_device(value: Any, device: torch.device) -> Any:
    """The tensors in nested lists, tuples and dicts on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        moved = [to_device(item, device) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value
