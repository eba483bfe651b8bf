"""Server optimizers: what is done with the workers' weighted sum before it is sent back.

An optimizer turns the sum into the step ``u`` by which the true model ``x = w - e`` moves: ``x - u``.
With ``send: difference`` the sum is a model difference, so the sum itself is a valid step (the
default), and any ``torch.optim`` class on top of it is a federated optimizer (FedAvgM, FedAdam,
DiLoCo). With ``send: gradient`` the optimizer is the user's own, moved to the server.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from protocol.errors import SettingsError
from protocol.layout import Layout

Options = list[dict[str, Any]]


class ServerOptimizer(Protocol):
    """Deterministic: equal sums in equal order give equal steps."""

    needs_model: bool

    def step(self, total: Tensor, model: Tensor | None, options: Options | None) -> Tensor:
        """The step ``u`` for the sum ``total``; both have shape ``(layout.numel,)``.

        Args:
            model: the true model ``x``, a scratch vector that may be overwritten; None unless
                ``needs_model``.
            options: new options of each parameter group (learning rates), if they changed.
        """


class Sum:
    """``u`` is the sum itself: the server's only work is compression."""

    needs_model = False

    def step(self, total: Tensor, model: Tensor | None, options: Options | None) -> Tensor:
        """See ``ServerOptimizer``."""
        return total


class TorchOptimizer:
    """Any ``torch.optim`` class, stepped on the true model with the sum as its gradient.

    Buffers of the model are not optimized, nor are control variates: for them the sum is the step.

    Args:
        kind: class path such as ``torch.optim.SGD``.
        groups: one dict a parameter group: ``params`` (names of layout entries) and options.
        options: of all groups.

    Raises:
        SettingsError: there is no such class, it does not take these options or parameters, or cannot step here.
    """

    needs_model = True

    def __init__(self, layout: Layout, kind: str, groups: Sequence[dict[str, Any]], **options: Any) -> None:
        self.layout = layout
        self._places = {s.entry.name: s for s in layout.tensors if s.entry.role == "parameter"}
        self._parameters = {
            name: torch.nn.Parameter(torch.zeros(s.numel, dtype=layout.dtype).reshape(s.entry.shape))
            for name, s in self._places.items()
        }
        try:
            arguments = [{**g, "params": [self._parameters[n] for n in g["params"]]} for g in groups]
        except KeyError as error:
            raise SettingsError(f"the server's optimizer {kind!r} is of {error}, which is not in the model") from None
        self.optimizer = build(kind, arguments, options)

    def step(self, total: Tensor, model: Tensor | None, options: Options | None) -> Tensor:
        """See ``ServerOptimizer``. ``x`` minus the stepped ``x``, elsewhere the sum."""
        assert model is not None
        for group, changed in zip(self.optimizer.param_groups, options or (), strict=False):
            group.update(changed)
        for name, parameter in self._parameters.items():
            place = self._places[name]
            parameter.data = model[place.start : place.stop].view(place.entry.shape)
            parameter.grad = total[place.start : place.stop].view(place.entry.shape)
        before = model.clone()
        self.optimizer.step()
        out = before.sub_(model)
        for place in self.layout.tensors:
            if place.entry.name not in self._parameters:
                out[place.start : place.stop] = total[place.start : place.stop]
        return out


def build(kind: str, groups: Sequence[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer; torch checks ``options``, but takes whatever it finds in groups.

    A twin of it with one element a parameter takes a step first, so that what cannot step here fails now and not in
    the middle of a run: optimizers that want a closure (LBFGS) or sparse gradients (SparseAdam).

    Raises:
        SettingsError: there is no such class, it does not take these options or parameters, or cannot step here.
    """
    found = optimizer_class(kind)
    twins = [{**group, "params": [_tiny(p) for p in group["params"]]} for group in groups]
    try:
        optimizer: torch.optim.Optimizer = found(groups, **options)
        twin = found(twins, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(
            f"the server's optimizer {kind!r} does not take these options and tensors: {_first(error)}"
        ) from None
    try:
        twin.step()
    except Exception as error:  # whatever a class of anyone's raises
        raise SettingsError(
            f"the server's optimizer {kind!r} cannot step where gradients are dense and there is no closure: "
            f"{_first(error)}"
        ) from None
    return optimizer


def _tiny(parameter: Tensor) -> torch.nn.Parameter:
    """One element with as many dimensions, and a gradient."""
    twin = torch.nn.Parameter(torch.ones((1,) * parameter.dim(), dtype=parameter.dtype))
    twin.grad = torch.ones_like(twin)
    return twin


def _first(error: Exception) -> str:
    """The first line of an error's text."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def optimizer_class(kind: str) -> Any:
    """The optimizer class that a path such as ``torch.optim.SGD`` names.

    Raises:
        SettingsError: there is no such class, or it is not a ``torch.optim.Optimizer``.
    """
    module, _, name = kind.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise SettingsError(
            f"server.optimizer.kind {kind!r} is not an optimizer; valid are sum and class paths such as torch.optim.SGD"
        )
    return found
