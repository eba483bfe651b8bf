"""Without compression a run is plain torch training: the same user code on the same batches gives the same model.

Equal to rounding, not bit for bit: the model moves to ``w - (w - y')``, which is ``y'`` up to the last digit. All in
float64, so that what is allowed (1e-12) is far below what any of these recipes changes (1e-4 at least).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore::workers.hooks.StatefulOptimizerWarning")

SENDS = ["difference", "gradient"]
ROUNDS = 12
DATA = TensorDataset(
    torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
)

sgd = partial(torch.optim.SGD, lr=0.1)
momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
adam = partial(torch.optim.Adam, lr=0.05, betas=(0.8, 0.95), amsgrad=True)
adamw = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
step_lr = partial(StepLR, step_size=3, gamma=0.5)
one_cycle = partial(OneCycleLR, max_lr=0.2, total_steps=ROUNDS)


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5, dtype=dtype), nn.Tanh(), nn.Linear(5, 2, dtype=dtype))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """The first layer with options of its own, and the second."""
    return [{"params": model[0].parameters(), "lr": 0.02, "weight_decay": 0.3}, {"params": model[2].parameters()}]


@dataclass(frozen=True)
class Recipe:
    """A user's training loop."""

    optimizer: Callable[..., torch.optim.Optimizer] = sgd
    grouped: bool = False
    scheduler: Callable[..., Any] | None = None
    scheduler_first: bool = False  # before prepare
    clip: float | None = None
    accumulate: int = 1
    scaler: Callable[[], torch.amp.GradScaler] | None = None
    overflow_at: int | None = None  # the batch whose loss is infinite
    autocast: bool = False
    closure: bool = False
    dtype: torch.dtype = torch.float64

    def fit(self, prepare: Callable[..., Any], batches: Callable[[], Iterable[Any]]) -> nn.Module:
        """The loop itself, the same in a session and outside."""
        model = net(self.dtype)
        optimizer = self.optimizer(groups(model) if self.grouped else model.parameters())
        first = self.scheduler(optimizer) if self.scheduler and self.scheduler_first else None
        assert prepare(model, optimizer) is not None
        scheduler = first or (self.scheduler(optimizer) if self.scheduler else None)
        scaler = self.scaler() if self.scaler else torch.amp.GradScaler("cpu", enabled=False)
        for number, (x, y) in enumerate(batches()):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = mse_loss(model(x.to(self.dtype)), y.to(self.dtype)) / self.accumulate
            if number == self.overflow_at:
                loss = loss * float("inf")
            if self.closure:
                assert optimizer.step(partial(self._backward, optimizer, loss)) is loss
                continue
            scaler.scale(loss).backward()
            if (number + 1) % self.accumulate:
                continue
            if self.clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
        return model

    @staticmethod
    def _backward(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss.backward()
        return loss


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def plain(recipe: Recipe, batches: list[Any]) -> Tensor:
    return flat(recipe.fit(lambda *given: given, lambda: batches))


def run(inline, recipe: Recipe, **settings: Any) -> tuple[list[Tensor], list[list[Any]]]:
    """What each worker's model is at the end, and the batches it saw."""
    models: dict[int, Tensor] = {}
    seen: dict[int, list[Any]] = {}

    def train(session):
        def batches() -> Iterator[Any]:
            for batch in session.batches(DATA, 4):
                seen.setdefault(session.rank, []).append(batch)
                yield batch

        models[session] = flat(recipe.fit(session.prepare, batches))

    inline.train(train, rounds=ROUNDS, **settings)
    return list(models.values()), [seen[rank] for rank in sorted(seen)]


RECIPES = {
    "sgd": Recipe(),
    "momentum in two groups": Recipe(momentum, grouped=True),
    "Adam": Recipe(adam),
    "AdamW in two groups": Recipe(adamw, grouped=True),
    "StepLR built before prepare": Recipe(momentum, scheduler=step_lr, scheduler_first=True),
    "StepLR built after prepare": Recipe(momentum, scheduler=step_lr),
    "OneCycleLR built before prepare, cycling momentum": Recipe(momentum, scheduler=one_cycle, scheduler_first=True),
    "OneCycleLR built after prepare, cycling momentum": Recipe(momentum, scheduler=one_cycle),
    "OneCycleLR cycling betas": Recipe(adamw, grouped=True, scheduler=one_cycle),
    "clipping": Recipe(momentum, clip=0.3),
    "accumulation": Recipe(momentum, accumulate=3),
    "GradScaler": Recipe(momentum, scaler=partial(torch.amp.GradScaler, "cpu", init_scale=1024.0)),
    "GradScaler, clipping and accumulation": Recipe(
        momentum, accumulate=2, clip=0.3, scaler=partial(torch.amp.GradScaler, "cpu", init_scale=64.0)
    ),
    "GradScaler and a fused optimizer": Recipe(
        partial(momentum, fused=True), scaler=partial(torch.amp.GradScaler, "cpu", init_scale=1024.0)
    ),
    "a closure": Recipe(momentum, closure=True),
    "a learning rate that is a tensor": Recipe(partial(adam, lr=torch.tensor(0.03, dtype=torch.float64))),
}


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("name", RECIPES)
def test_one_worker_trains_like_plain_torch(inline, name, send):
    recipe = RECIPES[name]
    workers = {"count": 1, "accumulate": recipe.accumulate}
    (model,), (batches,) = run(inline, recipe, send=send, workers=workers)
    assert len(batches) == ROUNDS * recipe.accumulate
    torch.testing.assert_close(model, plain(recipe, batches), rtol=0, atol=1e-12)


def test_what_the_recipes_do_shows_in_the_result():
    batches = [(x[None], y[None]) for x, y in DATA][:12]
    written = {"accumulate": 1, "scaler": None, "closure": False, "scheduler_first": False}  # not in the result
    distinct = [Recipe(momentum), *(recipe for recipe in RECIPES.values() if replace(recipe, **written) == recipe)]
    results = [plain(recipe, batches) for recipe in distinct]
    assert len(results) == 10
    for i, one in enumerate(results):
        assert all((one - other).abs().max() > 1e-4 for other in results[:i])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("send", SENDS)
def test_a_step_that_a_scaler_skips_leaves_the_model_like_plain_torch(inline, send, fused):
    # in send: gradient without momentum, since the server's momentum goes on through a round without gradients
    optimizer = partial(momentum if send == "difference" else sgd, fused=fused)
    recipe = Recipe(optimizer, scaler=partial(torch.amp.GradScaler, "cpu", init_scale=1024.0), overflow_at=4)
    (model,), (batches,) = run(inline, recipe, send=send, workers={"count": 1})
    torch.testing.assert_close(model, plain(recipe, batches), rtol=0, atol=1e-12)
    assert inline.summary["skipped_steps"] == 1


@pytest.mark.parametrize("send", SENDS)
def test_autocast_in_bfloat16_trains_like_plain_torch(inline, send):
    recipe = Recipe(momentum, autocast=True, dtype=torch.float32)
    (model,), (batches,) = run(inline, recipe, send=send, workers={"count": 1})
    torch.testing.assert_close(model, plain(recipe, batches), rtol=0, atol=1e-5)
    assert (model - plain(replace(recipe, autocast=False), batches)).abs().max() > 1e-4


def averaged(recipe: Recipe, batches: list[list[Any]]) -> Tensor:
    """Plain torch with the mean of the workers' gradients."""
    model = net()
    optimizer = recipe.optimizer(groups(model) if recipe.grouped else model.parameters())
    scheduler = recipe.scheduler(optimizer) if recipe.scheduler else None
    for together in zip(*batches, strict=True):
        optimizer.zero_grad()
        for x, y in together:
            (mse_loss(model(x), y) / len(together)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return flat(model)


@pytest.mark.parametrize(
    "name",
    ["momentum in two groups", "Adam", "AdamW in two groups", "OneCycleLR cycling betas", "StepLR built after prepare"],
)
def test_three_workers_that_send_gradients_train_like_plain_torch_on_their_mean(inline, name):
    models, batches = run(inline, RECIPES[name], send="gradient", workers={"count": 3})
    expected = averaged(RECIPES[name], batches)
    assert len(models) == len(batches) == 3
    for model in models:
        torch.testing.assert_close(model, expected, rtol=0, atol=1e-12)


def test_three_workers_that_send_differences_of_plain_sgd_train_like_torch_on_the_mean_gradient(inline):
    models, batches = run(inline, Recipe(), workers={"count": 3})
    for model in models:
        torch.testing.assert_close(model, averaged(Recipe(), batches), rtol=0, atol=1e-12)


def test_local_steps_average_the_workers_models(inline):
    models, batches = run(inline, Recipe(momentum), workers={"count": 2, "local_steps": 3})
    nets = [net() for _ in batches]
    optimizers = [momentum(model.parameters()) for model in nets]  # their momentum stays where it is
    for round_ in range(ROUNDS):
        for model, optimizer, seen in zip(nets, optimizers, batches, strict=True):
            for x, y in seen[3 * round_ : 3 * round_ + 3]:
                optimizer.zero_grad()
                mse_loss(model(x), y).backward()
                optimizer.step()
        mean = torch.stack([flat(model) for model in nets]).mean(dim=0)
        for model in nets:
            nn.utils.vector_to_parameters(mean.clone(), model.parameters())
    for model in models:
        torch.testing.assert_close(model, mean, rtol=0, atol=1e-12)


def test_a_server_momentum_of_one_worker_is_plain_momentum(inline):
    server = {"optimizer": {"kind": "torch.optim.SGD", "lr": 1.0, "momentum": 0.9}}
    (model,), (batches,) = run(inline, Recipe(), workers={"count": 1}, server=server)
    expected = plain(Recipe(partial(torch.optim.SGD, lr=0.1, momentum=0.9)), batches)
    torch.testing.assert_close(model, expected, rtol=0, atol=1e-12)
