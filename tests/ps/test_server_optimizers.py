"""Yogi against its recursion, and which optimizers a server takes: what cannot step there is refused before a run."""

from __future__ import annotations

import math
import sys
import types
from copy import deepcopy

import pytest
import torch
from torch import nn

from deploy import launch
from deploy.checking import describe
from deploy.settings import validate
from protocol import Layout, SettingsError
from protocol.errors import RunFailed
from protocol.layout import Entry as Tensor
from protocol.layout import layout_of
from ps.yogi import Yogi

NUMEL = 12
LAYOUT = Layout((Tensor("weight", (3, 3), "float64", "parameter"), Tensor("bias", (3,), "float64", "parameter")))


def gradients(rounds, seed=0):
    """Of sizes from 1e-6 to 1e3, some of them zero."""
    random = torch.Generator().manual_seed(seed)
    sizes = 10 ** (9 * torch.rand(NUMEL, generator=random, dtype=torch.float64) - 6)
    drawn = torch.randn(rounds, NUMEL, generator=random, dtype=torch.float64) * sizes
    return drawn * (torch.rand(rounds, NUMEL, generator=random) > 0.2)


def yogi(start, gradients, lr=0.01, betas=(0.9, 0.99), eps=1e-3, initial=None):
    """Algorithm 2 of Zaheer et al. 2018, one number after the other."""
    models, (b1, b2) = [], betas
    x, m, v = list(start), [0.0] * len(start), [eps**2 if initial is None else initial] * len(start)
    for gradient in gradients.tolist():
        for i, g in enumerate(gradient):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = v[i] - (1 - b2) * ((v[i] > g * g) - (v[i] < g * g)) * g * g
            x[i] = x[i] - lr * m[i] / (math.sqrt(v[i]) + eps)
        models.append(torch.tensor(x, dtype=torch.float64))
    return models


OPTIONS = [{}, {"lr": 0.3, "betas": (0.5, 0.9)}, {"eps": 0.1, "initial": 0.0}, {"initial": 4.0}, {"betas": [0.0, 0.0]}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_yogi_is_its_recursion(options):
    parts = [nn.Parameter(part) for part in torch.linspace(-1, 1, NUMEL, dtype=torch.float64).split((9, 3))]
    optimizer = Yogi([{"params": parts[:1]}, {"params": parts[1:]}], **options)
    start = torch.cat(parts).tolist()
    for gradient, expected in zip(gradients(40), yogi(start, gradients(40), **options), strict=True):
        parts[0].grad, parts[1].grad = gradient[:9].clone(), gradient[9:].clone()
        optimizer.step()
        assert torch.allclose(torch.cat(parts), expected, rtol=1e-11, atol=1e-11)


def test_yogi_s_second_moment_moves_by_the_square_of_the_gradient_where_adam_s_moves_by_the_difference():
    """After one large gradient Adam's falls by a share of itself, which a small gradient cannot tell; Yogi's stays."""
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Yogi([x], initial=0.0)
    for gradient in (10.0, *[0.1] * 100):
        x.grad = torch.full_like(x, gradient)
        optimizer.step()
    first, rest = 0.01 * 10.0**2, 100 * 0.01 * 0.1**2
    assert optimizer.state[x]["v"].item() == pytest.approx(first - rest, rel=1e-12)
    assert first * 0.99**100 < 0.4 * (first - rest), "Adam's"


def test_yogi_skips_parameters_without_gradient_and_evaluates_a_closure():
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Yogi([x, y], lr=0.5)

    def closure():
        optimizer.zero_grad()
        (loss := (3 * x).sum()).backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert y.tolist() == [1.0, 1.0]
    assert x[0].item() < 1.0
    state = deepcopy(optimizer.state_dict())
    again = Yogi([nn.Parameter(x.detach().clone()), nn.Parameter(torch.ones(2))], lr=0.1)
    again.load_state_dict(state)
    assert again.param_groups[0]["lr"] == 0.5
    optimizer.step(closure)
    (twin, _) = again.param_groups[0]["params"]
    twin.grad = torch.full((2,), 3.0)
    again.step()
    assert torch.equal(twin, x), "its whole state is in its state dict"


@pytest.mark.parametrize("downlink", ["none", "topk:0.2+int4"])
def test_the_true_model_of_a_run_moves_as_fedyogi_moves_it(rig, downlink):
    start, options = torch.linspace(-1, 1, NUMEL, dtype=torch.float64), {"lr": 0.1, "eps": 0.01}
    optimizer = {"kind": "ps.yogi.Yogi", **options}
    one = rig(layout=LAYOUT, model=start, downlink=downlink, optimizer=optimizer).start()
    for gradient, expected in zip(gradients(20), yogi(start.tolist(), gradients(20), **options), strict=True):
        one.round({0: 0.5 * gradient, 1: 0.25 * gradient, 2: 0.25 * gradient})
        assert torch.allclose(one.x, expected, rtol=0, atol=1e-9)
    assert torch.equal(one.w, one.x) == (downlink == "none")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"lr": 0.0}, "lr is 0.0; valid is a number above 0"),
        ({"lr": math.nan}, "lr is nan; valid is a number above 0"),
        ({"eps": -1.0}, "eps is -1.0; valid is a number above 0"),
        ({"betas": [0.9, 1.0]}, "betas is [0.9, 1.0]; valid are two numbers, each at least 0 and below 1"),
        ({"betas": [0.9]}, "betas is [0.9]; valid are two numbers, each at least 0 and below 1"),
        ({"initial": -1.0}, "initial is -1.0; valid is a number that is not negative, or null"),
        ({"beta": 0.9}, "got an unexpected keyword argument 'beta'"),
    ],
)
def test_options_that_yogi_does_not_take_are_refused_with_the_settings(options, part):
    with pytest.raises(SettingsError) as refused:
        settings({"kind": "ps.yogi.Yogi", **options})
    assert str(refused.value).startswith("server.optimizer: the server's optimizer 'ps.yogi.Yogi' does not take these")
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


# --- which optimizers a server takes


def settings(optimizer, **extra):
    run = {"train": "m:f", "backend": "inline", "feedback": {"kind": "ef"}, "rounds": 2, "workers": {"count": 2}}
    return validate({**run, "metrics": {"port": None}, "server": {"optimizer": optimizer}, **extra})


TORCH = [name for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name), type) and name != "Optimizer"]
NEVER = {"LBFGS": "missing 1 required positional argument: 'closure'", "SparseAdam": "does not support dense gradients"}


@pytest.mark.parametrize("name", TORCH)
def test_every_optimizer_of_torch_steps_on_the_server_or_is_refused_with_the_settings(name):
    chosen = {"kind": f"torch.optim.{name}", "lr": 0.01}
    if name in NEVER:
        with pytest.raises(SettingsError) as refused:
            settings(chosen)
        sentence = f"the server's optimizer 'torch.optim.{name}' cannot step where gradients are dense and there is no "
        assert str(refused.value).startswith(f"server.optimizer: {sentence}closure: ")
        assert NEVER[name] in str(refused.value)
        assert "\n" not in str(refused.value)
        return
    layout = layout_of(nn.Linear(5, 3, bias=name != "Muon").named_parameters())
    optimizer = settings(chosen).server.optimizer.of(layout)
    total, model = torch.ones(layout.numel), torch.linspace(-1, 1, layout.numel)
    steps = [optimizer.step(total.clone(), model.clone(), None) for _ in range(3)]
    assert all(step.isfinite().all() and step.abs().max() > 0 for step in steps)


@pytest.mark.parametrize("options", [{"capturable": True}, {"differentiable": True}], ids=str)
def test_options_with_which_an_optimizer_could_not_step_are_refused_with_the_settings(options):
    with pytest.raises(SettingsError, match=r"^server\.optimizer: .* cannot step where gradients are dense and"):
        settings({"kind": "torch.optim.Adam", **options})


class Refusing(torch.optim.SGD):
    """A class of a user's, whose error has several lines."""

    def step(self, closure=None):
        raise RuntimeError("not here\nnor there")


def test_whatever_a_class_of_a_users_raises_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(Refusing=Refusing))
    with pytest.raises(SettingsError, match=r"'mine\.Refusing' cannot step where .* there is no closure: not here$"):
        settings({"kind": "mine.Refusing", "lr": 0.1})


def test_an_optimizer_that_cannot_step_where_the_users_own_moves_to_the_server_fails_before_the_first_round(rig):
    one = rig(layout=LAYOUT, send="gradient", model=torch.zeros(NUMEL, dtype=torch.float64))
    kind = "torch.optim.SparseAdam"
    refusal = one.ask(one.join(0, optimizer={"kind": kind, "groups": [{"params": ["weight", "bias"], "lr": 0.1}]}))
    assert refusal.reason == "frame"
    assert refusal.detail.startswith(f"the server's optimizer '{kind}' cannot step where gradients are dense")


MUON = {"kind": "torch.optim.Muon", "lr": 0.01}


def train(session, bias=True):
    model = nn.Linear(4, 3, bias=bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.prepare(model, optimizer)
    for batch in session.batches(torch.ones(8, 4), 2):
        optimizer.zero_grad()
        model(batch).sum().backward()
        optimizer.step()


@pytest.mark.skipif("Muon" not in TORCH, reason="this torch has no Muon")
def test_an_optimizer_for_matrices_alone_is_refused_by_check_and_before_the_first_round(tmp_path):
    chosen = settings(MUON, storage={"dir": tmp_path})
    message = r"server's optimizer 'torch\.optim\.Muon' does not take these options and tensors: Muon only supports 2D"
    with pytest.raises(SettingsError, match=message):
        describe(chosen, train)
    rows = []
    with pytest.raises(RunFailed, match=message):
        launch(train, chosen, observe=rows.append)
    assert not rows
    matrices = settings(MUON, arguments={"bias": False}, storage={"dir": tmp_path})
    assert "parameters in 1 tensors" in describe(matrices, train)
    assert launch(train, matrices, observe=rows.append).summary["rounds"] == len(rows) == 2
