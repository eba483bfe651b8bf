"""Decoded segments are added with the same bits, however many are added at once."""

import numpy as np
import pytest
import torch

from protocol import compressor
from protocol.segment import unpack
from protocol.update import STRIP, accumulate

LARGE = 2 * STRIP + 777


def decoded(specs, numel, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(numel, generator=generator, dtype=dtype) ** 3 for _ in specs]
    return [unpack(compressor(s).encode(v, (), 5)[0], numel) for s, v in zip(specs, vectors, strict=True)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("out", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "specs",
    [
        ["topk:0.01+int4"] * 4,
        ["topk:0.01", "randk:0.01+sign", "threshold:30+bf16", "topk:0.002+qsgd:4"],
        ["topk:0.01+int4", "sign", "topk:0.01+int4"],
        ["topk:0.01+int4"],
        [],
    ],
    ids=["alike", "different codes", "one is dense", "one", "none"],
)
@pytest.mark.parametrize("numel", [1000, LARGE])
def test_a_sum_of_updates_has_the_bits_of_one_after_the_other(numel, specs, out, threads):
    updates = decoded(specs, numel)
    at_once = torch.linspace(-2, 2, numel, dtype=out)
    in_turn = at_once.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        accumulate(updates, at_once)
    finally:
        torch.set_num_threads(before)
    for update in updates:
        update.add_to(in_turn)
    assert torch.equal(at_once, in_turn)


@pytest.mark.parametrize("spec", ["topk:0.05+int4", "sign", "bf16", "qsgd:4,bucket=100", "topk:0.5", "none"])
def test_pieces_are_the_values_in_order(spec):
    (update,) = decoded([spec], 200_000)
    starts = [start for start, _ in update.pieces()]
    pieces = [piece for _, piece in update.pieces()]
    assert starts == list(np.cumsum([0, *(piece.size for piece in pieces[:-1])]))
    assert np.array_equal(np.concatenate(pieces), update.values)


@pytest.mark.parametrize("out", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", ["topk:0.05+int4", "topk:0.05", "randk:0.1+sign", "bf16", "none", "lowrank:2"])
def test_a_scaled_update_is_rounded_before_it_is_added(spec, out):
    one, vector = compressor(spec, (50, 40)), torch.randn(2000, generator=torch.Generator().manual_seed(2))
    update = unpack(one.encode(vector, one.init(2000), 5)[0], 2000)
    total = torch.linspace(-2, 2, 2000, dtype=out)
    expected = total + update.dense().to(out) * 0.3
    before = update.dense()
    update.add_scaled_to(total, 0.3)
    assert torch.equal(total, expected)
    assert torch.equal(update.dense(), before), "the update stays what it was"
    assert update.norm() == pytest.approx(float(before.double().norm()))
    with pytest.raises(ValueError, match="an update of 2000 elements cannot be added"):
        update.add_scaled_to(total[1:], 0.3)


@pytest.mark.parametrize("spec", ["topk:0.05+int4", "qsgd:4,bucket=100", "bf16"])
def test_what_is_subtracted_is_what_is_added(spec):
    (update,) = decoded([spec], 10_000)
    plus, minus = torch.zeros(10_000), torch.zeros(10_000)
    update.add_to(plus)
    update.subtract_from(minus)
    assert torch.equal(plus, -minus)
    assert torch.equal(plus, update.dense())
    assert plus.any()
