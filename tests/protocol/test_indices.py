"""The codes of indices: each gives them back, the smallest is taken, and none trusts what arrives."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from protocol import DecodeError
from protocol.coding import bitmap, blocks, raw, rice, varint
from protocol.coding.indices import BITMAP, BLOCKS, NAMES, RAW, RICE, decode, encode, sizes

LARGE = 25_000_000


def laws(max_examples):
    return settings(deadline=None, max_examples=max_examples)


def ascending(indices):
    return np.array(sorted(indices), np.int64)


def random(numel, count, seed=0):
    """A random selection."""
    return ascending(np.random.default_rng(seed).choice(numel, count, replace=False, shuffle=False))


def rows(numel, width, count, seed=0):
    """Whole rows of ``width`` elements."""
    return (random(numel // width, count, seed)[:, None] * width + np.arange(width)).ravel()


@st.composite
def selections(draw, max_numel=2**40):
    """Indices and their range: scattered, in runs and strides, in blocks, nearly all; at least one."""
    numel = draw(st.integers(1, 70) | st.integers(1, 5000) | st.integers(1, max_numel))
    runs = draw(st.lists(st.tuples(st.integers(0, numel - 1), st.integers(1, 300), st.integers(1, 9)), max_size=5))
    places = {start + i * stride for start, length, stride in runs for i in range(length)}
    places |= set(draw(st.lists(st.integers(0, numel - 1), max_size=20)))
    if numel <= 5000 and draw(st.booleans()):
        places ^= set(range(numel))
    places = {p for p in places if p < numel}
    assume(places)
    return ascending(places), numel


def forms(indices, numel):
    """Every code's stream, chosen or not: (code, parameter, data)."""
    gaps = rice.plan(indices, numel)
    yield RICE, gaps.b, rice.write(indices, gaps)
    yield RAW, 0, raw.encode(indices, numel)
    if numel <= 2**20:
        yield BITMAP, 0, bitmap.encode(indices, numel)
    for w in blocks.WIDTHS:
        yield BLOCKS, w, blocks.write(indices, blocks.Plan(w, rice.plan(indices, numel, w)))


def in_bits(numbers, width):
    """Written a second time: ``width`` bits of each, all of them filling bytes from the lowest bit upward."""
    whole = sum(int(number) << i * width for i, number in enumerate(numbers))
    return whole.to_bytes(-(-len(numbers) * width // 8), "little")


def rice_size(gaps, b):
    return -(-len(gaps) * b // 8) - (-sum(1 + (int(gap) >> b) for gap in gaps) // 8)


def best_rice_size(numbers):
    """That of the lowest parameter with the fewest bits, out of all."""
    gaps = np.diff(numbers, prepend=-1) - 1
    return rice_size(gaps, min(range(41), key=lambda b: len(gaps) * b + sum(int(gap) >> b for gap in gaps)))


def blocks_size(indices, w):
    numbers = np.unique(indices >> w)
    return len(varint.pack(numbers.size)) + 1 + best_rice_size(numbers) + numbers.size * 2**w // 8


def check(found, count, numel):
    """That ``found`` is ``count`` ascending indices below ``numel``."""
    assert found.dtype == np.int64
    assert found.shape == (count,)
    assert count == 0 or (found[0] >= 0 and found[-1] < numel)
    assert all(a < b for a, b in pairwise(found.tolist()))


# --- round trip


@laws(300)
@given(selection=selections())
@example(selection=(ascending([0]), 1))
@example(selection=(ascending(range(64)), 64))
@example(selection=(ascending([0, 2**40 - 1]), 2**40))
@example(selection=(ascending(range(2**39, 2**39 + 600)), 2**40))
def test_every_code_gives_the_indices_back(selection):
    indices, numel = selection
    for code, parameter, data in forms(indices, numel):
        assert data.dtype == np.uint8
        assert 0 <= parameter < 256
        assert np.array_equal(decode(code, parameter, data, indices.size, numel), indices), NAMES[code]


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 63, 64, 65, 1000, 4096])
def test_every_code_can_send_all_elements(numel):
    for code, parameter, data in forms(np.arange(numel), numel):
        assert np.array_equal(decode(code, parameter, data, numel, numel), np.arange(numel)), NAMES[code]


@pytest.mark.parametrize("indices", [rows(10**6, 64, 300), random(10**6, 10_000), random(10**6, 400_000)], ids=len)
def test_every_code_gives_many_indices_back(indices):
    for code, parameter, data in forms(indices, 10**6):
        assert np.array_equal(decode(code, parameter, data, indices.size, 10**6), indices), NAMES[code]


def test_raw_indices_may_need_more_than_a_word_holds_from_its_first_byte():
    indices, numel = ascending([5, 2**61, 2**61 + 1, 2**62, 2**63 - 2]), 2**63 - 1
    assert np.array_equal(raw.decode(raw.encode(indices, numel), indices.size, numel), indices)


def test_a_stream_is_read_from_a_view_that_cannot_be_written():
    indices = rows(10**5, 64, 20)
    for code, parameter, data in forms(indices, 10**5):
        view = np.frombuffer(b"x" + data.tobytes(), np.uint8)[1:]
        assert np.array_equal(decode(code, parameter, view, indices.size, 10**5), indices)


# --- what the documentation says, written a second time


@laws(100)
@given(selection=selections(max_numel=20_000))
def test_a_bitmap_has_a_bit_for_every_element(selection):
    indices, numel = selection
    expected = sum(1 << int(i) for i in indices).to_bytes(-(-numel // 8), "little")
    assert bitmap.encode(indices, numel).tobytes() == expected


@laws(100)
@given(selection=selections())
def test_raw_indices_have_the_bits_of_the_largest(selection):
    indices, numel = selection
    width = math.ceil(math.log2(max(2, numel)))
    assert raw.encode(indices, numel).tobytes() == in_bits(indices, width)


@laws(100)
@given(selection=selections(), w=st.sampled_from(blocks.WIDTHS))
def test_blocks_are_numbers_followed_by_bitmaps(selection, w):
    indices, numel = selection
    numbers = np.unique(indices >> w)
    gaps = rice.plan(numbers, -(-numel >> w))
    bitmaps = [sum(1 << int(i & 2**w - 1) for i in indices[indices >> w == number]) for number in numbers]
    expected = varint.pack(numbers.size) + bytes([gaps.b]) + rice.write(numbers, gaps).tobytes()
    found = blocks.write(indices, blocks.Plan(w, rice.plan(indices, numel, w)))
    assert found.tobytes() == expected + in_bits(bitmaps, 2**w)


@laws(200)
@given(number=st.integers(0, 2**63 - 1), tail=st.binary(max_size=2))
@example(number=0, tail=b"")
@example(number=127, tail=b"\xff")
@example(number=2**63 - 1, tail=b"")
def test_a_varint_comes_back_with_the_place_behind_it(number, tail):
    packed = varint.pack(number)
    assert len(packed) == max(1, -(-number.bit_length() // 7))
    assert varint.take(np.frombuffer(packed + tail, np.uint8), 0) == (number, len(packed))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff" * 9, b"\x80" * 9 + b"\x01"])
def test_a_varint_that_is_cut_off_or_padded_or_too_long_is_refused(data):
    with pytest.raises(DecodeError):
        varint.take(np.frombuffer(data, np.uint8), 0)


# --- sizes, and the choice by them


@laws(300)
@given(selection=selections())
@example(selection=(ascending(range(0, 256 * 40, 2)), 2**30))
@example(selection=(ascending(i * 4096 + j for i in range(9) for j in range(8)), 2**40))
def test_the_sizes_are_those_of_the_streams_and_the_least_is_taken(selection):
    indices, numel = selection
    found = sizes(indices, numel)
    assert found == {
        "rice": best_rice_size(indices),
        "bitmap": math.ceil(numel / 8),
        "blocks": min(blocks_size(indices, w) for w in blocks.WIDTHS),
        "raw": math.ceil(indices.size * math.ceil(math.log2(max(2, numel))) / 8),
    }
    code, parameter, data = encode(indices, numel)
    assert data.size == found[NAMES[code]] == min(found.values())
    equals = [c for c in NAMES if found[NAMES[c]] == data.size]
    assert code == (BITMAP if BITMAP in equals else min(equals))
    assert np.array_equal(decode(code, parameter, data, indices.size, numel), indices)


@laws(300)
@given(selection=selections(), w=st.sampled_from(blocks.WIDTHS))
def test_no_width_of_blocks_is_passed_over_that_could_win(selection, w):
    indices, numel = selection
    gaps, numbers = rice.plan(indices, numel), rice.plan(indices, numel, w)
    count = numbers.numbers
    assert blocks.bound(w, count, indices.size, gaps.bits) <= numbers.bits + count * 2**w
    assert blocks.bound(w, max(1, count - 1), indices.size, gaps.bits) <= numbers.bits + count * 2**w  # nor by a guess


@laws(200)
@given(selection=selections())
def test_a_bitmap_is_rice_without_remainders_and_empty_bytes_behind_it(selection):
    """So it never takes fewer bytes than Golomb-Rice, whose parameter may be 0."""
    indices, numel = selection
    assume(numel <= 2**20)
    found = bitmap.encode(indices, numel)
    stream = rice.write(indices, rice.Plan(0, indices.size, int(indices[-1]) + 1 - indices.size))
    assert np.array_equal(found[: stream.size], stream)
    assert not found[stream.size :].any()
    assert rice.plan(indices, numel).bits <= 8 * stream.size


@pytest.mark.parametrize(
    ("indices", "numel", "expected"),
    [
        (random(10**6, 10_000), 10**6, (RICE, 6)),
        (random(10**6, 1000), 10**6, (RICE, 9)),
        (random(10**6, 500_000), 10**6, (BITMAP, 0)),
        (np.arange(1000), 1000, (BITMAP, 0)),
        (rows(10**6, 8, 1000), 10**6, (BLOCKS, 3)),
        (rows(10**6, 64, 200), 10**6, (BLOCKS, 6)),
        (rows(2**20, 1024, 20), 2**20, (BLOCKS, 8)),
        (rows(2**20, 1024, 20)[::2], 2**20, (BLOCKS, 8)),
        (ascending([0]), 1, (BITMAP, 0)),
        (ascending([3]), 2**16, (RICE, 1)),
        (ascending([60_000]), 2**16, (RAW, 0)),
        (ascending([20_000, 60_000]), 2**16, (RAW, 0)),
    ],
    ids=lambda value: None if isinstance(value, int | np.ndarray) else f"{NAMES[value[0]]}-{value[1]}",
)
def test_the_pattern_decides_the_code(indices, numel, expected):
    assert encode(indices, numel)[:2] == expected


@pytest.mark.parametrize(("count", "rate"), [(250_000, 1.01), (25_000, 1.02), (2500, 1.02)])
def test_a_random_selection_takes_hardly_more_than_its_information(count, rate):
    _, _, data = encode(random(LARGE, count), LARGE)
    information = math.lgamma(LARGE + 1) - math.lgamma(count + 1) - math.lgamma(LARGE - count + 1)
    assert information <= 8 * math.log(2) * data.size <= rate * information


# --- what arrives broken


@laws(60)
@given(selection=selections(max_numel=50_000))
def test_every_truncation_is_refused_by_every_code(selection):
    indices, numel = selection
    for code, parameter, data in forms(indices, numel):
        for size in {*range(min(data.size, 12)), *range(max(0, data.size - 12), data.size), data.size // 2}:
            with pytest.raises(DecodeError):
                decode(code, parameter, data[: min(size, data.size - 1)], indices.size, numel)


@laws(60)
@given(selection=selections(max_numel=50_000), extra=st.binary(min_size=1, max_size=9))
def test_anything_behind_the_stream_is_refused_by_every_code(selection, extra):
    indices, numel = selection
    for code, parameter, data in forms(indices, numel):
        longer = np.concatenate([data, np.frombuffer(extra, np.uint8)])
        with pytest.raises(DecodeError):
            decode(code, parameter, longer, indices.size, numel)


@laws(40)
@given(selection=selections(max_numel=3000))
def test_every_flipped_bit_is_refused_or_gives_other_indices_in_every_code(selection):
    indices, numel = selection
    for code, parameter, data in forms(indices, numel):
        for bit in range(min(8 * data.size, 2000)):
            altered = data.copy()
            altered[bit >> 3] ^= 1 << (bit & 7)
            try:
                found = decode(code, parameter, altered, indices.size, numel)
            except DecodeError:
                continue
            check(found, indices.size, numel)
            assert not np.array_equal(found, indices)


@laws(60)
@given(seed=st.integers(0, 2**32 - 1), clustered=st.booleans())
def test_many_changes_to_a_long_stream_are_refused_or_give_valid_indices(seed, clustered):
    chance = np.random.default_rng(seed)
    numel = int(chance.integers(2000, 200_000))
    indices = rows(numel, 16, numel // 200, seed) if clustered else random(numel, numel // 20, seed)
    for code, parameter, data in forms(indices, numel):
        for _ in range(20):
            altered = data.copy()
            for at in chance.integers(0, data.size, int(chance.integers(1, 4))):
                altered[at] = chance.integers(0, 256)
            start, stop = np.sort(chance.integers(0, data.size + 1, 2))
            if chance.random() < 0.3:
                altered = np.concatenate([altered[:start], altered[stop:]])
            other = max(0, parameter + int(chance.integers(-1, 2)))
            count = max(1, indices.size + int(chance.integers(-1, 2)))
            try:
                found = decode(code, other, altered, count, numel)
            except DecodeError:
                continue
            check(found, count, numel)


@laws(1000)
@given(
    code=st.integers(0, 9) | st.sampled_from(list(NAMES)),
    parameter=st.integers(0, 255) | st.integers(0, 9),
    data=st.binary(max_size=80),
    count=st.integers(1, 20) | st.integers(1, 2**62),
    numel=st.integers(1, 600) | st.integers(1, 2**63 - 1),
)
@example(code=BLOCKS, parameter=8, data=b"\x01\x28" + b"\0" * 5 + b"\1" * 33, count=1, numel=2**63 - 1)
def test_random_bytes_are_refused_or_are_valid_indices(code, parameter, data, count, numel):
    assume(count <= numel)
    try:
        found = decode(code, parameter, np.frombuffer(data, np.uint8), count, numel)
    except DecodeError:
        return
    check(found, count, numel)


def bits(*numbers):
    return np.array(numbers, np.uint8)


@pytest.mark.parametrize(
    ("code", "parameter", "data", "count", "numel", "message"),
    [
        (0, 0, bits(1), 1, 8, "unknown index code 0"),
        (6, 0, bits(1), 1, 8, "unknown index code 6"),
        (BITMAP, 1, bits(1), 1, 8, "unknown index code 3 with parameter 1"),
        (RAW, 1, bits(1), 1, 8, "unknown index code 5 with parameter 1"),
        (BITMAP, 0, bits(1, 0), 1, 8, "2 bytes instead of 1"),
        (BITMAP, 0, bits(3), 1, 8, "does not hold 1 indices"),
        (BITMAP, 0, bits(1), 2, 8, "does not hold 2 indices"),
        (BITMAP, 0, bits(128), 1, 7, "padding"),
        (BITMAP, 0, bits(1), 9, 8, "cannot hold 9"),
        (RAW, 0, bits(1, 0), 1, 8, "2 bytes instead of 1"),
        (RAW, 0, bits(0o11), 2, 8, "do not ascend"),
        (RAW, 0, bits(7), 1, 7, "beyond the end"),
        (RAW, 0, bits(0o171), 2, 8, "padding"),
        (BLOCKS, 2, bits(1, 0, 1, 1), 1, 8, "2\\*\\*2 elements; valid is from 2\\*\\*3 to 2\\*\\*8"),
        (BLOCKS, 9, bits(1, 0, 1, 1), 1, 8, "2\\*\\*9 elements"),
        (BLOCKS, 3, bits(1, 0, 1, 0), 1, 8, "do not hold 1 indices"),
        (BLOCKS, 3, bits(1, 0, 1, 3), 1, 8, "do not hold 1 indices"),
        (BLOCKS, 3, bits(1, 0, 1, 64), 1, 6, "beyond the end"),
        (BLOCKS, 3, bits(1, 0, 2, 1), 1, 8, "beyond the end"),
        (BLOCKS, 3, bits(1, 0, 1, 0, 1), 1, 8, "padding"),
        (BLOCKS, 3, bits(2, 0, 3, 0, 3), 2, 16, "an empty one"),
        (BLOCKS, 3, bits(2, 0, 3, 3, 0), 2, 16, "an empty one"),
        (BLOCKS, 3, bits(2, 0, 3, 1, 1), 1, 16, "announce 2 blocks"),
        (BLOCKS, 3, bits(1, 0, 1, 255), 9, 16, "announce 1 blocks"),
        (BLOCKS, 3, bits(2, 0, 3), 2, 16, "announce 2 blocks"),
        (BLOCKS, 3, bits(2), 2, 16, "announce 2 blocks"),
        (BLOCKS, 3, bits(255), 2, 16, "ends inside a number"),
        (BLOCKS, 3, bits(1, 41, *[1] * 9), 1, 16, "Rice parameter 41"),
    ],
)
def test_what_is_wrong_is_refused_by_name(code, parameter, data, count, numel, message):
    with pytest.raises(DecodeError, match=message):
        decode(code, parameter, data, count, numel)


@pytest.mark.parametrize("code", NAMES)
def test_an_announcement_that_the_data_cannot_hold_is_refused(code):
    with pytest.raises(DecodeError):
        decode(code, 3 * (code == BLOCKS), bits(1, 0, 1, 1), 2**50, 2**60)
