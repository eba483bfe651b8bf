"""Messages between two halves: round trips, numbers that never change, and input that no honest sender packs."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import DecodeError, messages, wire
from protocol.halves import Activations, Gradients, pack_numbers, parse, unpack_numbers
from protocol.segment import pack_exact

BODIES = (pack_exact(np.array([1, -2, 0, 3], np.float32)),)
SAMPLES = (
    Activations(9, 2, "bfloat16", b"\x21", b"\x02", False, bodies=BODIES, layout=bytes(range(8))),
    Gradients(9, b"\x01", bodies=BODIES),
)
every_message = pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
laws = settings(deadline=None, max_examples=60)


@every_message
def test_every_message_comes_out_as_it_went_in(message):
    found = parse(message.pack())
    bodies = [[body.tolist() for body in one.bodies] for one in (found, message)]
    assert bodies[0] == bodies[1]
    assert dataclasses.replace(found, bodies=()) == dataclasses.replace(message, bodies=())


def test_kinds_and_keys_never_change():
    """What is written here has been sent; numbers may be added and none may be used again."""
    keys = {
        type(m): (m.KIND, {f.name: f.metadata["key"] for f in dataclasses.fields(m) if "key" in f.metadata})
        for m in SAMPLES
    }
    assert keys == {
        Activations: (64, {"sequence": 1, "rows": 2, "dtype": 3, "indices": 4, "fresh": 5, "awaited": 6}),
        Gradients: (65, {"sequence": 1, "fresh": 2}),
    }


def test_a_field_at_its_default_does_not_travel():
    assert set(wire.unpack(Activations(0, 1).pack()).fields) == {1, 2}
    assert set(wire.unpack(Gradients(0).pack()).fields) == {1}


@every_message
def test_no_server_takes_them_and_no_half_takes_a_servers(message):
    with pytest.raises(DecodeError, match=f"kind {message.KIND}"):
        messages.parse(message.pack())
    with pytest.raises(DecodeError, match="kind 9; between two halves 64, 65 are valid"):
        parse(messages.Farewell(8).pack())


@every_message
def test_every_truncation_and_every_flip_of_a_single_bit_is_a_decode_error(message):
    frame = message.pack()
    for size in range(frame.size):
        with pytest.raises(DecodeError):
            parse(frame[:size])
    for bit in range(8 * frame.size):
        altered = frame.copy()
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DecodeError):
            parse(altered)


NO_NUMBER = (None, True, -1, 2**63, 1.0, "1", b"1", [], {})
NO_BYTES = (None, 1, "text", [1])
MALFORMED = {
    "sequence": NO_NUMBER,
    "rows": (*NO_NUMBER, 0, 2**32),
    "dtype": (None, 1, "int8", "torch.float32", b"float32"),
    "indices": NO_BYTES,
    "fresh": NO_BYTES,
    "awaited": (None, 0, 1, "true"),
}


@every_message
def test_a_malformed_or_missing_field_is_named(message):
    fields = wire.unpack(dataclasses.replace(message, bodies=()).pack()).fields
    for field in dataclasses.fields(message):
        if "key" not in field.metadata:
            continue
        key = field.metadata["key"]
        for value in MALFORMED[field.name]:
            with pytest.raises(
                DecodeError, match=f"field '{field.name}' of a {type(message).__name__} message is malf"
            ):
                parse(wire.pack(message.KIND, wire.NO_LAYOUT, {**fields, key: value}))
        if field.default is dataclasses.MISSING:
            with pytest.raises(DecodeError, match=f"lacks its field '{field.name}'"):
                parse(wire.pack(message.KIND, wire.NO_LAYOUT, {k: v for k, v in fields.items() if k != key}))


@laws
@given(st.data(), st.integers(1, 2**40))
def test_numbers_come_out_as_they_went_in_and_take_the_bits_of_the_largest(data, below):
    numbers = np.array(data.draw(st.lists(st.integers(0, below - 1), max_size=40)), np.int64)
    packed = pack_numbers(numbers, below)
    assert unpack_numbers(packed, len(numbers), below).tolist() == numbers.tolist()
    assert len(packed) == -(-len(numbers) * max(1, (below - 1).bit_length()) // 8)


def test_numbers_are_in_their_order_from_the_lowest_bit_upward():
    assert pack_numbers(np.array([5, 0, 1]), 6) == bytes([0b01_000_101, 0b0])
    assert pack_numbers(np.array([1, 0, 1]), 2) == bytes([0b101])


@laws
@given(st.binary(max_size=8), st.integers(1, 12), st.integers(1, 300))
def test_noise_gives_the_numbers_that_pack_to_it_or_a_decode_error(noise, count, below):
    try:
        numbers = unpack_numbers(noise, count, below)
    except DecodeError:
        return
    assert pack_numbers(numbers, below) == noise
