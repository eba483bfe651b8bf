"""A cut through a model: what both ends share.

The ends are in ``workers.halves``, what is remembered of each sample in ``workers.crossing``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, get_args

import msgpack
import torch

from protocol.errors import SettingsError
from protocol.spec import compressor
from workers.crossing import EXACT, Direct, Lane, Method, PerSampleMemory, PerSampleResidual, Table

Kind = Literal["memory", "residual", "none"]
Direction = Literal["forward", "backward"]
CHOICES: dict[str, tuple[str, ...]] = {
    "activations": ("memory", "none"),  # an activation is used, not summed: there is nothing to deliver later
    "gradients": get_args(Kind),
    "memory": ("float32", "bfloat16", "float16", "float64"),
}


class Channel(Protocol):
    """Carries frames, whole and in order; ``multiprocessing.connection.Connection`` is one."""

    def send_bytes(self, frame: Any, /) -> None:
        """Send an object that has the buffer interface."""

    def recv_bytes(self) -> bytes:
        """Wait for the next frame."""


@dataclass
class Traffic:
    """What has crossed the cut in one direction, seen from one end.

    Attributes:
        frames: batches.
        bytes: of whole frames, indices included.
        dense_bytes: four for every element.
        given: norm of the last batch. At the end that sends, as the next one.
        left: norm of what the other end does not have of it: ``|x - m|``, or the residual.
        forgotten: samples sent against zero because their memory was farther away. At the end that sends.
    """

    frames: int = 0
    bytes: int = 0
    dense_bytes: int = 0
    given: float = 0.0
    left: float = 0.0
    forgotten: int = 0

    @property
    def ratio(self) -> float:
        """Dense bytes over bytes; 0 before the first batch."""
        return self.dense_bytes / self.bytes if self.bytes else 0.0

    def count(self, size: int, elements: int) -> None:
        """Book one frame."""
        self.frames += 1
        self.bytes += size
        self.dense_bytes += 4 * elements


@dataclass(frozen=True)
class Cut:
    """How a model is cut: the same at both ends, which every frame checks.

    Attributes:
        shape: of the activation of one sample.
        samples: of the data set: indices are below it, and no batch has more.
        forward: compressor of the activations of a batch, taken as one vector (``lowrank``: as a matrix with a row
            for each sample); see ``docs/compressors.md``.
        backward: compressor of their gradients.
        activations: ``memory`` of every sample at both ends, or ``none``; see ``docs/algorithms.md``.
        gradients: ``memory``; ``residual``, a memory at the second half only, which wants small steps; ``none``.
        first: compressor of the activation of a sample that is new. None sends it by ``forward``; ``int4``, or
            the paper's ``f32``, is for models that hardly move (fine-tuning).
        plain: compressor, both ways, of batches without indices, of which nothing is remembered.
        memory: dtype in which it is stored: ``float32``, ``bfloat16``, ``float16``; or ``float64``, which makes
            float64 the working precision too.
        seed: fixes, with the number of the batch, whatever is random. It may differ between the ends.

    Raises:
        SettingsError: a value is not valid; the message names it.
    """

    shape: tuple[int, ...]
    samples: int
    forward: str = "topk:0.1+int4"
    backward: str = "topk:0.1+int4"
    activations: str = "memory"
    gradients: str = "memory"
    first: str | None = None
    plain: str = "f32"
    memory: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        for name, numbers in (("shape", self.shape), ("samples", (self.samples,))):
            if not all(type(number) is int and number > 0 for number in numbers):
                raise SettingsError(f"{name} {getattr(self, name)!r} of the cut is not made of whole numbers above 0")
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                raise SettingsError(
                    f"{name} {getattr(self, name)!r} of the cut is unknown; valid are {', '.join(valid)}"
                )
        if self.first is not None and self.activations == "none":
            raise SettingsError(f"first {self.first!r} of the cut needs activations 'memory'")
        for spec in (self.forward, self.backward, self.plain, self.first or self.plain):
            compressor(spec, (self.samples, self.numel))

    @property
    def numel(self) -> int:
        """Elements of one sample's activation."""
        return math.prod(self.shape)

    @property
    def working(self) -> torch.dtype:
        """The precision of sums and differences."""
        return torch.float64 if self.memory == "float64" else torch.float32

    @property
    def name(self) -> bytes:
        """8 bytes, equal where all settings but the seed are; every frame carries them."""
        values: list[Any] = [getattr(self, field.name) for field in fields(self) if field.name != "seed"]
        return hashlib.blake2b(msgpack.packb([list(self.shape), *values[1:]]), digest_size=8).digest()

    def method(self, direction: Direction, sends: bool, device: torch.device) -> Method:
        """For one direction, at the end that sends or at the one that receives; ``device`` is the memory's."""
        spec, kind = (self.forward, self.activations) if direction == "forward" else (self.backward, self.gradients)
        lane = Lane(spec, self.numel, self.working)
        exact = compressor(spec, (self.samples, self.numel)).delta(self.samples * self.numel) >= EXACT
        if exact or kind == "none" or (kind == "residual" and not sends):
            return Direct(lane)
        table = Table(self.samples, self.numel, getattr(torch, self.memory), device)
        if kind == "residual":
            return PerSampleResidual(lane, table)
        return PerSampleMemory(lane, table, self.first if direction == "forward" else None)

    def plainly(self) -> Method:
        """For batches without indices, in both directions."""
        return Direct(Lane(self.plain, self.numel, self.working))
