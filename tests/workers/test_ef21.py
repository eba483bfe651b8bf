"""``ef21``: gradient descent without compression, Theorems 1 and 3 of its paper, and its recursion with momentum.

Richtarik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error Feedback"
(NeurIPS 2021). Workers have losses of their own, with full gradients, in float64.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import protocol.compression
from protocol.segment import pack_exact
from workers.feedback.ef21 import step_size

N, FEATURES, SAMPLES = 5, 20, 30
TICKS = TensorDataset(torch.zeros(100, 1))  # the rounds go on; the data is each worker's own
EF21, PLUS = {"kind": "ef21"}, {"kind": "ef21_plus"}


class LeastSquares:
    """``f_i(x) = |A_i x - b_i|^2 / 2m``, another for each worker."""

    def __init__(self, spread=1.0):
        random = np.random.default_rng(3)
        scales = 1 + 0.4 * np.arange(N)
        self.a = random.normal(size=(N, SAMPLES, FEATURES)) * scales[:, None, None] / scales.mean()
        self.b = random.normal(size=(N, SAMPLES)) * 3 * spread
        each = np.einsum("ism,isn->imn", self.a, self.a) / SAMPLES
        mean = each.mean(0)
        self.best = np.linalg.solve(mean, np.einsum("ism,is->m", self.a, self.b) / SAMPLES / N)
        self.smoothness = [float(np.linalg.eigvalsh(one)[-1]) for one in each]  # L_i
        self.mu, *_, self.mean_smoothness = map(float, np.linalg.eigvalsh(mean))  # L

    def value(self, x):
        return float(np.mean([np.sum((a @ x - b) ** 2) for a, b in zip(self.a, self.b, strict=True)]) / 2 / SAMPLES)

    def gradient(self, i, x):
        return self.a[i].T @ (self.a[i] @ x - self.b[i]) / SAMPLES


PROBLEM = LeastSquares()


class History:
    """What each round begins with, and the estimate that each worker ends it with."""

    def __init__(self, inline, rate, rounds, problem=PROBLEM, layers=1, **settings):
        self.problem, self.rate, self.layers = problem, rate, layers
        self.x, self.g = [], []  # x^t;  g^t by worker
        inline.train(self._train, rounds=rounds, workers={"count": N}, send="gradient", **settings)
        self.g = [np.stack(g) for g in zip(*[self._estimates[worker] for worker in range(N)], strict=True)]

    @property
    def array(self):
        return np.array(self.x)

    def _train(self, session):
        worker = session._plan.worker
        size = FEATURES // self.layers
        model = nn.ParameterList([nn.Parameter(torch.zeros(size, dtype=torch.float64)) for _ in range(self.layers)])
        session.prepare(model, optimizer := torch.optim.SGD(model.parameters(), lr=self.rate))
        sender = session._rounds.method.sender
        self._estimates = getattr(self, "_estimates", {})
        seen = self._estimates[worker] = []
        for _ in session.batches(TICKS, 1):
            x = torch.cat([part.detach() for part in model]).numpy().copy()
            if session.version:
                seen.append(-sender.residual.numpy().copy())
            if session.rank == 0:
                self.x.append(x)
            gradient = torch.from_numpy(self.problem.gradient(worker, x))
            for part, own in zip(model, gradient.split(size), strict=True):
                part.grad = own.clone()
            optimizer.step()
        seen.append(-sender.residual.numpy().copy())


def descent(rate, rounds, problem=PROBLEM):
    x, found = np.zeros(FEATURES), []
    for _ in range(rounds):
        found.append(x)
        x = x - rate * np.mean([problem.gradient(i, x) for i in range(N)], axis=0)
    return found


@pytest.mark.parametrize("kind", [EF21, PLUS, {**EF21, "initial": "full"}])
def test_without_compression_it_is_gradient_descent(inline, kind):
    found = History(inline, 0.2, 30, feedback=kind).x
    assert np.abs(np.array(found) - np.array(descent(0.2, 30))).max() < 1e-14
    assert np.abs(found[-1] - found[0]).max() > 0.1


# --- Theorem 1


class Diagonal:
    """``C(v) = A v`` with a diagonal A in [0, 1]: deterministic, positively homogeneous and additive."""

    spec = "diagonal"

    def __init__(self, values):
        self.values = torch.as_tensor(values)

    def init(self, numel):
        return ()

    def encode(self, vector, state, key, residual=None, residual_out=None, norms=None):
        total = vector.clone() if residual is None else vector + residual
        sent = self.values[: total.numel()] * total
        out = residual if residual_out is None else residual_out
        if out is not None:
            out.copy_(total - sent)
        if norms is not None:
            norms.before += float(total @ total)
            norms.left += float((total - sent) @ (total - sent))
        return pack_exact(sent.numpy()), state


MASK = [float(i % 3 == 0) for i in range(FEATURES)]
SHRINK = [(0.0, 0.25, 0.5, 1.0)[i % 4] for i in range(FEATURES)]


def stand_in(monkeypatch, values):
    """Where a specification says sign, the uplink is compressed by a diagonal."""
    made = protocol.compression.compressors_for

    def make(layout, spec, overrides):
        return (Diagonal(values),) * len(layout.segments) if spec == "sign" else made(layout, spec, overrides)

    monkeypatch.setattr(protocol.compression, "compressors_for", make)


@pytest.mark.parametrize(
    ("values", "layers"), [([1.0] * FEATURES, 1), (MASK, 1), (SHRINK, 2)], ids=["identity", "mask", "shrink"]
)
def test_theorem_1_it_is_error_feedback_for_additive_homogeneous_deterministic_compressors(
    inline, monkeypatch, values, layers
):
    stand_in(monkeypatch, values)
    kinds = EF21, {"kind": "ef"}
    first, second = (History(inline, 0.1, 50, layers=layers, feedback=kind, uplink="sign").array for kind in kinds)
    assert np.abs(first - second).max() < 1e-13
    assert np.abs(first[-1] - first[0]).max() > 0.1
    assert (np.abs(first - np.array(descent(0.1, 50))).max() > 0.1) == (values[1] < 1)


def test_for_topk_which_is_not_additive_they_differ(inline):
    """Else the test above would say little."""
    first, second = (
        History(inline, 0.1, 30, feedback=kind, uplink="topk:0.2").array for kind in (EF21, {"kind": "ef"})
    )
    assert np.abs(first - second).max() > 0.05


# --- Theorem 3


def lyapunov(history, rate, alpha):
    """``Psi^t = f(x^t) - f(x*) + gamma / theta G^t`` of every round."""
    problem, theta = history.problem, 1 - math.sqrt(1 - alpha)
    found = []
    for x, g in zip(history.x, history.g, strict=True):
        distortion = np.mean([np.sum((g[i] - problem.gradient(i, x)) ** 2) for i in range(N)])
        found.append(problem.value(x) - problem.value(problem.best) + rate / theta * distortion)
    return np.array(found)


@pytest.mark.parametrize(
    ("kind", "ratio"), [(EF21, 0.05), (EF21, 0.4), (PLUS, 0.4), ({**EF21, "initial": "full"}, 0.4)], ids=str
)
def test_theorem_3_it_converges_linearly_at_the_rate_of_the_theory(inline, kind, ratio):
    rate = step_size(PROBLEM.smoothness, PROBLEM.mean_smoothness, ratio, PROBLEM.mu)
    history = History(inline, rate, 80, feedback=kind, uplink=f"topk:{ratio}")
    psi = lyapunov(history, rate, ratio)
    rounding = 1e-13 * psi[0]
    assert (psi <= (1 - rate * PROBLEM.mu) ** np.arange(80) * psi[0] * (1 + 1e-12) + rounding).all()
    assert psi[-1] < (1 - rate * PROBLEM.mu) ** 79 * psi[0] < 0.9 * psi[0]
    if kind.get("initial") == "full":
        assert psi[0] == pytest.approx(PROBLEM.value(np.zeros(FEATURES)) - PROBLEM.value(PROBLEM.best))


def test_at_a_constant_step_error_feedback_stalls_where_it_goes_on(inline):
    """Figure 1 of the paper, small: the workers' optima differ."""
    rate, ends = 8 * step_size(PROBLEM.smoothness, PROBLEM.mean_smoothness, 0.2, PROBLEM.mu), {}
    for kind in ("ef", "ef21", "ef21_plus"):
        x = History(inline, rate, 60, feedback={"kind": kind}, uplink="topk:0.2").x
        ends[kind] = PROBLEM.value(x[-1]) - PROBLEM.value(PROBLEM.best)
    assert max(ends["ef21"], ends["ef21_plus"]) < ends["ef"] / 1000


# --- the step size


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.9, 1.0])
def test_the_step_size_is_that_of_the_theorems(alpha):
    theta = 1 - math.sqrt(1 - alpha)
    beta = (1 - alpha) / theta
    each, mean = [1.0, 2.0, 4.0], 2.0
    spread = math.sqrt((1 + 4 + 16) / 3)
    assert step_size(each, mean, alpha) == pytest.approx(1 / (mean + spread * math.sqrt(beta / theta)))  # (15)
    for mu in (1e-3, 1e3):
        both = 1 / (mean + spread * math.sqrt(2 * beta / theta)), theta / (2 * mu)
        assert step_size(each, mean, alpha, mu) == pytest.approx(min(both))  # (17)
    root = 1 / step_size([1.0], 0.0 if alpha < 1 else 1.0, alpha) - (alpha == 1)
    assert root == pytest.approx((1 + math.sqrt(1 - alpha)) / alpha - 1)  # below Theorem 2
    assert root <= 2 / alpha - 1 + 1e-12


def test_stronger_compression_needs_a_smaller_step_and_none_allows_that_of_gradient_descent():
    steps = [step_size([3.0, 1.0], 2.0, alpha) for alpha in (0.01, 0.1, 0.5, 1.0)]
    assert all(one < other for one, other in pairwise(steps))
    assert steps[-1] == 1 / 2.0


@pytest.mark.parametrize(("each", "alpha", "says"), [([1.0], 0.0, "delta"), ([1.0], 1.5, "delta"), ([], 0.5, "smooth")])
def test_a_step_size_that_does_not_exist_is_refused(each, alpha, says):
    with pytest.raises(ValueError, match=says):
        step_size(each, 1.0, alpha)


# --- momentum


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("initial", ["compressed", "full"])
def test_with_eta_the_average_of_the_gradients_is_estimated(lone, eta, initial):
    """Fatkhullin, Tyurin, Richtarik, "Momentum Provably Improves Error Feedback!" (NeurIPS 2023), Algorithm 1."""
    one = lone({"kind": "ef21", "eta": eta, "initial": initial}, "topk:0.2", ((40,),))
    random, v, g = torch.Generator().manual_seed(0), None, np.zeros(40)
    for t in range(30):
        given = torch.randn(40, generator=random, dtype=torch.float64)
        if t % 5 == 3:
            one.stage(given)
            one.method.refuse()
            one.stage(given, skipped=True)
            one.method.commit()  # neither counts
            continue
        v = given.numpy() if v is None else (1 - eta) * v + eta * given.numpy()
        places = np.argsort(-np.abs(v - g), kind="stable")[: 40 if initial == "full" and not t else 8]
        g = g.copy()
        g[places] = v[places]
        one.round(given)
        assert -one.sender.residual.numpy() == pytest.approx(g, abs=1e-13)
    assert np.abs(v - g).max() > 0.1
