"""Whatever bytes arrive as the body of a segment: a valid update or a DecodeError, and nothing else."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import DecodeError, compressor, segment
from protocol.values import BY_ID, CODES

SPECS = (
    *("none", "f64", "f32", "bf16", "sign"),
    *(f"topk:0.2+{values}" for values in ("none", "f64", "f32", "bf16", "int8", "int4", "sign")),
)
MEGABYTE = 1 << 20


def laws(max_examples):
    return settings(deadline=None, max_examples=max_examples)


def unpack(data, numel):
    """The update, after all that a receiver may rely on was checked; None if it was refused."""
    try:
        update = segment.unpack(np.frombuffer(data, np.uint8), numel)
    except DecodeError:
        return None
    assert update.numel == numel
    assert update.values.dtype in (np.float32, np.float64)
    assert np.isfinite(update.values).all()
    if update.indices is None:
        assert update.values.shape == (numel,)
    else:
        assert update.indices.dtype == np.int64
        assert update.indices.shape == update.values.shape
        places = update.indices.tolist()
        assert all(0 <= place < numel for place in places)
        assert all(a < b for a, b in pairwise(places))
    return update


@st.composite
def bodies(draw):
    """A valid body and its number of elements."""
    numel = draw(st.integers(0, 40))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    vector = torch.from_numpy(np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=numel) ** 3).to(dtype)
    if draw(st.booleans()):
        vector[::2] = 0
    payload, _ = compressor(draw(st.sampled_from(SPECS))).encode(vector, (), 1)
    return payload.tobytes(), numel


@st.composite
def announcements(draw):
    """A body that begins like one: known codes, the right number of elements, then anything."""
    numel = draw(st.integers(0, 50) | st.integers(0, 2**62))
    value_id = draw(st.sampled_from([code.wire_id for code in CODES])) | draw(st.sampled_from([0, segment.WIDE]))
    index_code = draw(st.sampled_from([segment.ALL, segment.NOTHING, segment.RICE]))
    head = bytes([index_code, value_id]) + segment.pack_varint(numel)
    if index_code == segment.RICE:
        count = draw(st.integers(0, 20) | st.integers(0, 2**62))
        head += segment.pack_varint(count) + bytes([draw(st.integers(0, 50))])
    return head + draw(st.binary(max_size=200)), numel


# --- valid bodies


@laws(100)
@given(body=bodies())
def test_a_valid_body_is_an_update_that_adds_like_its_dense_form(body):
    data, numel = body
    update = unpack(data, numel)
    assert update is not None
    dense = update.dense()
    assert dense.shape == (numel,)
    out = torch.arange(numel, dtype=dense.dtype)
    update.add_to(out)
    assert torch.equal(out, torch.arange(numel, dtype=dense.dtype) + dense)
    update.subtract_from(out)
    assert torch.equal(out, torch.arange(numel, dtype=dense.dtype) + dense - dense)


def test_every_value_code_and_index_code_is_reached():
    seen = set()
    for spec in SPECS:
        for vector in (torch.linspace(-1, 1, 21), torch.linspace(-1, 1, 21).double(), torch.zeros(3)):
            data = compressor(spec).encode(vector, (), 1)[0].tobytes()
            update = unpack(data, vector.numel())
            assert update is not None
            seen.add((data[0], data[1]))
    assert {index for index, _ in seen} == {segment.ALL, segment.NOTHING, segment.RICE}
    assert {value for _, value in seen} == set(BY_ID) | {value | segment.WIDE for value in BY_ID}


# --- altered bodies


@laws(60)
@given(body=bodies())
def test_every_truncation_is_refused(body):
    data, numel = body
    for size in range(len(data)):
        assert unpack(data[:size], numel) is None


@laws(100)
@given(body=bodies(), extra=st.binary(min_size=1, max_size=12))
def test_every_extension_is_refused(body, extra):
    data, numel = body
    assert unpack(data + extra, numel) is None


@laws(60)
@given(body=bodies())
def test_every_flipped_bit_is_survived(body):
    data, numel = body
    for bit in range(8 * len(data)):
        altered = bytearray(data)
        altered[bit >> 3] ^= 1 << (bit & 7)
        unpack(altered, numel)


@laws(400)
@given(body=bodies(), edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6))
def test_altered_bytes_are_survived(body, edits):
    data, numel = body
    altered = bytearray(data)
    for place, value in edits:
        altered[place % len(altered)] = value
    unpack(altered, numel)


@laws(300)
@given(first=bodies(), second=bodies(), cut=st.integers(0, 100))
def test_halves_of_two_bodies_are_survived(first, second, cut):
    data = first[0][:cut] + second[0][cut:]
    for numel in (first[1], second[1]):
        unpack(data, numel)


@laws(200)
@given(body=bodies(), numel=st.integers(0, 2**62))
def test_a_body_of_another_size_is_refused(body, numel):
    data, right = body
    if numel != right:
        assert unpack(data, numel) is None


@pytest.mark.parametrize(("spec", "used"), [("sign", 3), ("topk:1+sign", 3), ("topk:1+int4", 4)])
def test_padding_behind_the_values_is_refused_unless_it_is_empty(spec, used):
    vector = torch.linspace(1, 2, 3)
    data = bytearray(compressor(spec).encode(vector, (), 1)[0].tobytes())
    last = len(data) - (2 if spec.startswith("topk") else 1)  # one byte of indices, if there are any
    for bit in range(used, 8):
        data[last] ^= 1 << bit
        with pytest.raises(DecodeError, match="padding"):
            segment.unpack(np.frombuffer(bytes(data), np.uint8), 3)
        data[last] ^= 1 << bit
    assert unpack(bytes(data), 3) is not None


# --- invented bodies


@laws(300)
@given(data=st.binary(max_size=60), numel=st.integers(0, 60))
@example(data=b"", numel=0)
@example(data=b"\x02\x01", numel=1)
def test_random_bytes_are_survived(data, numel):
    unpack(data, numel)


@laws(800)
@given(announced=announcements())
def test_plausible_heads_before_random_bytes_are_survived(announced):
    unpack(*announced)


@pytest.mark.parametrize("wide", [0, segment.WIDE])
@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
@pytest.mark.parametrize("pattern", [b"\x00", b"\xff", b"\x80", b"\x7f", b"\xf0\x7f", b"\x01\x00\x80\xff"])
def test_values_of_odd_bit_patterns_are_finite_or_refused(pattern, code, wide):
    """Infinities, NaN, negative scales, grids that overflow, in every value code."""
    numel = 9
    size = code.size(numel, np.dtype(np.float64 if wide else np.float32))
    head = bytes([segment.ALL, code.wire_id | wide]) + segment.pack_varint(numel)
    for offset in range(len(pattern)):
        values = (pattern[offset:] + pattern * size)[:size]
        unpack(head + values, numel)


# --- how much memory


def heads(numel, count):
    for value_id in sorted({code.wire_id | wide for code in CODES for wide in (0, segment.WIDE)}):
        dense = bytes([segment.ALL, value_id]) + segment.pack_varint(numel)
        yield dense
        sparse = bytes([segment.RICE, value_id]) + segment.pack_varint(numel) + segment.pack_varint(count)
        yield from (sparse + bytes([b]) for b in (0, 1, 20, 40, 41, 255))


@pytest.mark.parametrize("tail", [b"", bytes(1000), b"\xff" * 1000], ids=["none", "zeros", "ones"])
@pytest.mark.parametrize(("numel", "count"), [(2**40, 2**39), (2**62, 2**62), (2**63 - 1, 1), (10**9, 10**9)])
def test_a_huge_announcement_allocates_nothing(numel, count, tail):
    unpack(compressor("topk:1+int4").encode(torch.ones(3), (), 1)[0].tobytes(), 3)  # compiles what is used
    tracemalloc.start()
    try:
        for head in heads(numel, count):
            unpack(head + tail, numel)
            unpack(head + tail, 7)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTE


def test_an_empty_segment_of_any_size_takes_no_memory_until_it_is_made_dense():
    body = bytes([segment.NOTHING, 1]) + segment.pack_varint(2**60)
    tracemalloc.start()
    try:
        update = unpack(body, 2**60)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert update is not None
    assert update.values.size == 0
    assert peak < MEGABYTE


def test_memory_is_in_proportion_to_the_bytes_that_arrived():
    """The densest honest message: a bit for each sign, a bit for each index."""
    count = 80_000
    payload, _ = compressor("topk:1+sign").encode(torch.ones(count), (), 1)
    data = payload.tobytes()
    unpack(data, count)
    tracemalloc.start()
    try:
        segment.unpack(payload, count)
        _, honest = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for cut in (len(data) // 2, len(data) - 1):
            with pytest.raises(DecodeError):
                segment.unpack(payload[:cut], count)
        _, cut_short = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert honest < 40 * count
    assert cut_short < MEGABYTE / 2


# --- numbers in the head


@laws(300)
@given(number=st.integers(0, 2**63 - 1), before=st.binary(max_size=3), after=st.binary(max_size=3))
def test_a_varint_comes_back_with_the_place_behind_it(number, before, after):
    data = np.frombuffer(before + segment.pack_varint(number) + after, np.uint8)
    assert segment.take_varint(data, len(before)) == (number, data.size - len(after))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 8, b"\xff" * 9 + b"\x01", b"\x80\x00", b"\x81\x80\x00"])
def test_a_varint_that_is_cut_too_long_or_padded_is_refused(data):
    with pytest.raises(DecodeError):
        segment.take_varint(np.frombuffer(data, np.uint8), 0)
