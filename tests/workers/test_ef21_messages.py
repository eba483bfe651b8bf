"""What one worker sends by ``ef21`` and ``ef21_plus``: the nearer of two, and nothing where there is no gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

EF21, PLUS = {"kind": "ef21"}, {"kind": "ef21_plus"}


def test_each_segment_sends_whichever_is_nearer(lone):
    one, random, taken = lone(PLUS, "topk:0.2"), torch.Generator().manual_seed(0), []

    def topk(v):
        places = np.argsort(-np.abs(v), kind="stable")[: round(0.2 * v.size)]
        return np.where(np.isin(np.arange(v.size), places), v, 0.0)

    base = torch.randn(47, generator=random, dtype=torch.float64)
    for t in range(60):
        base = base if t % 4 else torch.randn(47, generator=random, dtype=torch.float64) ** 3
        given = base + 0.3 * torch.randn(47, generator=random, dtype=torch.float64)
        g, grad = -one.sender.residual.numpy().copy(), given.numpy()
        message = one.stage(given)
        one.round(given)
        for number, span in enumerate(one.spans):
            plain, markov = topk(grad[span]), g[span] + topk(grad[span] - g[span])
            distances = [np.sum((candidate - grad[span]) ** 2) for candidate in (plain, markov)]
            replaced = number in message.replaced
            assert replaced == (distances[0] <= distances[1]) or distances[0] == pytest.approx(distances[1])
            assert -one.sender.residual.numpy()[span] == pytest.approx(plain if replaced else markov, abs=1e-13)
            taken.append(replaced)
        left = sum(float((given[s] + one.sender.residual[s]).norm() ** 2) for s in one.spans)
        assert message.norms.left == pytest.approx(left)
    assert 0.1 < np.mean(taken) < 0.9


# --- rounds without a gradient


@pytest.mark.parametrize("feedback", [EF21, PLUS], ids=str)
def test_a_skipped_step_leaves_the_estimate_and_sends_nothing_of_it(lone, feedback):
    one = lone(feedback, "topk:0.2", dtype="float32")
    for t in range(6):
        one.round(torch.randn(47, generator=torch.Generator().manual_seed(t)))
    before = one.sender.residual.clone()
    message = one.stage(torch.randn(47), skipped=True)
    assert sum(body.size for body in message.bodies) < 10
    assert not one.round(torch.randn(47), skipped=True).any()
    assert torch.equal(one.sender.residual, before)


def test_the_first_estimate_is_full_even_if_the_first_step_is_skipped(lone):
    one = lone({**EF21, "initial": "full"}, "topk:0.1", dtype="float32")
    given = torch.randn(47, generator=torch.Generator().manual_seed(0))
    one.round(0 * given, skipped=True)
    one.stage(given)
    one.method.refuse()
    assert torch.equal(one.round(given), given)
    assert (one.round(2 * given) != 0).sum() < 8


def test_estimates_of_gradients_that_hardly_change_do_not_look_like_an_imbalance(lone):
    """What is sent is then far smaller than the estimate, whose rounding the ledger sees."""
    one, always = lone(EF21, "int8", dtype="float32"), torch.randn(47, generator=torch.Generator().manual_seed(0))
    for t in range(200):
        one.round(always + 1e-6 * torch.randn(47, generator=torch.Generator().manual_seed(t)))
    assert one.sender.conservation_error() < 1.5
