"""Hooks on the user's optimizer: the same object, watched, or (send: gradient) moved to the server."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocol.errors import SettingsError
from workers.replica import Replica

Options = list[dict[str, Any]]


class StatefulOptimizerWarning(UserWarning):
    """A local optimizer's state sees only local, compressed history."""


class AroundStep:
    """Calls ``before`` and ``after`` around every step of an optimizer.

    Once, also where a class of the user's calls its parent's ``step``: torch hooks both.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, before: Callable[..., None], after: Callable[..., None] | None = None
    ) -> None:
        self._before, self._after = before, after
        self._depth = 0
        optimizer.register_step_pre_hook(self._enter)
        optimizer.register_step_post_hook(self._leave)

    def reset(self) -> None:
        """A round begins; a step that raised had no end."""
        self._depth = 0

    def _enter(self, *given: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self._before(*given)

    def _leave(self, *given: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._after is not None:
            self._after(*given)


class StepCounter:
    """Counts the optimizer steps that happen, which a GradScaler may skip.

    Attributes:
        factor: on every learning rate; the optimizer's own stays what the user and the schedulers set.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.factor = 1.0
        self._count = 0
        self._rates: list[Any] = []
        self._around = AroundStep(optimizer, self._begin, self._stepped)

    def _begin(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.factor != 1.0:
            self._rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.factor

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._count += 1
        if self.factor != 1.0:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate

    def take(self) -> int:
        """The steps since the last call."""
        self._around.reset()
        count, self._count = self._count, 0
        return count


class GradientCapture:
    """Replaces ``optimizer.step`` by one that keeps the gradients for the next push.

    Learning rates and other options are read at that moment, so that schedulers work as usual.

    Attributes:
        factor: on every learning rate that is announced.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, replica: Replica) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise SettingsError("LBFGS evaluates the loss several times a step, which needs send: difference")
        if optimizer.state:
            raise SettingsError(
                "the optimizer given to session.prepare has state from earlier steps, which send: gradient would lose; "
                "give a new one"
            )
        self.factor = 1.0
        self.gradient = torch.zeros_like(replica.w)
        self._optimizer = optimizer
        self._replica = replica
        self._names = {id(tensor): name for name, tensor in replica.trained()}
        self._count = 0
        self._current = self._options()
        self._announced: Options | None = None
        capture = self._capture

        def step(_: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return capture(closure)

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # a scheduler built before looks for it
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]

    def _capture(self, closure: Callable[[], Any] | None) -> Any:
        if self._count:
            raise SettingsError(
                "optimizer.step was called twice in a round, which sends one gradient with send: gradient; "
                "several steps a round need workers.local_steps and send: difference"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._replica.read_gradients(self.gradient)
        self._current = self._options()
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # torch's schedulers look for it
        self._count += 1
        return loss

    def take(self) -> int:
        """The steps since the last call."""
        count, self._count = self._count, 0
        return count

    def describe(self) -> dict[str, Any]:
        """The optimizer as the server can build it: its class, and its groups with names and options."""
        kind = type(self._optimizer)
        groups = []
        for group, options in zip(self._optimizer.param_groups, self._options(), strict=True):
            names = [self._names[id(p)] for p in group["params"] if id(p) in self._names]
            groups.append({"params": names, **options})
        self._announced = self._options()
        return {"kind": f"{kind.__module__}.{kind.__qualname__}", "groups": groups}

    def changed(self) -> Options | None:
        """The options that differ from those announced last, by group; None if none do."""
        known = self._announced or [{} for _ in self._current]
        if len(known) != len(self._current):
            raise SettingsError(
                f"the optimizer has {len(self._current)} parameter groups where session.prepare saw {len(known)}; "
                "with send: gradient all of them must be there before"
            )
        current = self._current  # of the last step: a round may be without one
        if self.factor != 1.0:
            current = [{**group, "lr": group["lr"] * self.factor} for group in current]
        changed = [
            {name: value for name, value in now.items() if name not in before or before[name] != value}
            for now, before in zip(current, known, strict=True)
        ]
        self._announced = current
        return changed if any(changed) else None

    def _options(self) -> Options:
        return [
            {name: _plain(value) for name, value in group.items() if name != "params"}
            for group in self._optimizer.param_groups
        ]


def _plain(value: Any) -> Any:
    """An option as msgpack carries it; tensors (learning rates) become numbers."""
    if isinstance(value, Tensor | np.generic):
        return value.item()
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def warn_if_stateful(optimizer: torch.optim.Optimizer, feedback: str) -> None:
    """Say that another mode may be meant, if a stateful optimizer takes one local step a round.

    Momentum SGD with ``saef`` is the paper's own algorithm and draws no warning.
    """
    plain = isinstance(optimizer, torch.optim.SGD)
    momentum = plain and any(group["momentum"] for group in optimizer.param_groups)
    if plain and (not momentum or feedback == "saef"):
        return
    warnings.warn(
        f"{type(optimizer).__name__} keeps its state on each worker; with one local step a round, "
        "`send: gradient` runs it on the server instead, where it sees the sum over workers",
        StatefulOptimizerWarning,
        stacklevel=3,  # where the user calls session.prepare
    )


def refuse_momentum(optimizer: torch.optim.Optimizer, feedback: str) -> None:
    """Refuse momentum in the optimizer beside a method that keeps the momentum itself.

    Raises:
        SettingsError: a parameter group has momentum.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            raise SettingsError(
                f"feedback.kind {feedback} keeps the momentum itself (feedback.momentum), and the optimizer given to "
                f"session.prepare has momentum {group['momentum']}; give it momentum 0"
            )


def check_optimizer(optimizer: torch.optim.Optimizer, replica: Replica) -> None:
    """Refuse an optimizer of another model.

    Raises:
        SettingsError: none of the optimizer's parameters belongs to the model.
    """
    known = {id(tensor) for _, tensor in replica.trained()}
    if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
        raise SettingsError(
            "the optimizer given to session.prepare holds none of the model's parameters; "
            "build it from model.parameters()"
        )
