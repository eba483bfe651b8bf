"""One direction of a cut: what of a batch is sent, and what both ends remember of each sample.

``memory`` is EF21 (Richtarik, Sokolov, Fatkhullin, NeurIPS 2021) for every sample by itself, as AQ-SGD has it
for activations (Wang et al., "Fine-tuning Language Models over Slow Networks using Activation Compression with
Guarantees", NeurIPS 2022, Algorithm 1). Both ends hold ``m_i``; ``C(x_i - m_i)`` travels; both add what it
decodes to, and that is what the receiver uses::

    c = C(x - m[i]);   m[i] += decode(c);   received = m[i]

Where ``|x_i - m_i| > |x_i|``, the memory is worse than none: such a sample is sent against zero (a bit tells the
receiver), which is EF21+'s choice, made for each sample before compression. So with the batch compressed as one
vector, ``|x - received|^2 <= (1 - delta) sum_i min(|x_i - m_i|^2, |x_i|^2)``.

``residual`` is local error feedback for every sample: ``c = C(x + e[i])``, ``e[i] += x - decode(c)``. Only the
sender holds it. ``none`` compresses each batch for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol.compressors import Norms
from protocol.errors import DecodeError
from protocol.halves import pack_numbers, unpack_numbers
from protocol.segment import unpack
from protocol.spec import compressor

U8 = npt.NDArray[np.uint8]

EXACT = 1.0 - 2.0**-48  # the delta of float32: beyond it a difference only adds rounding


class Parcel(NamedTuple):
    """What a frame carries of a batch."""

    bodies: tuple[U8, ...]  # see the methods
    fresh: bytes = b""  # ``pack_numbers`` of a bit a row; empty if all are 0


@dataclass(frozen=True)
class Lane:
    """How the rows of one direction look: ``numel`` elements in the working precision, sent by ``spec``."""

    spec: str
    numel: int
    working: torch.dtype

    def encode(self, rows: Tensor, key: int, norms: Norms, keep: bool, spec: str = "") -> U8:
        """All rows as one vector; with ``keep`` they become what was not sent."""
        flat = rows.view(-1)
        chosen = compressor(spec or self.spec, tuple(rows.shape))
        return chosen.encode(flat, chosen.init(flat.numel()), key, None, flat if keep else None, norms)[0]

    def decode(self, body: U8, rows: Tensor) -> None:
        """Add a body to rows, shape ``(n, numel)``, contiguous.

        Raises:
            DecodeError: the body is not valid for so many rows; they are as they were.
        """
        update = unpack(body, rows.numel(), rows.device)
        if update.dtype.itemsize > rows.dtype.itemsize:
            raise DecodeError("the batch holds float64 values where the cut works with float32")
        update.add_to(rows.view(-1))


class Table:
    """A row for each sample of a data set, kept in ``dtype``; a row that was never stored is zeros.

    Pages of a row that was never stored are not touched, so memory grows with the samples that are seen.
    """

    def __init__(self, samples: int, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = torch.empty(samples, numel, dtype=dtype, device=device)
        self._seen = torch.zeros(samples, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        """Bytes once every sample has been seen."""
        return self._rows.nbytes + self._seen.nbytes

    def load(self, indices: Tensor, like: Lane, device: torch.device) -> tuple[Tensor, Tensor]:
        """Copies of rows, shape ``(n, numel)`` in the working precision, and which of them were ever stored."""
        seen = self._seen[indices]
        rows = self._rows[indices.to(self._rows.device)].to(device, like.working)
        return rows.masked_fill_(~seen.to(device)[:, None], 0.0), seen

    def store(self, indices: Tensor, rows: Tensor) -> None:
        """Keep rows, rounded to nearest and clamped to the range of the dtype."""
        self._rows[indices.to(self._rows.device)] = narrow(rows, self._rows.dtype).to(self._rows.device)
        self._seen[indices] = True


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype, without becoming infinite."""
    if values.dtype == dtype:
        return values
    largest = torch.finfo(dtype).max
    return (values.clamp(-largest, largest) if largest < torch.finfo(values.dtype).max else values).to(dtype)


def farther(rows: Tensor, known: Tensor) -> Tensor:
    """Of which rows what is known is farther away than zero: shape ``(n,)``, bool."""
    return (rows - known).square().sum(1) > rows.square().sum(1)


class Method(Protocol):
    """One method at one end, which uses either ``send`` or ``receive``."""

    forgotten: int  # samples that were sent against zero although there was a memory of them

    @property
    def nbytes(self) -> int:
        """Of the memory, once every sample has been seen."""

    def send(self, rows: Tensor, indices: Tensor, key: int, norms: Norms) -> Parcel:
        """Compress a batch.

        Args:
            rows: shape ``(n, numel)`` in the working precision, contiguous; not altered.
            indices: shape ``(n,)``, distinct int64, on the CPU.
            key: fixes all randomness.
            norms: squared norms are added to it; ``left`` is that of what the receiver does not have.

        Raises:
            NotFiniteError: NaN or Inf; the memory is as it was.
        """

    def receive(self, parcel: Parcel, indices: Tensor, device: torch.device) -> Tensor:
        """What the receiver computes with: shape ``(n, numel)``, a tensor of its own.

        Raises:
            DecodeError: the parcel is not valid for these samples; the memory is as it was.
        """


class Direct:
    """``none``: a batch by itself. Bodies: all rows."""

    forgotten = 0

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    @property
    def nbytes(self) -> int:
        """See ``Method``."""
        return 0

    def send(self, rows: Tensor, indices: Tensor, key: int, norms: Norms) -> Parcel:
        """See ``Method``."""
        return Parcel((self._lane.encode(rows, key, norms, keep=False),))

    def receive(self, parcel: Parcel, indices: Tensor, device: torch.device) -> Tensor:
        """See ``Method``."""
        (body,) = _expect(parcel, 1, fresh=False)
        rows = torch.zeros(len(indices), self._lane.numel, dtype=self._lane.working, device=device)
        self._lane.decode(body, rows)
        return rows


class PerSampleResidual(Direct):
    """``residual``, at the sender; the receiver's is ``Direct``."""

    def __init__(self, lane: Lane, table: Table) -> None:
        super().__init__(lane)
        self._table = table

    @property
    def nbytes(self) -> int:
        """See ``Method``."""
        return self._table.nbytes

    def send(self, rows: Tensor, indices: Tensor, key: int, norms: Norms) -> Parcel:
        """See ``Method``."""
        owed, _ = self._table.load(indices, self._lane, rows.device)
        owed += rows
        body = self._lane.encode(owed, key, norms, keep=True)
        self._table.store(indices, owed)
        return Parcel((body,))


class PerSampleMemory:
    """``memory``. Bodies: all rows; with ``first`` those that are new, and then the others."""

    def __init__(self, lane: Lane, table: Table, first: str | None) -> None:
        self._lane, self._table, self._first = lane, table, first
        self.forgotten = 0

    @property
    def nbytes(self) -> int:
        """See ``Method``."""
        return self._table.nbytes

    def send(self, rows: Tensor, indices: Tensor, key: int, norms: Norms) -> Parcel:
        """See ``Method``."""
        known, seen = self._table.load(indices, self._lane, rows.device)
        fresh = ~seen | farther(rows, known).cpu()
        known[fresh.to(rows.device)] = 0.0
        owed = rows - known
        if self._first is None:
            bodies: tuple[U8, ...] = (self._lane.encode(owed, key, norms, keep=True),)
        else:
            old = seen.to(rows.device)
            bodies = (
                self._lane.encode(owed[~old], key ^ 1, norms, keep=True, spec=self._first),
                self._lane.encode(owed[old], key, norms, keep=True),
            )
        self._advance(bodies, indices, known, seen)
        self.forgotten += int((fresh & seen).sum())
        return Parcel(bodies, pack_numbers(fresh.numpy().astype(np.int64), 2) if fresh.any() else b"")

    def receive(self, parcel: Parcel, indices: Tensor, device: torch.device) -> Tensor:
        """See ``Method``."""
        bodies = _expect(parcel, 1 if self._first is None else 2, fresh=True)
        known, seen = self._table.load(indices, self._lane, device)
        flags = unpack_numbers(parcel.fresh, len(indices), 2) if parcel.fresh else np.zeros(len(indices), np.int64)
        fresh = torch.from_numpy(flags != 0)
        if (lost := indices[~seen & ~fresh]).numel():
            raise DecodeError(f"the other half knows sample {int(lost[0])}, which is new here; start both halves anew")
        known[fresh.to(device)] = 0.0
        return self._advance(bodies, indices, known, seen)

    def _advance(self, bodies: tuple[U8, ...], indices: Tensor, known: Tensor, seen: Tensor) -> Tensor:
        """What both ends do with the bytes, so that both remember the same bits."""
        if self._first is None:
            self._lane.decode(bodies[0], known)
        else:
            old = seen.to(known.device)
            parts = [(places, known[places]) for places in (~old, old)]
            for body, (_, part) in zip(bodies, parts, strict=True):
                self._lane.decode(body, part)
            for places, part in parts:
                known[places] = part
        self._table.store(indices, known)
        return known


def _expect(parcel: Parcel, bodies: int, fresh: bool) -> tuple[U8, ...]:
    if len(parcel.bodies) != bodies or (parcel.fresh and not fresh):
        raise DecodeError(
            f"the batch has {len(parcel.bodies)} segments and {len(parcel.fresh)} bytes of flags where the cut has "
            f"{bodies} segments and {'perhaps' if fresh else 'no'} flags"
        )
    return parcel.bodies
