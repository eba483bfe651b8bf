"""What each compressor is made for comes back exactly; and its worst case loses what was declared, not much less."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from protocol import compressor, decode

DTYPES = (torch.float32, torch.float64)
LOSSLESS = ("none", "f64", "f32")
N = 200

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float64"))


pytestmark = pytest.mark.usefixtures("one_thread")


def random(seed=0):
    return np.random.default_rng(seed)


def encode(spec, vector, key=7, kept=True):
    """What is sent, and what is left if it is kept."""
    c, left = compressor(spec, tuple(vector.shape)), torch.full_like(vector.view(-1), torch.nan) if kept else None
    payload, _ = c.encode(vector.view(-1), c.init(vector.numel()), key, None, left)
    return decode(payload, vector.numel()).view(vector.shape), left


def exact(spec, vector):
    """Everything was sent and nothing is left."""
    sent, left = encode(spec, vector)
    assert torch.equal(sent, vector)
    assert not left.any()


def lost(spec, vector):
    """The share of the square that is left."""
    _, left = encode(spec, vector)
    return float(left.square().sum() / vector.square().sum())


def as_tensor(values, dtype=torch.float64):
    return torch.from_numpy(np.asarray(values, np.float64)).to(dtype)


# --- selections


@every_dtype
@pytest.mark.parametrize("values", LOSSLESS)
@pytest.mark.parametrize("ending", ["", "+entropy"])
def test_a_sparse_vector_is_sent_exactly_by_a_selection_of_as_many(values, ending, dtype):
    for places in ([], [0], [N - 1], [3, 70, 71, 199], range(0, N, 10)):
        vector = torch.zeros(N, dtype=dtype)
        vector[list(places)] = as_tensor(random().normal(size=len(places)), torch.float32).to(dtype)
        exact(f"topk:0.1+{values}{ending}", vector)
        exact(f"threshold:1e-30+{values}{ending}", vector)
        exact(f"blocktopk:0.1,block=10+{values}{ending}", torch.where(torch.arange(N) % 10 == 4, vector + 1, 0))


@every_dtype
@pytest.mark.parametrize("spec", ["none", "topk:1", "blocktopk:1,block=7", "randk:1", "none+entropy", "topk:1+entropy"])
def test_a_selection_of_everything_is_exact(spec, dtype):
    exact(spec, as_tensor(random().normal(size=N), dtype))


# --- value codes


@every_dtype
@pytest.mark.parametrize("magnitude", [0.7123, 2.0**-140, 1e-30, 1e30])
@pytest.mark.parametrize("values", ["sign", "int2", "int4", "int8", "sign+entropy", "int4+entropy"])
def test_values_of_one_magnitude_are_sent_exactly(values, magnitude, dtype):
    signs = random().choice([-1.0, 1.0], N)
    exact(values, as_tensor(magnitude * signs, torch.float32).to(dtype))
    exact(f"topk:1e-9+{values}", as_tensor(np.where(np.arange(N) == 5, magnitude, 0), torch.float32).to(dtype))
    for selection in ("topk:0.1", "blocktopk:0.1,block=16", "randk:0.1"):
        vector = as_tensor(magnitude * signs, torch.float32).to(dtype)
        sent, left = encode(f"{selection}+{values}", vector)
        chosen = sent != 0
        assert int(chosen.sum()) == compressor(selection).selection.count(N)
        assert torch.equal(sent[chosen], vector[chosen])
        assert not left[chosen].any()


@every_dtype
@pytest.mark.parametrize(("values", "levels"), [("int2", 2), ("int4", 8)])
def test_as_many_magnitudes_as_there_are_levels_are_sent_exactly(values, levels, dtype):
    magnitudes = np.array([1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5])[-levels:]
    exact(values, as_tensor(random().choice([-1, 1], N) * random(1).choice(magnitudes, N), dtype))


@every_dtype
def test_powers_of_two_are_sent_exactly_by_natural(dtype):
    vector = as_tensor(random().choice([-1.0, 1.0], N) * 2.0 ** random().integers(-60, 60, N), dtype)
    sent, _ = encode("natural", vector, kept=False)
    assert torch.equal(sent, vector)
    scaled, left = encode("natural", vector)
    assert torch.allclose(scaled, vector * 8 / 9, rtol=1e-6)
    assert torch.allclose(left, vector / 9, rtol=1e-5)


@every_dtype
@pytest.mark.parametrize("values", ["ternary", "randk:0.3+ternary", "topk:0.3+ternary+entropy"])
def test_values_of_one_magnitude_are_sent_by_ternary_to_rounding(values, dtype):
    vector = as_tensor(0.7123 * random().choice([-1.0, 1.0], N), dtype)
    sent, _ = encode(values, vector)
    assert torch.allclose(sent, torch.where(sent != 0, vector, 0), rtol=1e-6, atol=0)
    assert int((sent != 0).sum()) == compressor(values).selection.count(N)


@every_dtype
@pytest.mark.parametrize("levels", [1, 4, 100])
def test_one_value_a_bucket_is_sent_exactly_by_qsgd(levels, dtype):
    vector = as_tensor(np.where(np.arange(N) % 16 == 3, random().normal(size=N), 0.0), dtype)
    sent, left = encode(f"qsgd:{levels},bucket=16", vector)
    assert torch.allclose(sent, vector, rtol=1e-6)
    assert left.abs().max() <= 1e-6 * vector.abs().max()


@every_dtype
@pytest.mark.parametrize(("values", "bits"), [("f16", 11), ("bf16", 8), ("f32", 24)])
def test_numbers_of_a_format_are_sent_exactly_in_it(values, bits, dtype):
    vector = as_tensor(random().integers(-(2 ** (bits - 1)), 2 ** (bits - 1), N) * 2.0**-9, dtype)
    exact(values, vector)
    exact(f"topk:0.999+{values}+entropy", torch.where(torch.arange(N) % 3 == 0, vector, 0))


VALUES = (*LOSSLESS, "f16", "bf16", "int8", "int4", "int2", "sign", "ternary", "qsgd:4", "qsgd:1")
SELECTIONS = ("", "topk:1e-9+", "blocktopk:0.5,block=3+", "randk:0.01+", "threshold:1e-9+", "lowrank:3+")


@pytest.mark.parametrize("spec", [s + v for s in SELECTIONS for v in VALUES if s != "lowrank:3+" or v in LOSSLESS])
def test_one_element_is_sent_exactly(spec):
    for dtype in DTYPES:
        for value in (1.0, -0.75, 2.0**-12, -1024.0):
            exact(spec, torch.tensor([value], dtype=dtype))


# --- low rank


def of_rank(rank, rows, columns, dtype, seed=0):
    return as_tensor(random(seed).normal(size=(rows, rank)) @ random(seed + 1).normal(size=(rank, columns)), dtype)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 5e-6), (torch.float64, 5e-14)])
@pytest.mark.parametrize("spec", ["lowrank:3", "lowrank:3+none", "lowrank:3+f64+entropy"])
@pytest.mark.parametrize(("rank", "scale"), [(1, 1.0), (2, 1e-30), (3, 1e30), (3, 1.0)])
def test_matrices_of_low_rank_are_sent_almost_exactly_one_after_the_other(spec, rank, scale, dtype, error):
    """A batch of one shape, as PowerSGD's: each is its own, whatever the others and the state are."""
    c, state = compressor(spec, (31, 20)), ()
    for seed in range(6):
        matrix = (of_rank(rank, 31, 20, dtype, 10 * seed) * scale * 10**seed).view(-1)
        payload, state = c.encode(matrix, state, seed, None, torch.empty_like(matrix))
        wrong = (decode(payload, matrix.numel()) - matrix) / (scale * 10**seed)
        assert float(wrong.norm() / (matrix / (scale * 10**seed)).norm()) <= error


@pytest.mark.parametrize(("values", "error"), [("f32", 1e-6), ("f16", 2.0**-10), ("bf16", 2.0**-7)])
def test_a_narrow_format_costs_a_matrix_of_low_rank_its_rounding(values, error):
    matrix = of_rank(2, 31, 20, torch.float64)
    assert math.sqrt(lost(f"lowrank:2+{values}", matrix)) <= error


def test_a_tensor_of_more_dimensions_is_a_matrix_of_its_first():
    kernel = of_rank(2, 16, 27, torch.float64).view(16, 3, 3, 3)
    assert lost("lowrank:2", kernel) <= 1e-28


@pytest.mark.parametrize("shape", [(), (40,), (1, 40), (40, 1), (3, 5)])
def test_what_is_no_matrix_or_too_small_is_sent_as_it_is(shape):
    exact("lowrank:2", as_tensor(random().normal(size=shape)).view(shape))


def slowly_decaying():
    """Singular values 0.9**i: a random subspace holds little of it, a power iteration finds the rest in a few steps."""
    left, right = (np.linalg.qr(random(s).normal(size=(n, 30)))[0] for s, n in ((1, 40), (2, 30)))
    return as_tensor(left * 0.9 ** np.arange(30) @ right.T), float(np.sum(0.9 ** (2 * np.arange(4, 30))))


def test_a_warm_start_approaches_the_best_approximation():
    matrix, best = slowly_decaying()
    c, state, errors = compressor("lowrank:4", (40, 30)), (), []
    for key in range(40):
        left = torch.empty(1200, dtype=torch.float64)
        _, state = c.encode(matrix.view(-1), state, key, None, left)
        errors.append(float(left.square().sum()))
    assert errors[0] > 1.05 * best
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert best * (1 - 1e-9) <= errors[-1] <= 1.001 * best


def test_without_its_state_it_does_not():
    matrix, best = slowly_decaying()
    errors = [lost_by_key("lowrank:4", matrix, key) for key in range(20)]
    assert min(errors) > 1.03 * best


def lost_by_key(spec, matrix, key):
    _, left = encode(spec, matrix, key)
    return float(left.square().sum())


def test_a_state_that_suits_the_matrix_worse_than_chance_is_not_taken():
    """Without that, a matrix at right angles to the last one would never be sent."""
    c = compressor("lowrank:1", (16, 16))
    first, second = torch.zeros(16, 16), torch.zeros(16, 16)
    first[:8, :8], second[8:, 8:] = 1.0, 1.0
    _, state = c.encode(first.view(-1), (), 1, None, torch.empty(256))
    left = torch.empty(256)
    c.encode(second.view(-1), state, 2, None, left)
    assert float(left.norm()) <= 1e-5 * float(second.norm())


# --- the worst cases


def test_the_worst_cases_lose_nearly_the_share_that_is_declared():
    """So that no greater delta could be declared."""
    spike = torch.zeros(N, dtype=torch.float64)
    spike[5] = -3.0
    halves = {"f16": 1 + 2.0**-11 * 0.999, "bf16": 1 + 2.0**-8 * 0.999, "f32": 1 + 2.0**-24 * 0.999}
    ones = torch.ones(N, dtype=torch.float64)
    worst = {
        "sign": spike,
        "topk:0.1": ones,
        "blocktopk:0.1,block=20": ones,
        **{s: h * ones for s, h in halves.items()},
    }
    for spec, vector in worst.items():
        assert lost(spec, vector) == pytest.approx(1 - compressor(spec).delta(N), rel=0.02), spec
