"""Data of one's own: how it is divided among workers, and which of it a worker sees when."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Subset, TensorDataset

from protocol.errors import RunFailed, SettingsError
from workers.batches import Samples, seed_of
from workers.partition import by_label, contiguous, dirichlet

SEEDS = st.integers(0, 2**32)
ALPHAS = st.sampled_from([1e-320, 1e-9, 0.01, 0.3, 1.0, 50.0, 1e9, 1e308])
SHARDS = "valid is a whole number from 1 to 2, the samples a worker"
DIGITS = np.repeat(np.arange(10), 60)


@st.composite
def divisions(draw):
    """Labels, and a number of workers for which there are enough."""
    labels = draw(st.lists(st.sampled_from([-7, 0, 3, 4, 10**9]), min_size=1, max_size=80))
    return labels, draw(st.integers(1, len(labels)))


def covers(parts, n, workers):
    """The law of all: int64, ascending, never empty, disjoint, and together everything."""
    assert len(parts) == workers
    assert all(part.dtype == np.int64 and part.ndim == 1 and part.size > 0 for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))


def same(parts, others):
    return all(np.array_equal(one, other) for one, other in zip(parts, others, strict=True))


def mixes(labels, parts):
    """The shares of the labels in every part: shape (workers, labels)."""
    return np.array([np.bincount(labels[part], minlength=10) / len(part) for part in parts])


# --- partitions


@given(divisions(), ALPHAS, SEEDS)
@settings(max_examples=150, deadline=None)
def test_dirichlet_gives_every_sample_to_one_worker_and_equal_parts_to_all(division, alpha, seed):
    labels, workers = division
    parts = dirichlet(labels, workers, alpha, seed)
    covers(parts, len(labels), workers)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert same(parts, dirichlet(np.array(labels), workers, alpha, seed))
    assert same(parts, dirichlet(torch.tensor(labels), workers, alpha, seed))


@given(divisions(), st.data(), SEEDS)
@settings(max_examples=150, deadline=None)
def test_shards_give_every_sample_to_one_worker_and_few_labels_to_each(division, data, seed):
    labels, workers = division
    shards = data.draw(st.integers(1, len(labels) // workers))
    parts = by_label(labels, workers, shards, seed)
    covers(parts, len(labels), workers)
    assert max(map(len, parts)) - min(map(len, parts)) <= shards
    assert same(parts, by_label(torch.tensor(labels), workers, shards, seed))
    if min(Counter(labels).values()) > len(labels) / (workers * shards):  # no shard spans three labels
        assert max(len({labels[i] for i in part}) for part in parts) <= 2 * shards


@given(st.integers(1, 500), st.data())
@settings(deadline=None)
def test_contiguous_parts_are_equal_and_in_order_and_the_last_takes_the_rest(n, data):
    workers = data.draw(st.integers(1, n))
    parts = contiguous(n, workers)
    covers(parts, n, workers)
    assert np.array_equal(np.concatenate(parts), np.arange(n))
    assert {len(part) for part in parts[:-1]} <= {n // workers}
    assert len(parts[-1]) == n // workers + n % workers


def test_where_shards_fit_into_labels_a_worker_has_as_many_labels_as_shards_at_most():
    for seed in range(20):
        labels = [set(DIGITS[part]) for part in by_label(DIGITS, 10, 2, seed)]
        assert max(map(len, labels)) == 2
    assert all(len(set(DIGITS[part])) == 1 for part in by_label(DIGITS, 10, 1, 0))


def test_a_small_alpha_gives_a_worker_one_label_and_a_large_one_the_whole_mix():
    """The first half of the workers: later ones get what is left."""
    first = [mixes(DIGITS, dirichlet(DIGITS, 10, alpha, 0))[:5] for alpha in (1e-3, 0.3, 1e4)]
    assert first[0].max(axis=1).min() > 0.99
    assert np.abs(first[2] - 0.1).max() < 0.16  # four deviations of 60 draws
    assert first[0].max(axis=1).mean() > first[1].max(axis=1).mean() + 0.1 > first[2].max(axis=1).mean() + 0.3


def test_the_first_workers_mixes_have_the_moments_of_the_dirichlet_distribution():
    """``E q = p``;  ``Var q = p (1 - p) / (alpha + 1)``, times ``1 + alpha / n`` for the shares of n draws."""
    labels, alpha, p = np.repeat(np.arange(4), [1600, 1200, 800, 400]), 2.0, np.array([0.4, 0.3, 0.2, 0.1])
    drawn = np.array([mixes(labels, dirichlet(labels, 20, alpha, seed)[:1])[0, :4] for seed in range(400)])
    variance = p * (1 - p) * (1 / (alpha + 1)) * (1 + alpha / 200)
    assert np.abs(drawn.mean(axis=0) - p).max() < 0.05
    assert np.abs(drawn.var(axis=0) / variance - 1).max() < 0.25


@pytest.mark.parametrize(("divide", "how"), [(by_label, 3), (dirichlet, 1.0)], ids=("by label", "dirichlet"))
def test_seeds_divide_differently(divide, how):
    assert not any(same(divide(DIGITS, 7, how, 0), divide(DIGITS, 7, how, seed)) for seed in (1, 2, 3))


@pytest.mark.parametrize(
    ("divide", "sentence"),
    [
        (lambda: contiguous(3, 4), "3 samples cannot be divided among 4 workers; each needs at least one"),
        (lambda: contiguous(3, 0), "workers is 0; valid is a whole number above 0"),
        (lambda: contiguous(3, True), "workers is True; valid is a whole number above 0"),
        (lambda: contiguous(3.0, 2), "3.0 samples cannot be divided among 2 workers; each needs at least one"),
        (lambda: dirichlet([], 1, 1.0), "0 samples cannot be divided among 1 workers; each needs at least one"),
        (lambda: dirichlet([0, 1], 2, 0.0), "alpha is 0.0; valid is a number above 0"),
        (lambda: dirichlet([0, 1], 2, float("nan")), "alpha is nan; valid is a number above 0"),
        (lambda: dirichlet([0, 1], 2, "1"), "alpha is '1'; valid is a number above 0"),
        (lambda: dirichlet(np.eye(2), 2, 1.0), "labels have the shape [2, 2]; valid is one label a sample, shape [n]"),
        (lambda: by_label(5, 1), "labels have the shape []; valid is one label a sample, shape [n]"),
        (lambda: by_label(range(9), 4, 3), "classes_per_worker is 3; " + SHARDS),
        (lambda: by_label(range(9), 4, 0), "classes_per_worker is 0; " + SHARDS),
        (lambda: by_label(range(9), 4, 1.0), "classes_per_worker is 1.0; " + SHARDS),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_sentence(divide, sentence):
    with pytest.raises(SettingsError) as refused:
        divide()
    assert str(refused.value) == sentence


# --- batches of it


def look(inline, sizes, batch=4, shared=False, indices=True, **settings):
    """What every worker sees of ``sizes[worker]`` samples of its own: batch and indices by version."""
    seen = defaultdict(list)

    def train(session):
        model = nn.Linear(1, 1)
        session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        mine = TensorDataset(1000 * session.worker + torch.arange(sizes[session.worker]))
        assert session.workers == len(sizes)
        for yielded in session.batches(mine, batch, shared=shared, indices=indices):
            seen[session.worker].append((session.version, yielded))

    inline.train(train, **{"rounds": 9, "workers": {"count": len(sizes), "local_steps": 2}, **settings})
    return seen


def test_a_worker_goes_through_its_own_samples_epoch_by_epoch_each_exactly_once(inline):
    sizes = (8, 24, 9)
    for worker, batches in look(inline, sizes).items():
        consumed = [n for _, (batch, _) in batches for n in batch[0].tolist()]
        assert len(consumed) == 9 * 2 * 4
        for epoch in range(len(consumed) // sizes[worker]):
            part = consumed[epoch * sizes[worker] : (epoch + 1) * sizes[worker]]
            assert sorted(part) == list(range(1000 * worker, 1000 * worker + sizes[worker]))


def test_which_samples_a_worker_sees_depends_on_seed_worker_and_what_it_has_consumed_alone(inline):
    def numbers(seen):
        return {worker: [given[1].tolist() for _, given in batches] for worker, batches in seen.items()}

    plain = numbers(look(inline, (20, 20, 20)))
    for worker, batches in plain.items():
        own = Samples(range(20), 4, seed_of(0, "own", worker))
        assert batches == [own.indices(4 * place, 4) for place in range(18)]
    assert plain[0] != plain[1] != plain[2], "equal data sets are not read in equal order"
    assert numbers(look(inline, (20, 20, 20), seed=1)) != plain
    assert numbers(look(inline, (20, 20, 7)))[0] == plain[0], "whatever others have"
    accumulated = {"workers": {"count": 3, "accumulate": 2}, "uplink": "topk:0.5", "downlink": "sign"}
    assert numbers(look(inline, (20, 20, 20), **accumulated)) == plain
    sampled = numbers(look(inline, (20, 20, 20), federated={"participation": 0.4}))
    assert all(plain[worker][: len(batches)] == batches for worker, batches in sampled.items())
    assert sum(map(len, sampled.values())) == 18, "one of three a round, who takes up where it stopped"


@pytest.mark.parametrize("shared", [True, False])
def test_the_indices_are_those_of_the_samples_in_the_data_set_that_was_given(inline, shared):
    for worker, batches in look(inline, (30, 30), shared=shared).items():
        for _, (batch, indices) in batches:
            assert (indices.dtype, indices.shape, indices.device.type) == (torch.int64, (4,), "cpu")
            assert torch.equal(batch[0], 1000 * worker + indices)


def test_asking_for_indices_changes_no_batch(inline):
    asked, plain = (look(inline, (30, 30), indices=indices) for indices in (True, False))
    for worker in (0, 1):
        pairs = zip(asked[worker], plain[worker], strict=True)
        assert all(torch.equal(one[1][0][0], other[1][0]) for one, other in pairs)


def test_subsets_of_one_data_set_by_a_partition_are_read_in_whole(inline):
    labels, read = torch.arange(40) % 5, defaultdict(set)

    def train(session):
        model = nn.Linear(1, 1)
        mine = by_label(labels, session.workers, 1, 3)[session.worker]
        session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), samples=len(mine))
        for batch, _ in session.batches(Subset(TensorDataset(torch.arange(40)), mine), 4, shared=False, indices=True):
            read[session.worker].update(batch[0].tolist())

    inline.train(train, workers={"count": 5}, rounds=2)
    assert sorted(n for part in read.values() for n in part) == list(range(40))
    assert all(len({n % 5 for n in part}) == 1 for part in read.values())


def test_a_batch_larger_than_a_worker_s_own_part_is_refused(inline):
    with pytest.raises(RunFailed, match="batch_size 4 is not an int between 1 and the data set's 3 samples"):
        look(inline, (8, 3))
