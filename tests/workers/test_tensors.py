"""Tensors of every kind in a model: frozen, tied, unused, buffers, narrow and wide, sparse, replaced."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from protocol.errors import RunFailed

SENDS = ["difference", "gradient"]
DATA = TensorDataset(
    torch.randn(48, 6, generator=torch.Generator().manual_seed(1)),
    torch.randn(48, 2, generator=torch.Generator().manual_seed(2)),
)
WORDS = TensorDataset(
    torch.randint(0, 9, (48, 4), generator=torch.Generator().manual_seed(1)),
    torch.randn(48, 2, generator=torch.Generator().manual_seed(2)),
)
LOSSY = {"uplink": "topk:0.3", "downlink": "topk:0.3", "feedback": {"kind": "saef"}}

sgd = partial(torch.optim.SGD, lr=0.1)


def fit(model, optimizer, batches):
    """The loop of every test here, in a session and outside."""
    for x, y in batches:
        optimizer.zero_grad()
        mse_loss(model(x).float(), y).backward()
        optimizer.step()


def part(inline, name: str) -> Tensor:
    """One tensor of the server's replica."""
    state = inline.server.state
    (place,) = (s for s in state.layout.segments if s.entry.name == name)
    return state.w[place.start : place.stop].view(place.entry.shape)


def exchanged(inline) -> list[str]:
    return [segment.entry.name for segment in inline.server.state.layout.segments]


def compare(inline, make, data=DATA, atol=1e-6, **settings):
    """Train in a session of one worker and in plain torch on the same batches; the state dicts agree."""
    states, seen = [], []

    def train(session):
        model = make()
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        fit(model, optimizer, (seen.append(batch) or batch for batch in session.batches(data, 4)))
        states.append(model.state_dict())

    inline.train(train, workers={"count": 1}, **settings)
    model = make()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, sgd(model.parameters()), seen)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(states[0][name], value, rtol=0, atol=atol)
    return start, states[0]


# --- parameters


class Net(nn.Module):
    """Tied, frozen, unused, scalar and empty parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(self.again(torch.tanh(self.first(x)))) * self.scale))


@pytest.mark.parametrize("send", SENDS)
def test_frozen_tied_unused_scalar_and_empty_parameters_train_like_plain_torch(inline, send):
    start, end = compare(inline, Net, send=send)
    assert exchanged(inline) == [
        *["scale", "nothing", "first.weight", "first.bias", "unused.weight", "unused.bias"],
        *["last.weight", "last.bias"],
    ]
    still = {name for name in start if torch.equal(start[name], end[name])}
    assert still == {"nothing", "frozen.weight", "frozen.bias", "unused.weight", "unused.bias"}
    assert torch.equal(end["again.weight"], end["first.weight"])


@pytest.mark.parametrize("settings", [LOSSY, {"send": "gradient", "uplink": "topk:0.3"}], ids=SENDS)
def test_tied_tensors_stay_tied_and_frozen_ones_still_on_every_worker(inline, settings):
    def train(session):
        torch.manual_seed(session._plan.worker)
        model = Net()
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        frozen, unused = model.frozen.weight.clone(), model.unused.weight.clone()
        fit(model, optimizer, session.batches(DATA, 4))
        assert model.again.weight is model.first.weight
        assert torch.equal(model.frozen.weight, frozen)
        assert torch.equal(model.unused.weight, unused)

    result = inline.train(train, **settings)
    saved = result.load_model()
    fresh = Net()
    fresh.load_state_dict(saved)
    assert torch.equal(saved["again.weight"], part(inline, "first.weight"))
    assert torch.equal(saved["frozen.weight"], Net().frozen.weight)


@pytest.mark.parametrize("send", SENDS)
def test_a_parameter_without_gradient_in_some_rounds_contributes_zero_in_those(inline, send):
    still = {}

    def train(session):
        model = Net()
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        before = model.unused.weight.detach().clone()
        for x, y in session.batches(DATA, 4):
            still[session.version] = torch.equal(model.unused.weight, before)
            before = model.unused.weight.detach().clone()
            loss = mse_loss(model(x), y)
            if session.version == 2:
                loss = loss + model.unused(x[:, :3]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    inline.train(train, send=send)
    assert still == {0: True, 1: True, 2: True, 3: False, 4: True}


@pytest.mark.parametrize("send", SENDS)
def test_a_parameter_that_no_optimizer_group_holds_does_not_move(inline, send):
    def train(session):
        model = Net()
        optimizer = sgd([*model.last.parameters(), model.scale])
        session.prepare(model, optimizer)
        before = model.first.weight.detach().clone(), model.last.weight.detach().clone()
        fit(model, optimizer, session.batches(DATA, 4))
        assert torch.equal(model.first.weight, before[0])
        assert not torch.equal(model.last.weight, before[1])

    inline.train(train, send=send)


@pytest.mark.parametrize("send", SENDS)
def test_sparse_gradients_with_repeated_rows_train_like_plain_torch(inline, send):
    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(12, 2))

    start, end = compare(inline, make, WORDS, send=send)
    assert not torch.equal(start["0.weight"], end["0.weight"])


@pytest.mark.parametrize("send", SENDS)
def test_tensors_that_are_not_contiguous_train_like_plain_torch(inline, send):
    def make():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Unflatten(1, (3, 2, 1)), nn.Conv2d(3, 4, (2, 1)), nn.Flatten(), nn.Linear(4, 2))
        model[3].weight.data = model[3].weight.data.t().contiguous().t()
        return model.to(memory_format=torch.channels_last)

    compare(inline, make, send=send)
    assert inline.summary["status"] == "finished"


class Noted(nn.Linear):
    """Its state dict holds more than tensors."""

    def get_extra_state(self) -> dict[str, str]:
        return {"note": "no tensor"}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Nothing to restore."""


def test_state_that_is_no_tensor_is_left_out_of_the_saved_model(inline):
    def train(session):
        model = Noted(6, 2)
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        fit(model, optimizer, session.batches(DATA, 4))

    assert sorted(inline.train(train).load_model()) == ["bias", "weight"]


# --- working precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_of_one_worker_equals_plain_torch_bit_for_bit(inline, dtype):
    def make():
        torch.manual_seed(3)
        return nn.Sequential(Cast(dtype), nn.Linear(6, 5, dtype=dtype), nn.Tanh(), nn.Linear(5, 2, dtype=dtype))

    compare(inline, make, atol=0, rounds=20)
    assert inline.server.state.w.dtype == torch.float32


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


@pytest.mark.parametrize("send", SENDS)
def test_a_narrow_model_shows_the_replica_rounded_to_its_dtype(inline, send):
    narrow = []

    def train(session):
        model = nn.Sequential(Cast(torch.bfloat16), nn.Linear(6, 2, dtype=torch.bfloat16))
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        for batch in session.batches(DATA, 4):
            assert torch.equal(model[1].weight, part(inline, "1.weight").bfloat16())
            narrow.append(torch.equal(model[1].weight.float(), part(inline, "1.weight")))
            fit(model, optimizer, [batch])
        assert torch.equal(model[1].weight, part(inline, "1.weight").bfloat16())

    inline.train(train, send=send, workers={"count": 3})
    assert not all(narrow)  # w keeps more digits than the model shows


def test_one_wide_parameter_makes_the_working_precision_wide(inline):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.first, self.last = nn.Linear(6, 5, dtype=torch.float64), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x.double())).float())

    compare(inline, Mixed)
    assert inline.server.state.w.dtype == torch.float64
    assert not torch.equal(part(inline, "first.weight"), part(inline, "first.weight").float().double())
    assert torch.equal(inline.sessions[0]._rounds.replica.w, inline.server.state.w)


# --- buffers


def norm_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("settings", [{}, LOSSY, {"send": "gradient"}], ids=["ef", "saef", "gradient"])
def test_running_statistics_are_equal_on_all_workers_after_every_round(inline, settings):
    seen = {}

    def train(session):
        model = norm_net()
        model[1].num_batches_tracked += 100 + session._plan.worker
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        own = {}
        for number, batch in enumerate(session.batches(DATA, 4)):
            name = session.version, session.rank
            seen[name] = model[1].running_mean.clone(), model[1].running_var.clone()
            assert model[1].num_batches_tracked == 100 + number  # rank 0's at version 0, then this worker's own
            fit(model, optimizer, [batch])
            own[name] = model[1].running_mean.clone()
            assert not torch.equal(own[name], seen[name][0])
        seen[session.version, session.rank] = model[1].running_mean.clone(), model[1].running_var.clone()

    inline.train(train, workers={"count": 3}, **settings)
    for version in range(6):
        for rank in (1, 2):
            assert all(map(torch.equal, seen[version, 0], seen[version, rank]))
    assert torch.equal(part(inline, "1.running_mean"), seen[5, 0][0])
    assert not torch.equal(seen[5, 0][0], seen[4, 0][0])


@pytest.mark.parametrize("send", SENDS)
def test_buffers_are_averaged_through_the_ledger_in_bfloat16_with_feedback(inline, send):
    after = {}

    def train(session):
        model = norm_net()
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        for batch in session.batches(DATA, 4):
            fit(model, optimizer, [batch])
            after[session.version, session.rank] = torch.cat([model[1].running_mean, model[1].running_var])

    inline.train(train, send=send, workers={"count": 2}, rounds=10)
    w = torch.cat([torch.zeros(4), torch.ones(4)])
    owed, missing = [torch.zeros(8), torch.zeros(8)], torch.zeros(8)
    for version in range(10):
        total = torch.zeros(8)
        for rank in (0, 1):
            due = 0.5 * (w - after[version, rank]) + owed[rank]
            sent = due.bfloat16().float()
            owed[rank] = due - sent
            total += sent
        due = total + missing
        sent = due.bfloat16().float()
        missing, w = due - sent, w - sent
    torch.testing.assert_close(
        torch.cat([part(inline, "1.running_mean"), part(inline, "1.running_var")]), w, rtol=0, atol=0
    )
    assert missing.abs().max() > 0


def test_stepping_ahead_shifts_parameters_but_no_buffers(inline):
    shifted = []

    def train(session):
        model = norm_net()
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        for batch in session.batches(DATA, 4):
            assert torch.equal(model[1].running_var, part(inline, "1.running_var"))
            shifted.append(not torch.equal(model[0].weight, part(inline, "0.weight")))
            fit(model, optimizer, [batch])

    inline.train(train, **LOSSY, overrides={"*running*": "topk:0.25"})
    assert sum(shifted) == 8  # of 2 workers in 5 rounds, all but the first, when there is no residual yet
    sender = inline.sessions[0]._rounds.method.sender
    assert sender.residual[sender.layout.trainable :].abs().max() > 0


class Replacing(nn.Module):
    """Assigns a new tensor to its buffer in every forward pass, with a gradient attached."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(6, 2)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.mean = 0.5 * self.mean + 0.5 * out.mean(dim=0)
        return out - self.mean.detach()


@pytest.mark.parametrize("send", SENDS)
def test_a_buffer_that_its_module_replaces_is_exchanged_all_the_same(inline, send):
    means = {}

    def train(session):
        model = Replacing()
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        for batch in session.batches(DATA, 4):
            means[session.version, session.rank] = model.mean.detach().clone()
            fit(model, optimizer, [batch])

    result = inline.train(train, send=send)
    for version in range(1, 5):
        assert means[version, 0].abs().max() > 0
        assert torch.equal(means[version, 0], means[version, 1])
    assert torch.equal(result.load_model()["mean"], part(inline, "mean"))


def test_a_buffer_that_is_not_finite_is_refused_by_name(inline):
    def train(session):
        model = norm_net()
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        for batch in session.batches(DATA, 4):
            fit(model, optimizer, [batch])
            model[1].running_var[2] = float("inf")

    with pytest.raises(RunFailed, match=r"the update of '1\.running_var' holds NaN or Inf in round 0"):
        inline.train(train)
