"""Kernels over several cores: each releases the GIL and works on a span of its own.

How many threads is torch's setting (``torch.get_num_threads``), so that a worker that owns one CPU
uses one, and users have one knob.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
Span = tuple[int, int]

WORTH = 1 << 19  # values below which handing over costs more than a second core saves


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="kernel")


os.register_at_fork(after_in_child=_pool.cache_clear)  # the threads stay behind


def spans(size: int, grain: int, worth: int = WORTH) -> list[Span]:
    """``range(size)`` cut into one span a thread, each but the last a multiple of ``grain``, none below ``worth``."""
    threads = min(torch.get_num_threads(), max(1, size // worth))
    step = max(1, -(-size // (threads * grain))) * grain
    return [(start, min(start + step, size)) for start in range(0, size, step)] or [(0, 0)]


def over(parts: list[Span], kernel: Callable[[int, int], T]) -> list[T]:
    """``kernel(start, stop)`` for every span, the last of them in this thread; results in order."""
    if len(parts) == 1:
        return [kernel(*parts[0])]
    futures = [_pool().submit(kernel, *part) for part in parts[:-1]]
    last = kernel(*parts[-1])
    return [*(future.result() for future in futures), last]
