"""Random compressors over many keys: unbiased where they say so, of the declared variance, contracting in expectation.

Means are compared with what they should be in units of their standard error. Keys are fixed, so that a
test passes for ever or fails for ever.
"""

import math
from functools import cache

import numpy as np
import pytest
import torch

from protocol import compressor, decode

UNBIASED = (
    *("randk:0.25", "randk:0.25+f64", "randk:0.01", "randk:1", "ternary", "natural"),
    *("qsgd:1", "qsgd:4", "qsgd:4,bucket=8", "qsgd:127,bucket=5"),
    *("randk:0.25+ternary", "randk:0.25+natural", "randk:0.5+qsgd:4,bucket=3", "ternary+entropy", "randk:0.25+entropy"),
)
BIASED = (
    *("topk:0.25+ternary", "topk:0.25+natural", "blocktopk:0.25,block=8+qsgd:4,bucket=4", "threshold:0.5+natural"),
    *("randk:0.25+int4", "randk:0.25+int8", "randk:0.25+sign", "randk:0.25+f16", "lowrank:1", "lowrank:2+bf16"),
)
SHAPE = (6, 5)
N = math.prod(SHAPE)
KEYS = 300
SIGMAS = 5.0
SEEN = 16  # samples in which a coordinate is not what it mostly is; with fewer, no error of its mean is normal

random = np.random.default_rng(1)
VECTORS = {
    "moderate": random.uniform(0.3, 1.0, N) * random.choice([-1.0, 0.0, 1.0], N, p=[0.45, 0.1, 0.45]),
    "twenty octaves": 2.0 ** -random.uniform(0, 20, N),
}

PEAK = {"peak": np.where(np.arange(N) == 0, 1.0, 1 / (1 + math.sqrt(N)))}  # what ternary likes least

every_unbiased = pytest.mark.parametrize("spec", UNBIASED)
every_vector = pytest.mark.parametrize("name", VECTORS)


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def samples(spec, name, kept):
    """The vector, what was sent of it with each key, shape ``(KEYS, N)``, and what was left of it."""
    vector = torch.from_numpy((VECTORS | PEAK)[name].astype(np.float32))
    c, sent, left = compressor(spec, SHAPE), np.empty((KEYS, N)), np.empty((KEYS, N))
    for key in range(KEYS):
        out = torch.empty_like(vector) if kept else None
        payload, _ = c.encode(vector, c.init(N), key, None, out)
        sent[key] = decode(payload, N).numpy()
        left[key] = out.numpy() if kept else vector.double().numpy() - sent[key]
    return vector.double().numpy(), sent, left


def standard_error(values):
    return values.std(axis=0, ddof=1) / math.sqrt(KEYS)


def mean_at_most(values, bound):
    """The mean of samples is at most the bound, as far as so many can tell."""
    return values.mean() <= bound * (1 + 1e-6) + SIGMAS * standard_error(values)


@every_unbiased
def test_the_expectation_is_the_vector(spec):
    vector, sent, _ = samples(spec, "moderate", kept=False)
    wrong, error = sent.mean(axis=0) - vector, standard_error(sent)
    seen = (sent != np.median(sent, axis=0)).sum(axis=0) >= SEEN
    assert seen.sum() >= (0 if spec in ("randk:1", "randk:0.01") else 15)
    assert np.all(np.abs(wrong)[seen] <= SIGMAS * error[seen])
    assert np.square(wrong[seen] / error[seen]).sum() <= seen.sum() + SIGMAS * math.sqrt(2 * seen.sum())
    assert not sent[:, vector == 0].any()
    assert spec != "randk:1" or np.array_equal(sent[0], vector)
    for direction in (vector, np.sign(vector), np.arange(N)):  # coordinates together
        along = sent @ direction
        assert abs(along.mean() - vector @ direction) <= SIGMAS * standard_error(along) + 1e-5


@every_vector
@every_unbiased
def test_the_variance_is_at_most_the_declared_omega(spec, name):
    omega = compressor(spec).omega(N)
    vector, _, wrong = samples(spec, name, kept=False)
    assert mean_at_most((wrong**2).sum(axis=1), omega * (vector @ vector))


@every_vector
@every_unbiased
def test_with_error_feedback_it_is_scaled_down_to_a_contraction(spec, name):
    c = compressor(spec)
    assert c.delta(N) == pytest.approx(1 / (1 + c.omega(N)), rel=1e-6)
    vector, _, left = samples(spec, name, kept=True)
    assert mean_at_most((left**2).sum(axis=1), (1 - c.delta(N)) * (vector @ vector))


@every_vector
@pytest.mark.parametrize("spec", BIASED)
def test_a_biased_random_compressor_contracts_in_expectation(spec, name):
    c = compressor(spec, SHAPE)
    assert c.omega(N) is None
    vector, _, left = samples(spec, name, kept=True)
    assert mean_at_most((left**2).sum(axis=1), (1 - c.delta(N)) * (vector @ vector))


@pytest.mark.parametrize("spec", ["randk:0.25", "randk:0.01", "natural", "ternary", "qsgd:4"])
def test_the_same_key_gives_the_same_up_to_that_scale(spec):
    vector, sent, _ = samples(spec, "moderate", kept=False)
    _, scaled, _ = samples(spec, "moderate", kept=True)
    assert np.array_equal(sent != 0, scaled != 0)
    factors = scaled[sent != 0] / sent[sent != 0]
    assert np.allclose(factors, factors[0], rtol=1e-6)
    assert compressor(spec).delta(N) * (1 - 1e-6) <= factors[0] <= 1
    assert vector.any()


@pytest.mark.parametrize(("spec", "name"), [("randk:0.25", "moderate"), ("randk:0.5", "moderate"), ("ternary", "peak")])
def test_in_the_worst_case_the_variance_is_the_declared_one(spec, name):
    vector, _, wrong = samples(spec, name, kept=False)
    squares, declared = (wrong**2).sum(axis=1), compressor(spec).omega(N) * (vector @ vector)
    assert abs(squares.mean() - declared) <= SIGMAS * standard_error(squares) + 1e-6 * declared


@every_unbiased
def test_without_a_residual_the_vector_stays_as_it_is(spec):
    vector = torch.from_numpy(VECTORS["moderate"])
    before = vector.clone()
    compressor(spec).encode(vector, (), 3)
    assert torch.equal(vector, before)


@pytest.mark.parametrize(
    "spec", ["topk:0.5+natural", "int4", "sign", "bf16", "blocktopk:0.5", "threshold:1", "randk:0.5+int4"]
)
def test_what_is_biased_declares_no_variance(spec):
    assert compressor(spec).omega(N) is None


def test_declared_variances_are_those_of_the_papers():
    assert compressor("natural").omega(10**6) == 1 / 8
    assert compressor("randk:0.01").omega(1000) == pytest.approx(99)
    assert compressor("qsgd:4,bucket=16").omega(1000) == pytest.approx(1.0)  # min(16 / 4**2, sqrt(16) / 4)
    assert compressor("qsgd:16,bucket=64").omega(1000) == pytest.approx(0.25)  # 64 / 16**2
    assert compressor("qsgd:4").omega(512 * 9) == pytest.approx(math.sqrt(512) / 4)
    assert compressor("ternary").omega(100) == pytest.approx(4.5)  # (sqrt(100) - 1) / 2
    assert compressor("none").omega(5) == 0
    both = compressor("randk:0.5+natural").omega(100)
    assert 1 + both == pytest.approx(2 * (1 + 1 / 8))


HARD = {
    "one spike": [1.0] + [0.0] * 99,
    "a spike over a plain": [100.0] + [1.0] * 99,
    "a spike over denormal numbers": [2.0**-126] + [2.0**-149] * 99,
    "forty octaves": [2.0**-i * (-1) ** i for i in range(40)],
    "just below a power of two": [2.0 - 2.0**-20] * 100,
    "just above a power of two": [-1.0 - 2.0**-20] * 100,
    "one and a half": [1.5] * 100,
    "large": [1e30, -3e30, 2.9e30, 1e29],
    "two sizes": [1e-3] * 50 + [1.0] * 50,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", ["natural", "ternary", "qsgd:1", "qsgd:4", "qsgd:127", "qsgd:2,bucket=7", "randk:0.3"])
@pytest.mark.parametrize("name", HARD)
def test_on_hard_vectors_random_codes_contract_in_the_mean_and_stay_unbiased_within_omega(name, spec, dtype):
    c, vector = compressor(spec), torch.tensor(HARD[name], dtype=dtype)
    scale = 2.0**100 if vector.abs().max() < 1e-30 else 1.0  # squares must not underflow
    numel, wide, keys = len(vector), vector.double() * scale, range(300)
    whole, left = wide.square().sum(), torch.empty_like(vector)
    kept, missed = [], []
    for key in keys:
        c.encode(vector, (), key, residual_out=left)
        kept.append(float((left.double() * scale).square().sum() / whole))
        received = decode(c.encode(vector, (), key)[0], numel).double() * scale
        missed.append(float((received - wide).square().sum() / whole))
    for found, bound in ((torch.tensor(kept), 1 - c.delta(numel)), (torch.tensor(missed), c.omega(numel))):
        tolerance = 5 * float(found.std()) / len(keys) ** 0.5 + 1e-6
        assert float(found.mean()) <= bound + tolerance
