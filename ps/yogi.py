"""Yogi, for the server: Adam whose step sizes cannot grow quickly; not among torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Yogi(torch.optim.Optimizer):
    """``m = b1 m + (1 - b1) g;  v = v - (1 - b2) sign(v - g^2) g^2;  x = x - lr m / (sqrt(v) + eps)``, by element.

    Zaheer, Reddi, Sachan, Kale, Kumar, "Adaptive Methods for Nonconvex Optimization" (NeurIPS 2018), Algorithm 2.
    On the server (``server.optimizer: {kind: ps.yogi.Yogi, lr: 0.01}``), where g is the sum of the workers' weighted
    differences, FedYogi: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive Federated
    Optimization" (ICLR 2021), Algorithm 2; eps is its tau, lr its eta, and its v may begin at any value from
    ``tau^2`` on. As there, and unlike ``torch.optim.Adam``, moments are not corrected for their start at ``initial``.

    Args:
        params: tensors, or groups of them with options of their own.
        lr: step size, above 0.
        betas: (b1, b2), each in [0, 1).
        eps: above 0: how adaptive the steps are; the larger, the closer to plain momentum.
        initial: v before the first step, not negative; None: ``eps^2``.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-3,
        initial: float | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "initial": initial})
        for group in self.param_groups:
            _check(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure`` does, which evaluates the gradients if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (b1, b2), eps = group["betas"], group["eps"]
            first = eps**2 if group["initial"] is None else group["initial"]
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(x), torch.full_like(x, first)
                m, v, square = state["m"], state["v"], x.grad.square()
                m.lerp_(x.grad, 1.0 - b1)
                v.addcmul_(torch.sign(v - square), square, value=b2 - 1.0)
                x.addcdiv_(m, v.sqrt().add_(eps), value=-group["lr"])
        return loss


def _check(group: dict[str, Any]) -> None:
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas is {group['betas']}; valid are two numbers, each at least 0 and below 1")
    for name in ("lr", "eps"):
        if not group[name] > 0.0:
            raise ValueError(f"{name} is {group[name]}; valid is a number above 0")
    if group["initial"] is not None and not group["initial"] >= 0.0:
        raise ValueError(f"initial is {group['initial']}; valid is a number that is not negative, or null")
