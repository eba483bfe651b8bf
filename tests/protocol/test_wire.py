"""The frame: what is packed comes out again, and nothing else ever does."""

import struct
import tracemalloc
import zlib

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import DecodeError, wire
from protocol.coding import varint

LAYOUT = bytes(range(8))
BIG = 2**63 - 1

laws = settings(deadline=None, max_examples=100)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=9)
    | st.binary(max_size=9)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=5,
)
bodies = st.lists(st.binary(max_size=300).map(lambda data: np.frombuffer(data, np.uint8)), max_size=5)


def forge(table=b"\x80", body=b"", *, magic=b"CRRY", version=1, kind=3, zero=0, table_size=None, body_size=None):
    """A frame with a good CRC around whatever is wrong with it."""
    sizes = len(table) if table_size is None else table_size, len(body) if body_size is None else body_size
    data = struct.pack("<4sBBH8sIQ", magic, version, kind, zero, LAYOUT, *sizes) + table + body
    return np.frombuffer(data + struct.pack("<I", zlib.crc32(data)), np.uint8)


def a_frame():
    body = np.arange(9, dtype=np.uint8)
    return wire.pack(3, LAYOUT, {1: 7, 2: "text", 5: b"\x00\xff"}, (body, body[:0], body[4:]))


@laws
@given(st.integers(0, 255), st.binary(min_size=8, max_size=8), st.dictionaries(st.integers(1, 99), values), bodies)
def test_what_is_packed_comes_out_again(kind, layout, fields, parts):
    frame = wire.unpack(wire.pack(kind, layout, fields, parts))
    assert (frame.kind, frame.layout, frame.fields) == (kind, layout, fields)
    assert [bytes(b) for b in frame.bodies] == [bytes(p) for p in parts]


def test_the_forged_frames_of_this_file_differ_from_real_ones_in_nothing_but_what_they_forge():
    assert bytes(forge()) == bytes(wire.pack(3, LAYOUT, {}))


def test_bodies_are_views_of_the_frame():
    frame = a_frame()
    assert all(np.shares_memory(body, frame) for body in wire.unpack(frame).bodies if body.size)


def test_every_truncation_is_a_decode_error():
    frame = a_frame()
    for size in range(frame.size):
        with pytest.raises(DecodeError):
            wire.unpack(frame[:size])


def test_bytes_behind_the_end_are_a_decode_error():
    with pytest.raises(DecodeError, match="header announces"):
        wire.unpack(np.append(a_frame(), np.uint8(0)))


def test_every_flip_of_a_single_bit_is_a_decode_error():
    frame = a_frame()
    for bit in range(8 * frame.size):
        altered = frame.copy()
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DecodeError):
            wire.unpack(altered)


@laws
@given(st.data())
def test_any_few_altered_bytes_are_a_decode_error(data):
    frame = a_frame()
    altered = frame.copy()
    for place in data.draw(st.sets(st.integers(0, frame.size - 1), min_size=1, max_size=4)):
        altered[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DecodeError):
        wire.unpack(altered)


@laws
@given(st.binary(max_size=200))
def test_noise_is_a_decode_error(noise):
    with pytest.raises(DecodeError):
        wire.unpack(np.frombuffer(b"CRRY\x01" + noise, np.uint8))


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_format_version_is_refused_with_both_versions(version):
    with pytest.raises(DecodeError) as refused:
        wire.unpack(forge(version=version))
    assert str(refused.value) == f"the frame has format version {version}; this side speaks version 1"


def test_another_format_version_is_named_even_if_its_header_means_something_else():
    with pytest.raises(DecodeError, match="format version 2"):
        wire.unpack(forge(version=2, zero=5, table_size=9))


def test_another_magic_is_refused():
    with pytest.raises(DecodeError, match="b'CRRX' instead of b'CRRY'"):
        wire.unpack(forge(magic=b"CRRX"))


def test_reserved_bytes_must_be_zero():
    with pytest.raises(DecodeError):
        wire.unpack(forge(zero=1))


@pytest.mark.parametrize(
    "sizes",
    [{"table_size": 0}, {"table_size": 2}, {"table_size": 2**32 - 1}, {"body_size": 1}, {"body_size": 2**64 - 1}],
)
def test_a_header_whose_lengths_lie_is_refused(sizes):
    with pytest.raises(DecodeError, match="header announces"):
        wire.unpack(forge(**sizes))


@pytest.mark.parametrize(
    "table",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x01", id="no map"),
        pytest.param(b"\x90", id="a list"),
        pytest.param(b"\xc0", id="nil"),
        pytest.param(b"\x81\x01", id="cut off"),
        pytest.param(b"\x80\x80", id="two maps"),
        pytest.param(b"\xc1", id="no msgpack"),
        pytest.param(b"\x81\xa1a\x01", id="text key"),
        pytest.param(b"\x81\xc3\x01", id="true as key, which Python takes for 1"),
        pytest.param(b"\x81\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00\x01", id="1.0 as key, which Python takes for 1"),
        pytest.param(b"\x82\x01\x02\x01\x03", id="a key twice"),
        pytest.param(b"\x81\x01\x82\x05\x02\x05\x03", id="a key twice deeper down"),
        pytest.param(b"\x81\x80\x01", id="map as key"),
        pytest.param(b"\x81\x90\x01", id="list as key"),
        pytest.param(b"\x81\x01\x81\x80\x01", id="map as key deeper down"),
        pytest.param(b"\x81\x01\xa1\xff", id="text that is not UTF-8"),
        pytest.param(b"\x81\x01\xd4\xff\x00", id="malformed timestamp"),
        pytest.param(b"\x81\x01" + b"\x91" * 5000 + b"\xc0", id="nested without end"),
        pytest.param(b"\x81\x01\xdd\xff\xff\xff\xff", id="list of 2**32 - 1"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="map of 2**32 - 1"),
        pytest.param(b"\x81\x01\xc6\xff\xff\xff\xff", id="bytes of 2**32 - 1"),
    ],
)
def test_a_malformed_map_is_refused(table):
    with pytest.raises(DecodeError, match=r"the frame's map"):
        wire.unpack(forge(table))


@pytest.mark.parametrize("lengths", [3, "ab", [1, 2], None, {1: 2}, True])
def test_body_lengths_of_another_type_are_refused(lengths):
    with pytest.raises(DecodeError, match="malformed"):
        wire.unpack(forge(msgpack.packb({0: lengths}), bytes(3)))


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        pytest.param(b"\x03", 2, id="one too many"),
        pytest.param(b"\x03", 4, id="one too few"),
        pytest.param(b"", 1, id="none"),
        pytest.param(b"\x01\x01", 3, id="sum too small"),
        pytest.param(b"\x02\x02", 3, id="sum too large"),
        pytest.param(varint.pack(BIG), 3, id="the largest number"),
        pytest.param(varint.pack(BIG) + b"\x03", 3, id="a large one first"),
        pytest.param(b"\x80", 3, id="cut off"),
        pytest.param(b"\x83\x00", 3, id="padded with zeros"),
        pytest.param(b"\xff" * 9 + b"\x01", 3, id="64 bits"),
    ],
)
def test_body_lengths_that_lie_are_refused(lengths, size):
    with pytest.raises(DecodeError):
        wire.unpack(forge(msgpack.packb({0: lengths}), bytes(size)))


@pytest.mark.parametrize(
    "frame",
    [
        forge(table_size=2**32 - 1, body_size=2**64 - 1),
        forge(msgpack.packb({0: varint.pack(BIG) * 100})),
        forge(b"\x81\x01\xdd\x7f\xff\xff\xff"),
        forge(b"\xdf\x7f\xff\xff\xff"),
        forge(b"\x81\x01\xc6\x7f\xff\xff\xff"),
    ],
    ids=("header", "bodies", "list", "map", "bytes"),
)
def test_huge_announced_lengths_allocate_nothing(frame):
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            wire.unpack(frame)
        assert tracemalloc.get_traced_memory()[1] < 2**17
    finally:
        tracemalloc.stop()
