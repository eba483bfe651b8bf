"""Whatever bytes arrive, as the body of a segment or as a frame: a valid update or a DecodeError, and nothing else."""

import struct
import tracemalloc
import zlib
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import DecodeError, compressor, decode, messages, segment, wire
from protocol.coding import indices, varint
from protocol.layout import Entry, Layout
from protocol.messages import Push
from protocol.values import BY_ID, Cast

VALUES = ("none", "f64", "f32", "f16", "bf16", "int8", "int4", "int2", "sign", "ternary", "natural", "qsgd:4,bucket=7")
PLAIN = (
    *VALUES,
    *(f"topk:0.2+{values}" for values in VALUES),
    *(f"randk:0.2+{values}" for values in ("none", "int4", "qsgd:9")),
    *("lowrank:1", "lowrank:2+bf16", "lowrank:2+f64"),
)
SPECS = (*PLAIN, *(f"{spec}+entropy" for spec in PLAIN))
SHAPE = (12, 9)
MATRIX = 108
INDEX_CODES = (segment.ALL, segment.NOTHING, *indices.NAMES, segment.KEYED, segment.PRODUCT)
FLAGS = (0, segment.CODED, segment.WIDE, segment.CODED | segment.WIDE)
MEGABYTE = 1 << 20

every_spec = pytest.mark.parametrize("spec", SPECS)


pytestmark = pytest.mark.usefixtures("one_thread")


def laws(max_examples):
    return settings(deadline=None, max_examples=max_examples)


def unpack(data, numel):
    """The update, after all that a receiver may rely on was checked; None if it was refused."""
    try:
        update = segment.unpack(np.frombuffer(bytes(data), np.uint8), numel)
    except DecodeError:
        return None
    values = update.values
    assert update.numel == numel
    assert values.dtype in (np.float32, np.float64)
    assert np.isfinite(values).all()
    assert sum(piece.size for _, piece in update.pieces()) == values.size
    if update.indices is None:
        assert values.shape == (numel,)
    else:
        assert update.indices.dtype == np.int64
        assert update.indices.shape == values.shape
        places = update.indices.tolist()
        assert all(0 <= place < numel for place in places)
        assert all(a < b for a, b in pairwise(places))
    if numel < 10_000:
        dense = update.dense()
        assert torch.isfinite(dense).all()
        assert np.array_equal(dense.numpy()[slice(None) if update.indices is None else update.indices], values)
    return update


@cache
def payloads(spec):
    """Real ones, as (bytes, elements): single and double, few values and many, of random and of few magnitudes."""
    found = []
    few = 300 if spec.endswith("entropy") else 40  # elements, most of one magnitude, so that entropy coding pays
    for numel in (1, few, MATRIX):
        shape = SHAPE if numel == MATRIX else (numel,)
        for dtype in (np.float32, np.float64):
            random = np.random.default_rng(numel)
            vector = random.normal(size=numel) ** 3
            if numel == few:
                vector = np.where(random.random(numel) < 0.9, 1.0, random.choice([-1.0, 0.0, 0.25], numel))
            given_ = torch.from_numpy(vector.astype(dtype))
            found.append((compressor(spec, shape).encode(given_, (), 2**63 + 1)[0].tobytes(), numel))
    return tuple(found)


bodies = st.sampled_from(SPECS).flatmap(lambda spec: st.sampled_from(payloads(spec)))


def mutations(random, data, other):
    """Without end: one to four changes of a body each."""
    while True:
        altered = bytearray(data)
        for _ in range(random.integers(1, 5)):
            kind, size = random.integers(8), len(altered)
            place = int(random.integers(min(size, 24) if random.random() < 0.5 else size))  # often in the head
            if kind == 0:
                altered[place] ^= 1 << int(random.integers(8))
            elif kind == 1:
                altered[place] = int(random.choice([0, 1, 127, 128, 255, random.integers(256)]))
            elif kind == 2:
                altered[0] = int(random.choice(INDEX_CODES))
            elif kind == 3:
                altered[1] = int(random.choice(list(BY_ID))) | int(random.choice(FLAGS))
            elif kind == 4:
                del altered[place:]
            elif kind == 5:
                altered += random.bytes(int(random.integers(1, 9)))
            elif kind == 6:
                altered[place : place + int(random.integers(9))] = random.bytes(int(random.integers(9)))
            else:
                cut = int(random.integers(len(other) + 1))
                altered[place:] = other[cut:]
            if len(altered) < 2:
                break
        yield bytes(altered)


# --- valid bodies


@every_spec
def test_a_real_body_is_an_update_that_adds_like_its_dense_form(spec):
    for data, numel in payloads(spec):
        update = unpack(data, numel)
        assert update is not None
        dense, start = update.dense(), torch.arange(numel, dtype=torch.float64)
        out = start.clone()
        update.add_to(out)
        assert torch.equal(out, start + dense)
        update.subtract_from(out)
        assert torch.equal(out, start + dense - dense)


def test_every_value_code_and_index_code_is_among_them():
    heads = {(data[0], data[1]) for spec in SPECS for data, _ in payloads(spec)}
    written = [number for number, code in BY_ID.items() if number not in (5, 6)]
    assert {value for _, value in heads} >= {number | flags for number in written for flags in FLAGS}
    assert {index for index, _ in heads} >= {segment.ALL, indices.RICE, indices.BITMAP, segment.KEYED, segment.PRODUCT}


# --- altered bodies


@every_spec
def test_every_truncation_and_every_extension_is_refused(spec):
    for data, numel in payloads(spec):
        for size in range(len(data)):
            assert unpack(data[:size], numel) is None
        for extra in (b"\x00", b"\xff", b"\x01\x02\x03", bytes(9), data):
            assert unpack(data + extra, numel) is None


@every_spec
def test_every_flipped_bit_is_survived(spec):
    data, numel = payloads(spec)[2]
    for bit in range(8 * len(data)):
        altered = bytearray(data)
        altered[bit >> 3] ^= 1 << (bit & 7)
        unpack(altered, numel)


@every_spec
def test_hundreds_of_mutations_of_each_are_survived(spec):
    random = np.random.default_rng(SPECS.index(spec))
    for data, numel in payloads(spec):
        other, _ = payloads(SPECS[random.integers(len(SPECS))])[random.integers(6)]
        for altered, _ in zip(mutations(random, data, other), range(60), strict=False):
            unpack(altered, numel)


@laws(100)
@given(body=bodies, numel=st.integers(0, 2**62))
def test_a_body_of_another_size_is_refused(body, numel):
    data, right = body
    if numel != right:
        assert unpack(data, numel) is None
        with pytest.raises(DecodeError):
            decode(np.frombuffer(data, np.uint8), numel)


# --- products


@pytest.mark.parametrize("wide", [0, segment.WIDE])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1)])
def test_a_product_that_overflows_is_refused(wide, signs):
    """Each number of the two matrices is finite; a product, or the difference of two, is not."""
    kind = np.float64 if wide else np.float32
    large = np.sqrt(np.finfo(kind).max) * kind(4)
    left = np.array([[large, large]] * 3, kind)
    right = np.array([[large * signs[0], large * signs[1]]] * 3, kind)
    code = 0 if wide else 1
    head = bytes([segment.PRODUCT, code | wide]) + varint.pack(9) + varint.pack(3) + varint.pack(2)
    assert unpack(head + left.tobytes() + right.tobytes(), 9) is None


# --- invented bodies


@st.composite
def announcements(draw):
    """A body that begins like one: known codes, the right number of elements, then anything."""
    numel = draw(st.integers(0, 50) | st.integers(0, 2**20))
    value_id = draw(st.sampled_from(sorted(BY_ID))) | draw(st.sampled_from(FLAGS))
    index_code = draw(st.sampled_from(INDEX_CODES))
    head = bytes([index_code, value_id]) + varint.pack(numel)
    if index_code in (*indices.NAMES, segment.KEYED):
        head += varint.pack(draw(st.integers(0, 20) | st.integers(0, 2**62)))
        head += (
            draw(st.binary(min_size=8, max_size=8))
            if index_code == segment.KEYED
            else bytes([draw(st.integers(0, 50))])
        )
    elif index_code == segment.PRODUCT:
        head += varint.pack(draw(st.integers(0, 60))) + varint.pack(draw(st.integers(0, 60)))
    if value_id & segment.CODED and draw(st.booleans()):  # a stream that says that all symbols are the same
        head += draw(st.sampled_from([b"", b"\x01\x00\x00\x80\x3f", b"\x01\x00"])) + b"\x02\x00\x01"
    return head + draw(st.binary(max_size=100)), numel


@laws(300)
@given(data=st.binary(max_size=60), numel=st.integers(0, 60))
@example(data=b"", numel=0)
@example(data=b"\x02\x01", numel=1)
def test_random_bytes_are_survived(data, numel):
    unpack(data, numel)


@laws(1000)
@given(announced=announcements())
def test_plausible_heads_before_random_bytes_are_survived(announced):
    unpack(*announced)


PATTERNS = (b"\x00", b"\xff", b"\x80", b"\x7f", b"\xf0\x7f", b"\x01\x00\x80\xff", b"\x02\x7f\x7f")


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("code", BY_ID)
def test_values_of_odd_bit_patterns_are_finite_or_refused(code, flags):
    """Infinities, NaN, negative scales, grids that overflow, in every value code and at every length."""
    for index_code, matrices in ((segment.ALL, b""), (segment.PRODUCT, b"\x03\x02")):
        head = bytes([index_code, code | flags]) + varint.pack(9) + matrices
        for pattern in PATTERNS:
            for offset in range(len(pattern)):
                for size in range(1, 110):
                    unpack(head + (pattern[offset:] + pattern * size)[:size], 9)


# --- how much memory


@cache
def compiled():
    """All that is compiled when it is first used, which takes memory."""
    for spec in SPECS:
        for data, numel in payloads(spec):
            unpack(data, numel)


def peak_of(act):
    """Bytes that were allocated at most at a time while it acted."""
    compiled()
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refuse(data, numel):
    with pytest.raises(DecodeError):
        segment.unpack(np.frombuffer(data, np.uint8), numel)


def heads(numel, count):
    """Of every kind, which announce so much, with the fields that come before values."""
    for value_id in (number | flags for number in BY_ID for flags in FLAGS):
        begin = bytes([value_id]) + varint.pack(numel)
        yield bytes([segment.ALL]) + begin
        yield bytes([segment.KEYED]) + begin + varint.pack(count) + bytes(8)
        yield bytes([segment.PRODUCT]) + begin + varint.pack(1 << 10) + varint.pack(min(1 << 10, count))
        for index_code in indices.NAMES:
            for parameter in (0, 3, 8, 40, 255):
                yield bytes([index_code]) + begin + varint.pack(count) + bytes([parameter])


@pytest.mark.parametrize("tail", [b"", bytes(1000), b"\xff" * 1000], ids=["none", "zeros", "ones"])
@pytest.mark.parametrize(("numel", "count"), [(2**40, 2**39), (2**62, 2**62), (2**30, 2**30)])
def test_a_huge_announcement_allocates_nothing(numel, count, tail):
    def act():
        for head in heads(numel, count):
            refuse(head + tail, numel)
            refuse(head + tail, 7)

    assert peak_of(act) < MEGABYTE


def test_an_empty_segment_of_any_size_takes_no_memory_until_it_is_made_dense():
    body = bytes([segment.NOTHING, 1]) + varint.pack(2**60)
    found = []
    assert peak_of(lambda: found.append(unpack(body, 2**60))) < MEGABYTE
    assert found[0].values.size == 0


def constant_streams(code, flags, count):
    """A section of ``count`` equal numbers or symbols, in a few bytes."""
    if isinstance(code, Cast):
        return b"\x02\x00\x00" * code.dtype.itemsize
    width = 8 if flags & segment.WIDE else 4
    head = {4: bytes(width), 10: b"\x01\x00" + bytes(width), 11: bytes(width), 5: bytes(2 * width), 6: bytes(2 * width)}
    return head.get(code.wire_id, b"\x01" + bytes(width)) + b"\x02\x00\x00"


@pytest.mark.parametrize("index_code", [segment.ALL, segment.KEYED, segment.PRODUCT])
@pytest.mark.parametrize("code", BY_ID.values(), ids=lambda code: f"{code.wire_id}")
def test_a_few_bytes_that_say_much_take_memory_in_proportion_to_the_layout(code, index_code):
    """Entropy-coded constants: the smallest valid message of so many values."""
    numel = 1 << 16
    for flags in (segment.CODED, segment.CODED | segment.WIDE):
        head = bytes([index_code, code.wire_id | flags]) + varint.pack(numel)
        body = {
            segment.ALL: head + constant_streams(code, flags, numel),
            segment.KEYED: head + varint.pack(numel) + bytes(8) + constant_streams(code, flags, numel),
            segment.PRODUCT: head + varint.pack(256) + varint.pack(256) + 2 * constant_streams(code, flags, numel),
        }[index_code]
        found = []
        peak = peak_of(
            lambda body=body, found=found: found.append(segment.unpack(np.frombuffer(body, np.uint8), numel))
        )
        assert found[0].numel == numel
        assert peak < 64 * numel + MEGABYTE


def test_memory_is_in_proportion_to_the_bytes_that_arrived():
    """The densest honest message without entropy coding: a bit for each sign, a bit for each index."""
    count = 80_000
    payload, _ = compressor("topk:1+sign").encode(torch.ones(count), (), 1)
    data = payload.tobytes()
    assert peak_of(lambda: segment.unpack(payload, count)) < 40 * count
    for cut in (len(data) // 2, len(data) - 1):
        assert peak_of(lambda cut=cut: refuse(data[:cut], count)) < MEGABYTE / 2


# --- numbers in the head


@laws(300)
@given(number=st.integers(0, 2**63 - 1), before=st.binary(max_size=3), after=st.binary(max_size=3))
def test_a_varint_comes_back_with_the_place_behind_it(number, before, after):
    data = np.frombuffer(before + varint.pack(number) + after, np.uint8)
    assert varint.take(data, len(before)) == (number, data.size - len(after))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 8, b"\xff" * 9 + b"\x01", b"\x80\x00", b"\x81\x80\x00"])
def test_a_varint_that_is_cut_too_long_or_padded_is_refused(data):
    with pytest.raises(DecodeError):
        varint.take(np.frombuffer(data, np.uint8), 0)


# --- whole frames


@cache
def pushes():
    """Frames with a segment of each specification, a few at a time, and their layouts."""
    found = []
    for first in range(0, len(SPECS), 6):
        parts = [payloads(spec)[-2] for spec in SPECS[first : first + 6]]
        layout = Layout(tuple(Entry(f"{i}", (numel,), "float32", "parameter") for i, (_, numel) in enumerate(parts)))
        bodies = tuple(np.frombuffer(data, np.uint8) for data, _ in parts)
        found.append((Push(1, 2, 3, 4, bodies=bodies, layout=layout.hash).pack().tobytes(), layout))
    return tuple(found)


def received(frame, layout):
    """As a server reads it; None if it was refused."""
    try:
        message = messages.parse(np.frombuffer(bytes(frame), np.uint8))
        updates = messages.updates(message, layout)
    except DecodeError:
        return None
    assert [update.numel for update in updates] == [place.numel for place in layout.segments]
    assert all(np.isfinite(update.values).all() for update in updates)
    return updates


def test_real_frames_are_received():
    for frame, layout in pushes():
        assert received(frame, layout) is not None


def test_an_altered_frame_is_refused_by_its_checksum():
    random = np.random.default_rng(0)
    for frame, layout in pushes():
        for _, altered in zip(range(60), mutations(random, frame, frame), strict=False):
            assert altered == frame or received(altered, layout) is None


def test_an_altered_frame_with_a_checksum_that_fits_is_survived():
    random = np.random.default_rng(1)
    for frame, layout in pushes():
        for _, altered in zip(range(250), mutations(random, frame[:-4], frame), strict=False):
            received(altered + struct.pack("<I", zlib.crc32(altered)), layout)


def test_frames_whose_bodies_are_altered_are_survived():
    random = np.random.default_rng(2)
    for frame, layout in pushes():
        parts = wire.unpack(np.frombuffer(frame, np.uint8))
        for _ in range(100):
            bodies = list(parts.bodies)
            for place in range(len(bodies)):
                if random.random() < 0.3:
                    altered = next(mutations(random, parts.bodies[place].tobytes(), parts.bodies[0].tobytes()))
                    bodies[place] = np.frombuffer(altered, np.uint8)
            received(wire.pack(parts.kind, parts.layout, parts.fields, bodies), layout)
