"""Which samples a worker sees: a pure function of seed, position, rank and step, and random state with it."""

from __future__ import annotations

import random
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from protocol.errors import RunFailed, SettingsError
from workers.batches import Samples, to_device

NUMBERS = TensorDataset(torch.arange(48))


class Numbers(Dataset):
    """Its samples are their own indices."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def look(session, each, dataset=NUMBERS, size=4, **options):
    """Calls ``each(session, number of the batch, batch)``, and trains nothing."""
    model = nn.Linear(1, 1)
    session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for number, batch in enumerate(session.batches(dataset, size, **options)):
        each(session, number, batch)


# --- the endless sequence


@given(length=st.integers(1, 40), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=100, deadline=None)
def test_every_epoch_holds_every_sample_once_however_batches_straddle_it(length, seed, data):
    size = data.draw(st.integers(1, length))
    samples = Samples(Numbers(length), size, seed)
    sequence = [index for batch in range(3 * length) for index in samples.indices(batch * size, size)]
    assert len(sequence) == 3 * length * size
    for epoch in range(3 * size):
        assert sorted(sequence[epoch * length : (epoch + 1) * length]) == list(range(length))


@given(starts=st.lists(st.integers(0, 500), min_size=1, max_size=20), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_a_batch_depends_on_seed_and_position_alone_not_on_what_was_read_before(starts, seed):
    samples = Samples(Numbers(37), 5, seed)
    random.seed(starts[0])  # and on no global random state
    np.random.seed(starts[0])
    torch.manual_seed(starts[0])
    for start in starts:
        assert samples.indices(start, 5) == Samples(Numbers(37), 5, seed).indices(start, 5)


def test_epochs_and_seeds_are_shuffled_differently():
    orders = [tuple(Samples(Numbers(30), 30, seed).indices(30 * epoch, 30)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({*orders, tuple(range(30))}) == 7


# --- in a run


def batches(inline, **settings: Any) -> dict[tuple[int, int, int], list[int]]:
    """The samples by version, rank and step."""
    seen: dict[tuple[int, int, int], list[int]] = {}

    def each(session, number, batch):
        steps = sum(1 for version, rank, _ in seen if (version, rank) == (session.version, session.rank))
        seen[session.version, session.rank, steps] = batch[0].tolist()

    inline.train(partial(look, each=each), **settings)
    return seen


def test_ranks_and_steps_of_a_round_share_no_sample_and_an_epoch_is_every_sample_once(inline):
    seen = batches(inline, rounds=6, workers={"count": 3, "local_steps": 2})
    assert sorted(seen) == [(v, r, s) for v in range(6) for r in range(3) for s in range(2)]
    for epoch in range(3):  # two rounds of 24 samples
        samples = [n for (version, *_), batch in seen.items() if version // 2 == epoch for n in batch]
        assert sorted(samples) == list(range(48))


def test_a_batch_is_the_one_at_position_rank_and_step(inline):
    seen = batches(inline, rounds=9, workers={"count": 3, "local_steps": 2}, seed=7)
    samples = Samples(NUMBERS, 4, 7)
    for (version, rank, step), batch in seen.items():
        assert batch == samples.indices(version * 24 + (step * 3 + rank) * 4, 4)
    assert [row["position"] for row in inline.rows] == [24 * version for version in range(1, 10)]


def test_batches_do_not_depend_on_how_the_run_is_compressed_or_steps_are_accumulated(inline):
    plain = batches(inline, workers={"count": 2, "local_steps": 2})
    lossy = {"uplink": "sign", "downlink": "topk:0.5", "feedback": {"kind": "saef"}}
    assert batches(inline, workers={"count": 2, "accumulate": 2}, **lossy) == plain
    assert batches(inline, workers={"count": 2, "local_steps": 2}, seed=1) != plain


# --- collating and moving


class Pair(NamedTuple):
    number: Any
    text: Any


def test_samples_are_collated_as_torch_does_it_or_as_the_user_says(inline):
    pairs = [Pair(n, {"text": str(n), "half": torch.tensor(n / 2)}) for n in range(48)]
    chosen = Samples(pairs, 4, 0).indices(8, 4)
    assert str(Samples(pairs, 4, 0).batch(chosen)) == str(default_collate([pairs[n] for n in chosen]))
    assert Samples(pairs, 4, 0, collate=lambda batch: [pair.number for pair in batch]).batch(chosen) == chosen

    def each(session, number, batch):
        assert isinstance(batch, Pair)
        assert batch.text["half"].tolist() == [n / 2 for n in batch.number.tolist()]
        assert batch.text["text"] == [str(n) for n in batch.number.tolist()]

    inline.train(partial(look, each=each, dataset=pairs))
    inline.train(partial(look, each=lambda *seen: None, dataset=pairs, collate=default_collate))


def test_a_tensor_data_set_gives_what_indexing_it_gives():
    dataset = TensorDataset(torch.randn(20, 3), torch.arange(20))
    samples = Samples(dataset, 6, 0)
    expected = default_collate([dataset[n] for n in samples.indices(17, 6)])
    assert all(map(torch.equal, samples.batch(samples.indices(17, 6)), expected))


def test_a_data_set_that_builds_on_a_tensor_data_set_is_asked_for_its_own_samples():
    class Negated(TensorDataset):
        def __getitem__(self, index):
            return tuple(-tensor for tensor in super().__getitem__(index))

    samples = Samples(Negated(torch.arange(20)), 6, 0)
    assert samples.batch(samples.indices(0, 6))[0].tolist() == [-n for n in samples.indices(0, 6)]


def test_moving_a_batch_keeps_its_structure():
    meta = torch.device("meta")
    batch = {"a": [torch.ones(2), "text"], "b": Pair(torch.ones(3), (1, None)), "c": torch.ones(4)}
    moved = to_device(batch, meta)
    assert moved["a"][0].device == moved["b"].number.device == moved["c"].device == meta
    assert (moved["a"][1], moved["b"].text, type(moved["b"]), type(moved["a"])) == ("text", (1, None), Pair, list)


# --- refusals


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(100))


@pytest.mark.parametrize(
    "dataset", [Stream(), (n for n in range(100)), DataLoader(NUMBERS), 100, {1, 2, 3}], ids=lambda d: type(d).__name__
)
def test_data_that_has_no_length_or_no_indexing_is_refused(dataset):
    with pytest.raises(SettingsError, match=rf"got a {type(dataset).__name__}; valid is a map-style data set"):
        Samples(dataset, 4, 0)


@pytest.mark.parametrize("size", [0, -1, 49, 4.0, "4", True, None, np.int64(4)])
def test_a_batch_size_that_does_not_fit_the_data_set_is_refused(size):
    with pytest.raises(SettingsError, match="is not an int between 1 and the data set's 48 samples") as refused:
        Samples(NUMBERS, size, 0)
    assert repr(size) in str(refused.value)


def test_an_empty_data_set_fails_the_run_in_one_sentence(inline):
    with pytest.raises(RunFailed, match="batch_size 4 is not an int between 1 and the data set's 0 samples"):
        inline.train(partial(look, each=None, dataset=[]))


# --- random state


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_random_state_is_the_same_before_each_batch_whatever_was_drawn_before(inline):
    def drawn(extra: int) -> dict[tuple[int, int, int], Any]:
        seen = {}

        def each(session, number, batch):
            seen[session.version, session.rank, number] = draw()
            for _ in range(extra * (session.rank + 1)):
                draw()

        inline.train(partial(look, each=each), workers={"count": 2, "local_steps": 2})
        return seen

    first = drawn(0)
    assert len({value for values in first.values() for value in values}) == 3 * 2 * 5 * 2  # no two are alike
    assert drawn(3) == first


def test_random_augmentation_in_a_data_set_is_the_same_in_every_run(inline):
    class Noisy(Numbers):
        def __getitem__(self, index):
            return index + torch.rand(())

    def run() -> dict[tuple[int, int], list[float]]:
        seen = {}

        def each(session, number, batch):
            seen[session.version, session.rank] = batch.tolist()
            torch.rand(session.rank + len(seen))

        inline.train(partial(look, each=each, dataset=Noisy(48)))
        return seen

    assert run() == run()


def test_the_training_function_starts_with_the_same_random_state_on_every_rank(inline):
    def starts(seed: int) -> list[Any]:
        drawn = []

        def train(session):
            drawn.append(draw())
            look(session, lambda *seen: None)

        inline.train(train, rounds=1, seed=seed)
        return drawn

    (one, other), (different, _) = starts(0), starts(1)
    assert one == other != different
