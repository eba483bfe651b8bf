"""Torch's optimizers on the server against plain torch: the true model ``x = w - e`` takes their steps."""

import pytest
import torch

from protocol import Layout, SettingsError
from protocol.layout import Entry as Tensor
from ps.optimizer import Sum, TorchOptimizer, optimizer_class
from ps.settings import OptimizerSettings

LAYOUT = Layout(
    (
        Tensor("weight", (4, 5), "float32", "parameter"),
        Tensor("bias", (3,), "float32", "parameter"),
        Tensor("mean", (2,), "float32", "buffer"),
    )
)
OPTIMIZERS = {
    "SGD": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "Nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.1},
}
CLASSES = {"Adam": "Adam", "AdamW": "AdamW"}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
ROUNDS = 8


def kind_of(name):
    return f"torch.optim.{CLASSES.get(name, 'SGD')}"


def gradients(seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(25, generator=random) for _ in range(ROUNDS)]


class Plain:
    """The same model trained by torch itself, one tensor a segment."""

    def __init__(self, model, name, layout=LAYOUT):
        self.parts = [
            torch.nn.Parameter(model[s.start : s.stop].clone().reshape(s.entry.shape))
            for s in layout.segments
            if s.entry.role == "parameter"
        ]
        self.optimizer = getattr(torch.optim, kind_of(name)[12:])(self.parts, **OPTIMIZERS[name])

    def step(self, gradient):
        start = 0
        for part in self.parts:
            part.grad = gradient[start : start + part.numel()].reshape(part.shape).clone()
            start += part.numel()
        self.optimizer.step()
        return torch.cat([part.detach().reshape(-1) for part in self.parts])


@every_optimizer
def test_a_step_is_the_step_of_torch(name):
    ours = TorchOptimizer(LAYOUT, kind_of(name), [{"params": ["weight", "bias"], **OPTIMIZERS[name]}])
    x = torch.linspace(-1, 1, 25)
    plain = Plain(x, name)
    for gradient in gradients():
        step = ours.step(gradient.clone(), x.clone(), None)
        assert torch.equal(step[23:], gradient[23:]), "for buffers the sum is the step"
        x = x - step
        assert torch.allclose(x[:23], plain.step(gradient), rtol=1e-6, atol=1e-6)


@every_optimizer
@pytest.mark.parametrize("downlink", ["none", "topk:0.2+int4", "sign"])
@pytest.mark.parametrize("send", ["difference", "gradient"])
def test_the_true_model_of_a_run_moves_as_torch_moves_it(rig, name, downlink, send):
    """However much of it the workers have been sent so far."""
    options = {"kind": kind_of(name), **OPTIMIZERS[name]}
    if send == "difference":
        one = rig(layout=LAYOUT, downlink=downlink, model=torch.linspace(-1, 1, 25), optimizer=options).start()
    else:
        groups = [{"params": ["weight", "bias"], **OPTIMIZERS[name]}]
        one = rig(layout=LAYOUT, downlink=downlink, model=torch.linspace(-1, 1, 25), send="gradient")
        one.send(one.join(0, optimizer={"kind": kind_of(name), "groups": groups}))
        for worker in (1, 2):
            one.send(one.join(worker))
    plain = Plain(one.model, name)
    for gradient in gradients():
        parts = {0: 0.5 * gradient, 1: 0.25 * gradient, 2: 0.25 * gradient}
        one.round(parts)
        expected = plain.step(0.5 * gradient + 0.25 * gradient + 0.25 * gradient)
        assert torch.allclose(one.x[:23], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(one.w[:23], one.x[:23]) == (downlink == "none")
    assert one.vitals.server_conservation <= 4


def test_the_default_is_the_sum_itself():
    total = torch.arange(25.0)
    assert Sum().step(total, None, None) is total
    assert not Sum().needs_model


def test_new_learning_rates_hold_from_the_push_that_brings_them(rig):
    groups = [{"params": ["weight"], "lr": 1.0}, {"params": ["bias"], "lr": 1.0}]
    one = rig(layout=LAYOUT, send="gradient", model=torch.zeros(25))
    one.send(one.join(0, optimizer={"kind": "torch.optim.SGD", "groups": groups}))
    one.send(one.join(1))
    one.send(one.join(2))
    one.send(one.push(1, 0.0, options=[{"lr": 7.0}]))  # only the lowest id speaks for the optimizer
    one.send(one.push(0, 1.0, options=[{"lr": 0.5}, {}]))
    one.send(one.push(2, 0.0))
    assert one.w.tolist() == [-0.5] * 20 + [-1.0] * 5
    one.round({0: 1.0, 1: 0.0, 2: 0.0})
    assert one.w.tolist() == [-1.0] * 20 + [-2.0] * 5, "and stay"


def test_parameters_without_a_group_are_summed_like_buffers_or_kept(rig):
    """As with torch: what the optimizer was not given, it does not move."""
    ours = TorchOptimizer(LAYOUT, "torch.optim.SGD", [{"params": ["weight"], "lr": 1.0}])
    step = ours.step(torch.ones(25), torch.zeros(25), None)
    assert step.tolist() == [1.0] * 20 + [0.0] * 3 + [1.0] * 2


def test_the_founder_must_name_the_optimizer_that_the_server_shall_run(rig):
    one = rig(layout=LAYOUT, send="gradient")
    refusal = one.ask(one.join(0))
    assert (refusal.reason, refusal.detail) == (
        "frame",
        "worker 0 has not said which optimizer the server shall run",
    )


@pytest.mark.parametrize(
    "kind", ["sum", "SGD", "torch.optim", "torch.optim.Nosuch", "torch.nn.Linear", "nosuch.SGD", ""]
)
def test_what_is_no_optimizer_is_refused(kind):
    with pytest.raises(
        SettingsError, match=r"is not an optimizer; valid are sum and class paths such as torch\.optim\.S"
    ):
        optimizer_class(kind)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": 0.1, "momentun": 0.9}, {"lr": 0.1, "nesterov": True}])
def test_options_that_torch_does_not_take_are_an_error_before_anything_runs(options):
    with pytest.raises(SettingsError, match=r"optimizer 'torch.optim.SGD' does not take these options"):
        TorchOptimizer(LAYOUT, "torch.optim.SGD", [{"params": ["weight"]}], **options)
    with pytest.raises(ValueError, match=r"optimizer 'torch.optim.SGD' does not take these options"):
        OptimizerSettings(kind="torch.optim.SGD", **options)


def test_a_parameter_that_the_model_lacks_is_named():
    with pytest.raises(SettingsError, match="of 'offset', which is not in the model"):
        TorchOptimizer(LAYOUT, "torch.optim.SGD", [{"params": ["weight", "offset"], "lr": 0.1}])
