"""What the server concludes from sketches and energies: the SAEF paper's mismatch, and ratios that keep to a budget."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from protocol import Layout
from protocol.compression import Compression, count_of
from protocol.energies import Energy
from protocol.kernels.sketch import COLUMNS
from protocol.layout import Entry
from protocol.ledger import sketch
from protocol.settings import Budget, Schedule
from ps.steering import Steering, mismatch

# --- mismatch


def normal(numel, seed):
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paper(error, local, weights):
    """Equations (9) and (10), without ``L^2`` and ``4 sigma^2``; the paper's ``e_k`` is our ``e_k / a_k``."""
    theirs = {k: e / weights[k] for k, e in local.items()}
    mean = sum(weights[k] * e for k, e in theirs.items())
    nine = float((error + mean).norm())
    ten = sum(weights[k] * float((error + mean - e).norm() ** 2) for k, e in theirs.items()) ** 0.5
    return nine, ten


def measured(error, local, weights):
    found = mismatch(sketch(error), {k: sketch(e) for k, e in local.items()}, weights)
    return found.replica, found.ahead


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.6, 0.3, 0.1], [1.0]])
def test_the_mismatch_is_that_of_the_paper_where_sketches_are_exact(weights):
    weights = dict(enumerate(weights))
    error, local = normal(COLUMNS, 0), {k: a * (normal(COLUMNS, k + 1) + 0.5) for k, a in weights.items()}
    assert measured(error, local, weights) == pytest.approx(paper(error, local, weights), rel=1e-12)


def test_the_mismatch_of_a_round_is_of_those_who_took_part_in_it():
    weights = {0: 0.5, 1: 0.3, 2: 0.2}
    applied = {0: 0.5 / 0.7, 2: 0.2 / 0.7}  # with such weights the residuals of this round were made
    error, local = normal(COLUMNS, 0), {k: a * normal(COLUMNS, k + 1) for k, a in applied.items()}
    assert measured(error, local, weights) == pytest.approx(paper(error, local, applied), rel=1e-12)


def test_equal_residuals_have_no_mismatch_ahead_but_for_the_servers():
    e = normal(COLUMNS, 0)
    nine, ten = measured(0 * e, dict.fromkeys(range(4), e / 4), dict.fromkeys(range(4), 0.25))
    assert (nine, ten) == pytest.approx((float(e.norm()), 0.0), abs=1e-12)


def structured(kind, seed):
    """Vectors as residuals of layers are."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    if kind == "random":
        return draw(20_000)
    if kind == "constant":
        return torch.ones(5_000 + 1_000 * seed, dtype=torch.float64)
    if kind == "rank one":  # the gradient of a linear layer for one sample; inputs are activations
        return torch.outer(draw(100), draw(256).abs() + 0.1).reshape(-1)
    if kind == "periodic":
        return draw(128).repeat(150)
    if kind == "sparse":
        return draw(60_000) * (torch.rand(60_000, generator=random) < 0.1)
    return torch.cat([draw(9_000), torch.zeros(9_000, dtype=torch.float64), 0.01 * draw(9_000)])


def sigma(vector):
    """Of the norm of a sketch, relative: its variance over the signs is ``sum_c (s_c / s)^2 / 2``, see the ledger."""
    squares = np.zeros(COLUMNS)
    np.add.at(squares, np.arange(vector.numel()) % COLUMNS, vector.numpy() ** 2)
    return float(np.sqrt(np.sum((squares / squares.sum()) ** 2) / 2))


@pytest.mark.parametrize("kind", ["random", "constant", "rank one", "periodic", "sparse", "layers"])
def test_mismatch_is_known_to_the_error_of_a_sketch_whatever_the_residuals_look_like(kind):
    """None of 20 is off by more than 5 sigma, nor all by more than 1.5 sigma in root mean square; sigma is small."""
    off, weights = [], {0: 0.25, 1: 0.75}
    for seed in range(20):
        vector = structured(kind, seed)
        error, local = 0.3 * vector.roll(1), {0: 0.2 * vector, 1: -0.1 * vector.roll(7)}
        total = error + local[0] + local[1]
        one = max(sigma(total), *(sigma(total - e / weights[k]) for k, e in local.items()))
        assert one < 2.5 * (1 / (2 * COLUMNS)) ** 0.5  # that is 4.4 %, where all columns hold as much
        found, exact = measured(error, local, weights), paper(error, local, weights)
        off += [(a / b - 1) / one for a, b in zip(found, exact, strict=True)]
    assert np.abs(off).max() < 5
    assert np.sqrt(np.mean(np.square(off))) < 1.5


# --- ratios

HEAD = 9  # bytes of a body, whatever it holds


class Workers:
    """Two workers without feedback, whose updates are normal, with a scale for each layer; a value costs 5 bytes."""

    def __init__(self, sizes, scales, budget, spec="topk:0.05", schedule=None, **limits):
        self.layout = Layout(tuple(Entry(f"w{n}", (size,), "float32", "parameter") for n, size in enumerate(sizes)))
        schedule = schedule or Schedule()
        self.compression = Compression(self.layout, spec, {}, schedule)
        self.steering = Steering(self.layout, self.compression, schedule, Budget(bytes=budget, **limits))
        self.scales, self.random, self.ratios = scales, np.random.default_rng(0), []
        self.version = 0

    def round(self):
        """Bytes of a push, squared errors by layer, and counts; the ratios that follow are kept."""
        used = self.compression.at(self.version, self.ratios)
        sizes = [place.numel for place in self.layout.segments]
        counts = np.array([count_of(one, size) for one, size in zip(used, sizes, strict=True)])
        energies, bodies = [], [[HEAD + 5 * int(k) for k in counts]] * 2
        for _ in range(2):
            squares = [np.sort((s * self.random.normal(size=n)) ** 2) for n, s in zip(sizes, self.scales, strict=True)]
            energies.append([Energy(q.sum(), q[: q.size - k].sum()) for q, k in zip(squares, counts, strict=True)])
        whole = 40.0 + sum(bodies[0])
        found = self.steering.ratios(self.version, self.ratios, energies, bodies, whole)
        self.ratios = self.ratios if found is None else found
        self.version += 1
        errors = np.array([sum(each[n].left for each in energies) for n in range(len(sizes))])
        return SimpleNamespace(bytes=whole, errors=errors, counts=counts)

    def settle(self, rounds=25):
        return [self.round() for _ in range(rounds)][-1]


SIZES, SCALES = (6000, 6000, 2000, 10), (1.0, 0.1, 3.0, 1.0)


@pytest.mark.parametrize("budget", [400, 2000, 10_000, 40_000, 60_000])
def test_bytes_come_to_the_budget_whatever_it_is(budget):
    workers = Workers(SIZES, SCALES, budget)
    found = [workers.round().bytes for _ in range(20)][5:]
    assert found == pytest.approx([budget] * 15, rel=0.05)


@pytest.mark.parametrize("budget", [2000, 10_000, 40_000])
def test_the_errors_are_less_than_at_the_same_ratio_for_all_and_the_ratios_settle(budget):
    steered = Workers(SIZES, SCALES, budget)
    last = steered.settle()
    uniform = Workers(SIZES, SCALES, budget, f"topk:{(last.bytes - 40 - 4 * HEAD) / 5 / sum(SIZES)}").round()
    assert uniform.bytes == pytest.approx(last.bytes, rel=0.01)
    assert last.errors.sum() < 0.9 * uniform.errors.sum()
    ratios, before = np.array(steered.ratios), last.errors.sum()
    for _ in range(4):
        assert steered.round().errors.sum() == pytest.approx(before, rel=0.15)
        assert steered.ratios[:3] == pytest.approx(ratios[:3], rel=0.15)


def test_an_element_more_would_help_every_layer_as_much():
    last = Workers((8000, 8000, 8000), (1.0, 2.0, 4.0), 20_000).settle()
    assert last.errors / last.counts == pytest.approx([(last.errors / last.counts).mean()] * 3, rel=0.1)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_only_the_relations_of_the_errors_count(scale):
    workers = Workers(SIZES, tuple(scale * one for one in SCALES), 5000)
    workers.settle(10)
    same = Workers(SIZES, SCALES, 5000)
    same.settle(10)
    assert workers.ratios == pytest.approx(same.ratios, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_layer_without_any_gradient_costs_the_others_nothing(scale):
    """Its error is 0, so that its share goes to the least: that must not drown the relations of the others."""
    last = Workers((6000, 6000, 2000), (scale, 0.3 * scale, 0.0), 5000).settle()
    assert last.bytes == pytest.approx(5000, rel=0.05)
    assert last.counts[0] > 1.5 * last.counts[1] > 30
    assert last.counts[2] == 1


def test_a_layer_that_is_sent_whole_does_not_fall_back_to_the_least():
    """Its error is 0 for another reason, and would be large in the next round."""
    workers = Workers((5000, 5000), (1.0, 1e-3), 35_000)
    counts = np.array([workers.round().counts for _ in range(25)])[3:]
    assert counts[:, 0].min() > 4000
    assert counts[:, 1].min() > 50


@pytest.mark.parametrize("start", ["topk:1", "topk:0.0001"])
def test_it_does_not_matter_where_the_ratios_begin(start):
    found = Workers(SIZES, SCALES, 5000, start).settle(), Workers(SIZES, SCALES, 5000).settle()
    assert found[0].counts[:3] == pytest.approx(found[1].counts[:3], rel=0.1)


def test_no_ratio_leaves_its_bounds():
    low = Workers((6000, 6000), (1.0, 1e-4), 3000, smallest=0.03)
    assert low.settle().counts[1] == 180
    high = Workers((6000, 6000), (1.0, 1e-4), 30_000, largest=0.2)
    assert high.settle().counts.tolist() == [1200, 1200]
    for workers in (low, high):
        for _ in range(5):
            workers.round()
            assert all(ratio >= 0.03 for ratio in low.ratios)
            assert all(ratio <= 0.2 for ratio in high.ratios)


def test_a_budget_that_nothing_fits_into_leaves_the_least_and_one_that_is_too_large_sends_all():
    assert Workers(SIZES, SCALES, 1).settle().counts.tolist() == [1, 1, 1, 1]
    assert Workers(SIZES, SCALES, 10**7).settle().counts.tolist() == list(SIZES)


def test_without_any_error_nothing_divides_by_it():
    last = Workers(SIZES, (0.0,) * 4, 5000).settle()
    assert last.bytes == pytest.approx(5000, rel=0.05)
    assert last.counts[0] == pytest.approx(last.counts[1])


def test_layers_without_elements_or_without_a_ratio_are_left_alone():
    workers = Workers((0, 3000, 1), (1.0, 1.0, 1.0), 2000)
    workers.settle(5)
    assert workers.ratios[0] == 0.0
    assert workers.ratios[2] == 1.0
    assert all(type(ratio) is float and 0 <= ratio <= 1 for ratio in workers.ratios)


def test_there_is_nothing_to_say_before_compression_sets_in_or_without_energies():
    late = Workers(SIZES, SCALES, 5000, schedule=Schedule(start_round=3))
    for _ in range(3):
        late.round()
        assert late.ratios == []
    late.round()
    assert len(late.ratios) == 4
    assert late.steering.ratios(9, [], [], [], 0.0) is None
    assert (
        Workers(SIZES, SCALES, 5000, "sign").steering.ratios(0, [], [[Energy(1.0, 1.0)] * 4], [[9] * 4], 40.0) is None
    )
