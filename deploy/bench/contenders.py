"""Who takes turns: our encoders and decoders, and what a user would write or pick without them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deploy.bench.timing import Contender, copier
from protocol import compressor, decode
from protocol.messages import Push, parse
from protocol.segment import unpack

U8 = npt.NDArray[np.uint8]

RANK = 4  # of lowrank and of the PowerSGD hook
FRAMES = 8  # messages that are summed
TOPK, LEAN, ADD = "torch.topk", "torch.topk, lean", "torch.add"
ONE_FRAME, SUM = "frame: check, decode, add", f"{FRAMES} frames: check, decode, add"


def heavy_tailed(numel: int, seed: int, device: str = "cpu") -> Tensor:
    """Cubes of normal numbers, float32, shape ``(numel,)``."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return values.pow_(3).to(device)


def specifications(ratio: float, level: float) -> list[str]:
    """What is timed; ``level`` is a threshold that about ``ratio`` of the elements reach."""
    one_k = f"{ratio:g}"
    sparse = [f"topk:{one_k}+int4", f"topk:{one_k}", f"topk:{one_k}+sign", f"blocktopk:{one_k}+int4"]
    others = [f"randk:{one_k}+int4", f"threshold:{level:.4g}+int4"]
    dense = ["sign", "int8", "int4", "ternary", "qsgd:4", "natural", "bf16", "f16", "none", f"lowrank:{RANK}"]
    return [*sparse, *others, *dense, f"topk:{one_k}+int4+entropy", "ternary+entropy"]


class Given:
    """What all contenders read and alter not, and buffers that they write to; equal seeds, equal vectors."""

    def __init__(self, numel: int, ratio: float, device: str, seed: int = 0) -> None:
        self.vector, self.residual = (heavy_tailed(numel, seed + i, device) for i in range(2))
        self.out, self.scratch, self.product, self.sum = (torch.zeros_like(self.vector) for _ in range(4))
        self.k = min(numel, max(1, round(ratio * numel)))
        self.device = device

    @property
    def level(self) -> float:
        """The k-th magnitude of the sum of vector and residual."""
        return float(torch.topk((self.vector + self.residual).abs(), self.k, sorted=False).values.min())


@dataclass(frozen=True)
class Square:
    """The matrix, nearly square, that the first elements of a vector are."""

    rows: int
    columns: int

    @staticmethod
    def of(numel: int) -> Square:
        """With the fewest elements left over at about equal sides."""
        return Square(math.isqrt(numel), numel // math.isqrt(numel))

    @property
    def numel(self) -> int:
        """Elements in the matrix."""
        return self.rows * self.columns


def copying(given: Given, threads: int) -> list[Contender]:
    """What the memory can do: the limit is taken from it."""
    return [Contender("copy", "copy", copier(given.out, given.vector, threads))]


def encoders(given: Given, specs: list[str]) -> tuple[list[Contender], dict[str, tuple[U8, int]]]:
    """Vector and residual to payload and new residual; and each body with its number of elements.

    In ``encode`` the new residual goes to a buffer of its own, as a worker stages it; in ``encode in place``
    it takes the place of the old one.
    """
    found, bodies = [], {}
    square, in_place = Square.of(given.vector.numel()), given.scratch
    for spec in specs:
        numel = square.numel if spec.startswith("lowrank") else given.vector.numel()
        c = compressor(spec, (square.rows, square.columns) if numel == square.numel else ())
        vector, residual, out = given.vector[:numel], given.residual[:numel], given.out[:numel]
        body, state = c.encode(vector, c.init(numel), 1, residual, out)
        bodies[spec] = body, numel
        found += [
            Contender("encode", spec, partial(c.encode, vector, state, 1, residual, out)),
            Contender(
                "encode in place",
                spec,
                partial(c.encode, vector, state, 1, in_place[:numel]),
                partial(in_place.copy_, given.residual),
            ),
        ]
    return found, bodies


def decoders(given: Given, bodies: dict[str, tuple[U8, int]]) -> list[Contender]:
    """To a vector, and into a vector that is there."""
    found = []
    for spec, (body, numel) in bodies.items():
        found.append(Contender("decode", spec, partial(decode, body, numel)))
        found.append(Contender("decode and add", spec, partial(_add, body, given.sum[:numel])))
    return found


def _add(body: U8, out: Tensor) -> None:
    unpack(body, out.numel(), out.device).add_to(out)


def summing(given: Given, spec: str) -> list[Contender]:
    """Whole frames into one vector, against a scatter of numbers that are decoded already, and dense vectors."""
    numel, out, c = given.vector.numel(), given.sum, compressor(spec)
    bodies = [c.encode(heavy_tailed(numel, 2 + i, given.device), (), i)[0] for i in range(FRAMES)]
    frames = [Push(i, 1, 1, samples=64, bodies=(body,)).pack() for i, body in enumerate(bodies)]
    pairs = [(update.indices, update.values) for update in (unpack(body, numel) for body in bodies)]
    if given.device != "cpu":
        pairs = [tuple(torch.from_numpy(x).to(given.device) for x in pair) for pair in pairs]  # type: ignore

    def frame(count: int) -> None:
        for data in frames[:count]:
            _add(parse(data).bodies[0], out)

    into: Any = out if given.device != "cpu" else out.numpy()

    def scatter(count: int) -> None:
        for indices, values in pairs[:count]:
            into[indices] += values

    def dense(count: int) -> None:
        for body in bodies[:count]:
            out.add_(decode(body, numel).to(out.device))

    calls = [
        (ONE_FRAME, frame, 1),
        ("decoded before: out[indices] += values", scatter, 1),
        ("decode to a vector, add that", dense, 1),
        (SUM, frame, FRAMES),
        (f"{FRAMES} decoded before: out[indices] += values", scatter, FRAMES),
        (f"{FRAMES} to a vector each, add those", dense, FRAMES),
    ]
    return [Contender("sum", name, partial(call, count)) for name, call, count in calls]


def alternatives(given: Given) -> list[Contender]:
    """Steps with error feedback as they are ordinarily written; none of them makes bytes, to its advantage."""
    vector, residual, out, scratch, k = given.vector, given.residual, given.out, given.scratch, given.k

    def ordinary() -> Any:
        total = vector + residual
        indices = torch.topk(total.abs(), k).indices
        values = total[indices]
        total[indices] = 0.0
        return values, indices, total

    def lean() -> Any:
        torch.add(vector, residual, out=out)
        torch.abs(out, out=scratch)
        indices = torch.topk(scratch, k, sorted=False).indices
        values = out[indices]
        out[indices] = 0.0
        return values, indices

    def argpartition() -> Any:
        total = vector.numpy() + residual.numpy()
        indices = np.argpartition(np.abs(total), total.size - k)[total.size - k :]
        values = total[indices]
        total[indices] = 0.0
        return values, indices, total

    calls: dict[str, Any] = {TOPK: ordinary, LEAN: lean}
    if given.device == "cpu":
        calls["numpy argpartition"] = argpartition
        calls["numpy add"] = lambda: np.add(vector.numpy(), residual.numpy(), out=out.numpy())
    calls[ADD] = lambda: torch.add(vector, residual, out=out)
    calls["fp16 hook (no feedback)"] = lambda: out.copy_(vector.half())
    calls[f"PowerSGD hook, rank {RANK}"] = power_sgd(given)
    return [Contender("others", name, call) for name, call in calls.items()]


def power_sgd(given: Given) -> Any:
    """What torch's PowerSGD hook computes on one side, on a square matrix of the same number of values."""
    shape = Square.of(given.vector.numel())
    buffers = given.vector, given.residual, given.scratch, given.product, given.out
    vector, residual, total, product, out = (x[: shape.numel].view(shape.rows, shape.columns) for x in buffers)
    kept = torch.randn(shape.columns, RANK, generator=torch.Generator().manual_seed(0)).to(given.device)

    def step() -> None:
        torch.add(vector, residual, out=total)
        right = torch.linalg.qr(kept).Q
        left = torch.linalg.qr(total @ right).Q
        right = total.T @ left
        torch.matmul(left, right.T, out=product)
        torch.sub(total, product, out=out)

    return step
