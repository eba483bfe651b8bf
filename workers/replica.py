"""The model of a training process, seen as one flat vector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protocol import snapshot
from protocol.errors import LayoutError
from protocol.layout import Granularity, layout_of

U8 = npt.NDArray[np.uint8]


class Replica:
    """``w``, bit for bit the same on all workers, beside the user's model that trains away from it.

    Args:
        model: the user's; its tensors are read and written in place, never replaced by us.
        granularity: what is compressed as one vector.
        controls: whether ``w`` also holds a control variate of each parameter, which the model does not.

    Attributes:
        layout: of the model.
        w: shape ``(layout.numel,)`` in the working precision, on the model's device.
    """

    def __init__(self, model: torch.nn.Module, granularity: Granularity = "layer", controls: bool = False) -> None:
        self._model = model
        self._parameters = list(model.named_parameters())
        self._trained = [parameter.requires_grad for _, parameter in self._parameters]
        self.layout = layout_of(self._parameters, model.named_buffers(), granularity, controls)
        tensors = self._tensors()
        self._places = [place for place in self.layout.tensors if place.entry.role != "control"]
        exchanged = [tensors[place.entry.name] for place in self._places]
        self.device = exchanged[0].device
        self.w = self.layout.zeros(self.device)
        self._known = {entry.name for entry in self.layout.entries}
        self._exact = all(tensor.dtype == self.layout.dtype for tensor in exchanged)
        self.read(self.w)

    def _tensors(self) -> dict[str, Tensor]:
        """By name, looked up each time, since modules may replace their buffers."""
        return dict(chain[tuple[str, Tensor]](self._model.named_parameters(), self._model.named_buffers()))

    def trained(self) -> list[tuple[str, Tensor]]:
        """The parameters that are exchanged, by name."""
        return [named for named, trained in zip(self._parameters, self._trained, strict=True) if trained]

    @torch.no_grad()
    def read(self, out: Tensor) -> Tensor:
        """Copy the model's tensors to ``out``, shape ``(layout.numel,)``; control variates are left alone."""
        tensors = self._tensors()
        for place in self._places:
            out[place.start : place.stop].copy_(tensors[place.entry.name].reshape(-1))
        return out

    @torch.no_grad()
    def show(self, vector: Tensor) -> Tensor:
        """Let the model's tensors hold ``vector``; what they hold then, after rounding to their dtypes."""
        tensors = self._tensors()
        for place in self._places:
            tensors[place.entry.name].copy_(vector[place.start : place.stop].view(place.entry.shape))
        return vector if self._exact else self.read(torch.empty_like(vector))

    @torch.no_grad()
    def read_gradients(self, out: Tensor) -> Tensor:
        """Copy the gradients to the parameters' places in ``out``; zero where there is none."""
        for place, (_, parameter) in zip(self._places, self.trained(), strict=False):  # buffers come last
            part, gradient = out[place.start : place.stop], parameter.grad
            if gradient is None:
                part.zero_()
            else:
                part.copy_((gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1))
        return out

    def statics(self) -> tuple[U8, ...]:
        """The raw bytes of the tensors that are not exchanged."""
        tensors = self._tensors()
        return tuple(snapshot.raw(tensors[entry.name]) for entry in self.layout.statics)

    @torch.no_grad()
    def load(self, w: Tensor, statics: Sequence[U8] | None = None) -> None:
        """Take over a snapshot; the tensors that are not exchanged stay as they are unless ``statics`` holds them."""
        self.w.copy_(w)
        self.show(self.w)
        if statics is None:
            return
        tensors = self._tensors()
        for entry, body in zip(self.layout.statics, statics, strict=True):
            tensors[entry.name].copy_(snapshot.restore_static(body, entry.shape, entry.dtype))

    def check(self) -> None:
        """Refuse another parameter, or a change of its ``requires_grad``, since the layout was agreed.

        Raises:
            LayoutError: names the parameter.
        """
        tensors = self._tensors()
        for name in tensors.keys() - self._known:
            raise LayoutError(f"{name!r} was added after session.prepare; add it before, so that it is exchanged")
        for (name, parameter), trained in zip(self._parameters, self._trained, strict=True):
            if tensors.get(name) is not parameter:
                raise LayoutError(f"{name!r} was replaced or removed after session.prepare; change its values in place")
            if parameter.requires_grad != trained:
                raise LayoutError(
                    f"requires_grad of {name!r} changed to {parameter.requires_grad} after session.prepare; "
                    "set it before, since it decides what is exchanged"
                )
