"""What a cut refuses, in one sentence, before it sends or remembers anything."""

import hashlib
import multiprocessing
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import torch

from protocol import DecodeError, SettingsError
from protocol.halves import Activations, Gradients, pack_numbers, parse
from protocol.segment import pack_dense
from workers import Cut, Downstream, Upstream

PLAIN = Cut((3, 8), 40, "topk:0.25", "topk:0.25")


def ends(cut=PLAIN, other=None):
    here, there = multiprocessing.Pipe()
    return Upstream(cut, here), Downstream(other or cut, there)


def rows(count=4, **kwargs):
    return torch.ones(count, 3, 8, **kwargs)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shape": (3, 0)}, r"shape \(3, 0\) of the cut is not made of whole numbers above 0"),
        ({"shape": (3.0,)}, r"shape \(3.0,\)"),
        ({"samples": 0}, "samples 0"),
        ({"samples": True}, "samples True"),
        ({"forward": "top:0.1"}, "unknown stage 'top'"),
        ({"backward": "topk:2"}, "ratio '2'"),
        ({"first": "int5"}, "unknown stage 'int5'"),
        ({"plain": ""}, "unknown stage ''"),
        ({"activations": "residual"}, "activations 'residual' of the cut is unknown; valid are memory, none"),
        ({"gradients": "ef"}, "gradients 'ef' of the cut is unknown; valid are memory, residual, none"),
        ({"memory": "int8"}, "memory 'int8' of the cut is unknown; valid are float32, bfloat16, float16, float64"),
        ({"activations": "none", "first": "f32"}, "first 'f32' of the cut needs activations 'memory'"),
    ],
)
def test_settings_are_checked_when_they_are_made(settings, says):
    with pytest.raises(SettingsError, match=says):
        replace(PLAIN, **settings)


@pytest.mark.parametrize(
    ("activation", "indices", "says"),
    [
        (torch.ones(4, 24), None, r"the activation has shape \(4, 24\); valid is \(n, 3, 8\), n from 1 to 40"),
        (torch.ones(4, 8, 3), None, r"shape \(4, 8, 3\)"),
        (torch.ones(3, 8), None, r"shape \(3, 8\)"),
        (torch.ones(()), None, r"shape \(\)"),
        (rows(0), None, "n from 1 to 40"),
        (rows(41), None, "n from 1 to 40"),
        (rows().double(), None, "is torch.float64; with memory 'float32' valid are float32, float16, bfloat16"),
        (rows().long(), None, "is torch.int64"),
        (rows(), [0, 1, 2], r"indices are torch.int64 of shape \(3,\); valid is a whole number for each of the 4"),
        (rows(), [0.0, 1.0, 2.0, 3.0], "indices are torch.float32"),
        (rows(), [True, False, True, False], "indices are torch.bool"),
        (rows(), [[0], [1], [2], [3]], r"of shape \(4, 1\)"),
        (rows(), [0, 1, 2, 40], "indices hold 40; valid is from 0 to 39"),
        (rows(), [0, -1, 2, 3], "indices hold -1"),
        (rows(), [7, 3, 5, 3], "indices hold 3 twice; valid are distinct ones, or None"),
    ],
)
def test_a_batch_that_does_not_fit_is_not_sent(activation, indices, says):
    head, tail = ends()
    with pytest.raises(SettingsError, match=says):
        head(activation, indices)
    assert not tail._channel.poll()
    head(rows(), range(4))  # as if nothing had been
    assert tail()[1].tolist() == [0, 1, 2, 3]


def frames(cut=PLAIN):
    """The frames of a batch, and the ends that wait for them with a first batch behind them."""
    head, tail = ends(cut)
    for _ in range(2):
        scalar = head(rows(requires_grad=True) + 1, range(4))
        there = tail._channel.recv_bytes()
        head._channel.send_bytes(there)
        arrived, _ = tail()
        arrived.sum().backward()
        back = head._channel.recv_bytes()
        if scalar is not None:
            tail._channel.send_bytes(back)
            scalar.backward()
    return head, tail, there, back


def remembered(end):
    return [(m._table._rows[:4].clone(), m._table._seen.clone()) for m in (end._in, end._out)]


def unchanged(before, end):
    return all(
        torch.equal(a, b) for x, y in zip(before, remembered(end), strict=True) for a, b in zip(x, y, strict=True)
    )


def test_a_damaged_frame_is_a_decode_error_and_nothing_is_remembered():
    head, tail, there, back = frames()
    before = remembered(tail)
    for at in range(len(there)):
        head._channel.send_bytes(there[:at] + bytes([there[at] ^ 16]) + there[at + 1 :])
        with pytest.raises(DecodeError):
            tail()
    for size in range(len(there)):
        head._channel.send_bytes(there[:size])
        with pytest.raises(DecodeError):
            tail()
    assert unchanged(before, tail)
    scalar, before = head(rows(requires_grad=True), range(4)), remembered(head)
    for at in range(len(back)):
        tail._channel.send_bytes(back[:at] + bytes([back[at] ^ 1]) + back[at + 1 :])
        with pytest.raises(DecodeError):
            scalar.backward(retain_graph=True)
    assert unchanged(before, head)
    tail()[0].sum().backward()
    scalar.backward()


def forged(there, **changes):
    """An honest frame with other contents and a good CRC."""
    return replace(parse(np.frombuffer(there, np.uint8)), **changes).pack()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layout": bytes(8)}, "of a cut with other settings"),
        ({"sequence": 1}, "batch 1 came where 2 was due"),
        ({"sequence": 3}, "batch 3 came where 2 was due"),
        ({"rows": 41}, "41 samples of float32, which do not fit the cut"),
        ({"rows": 5}, "5 numbers of 6 bits have 3 bytes instead of 4"),
        ({"dtype": "float64"}, "4 samples of float64"),
        ({"indices": pack_numbers(np.array([1, 2, 3, 63]), 64)}, "not below 40"),
        ({"indices": pack_numbers(np.array([1, 2, 3, 1]), 40)}, "names a sample twice"),
        ({"indices": b"\0"}, "have 1 bytes"),
        ({"indices": pack_numbers(np.array([1, 2, 3, 9]), 40)}, "the other half knows sample 9, which is new here"),
        ({"fresh": b"\0\0"}, "4 numbers of 1 bits have 2 bytes"),
        ({"fresh": b"\x10"}, "padding"),
        ({"bodies": ()}, "0 segments and 0 bytes of flags where the cut has 1"),
        ({"bodies": (pack_dense(np.ones(95, np.float32)),)}, "95 elements where the layout has 96"),
        ({"bodies": (pack_dense(np.ones(96)),)}, "float64 values where the cut works with float32"),
        ({"indices": b"", "fresh": b"\1"}, "1 bytes of flags where the cut has 1 segments and no flags"),
    ],
)
def test_a_frame_with_other_contents_is_a_decode_error(changes, says):
    head, tail, there, _ = frames()
    before = remembered(tail)
    head._channel.send_bytes(forged(there, **{"sequence": 2, **changes}))
    with pytest.raises(DecodeError, match=says):
        tail()
    assert unchanged(before, tail)


def test_a_gradient_that_nobody_awaits_and_a_frame_of_the_other_kind_are_decode_errors():
    head, tail, there, back = frames()
    scalar = head(rows(requires_grad=True), range(4))
    tail._channel.send_bytes(back)
    with pytest.raises(DecodeError, match="a gradient for batch 1 came, for which none is awaited"):
        scalar.backward(retain_graph=True)
    tail._channel.send_bytes(there)
    with pytest.raises(DecodeError, match="a frame with Activations came where Gradients were due"):
        scalar.backward(retain_graph=True)
    head._channel.send_bytes(back)
    tail()
    with pytest.raises(DecodeError, match="a frame with Gradients came where Activations were due"):
        tail()
    assert isinstance(parse(np.frombuffer(there, np.uint8)), Activations)
    assert isinstance(parse(np.frombuffer(back, np.uint8)), Gradients)


@pytest.mark.parametrize(
    "other",
    [{"samples": 41}, {"shape": (8, 3)}, {"gradients": "residual"}, {"first": "f32"}, {"memory": "bfloat16"}],
    ids=str,
)
def test_halves_of_different_cuts_refuse_each_other(other):
    head, tail = ends(PLAIN, replace(PLAIN, **other))
    head(rows(), range(4))
    with pytest.raises(DecodeError, match="the frame is of a cut with other settings"):
        tail()


def test_the_name_of_a_cut_is_the_one_that_the_specification_gives():
    described = [[3, 8], 40, "topk:0.25", "topk:0.25", "memory", "memory", None, "f32", "float32"]
    assert PLAIN.name == hashlib.blake2b(msgpack.packb(described), digest_size=8).digest()


def test_halves_that_differ_in_their_seed_alone_do_not():
    head, tail = ends(PLAIN, replace(PLAIN, seed=7))
    head(rows(), range(4))
    assert tail()[0].shape == (4, 3, 8)


def test_a_half_that_was_started_again_is_noticed():
    here, there = multiprocessing.Pipe()
    head, tail = Upstream(PLAIN, here), Downstream(PLAIN, there)
    head(rows(), range(4))
    tail()
    head(rows(), range(4))
    with pytest.raises(DecodeError, match="batch 1 came where 0 was due"):
        Downstream(PLAIN, there)()


def test_backward_works_once_for_a_batch():
    head, tail = ends()
    scalar = head(rows(requires_grad=True), range(4))
    arrived, _ = tail()
    arrived.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of batch 0 was sent"):
        arrived.sum().backward()
    scalar.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of batch 0 has been taken"):
        scalar.backward()


def test_nothing_comes_back_for_an_activation_without_gradient():
    head, tail = ends()
    assert not head(rows(), range(4)).requires_grad
    assert not tail()[0].requires_grad
    with torch.no_grad():
        head(rows(requires_grad=True), range(4))
        assert not tail()[0].requires_grad


def test_a_gradient_that_is_awaited_cannot_be_disabled_at_the_other_half():
    head, tail = ends()
    head(rows(requires_grad=True), range(4))
    with torch.no_grad(), pytest.raises(SettingsError, match="the other half awaits a gradient"):
        tail()


def test_neither_end_adds_anything_to_a_model():
    head, tail = ends()
    assert not list(head.parameters())
    assert not list(tail.parameters())
    assert not head.state_dict()
    assert not tail.state_dict()
