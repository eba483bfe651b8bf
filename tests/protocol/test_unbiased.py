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
KEYS = 1500
SIGMAS = 5.0

random = np.random.default_rng(1)
VECTORS = {
    "heavy tail": random.normal(size=N) ** 3,
    "spike": np.where(np.arange(N) == 7, 1.0, 1e-3 * random.normal(size=N)),
    "flat": random.choice([-1.0, 1.0], N) * 0.7,
    "octaves": 2.0 ** -random.uniform(0, 20, N),
    "sparse": np.where(np.arange(N) % 3 == 0, random.normal(size=N), 0.0),
}

every_unbiased = pytest.mark.parametrize("spec", UNBIASED)
every_vector = pytest.mark.parametrize("name", VECTORS)


@cache
def samples(spec, name, kept):
    """The vector, what was sent of it with each key, shape ``(KEYS, N)``, and what was left of it."""
    vector = torch.from_numpy(VECTORS[name].astype(np.float32))
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


@every_vector
@every_unbiased
def test_the_expectation_is_the_vector(spec, name):
    vector, sent, _ = samples(spec, name, kept=False)
    near = SIGMAS * standard_error(sent) + 1e-6 * np.abs(vector) + 1e-12
    seen = (sent != 0).sum(axis=0) >= 25  # fewer, and no error is normal
    assert np.all(np.abs(sent.mean(axis=0) - vector)[seen] <= near[seen])
    along = sent @ vector  # all coordinates together
    assert abs(along.mean() - vector @ vector) <= SIGMAS * standard_error(along) + 1e-6 * (vector @ vector)


@every_vector
@every_unbiased
def test_coordinates_err_independently_of_their_size(spec, name):
    """The squares of the errors of the means, in units of their variance, are one on average."""
    vector, sent, _ = samples(spec, name, kept=False)
    error = standard_error(sent)
    seen = ((sent != 0).sum(axis=0) >= 25) & (error > 1e-6 * np.abs(vector))
    if seen.sum() >= 10:
        scores = ((sent.mean(axis=0) - vector)[seen] / error[seen]) ** 2
        assert 0.1 < scores.mean() < 1 + SIGMAS * math.sqrt(2 / seen.sum()) + (3 if "randk" in spec else 0)


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
    vector, sent, _ = samples(spec, "heavy tail", kept=False)
    _, scaled, _ = samples(spec, "heavy tail", kept=True)
    assert np.array_equal(sent != 0, scaled != 0)
    factors = scaled[sent != 0] / sent[sent != 0]
    assert np.allclose(factors, factors[0], rtol=1e-6)
    assert compressor(spec).delta(N) * (1 - 1e-6) <= factors[0] <= 1
    assert vector.any()


def test_random_selection_has_exactly_the_variance_that_it_declares():
    for spec in ("randk:0.25", "randk:0.5"):
        vector, _, wrong = samples(spec, "heavy tail", kept=False)
        squares = (wrong**2).sum(axis=1)
        assert abs(squares.mean() - compressor(spec).omega(N) * (vector @ vector)) <= SIGMAS * standard_error(squares)


@every_unbiased
def test_without_a_residual_the_vector_stays_as_it_is(spec):
    vector = torch.from_numpy(VECTORS["heavy tail"])
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
    assert compressor("ternary").omega(100) == pytest.approx(9)
    assert compressor("none").omega(5) == 0
    both = compressor("randk:0.5+natural").omega(100)
    assert 1 + both == pytest.approx(2 * (1 + 1 / 8))
