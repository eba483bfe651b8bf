"""The system against Algorithm 1 of the SAEF paper, written here in plain numpy, line by line.

Xu, Huo, Huang, "Step-Ahead Error Feedback for Distributed Training with Compressed Gradient" (AAAI 2021). Three workers
train a logistic regression with momentum SGD, weight decay and a falling learning rate, compressed in both directions.
Our residuals carry the worker's weight, so the paper's ``e_k`` is ``3 e_k`` here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore::workers.hooks.StatefulOptimizerWarning")

Vector = npt.NDArray[np.float64]
Compress = Callable[[Vector], Vector]

K, ROUNDS, FEATURES, SIZE = 3, 20, 30, 6
RATE, MOMENTUM, DECAY, EVERY, FALL = 0.4, 0.9, 0.02, 6, 0.5
TRUTH = torch.randn(FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
INPUTS = torch.randn(120, FEATURES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
DATA = TensorDataset(INPUTS, (INPUTS @ TRUTH > 0).double())


def f32(v: Vector) -> Vector:
    return v.astype(np.float32).astype(np.float64)


def exact(v: Vector) -> Vector:
    return v.copy()


def topk(ratio: float, v: Vector) -> Vector:
    out = np.zeros_like(v)
    places = np.argsort(-np.abs(v), kind="stable")[: max(1, round(ratio * v.size))]
    out[places] = v[places]
    return out


def sign(v: Vector) -> Vector:
    return np.abs(v).mean() * np.where(v < 0, -1.0, 1.0)


COMPRESSORS: dict[str, Compress] = {
    "f32": f32,
    "f64": exact,
    "sign": sign,
    "topk:0.1": partial(topk, 0.1),
    "topk:0.3": partial(topk, 0.3),
}


def by_tensor(compress: Compress, v: Vector) -> Vector:
    """Weight and bias are compressed each on its own."""
    return np.concatenate([compress(v[:FEATURES]), compress(v[FEATURES:])])


def gradient(x: Vector, batch: tuple[Vector, Vector]) -> Vector:
    inputs, labels = batch
    wrong = 1 / (1 + np.exp(-(inputs @ x[:FEATURES] + x[FEATURES]))) - labels
    return np.append(inputs.T @ wrong, wrong.sum()) / labels.size


def algorithm_1(
    x: Vector,
    batches: dict[tuple[int, int], list[tuple[Vector, Vector]]],
    kind: str,
    compress: Compress,
    period: int | None,
    average: Compress,
) -> list[dict[str, Any]]:
    """What each round begins with; ``batches`` by iteration and worker, one for each local step."""
    local = [np.zeros_like(x) for _ in range(K)]  # e_k
    velocity = [np.zeros_like(x) for _ in range(K)]  # m_k
    error = np.zeros_like(x)  # e
    history = []
    for t in range(ROUNDS):
        rate = RATE * FALL ** (t // EVERY)
        if kind == "saef" and period and (t + 1) % period == 0:  # line 6
            shared = [by_tensor(average, e) for e in local]
            local = [e - b + sum(shared) / K for e, b in zip(local, shared, strict=True)]  # line 7
        half = [x - e if kind == "saef" else x for e in local]  # line 9
        history.append({"x": x, "half": half, "local": local, "error": error})
        sent, left = [], []
        for k in range(K):
            moved = half[k]
            for batch in batches[t, k]:
                velocity[k] = MOMENTUM * velocity[k] + gradient(moved, batch) + DECAY * moved  # lines 10, 14
                moved = moved - rate * velocity[k]  # lines 11, 15
            delta = local[k] + half[k] - moved  # lines 12, 16
            sent.append(by_tensor(compress, delta))
            left.append(delta - sent[k] if kind != "none" else 0 * delta)  # line 18
        local = left
        total = error + sum(sent) / K  # line 21
        back = by_tensor(compress, total)
        error = total - back  # line 22
        x = x - back  # line 25
    return history


def run(inline, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[list[dict[str, Any]], Any]:
    """What each round of the system begins with, in the paper's scale, and the batches."""
    history: list[dict[str, Any]] = [{"half": [None] * K, "local": [None] * K} for _ in range(ROUNDS)]
    batches: dict[tuple[int, int], Any] = {}

    def train(session):
        torch.manual_seed(5)
        model = nn.Linear(FEATURES, 1, dtype=dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
        session.prepare(model, optimizer)
        steps = settings.get("workers", {}).get("local_steps", 1)
        scheduler = StepLR(optimizer, EVERY * steps, FALL)
        for inputs, labels in session.batches(DATA, SIZE):
            now, state = history[session.version], inline.server.state
            if (session.version, session.rank) not in batches:
                now["x"], now["error"] = numbers(state.w), numbers(state.sender.residual)
                now["half"][session.rank] = numbers(nn.utils.parameters_to_vector(model.parameters()))
                now["local"][session.rank] = K * numbers(session._rounds.method.sender.residual)
            seen = batches.setdefault((session.version, session.rank), [])
            seen.append((numbers(inputs), numbers(labels)))
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(model(inputs.to(dtype))[:, 0], labels.to(dtype)).backward()
            optimizer.step()
            scheduler.step()

    settings = {**settings, "workers": {"count": K, **settings.get("workers", {})}}
    inline.train(train, rounds=ROUNDS, **settings)
    return history, batches


def numbers(tensor: torch.Tensor) -> Vector:
    return tensor.detach().double().numpy().copy()


def follows(history, expected, tolerance: float) -> None:
    for t, (ours, paper) in enumerate(zip(history, expected, strict=True)):
        for name in ("x", "error", "half", "local"):
            difference = np.abs(np.array(ours[name]) - np.array(paper[name])).max()
            assert difference <= tolerance, f"{name} in round {t} is off by {difference:.2e}"


# f32 of a third is not a third of f32, so there the weight before the residual shows in the last digit of float32
@pytest.mark.parametrize(("spec", "tolerance"), [("f32", 1e-6), ("topk:0.1", 1e-11), ("sign", 1e-11)])
@pytest.mark.parametrize(
    "feedback",
    [
        {"kind": "none"},
        {"kind": "ef"},
        {"kind": "saef"},
        {"kind": "saef", "average_every": 2, "average": "f64"},
        {"kind": "saef", "average_every": 2, "average": "topk:0.3"},
        {"kind": "saef", "average_every": 3, "average": "sign"},
    ],
    ids=str,
)
def test_the_system_follows_algorithm_1_of_the_paper(inline, feedback, spec, tolerance):
    history, batches = run(inline, feedback=feedback, uplink=spec, downlink=spec)
    expected = algorithm_1(
        history[0]["x"],
        batches,
        feedback["kind"],
        COMPRESSORS[spec],
        feedback.get("average_every"),
        COMPRESSORS[feedback.get("average", "f64")],
    )
    follows(history, expected, tolerance)


@pytest.mark.parametrize("spec", ["topk:0.1", "sign"])
def test_averaging_in_f32_is_line_7_exactly_for_a_float32_model(inline, spec):
    feedback = {"kind": "saef", "average_every": 2}  # f32 is the default
    history, batches = run(inline, dtype=torch.float32, feedback=feedback, uplink=spec, downlink=spec)
    follows(history, algorithm_1(history[0]["x"], batches, "saef", COMPRESSORS[spec], 2, exact), 1e-4)
    for t in range(ROUNDS):
        first, *others = history[t]["local"]
        same = all(np.allclose(first, other, rtol=0, atol=1e-6) for other in others)
        assert same == (t == 0 or (t + 1) % 2 == 0)


def test_several_local_steps_start_from_one_step_ahead(inline):
    settings = {"feedback": {"kind": "saef"}, "uplink": "topk:0.1", "downlink": "topk:0.1"}
    history, batches = run(inline, workers={"local_steps": 3}, **settings)
    assert {len(seen) for seen in batches.values()} == {3}
    follows(history, algorithm_1(history[0]["x"], batches, "saef", COMPRESSORS["topk:0.1"], None, exact), 1e-11)


def test_the_methods_are_told_apart_by_this_problem(inline):
    """Else the tests above would say little."""
    history, batches = run(inline, uplink="topk:0.1", downlink="topk:0.1")
    start, compress = history[0]["x"], COMPRESSORS["topk:0.1"]
    ends = [
        algorithm_1(start, batches, *method)[-1]["x"]
        for method in [
            ("none", compress, None, exact),
            ("ef", compress, None, exact),
            ("saef", compress, None, exact),
            ("saef", compress, 2, exact),
            ("saef", compress, 2, COMPRESSORS["topk:0.3"]),
            ("saef", compress, 3, exact),
            ("ef", exact, None, exact),
        ]
    ]
    for i, end in enumerate(ends):
        assert all(np.abs(end - other).max() > 1e-3 for other in ends[:i])


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_strength_scales_the_step_ahead(inline, strength):
    feedback = {"kind": "saef", "strength": strength}
    history, _ = run(inline, feedback=feedback, uplink="topk:0.1", downlink="topk:0.1")
    for now in history[1:]:
        for half, local in zip(now["half"], now["local"], strict=True):
            np.testing.assert_allclose(half, now["x"] - strength * local, rtol=0, atol=1e-13)
            assert np.abs(local).max() > 0


def test_step_ahead_of_strength_0_is_plain_error_feedback_bit_for_bit(inline):
    lossy = {"uplink": "topk:0.1", "downlink": "sign"}
    run(inline, feedback={"kind": "ef"}, **lossy)
    plain = inline.summary["fingerprint"]
    run(inline, feedback={"kind": "saef", "strength": 0.0}, **lossy)
    assert inline.summary["fingerprint"] == plain
    run(inline, feedback={"kind": "saef"}, **lossy)
    assert inline.summary["fingerprint"] != plain


def test_the_bytes_of_averaging_count(inline):
    lossy = {"uplink": "topk:0.1", "downlink": "topk:0.1"}
    lossy["metrics"] = {"port": None, "sketch_every": ROUNDS}  # sketches are as large as these updates
    run(inline, feedback={"kind": "saef"}, **lossy)
    without = inline.summary
    run(inline, feedback={"kind": "saef", "average_every": 2}, **lossy)
    for direction in ("uplink", "downlink"):
        assert inline.server.vitals.wire[direction, "average"] > (ROUNDS // 2) * K * 4 * FEATURES
        assert inline.summary[f"{direction}_bytes"] > without[f"{direction}_bytes"] * 1.5
