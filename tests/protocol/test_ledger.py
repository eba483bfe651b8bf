"""The sketch is linear, sees every element, and keeps norms; the ledger notices what is missing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.forms import Rounding
from protocol.ledger import COLUMNS, Ledger, sketch, sketch_update
from protocol.segment import exact
from protocol.update import Update
from protocol.values.decoded import Narrowed

laws = settings(deadline=None, max_examples=100)
offsets = st.integers(0, 3 * COLUMNS) | st.integers(0, 2**40)
sizes = st.integers(0, 3 * COLUMNS)
seeds = st.integers(0, 2**32)


def whole_numbers(seed, numel, dtype=torch.float64):
    """Small enough that every sum of them is exact."""
    return torch.randint(-1000, 1000, (numel,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def coded(values):
    return Narrowed(values.view(np.uint8), exact(values.dtype), values.dtype)


@laws
@given(sizes, offsets, seeds, st.integers(-5, 5), st.integers(-5, 5))
def test_a_sketch_is_linear(numel, start, seed, a, b):
    x, y = whole_numbers(seed, numel), whole_numbers(seed + 1, numel)
    assert np.array_equal(sketch(a * x + b * y, start), a * sketch(x, start) + b * sketch(y, start))


@laws
@given(sizes, sizes, offsets, seeds)
def test_the_sketches_of_two_parts_add_up_to_that_of_the_whole(first, second, start, seed):
    whole = whole_numbers(seed, first + second)
    parts = sketch(whole[:first], start) + sketch(whole[first:], start + first)
    assert np.array_equal(sketch(whole, start), parts)


@laws
@given(sizes, offsets, seeds, st.sampled_from([torch.float32, torch.float64]), st.floats(0, 1))
def test_a_sparse_update_has_the_sketch_of_its_dense_form(numel, start, seed, dtype, density):
    values = whole_numbers(seed, numel, dtype)
    chosen = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < density
    sparse = Update(numel, chosen.nonzero()[:, 0].numpy(), coded(values[chosen].numpy()))
    dense = Update(numel, None, coded(torch.where(chosen, values, 0).numpy()))
    assert np.array_equal(sketch_update(sparse, start), sketch_update(dense, start))
    assert np.array_equal(sketch_update(sparse, start), sketch(sparse.dense(), start))


def test_every_single_element_is_seen():
    numel = 3 * COLUMNS + 5
    for place in range(numel):
        vector = torch.zeros(numel)
        vector[place] = -1.5
        (column,) = np.flatnonzero(sketch(vector))
        assert column == place % COLUMNS
        assert abs(sketch(vector)[column]) == 1.5


def test_sums_are_in_float64():
    vector = torch.full((COLUMNS * 50,), 1 + 2.0**-23)
    found = np.abs(sketch(vector)) / (1 + 2.0**-23)
    assert np.array_equal(found, np.round(found))  # a whole number of them, without any rounding


@pytest.mark.parametrize("scale", ["equal", "heavy"])
def test_the_expected_square_of_a_sketch_is_the_square_of_the_vector(scale):
    draws, numel = 400, 40 * COLUMNS + 77
    random = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(draws):
        vector = torch.randn(numel, generator=random, dtype=torch.float64)
        if scale == "heavy":
            vector **= 3
        ratios.append(np.sum(sketch(vector) ** 2) / float(vector @ vector))
    # the variance of one ratio is 2 / COLUMNS, or a little more for heavy tails
    assert abs(np.mean(ratios) - 1) < 5 * (2.2 / COLUMNS / draws) ** 0.5
    assert np.std(ratios) < 2 * (2 / COLUMNS) ** 0.5


def test_it_is_so_for_one_fixed_vector_too_over_the_signs_of_many_offsets():
    """Even a constant one: no two elements that share a column have the same signs as two of another column."""
    rows, draws = 16, 1000
    ones = torch.ones(rows * COLUMNS, dtype=torch.float64)
    ratios = [np.sum(sketch(ones, n * rows * COLUMNS) ** 2) / ones.numel() for n in range(draws)]
    assert abs(np.mean(ratios) - 1) < 5 * (2 / COLUMNS / draws) ** 0.5
    assert np.std(ratios) < 1.2 * (2 / COLUMNS) ** 0.5


def test_an_empty_ledger_balances():
    assert Ledger().error(sketch(torch.zeros(5))) == 0.0


def test_the_error_is_the_imbalance_in_units_of_rounding():
    ledger = Ledger()
    given_, sent, dropped = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 4.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    ledger.enter(sketch(given_), sketch(sent), sketch(dropped), 5.0)
    assert ledger.error(sketch(torch.tensor([2.0, 0.0, 0.0]))) == 0.0
    assert ledger.error(sketch(torch.tensor([2.0, 0.0, 0.5]))) == pytest.approx(0.5 / (2.0**-24 * 5))
    ledger.enter(sketch(torch.zeros(3)), sketch(torch.zeros(3)), None, 15.0)
    assert ledger.error(sketch(torch.tensor([2.0, 0.0, 0.5]))) == pytest.approx(0.5 / (2.0**-24 * 20))


def test_what_is_rounded_off_is_not_missing_but_must_be_noise():
    ledger, nothing = Ledger(), sketch(torch.zeros(3))
    ledger.enter(sketch(torch.tensor([3.0, 4.0, 0.0])), nothing, None, 5.0, Rounding(sketch(torch.ones(3)), 2.0))
    assert ledger.error(sketch(torch.tensor([2.0, 3.0, -1.0]))) == pytest.approx((3 / 2) ** 0.5)
    assert ledger.error(sketch(torch.tensor([2.0, 3.0, -0.5]))) == pytest.approx(0.5 / (2.0**-24 * 5))
    for _ in range(99):  # always the same: no noise
        ledger.enter(sketch(torch.ones(3)), nothing, None, 5.0, Rounding(sketch(torch.ones(3)), 2.0))
    assert ledger.error(sketch(torch.tensor([2.0, 3.0, -1.0]))) == pytest.approx(10 * (3 / 2) ** 0.5)
