"""What federated methods add to each local step: FedProx's pull and SCAFFOLD's control variates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protocol.errors import SettingsError
from protocol.layout import Layout
from workers.hooks import AroundStep
from workers.replica import Replica


class LocalSteps:
    """Corrects the gradients just before each step of the user's optimizer.

    FedProx (Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys
    2020, equation 2): the gradient of ``mu / 2 |x - y|^2``, with y where the round began.

    SCAFFOLD (Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for
    Federated Learning", ICML 2020, Algorithm 1): the step goes along ``g - c_k + c``, and after H steps ``c_k'`` is
    the mean of the ``g``. For plain SGD that is option II of line 12, ``c_k - c + (y - y') / (H lr)``, and it needs
    neither the learning rate nor plain SGD. ``c`` is part of the replica (``control`` entries of the layout), so it
    moves by ``sum_k a_k (c_k' - c_k)``, compressed both ways with error feedback like everything else. Differences
    from the paper: ``g`` is the gradient after clipping and without the optimizer's weight decay, which is the same
    for all; ``c`` is the sum of what the workers have brought in, each by its weight then, so that a worker whose
    weight changes corrects its part with its next update, and one that leaves takes its part out again.

    Args:
        optimizer: the user's; its gradients are altered in place.
        proximal: mu; 0 for none.
        controls: whether there are control variates.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, replica: Replica, proximal: float, controls: bool) -> None:
        self._replica = replica
        self._proximal = proximal
        self._start = replica.w
        layout, trained = replica.layout, replica.layout.trainable
        self._places = layout.tensors[: len(replica.trained())]
        self._own = _controls(layout, layout.zeros(replica.device)).clone() if controls else None  # c_k
        self._sum = torch.zeros(trained, dtype=layout.dtype, device=replica.device) if controls else None
        self._steps = 0
        self._brought = self._weight = 0.0  # a_k with which c_k is in c, and in this round
        self._around = AroundStep(optimizer, self._correct) if proximal or controls else None

    def begin(self, start: Tensor, weight: float) -> None:
        """A round begins at ``start``, shape ``(layout.numel,)``; ``weight`` is ``a_k`` among all members."""
        self._start, self._steps, self._weight = start, 0, weight
        if self._around is not None:
            self._around.reset()
        if self._sum is not None:
            self._sum.zero_()

    @torch.no_grad()
    def _correct(self, _: torch.optim.Optimizer, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        if any(closure is not None for closure in (*given[1:], options.get("closure"))):
            raise SettingsError(
                "optimizer.step got a closure, whose gradients federated.proximal and federated.control_variates "
                "cannot correct; call backward before optimizer.step()"
            )
        shared = _controls(self._replica.layout, self._replica.w) if self._own is not None else None
        for place, (_name, parameter) in zip(self._places, self._replica.trained(), strict=True):
            if parameter.grad is None:
                continue
            span = slice(place.start, place.stop)
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            correction = torch.zeros_like(self._start[span])
            if self._sum is not None and self._own is not None and shared is not None:
                self._sum[span] += gradient.reshape(-1)
                correction += shared[span] - self._own[span]
            if self._proximal:
                correction += self._proximal * (parameter.detach().reshape(-1) - self._start[span])
            parameter.grad = gradient + correction.view_as(parameter).to(gradient.dtype)
        self._steps += 1

    def give(self, given: Tensor, present: float) -> None:
        """Write ``c_k - c_k'`` to the control entries of an update, which the server subtracts.

        Args:
            present: the share of all weight that takes part; the weight that will be applied is ``a_k`` of that.
        """
        if self._own is None or self._sum is None:
            return
        part = _controls(self._replica.layout, given)
        part.zero_()
        if self._steps:
            part.copy_((self._own * (self._brought / self._weight) - self._sum / self._steps) * present)

    def commit(self) -> None:
        """The server has the update, or will get it from the residual: ``c_k'`` counts."""
        if self._own is not None and self._sum is not None and self._steps:
            self._own, self._brought = self._sum / self._steps, self._weight

    def withdraw(self, handed: Tensor) -> None:
        """Add to a hand-over, shape ``(layout.numel,)``, what takes this worker's part out of ``c``."""
        if self._own is not None:
            _controls(self._replica.layout, handed).add_(self._own, alpha=self._brought)


def _controls(layout: Layout, vector: Tensor) -> Tensor:
    """The control variates in a flat vector, shape ``(layout.trainable,)``."""
    places = [place for place in layout.tensors if place.entry.role == "control"]
    return vector[places[0].start : places[-1].stop]
