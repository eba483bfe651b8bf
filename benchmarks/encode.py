"""What a worker spends on one message, beside the ordinary way and beside the speed of the memory.

    python benchmarks/encode.py [--numel 25000000] [--repeats 7] [--json FILE]

One core, float32, a vector and a residual of heavy-tailed values (cubes of normal numbers). Contenders
take turns, so that a machine that slows down slows all of them down. Measured are

``topk:0.01+int4``, ``topk:0.01``
    ``protocol.compressor(...).encode``: vector and residual to payload (values, coded indices) and new
    residual, in a buffer of its own, as a worker stages it. Everything that travels is finished.
``torch.topk``
    The same step as it is ordinarily written: ``p = v + e; i = topk(p.abs(), k).indices; values = p[i];
    p[i] = 0``. It ends with values and indices as tensors: no bytes are made, which is to its advantage.
``torch.topk, lean``
    The same with all that can be spared it: buffers for ``p`` and ``p.abs()`` are kept, and the indices
    stay unsorted.
``numpy add``
    ``out = v + e``: reads and writes the 12 bytes a value that no step with error feedback can avoid.
``memcpy``
    ``out = v``: 8 bytes a value.

Numba kernels are compiled in a warm-up round, which is not measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from protocol import compressor

RATIO = 0.01
OURS = ("topk:0.01+int4", "topk:0.01")
ORDINARY, LEAN = "torch.topk", "torch.topk, lean"
GOAL = 15  # times faster than torch.topk


def contenders(numel: int, seed: int) -> dict[str, Callable[[], Any]]:
    """One call each; all read the same vector and residual and alter neither."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(numel, generator=generator) ** 3
    residual = torch.randn(numel, generator=generator) ** 3
    new_residual, magnitudes = torch.empty(numel), torch.empty(numel)
    k = max(1, round(RATIO * numel))

    def ours(spec: str) -> Callable[[], Any]:
        c = compressor(spec)
        return lambda: c.encode(vector, (), 0, residual, new_residual)[0]

    def ordinary() -> Any:
        total = vector + residual
        indices = torch.topk(total.abs(), k).indices
        values = total[indices]
        total[indices] = 0.0
        return values, indices, total

    def lean() -> Any:
        torch.add(vector, residual, out=new_residual)
        torch.abs(new_residual, out=magnitudes)
        indices = torch.topk(magnitudes, k, sorted=False).indices
        values = new_residual[indices]
        new_residual[indices] = 0.0
        return values, indices

    def add() -> Any:
        return np.add(vector.numpy(), residual.numpy(), out=new_residual.numpy())

    def copy() -> Any:
        return np.copyto(new_residual.numpy(), vector.numpy())

    others = {ORDINARY: ordinary, LEAN: lean, "numpy add": add, "memcpy": copy}
    return {**{spec: ours(spec) for spec in OURS}, **others}


def measure(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every call, the contenders taking turns; the first round is not counted."""
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:
                milliseconds[name].append(1e3 * (time.perf_counter() - begin))
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Times top-k encoding against torch.topk and memory speed.")
    parser.add_argument("--numel", type=int, default=25_000_000, help="elements of the vector")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds")
    parser.add_argument("--seed", type=int, default=0, help="of the vector and the residual")
    parser.add_argument("--json", type=Path, help="also write every duration to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    calls = contenders(options.numel, options.seed)
    milliseconds = measure(calls, options.repeats)
    middle = {name: median(times) for name, times in milliseconds.items()}

    print(f"{options.numel:,} float32, {RATIO:.0%} selected, one core, medians of {options.repeats} rounds")
    print(f"{'':16}{'median ms':>10}{'min ms':>10}{'to torch.topk':>15}{'to numpy add':>14}{'bytes':>14}")
    for name, times in milliseconds.items():
        size = f"{calls[name]().size:,}" if name in OURS else ""
        print(
            f"{name:16}{middle[name]:10.1f}{min(times):10.1f}{middle[ORDINARY] / middle[name]:14.1f}x"
            f"{middle[name] / middle['numpy add']:13.2f}x{size:>14}"
        )
    slowest = min(middle[ORDINARY] / middle[spec] for spec in OURS)
    print(f"goal: {GOAL}x torch.topk; {'reached' if slowest >= GOAL else 'MISSED'} with {slowest:.1f}x")
    if options.json:
        record = {
            "numel": options.numel,
            "ratio": RATIO,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "milliseconds": milliseconds,
            "median_ms": middle,
            "times_torch_topk": {spec: middle[ORDINARY] / middle[spec] for spec in OURS},
            "times_lean_torch_topk": {spec: middle[LEAN] / middle[spec] for spec in OURS},
            "payload_bytes": {spec: int(calls[spec]().size) for spec in OURS},
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
