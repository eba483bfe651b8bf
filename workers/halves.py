"""Two halves of a model on two machines, with error feedback for what crosses the cut between them.

Both ends are modules, made of the same ``Cut``, on any channel that has ``send_bytes`` and ``recv_bytes``: a
``multiprocessing`` Pipe, or the connection between a ``Listener`` and a ``Client``. One end::

    head = Upstream(cut, channel)
    for indices in batches:
        optimizer.zero_grad()
        head(first_half(images[indices]), indices).backward()  # sends, and waits for the gradient
        optimizer.step()

The other one::

    tail = Downstream(cut, channel)
    for _ in batches:
        optimizer.zero_grad()
        activation, indices = tail()  # waits
        criterion(second_half(activation), labels[indices]).backward()  # sends the gradient
        optimizer.step()

Neither needs a session or knows of one; each half may be prepared in a run of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protocol.compressors import Norms
from protocol.errors import DecodeError, NotFiniteError, SettingsError
from protocol.halves import DTYPES, Activations, Gradients, pack_numbers, parse, unpack_numbers
from protocol.messages import Message
from workers.batches import seed_of
from workers.crossing import Parcel, narrow
from workers.cut import Channel, Cut, Direction, Traffic

M = TypeVar("M", bound=Message)
Indices = Tensor | Sequence[int]


class _Batch(NamedTuple):
    """A batch whose gradient is still to cross."""

    indices: Tensor | None  # int64, on the CPU
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _End(torch.nn.Module):
    """What both ends have in common. Neither has parameters, buffers or anything in its ``state_dict``.

    Attributes:
        sent, received: what has crossed, see ``Traffic``.
    """

    def __init__(self, cut: Cut, channel: Channel, sends: Direction, device: torch.device | str) -> None:
        super().__init__()
        self.cut = cut
        self.sent, self.received = Traffic(), Traffic()
        self._channel = channel
        self._sends: Direction = sends
        self._out = cut.method(sends, True, torch.device(device))
        self._in = cut.method("backward" if sends == "forward" else "forward", False, torch.device(device))
        self._plain = cut.plainly()
        self._open: dict[int, _Batch] = {}
        self._sequence = 0

    @property
    def nbytes(self) -> int:
        """Bytes of this end's memories, once every sample of the data set has been seen."""
        return self._out.nbytes + self._in.nbytes

    def _compress(self, values: Tensor, indices: Tensor | None, sequence: int) -> Parcel:
        rows = values.detach().to(self.cut.working).reshape(len(values), -1).contiguous()
        norms, key = Norms(), seed_of(self.cut.seed, self._sends, sequence)
        with torch.autocast(rows.device.type, enabled=False):
            method = self._plain if indices is None else self._out
            try:
                parcel = method.send(rows, _places(indices, len(rows)), key, norms)
            except NotFiniteError:
                what = "activation" if self._sends == "forward" else "gradient"
                raise NotFiniteError(f"the {what} at the cut holds NaN or Inf in batch {sequence}") from None
        self.sent.given, self.sent.left = float(torch.linalg.vector_norm(rows)), norms.left**0.5
        self.sent.forgotten = self._out.forgotten
        return parcel

    def _restore(self, parcel: Parcel, batch: _Batch) -> Tensor:
        method = self._plain if batch.indices is None else self._in
        places = _places(batch.indices, batch.shape[0])
        with torch.no_grad(), torch.autocast(batch.device.type, enabled=False):
            rows = method.receive(parcel, places, batch.device)
            return narrow(rows, batch.dtype).view(batch.shape)

    def _send(self, message: Message, elements: int) -> None:
        frame = message.pack()
        self._channel.send_bytes(frame)
        self.sent.count(len(frame), elements)

    def _receive(self, kind: type[M]) -> tuple[M, int]:
        frame = np.frombuffer(self._channel.recv_bytes(), np.uint8)
        message = parse(frame)
        if not isinstance(message, kind):
            raise DecodeError(f"a frame with {type(message).__name__} came where {kind.__name__} were due")
        if message.layout != self.cut.name:
            raise DecodeError("the frame is of a cut with other settings; both halves must be made of equal ones")
        return message, len(frame)


class Upstream(_End):
    """The end of the first half: sends activations, and receives their gradients in ``backward``.

    Args:
        cut: equal to that of the other half.
        channel: to the other half; both belong to this cut alone.
        memory_device: where memories lie; by default in the host's memory.
    """

    def __init__(self, cut: Cut, channel: Channel, memory_device: torch.device | str = "cpu") -> None:
        super().__init__(cut, channel, "forward", memory_device)
        self._gradients: dict[int, Tensor] = {}

    def forward(self, activation: Tensor, indices: Indices | None = None) -> Tensor:
        """Send a batch.

        Args:
            activation: shape ``(n, *cut.shape)``, any floating-point dtype (float64 if the cut's memory is).
                Nothing comes back for one that does not require grad, such as under ``torch.no_grad``.
            indices: of the samples in the data set: n distinct ones below ``cut.samples``. None (evaluation) sends
                the batch by ``cut.plain`` and remembers nothing.

        Returns:
            A scalar that stands for the loss: 0, but its ``backward`` waits for the gradient and goes on with it,
            times the scalar's own, so that it may be scaled and added to other terms. Once for each batch.

        Raises:
            SettingsError: activation or indices do not fit the cut.
            NotFiniteError: the activation holds NaN or Inf; nothing was sent or remembered.
        """
        places = self._check(activation, indices)
        awaited = activation.requires_grad and torch.is_grad_enabled()
        batch = _Batch(places, activation.shape, activation.dtype, activation.device)
        parcel = self._compress(activation, places, self._sequence)
        message = Activations(
            self._sequence,
            len(activation),
            str(activation.dtype).removeprefix("torch."),
            b"" if places is None else pack_numbers(places.numpy(), self.cut.samples),
            parcel.fresh,
            awaited,
            bodies=parcel.bodies,
            layout=self.cut.name,
        )
        if awaited:
            self._open[self._sequence] = batch
        self._send(message, activation.numel())
        self._sequence += 1
        scalar: Tensor = _Departure.apply(activation, self, message.sequence)  # type: ignore[no-untyped-call]
        return scalar

    def _check(self, activation: Tensor, indices: Indices | None) -> Tensor | None:
        cut, shape = self.cut, tuple(activation.shape)
        if shape[1:] != cut.shape or not 0 < len(activation) <= cut.samples:
            raise SettingsError(
                f"the activation has shape {shape}; valid is ({', '.join(['n', *map(str, cut.shape)])}), "
                f"n from 1 to {cut.samples}"
            )
        valid = DTYPES if cut.working == torch.float64 else tuple(name for name in DTYPES if name != "float64")
        if str(activation.dtype).removeprefix("torch.") not in valid:
            raise SettingsError(
                f"the activation is {activation.dtype}; with memory {cut.memory!r} valid are {', '.join(valid)}"
            )
        if indices is None:
            return None
        places = torch.as_tensor(indices).cpu()
        if places.dtype.is_floating_point or places.dtype == torch.bool or places.shape != (len(activation),):
            raise SettingsError(
                f"indices are {places.dtype} of shape {tuple(places.shape)}; valid is a whole number for each of the "
                f"{len(activation)} samples"
            )
        places = places.to(torch.int64)
        for place, following in zip(ordered := places.sort().values.tolist(), [*ordered[1:], None], strict=True):
            if not 0 <= place < cut.samples:
                raise SettingsError(f"indices hold {place}; valid is from 0 to {cut.samples - 1}")
            if place == following:
                raise SettingsError(f"indices hold {place} twice; valid are distinct ones, or None")
        return places

    def gradient(self, sequence: int) -> Tensor:
        """The gradient of a batch, in the dtype and shape of its activation; for ``backward``.

        Gradients are taken in as they come, whichever is asked for, so that both memories see one order.
        """
        while sequence not in self._gradients:
            if sequence not in self._open:
                raise RuntimeError(f"the gradient of batch {sequence} has been taken; backward works once for a batch")
            message, size = self._receive(Gradients)
            batch = self._open.get(message.sequence)
            if batch is None:
                raise DecodeError(f"a gradient for batch {message.sequence} came, for which none is awaited")
            self._gradients[message.sequence] = self._restore(Parcel(message.bodies, message.fresh), batch)
            del self._open[message.sequence]
            self.received.count(size, batch.shape.numel())
        return self._gradients.pop(sequence)


class Downstream(_End):
    """The beginning of the second half: receives activations, and sends their gradients in ``backward``.

    Args:
        cut, channel, memory_device: see ``Upstream``.
    """

    def __init__(self, cut: Cut, channel: Channel, memory_device: torch.device | str = "cpu") -> None:
        super().__init__(cut, channel, "backward", memory_device)
        self._anchor = torch.empty(0, requires_grad=True)  # makes autograd come by

    def forward(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
        """Wait for a batch.

        Args:
            device: of the result.

        Returns:
            The activation, shape ``(n, *cut.shape)``, in the dtype that it has at the other half; and the
            indices of the samples, shape ``(n,)``, int64, on the CPU, or None if it came without. The ``backward``
            of the activation sends its gradient, once.

        Raises:
            DecodeError: the frame is damaged, or of another cut; nothing was remembered.
            SettingsError: the other half awaits a gradient, and gradients are disabled here.
        """
        message, size = self._receive(Activations)
        if message.sequence != self._sequence:
            raise DecodeError(f"batch {message.sequence} came where {self._sequence} was due")
        if message.rows > self.cut.samples or (message.dtype == "float64" and self.cut.working != torch.float64):
            raise DecodeError(
                f"the frame announces {message.rows} samples of {message.dtype}, which do not fit the cut"
            )
        if message.awaited and not torch.is_grad_enabled():
            raise SettingsError(
                "the other half awaits a gradient and gradients are disabled here; disable them at both"
            )
        indices = None
        if message.indices:
            indices = torch.from_numpy(unpack_numbers(message.indices, message.rows, self.cut.samples))
            if len(set(indices.tolist())) < message.rows:
                raise DecodeError("the frame names a sample twice")
        shape = torch.Size((message.rows, *self.cut.shape))
        batch = _Batch(indices, shape, getattr(torch, message.dtype), torch.device(device))
        arrived = self._restore(Parcel(message.bodies, message.fresh), batch)
        self._sequence += 1
        self.received.count(size, arrived.numel())
        if message.awaited:
            self._open[message.sequence] = batch
            arrived = _Arrival.apply(self._anchor, arrived, self, message.sequence)  # type: ignore[no-untyped-call]
        return arrived, indices

    def answer(self, sequence: int, gradient: Tensor) -> None:
        """Send the gradient of a batch; for ``backward``."""
        batch = self._open.pop(sequence, None)
        if batch is None:
            raise RuntimeError(f"the gradient of batch {sequence} was sent; backward works once for a batch")
        parcel = self._compress(gradient, batch.indices, sequence)
        self._send(Gradients(sequence, parcel.fresh, bodies=parcel.bodies, layout=self.cut.name), gradient.numel())


def _places(indices: Tensor | None, rows: int) -> Tensor:
    return torch.arange(rows) if indices is None else indices


class _Departure(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, end: Upstream, sequence: int) -> Tensor:
        ctx.end, ctx.sequence = end, sequence
        return torch.zeros((), device=activation.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        return ctx.end.gradient(ctx.sequence) * scale, None, None


class _Arrival(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, arrived: Tensor, end: Downstream, sequence: int) -> Tensor:
        ctx.end, ctx.sequence = end, sequence
        return arrived.clone()  # a view of an input could not be altered in place, as ReLU(inplace=True) does

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.end.answer(ctx.sequence, gradient)
        return None, None, None, None
