"""Rice coding of indices: it gives them back, in few bits, and survives whatever arrives."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import DecodeError
from protocol.coding import rice, varint
from protocol.selections import TopK

LARGE = 25_000_000


def laws(max_examples):
    return settings(deadline=None, max_examples=max_examples)


def ascending(*indices):
    return np.array(indices, np.int64)


def chosen(numel, count, seed):
    """A random selection, ascending."""
    random = np.random.default_rng(seed)
    return np.sort(random.choice(numel, count, replace=False, shuffle=False)).astype(np.int64)


@st.composite
def selections(draw, max_numel=2**50):
    """Ascending indices and their range: scattered, clustered, dense, at both ends."""
    numel = draw(st.integers(1, 60) | st.integers(1, max_numel))
    runs = draw(st.lists(st.tuples(st.integers(0, numel - 1), st.integers(1, 30), st.integers(1, 9)), max_size=5))
    places = {start + i * stride for start, length, stride in runs for i in range(length)}
    places |= set(draw(st.lists(st.integers(0, numel - 1), max_size=20)))
    return ascending(*sorted(p for p in places if p < numel)), numel


def valid(indices, count, numel):
    return (
        indices.dtype == np.int64
        and indices.shape == (count,)
        and (count == 0 or (indices[0] >= 0 and indices[-1] < numel))
        and all(a < b for a, b in pairwise(indices.tolist()))
    )


# --- round trip


@laws(300)
@given(selection=selections())
@example(selection=(ascending(), 1))
@example(selection=(ascending(0), 1))
@example(selection=(ascending(*range(64)), 64))
@example(selection=(ascending(2**50 - 1), 2**50))
@example(selection=(ascending(0, 2**50 - 1), 2**50))
@example(selection=(ascending(0, 1, 2, 2**40), 2**40 + 1))
def test_indices_come_back(selection):
    indices, numel = selection
    b, data = rice.encode(indices, numel)
    assert data.dtype == np.uint8
    assert 0 <= b <= rice.MAX_PARAMETER
    assert np.array_equal(rice.decode(data, b, indices.size, numel), indices)


@pytest.mark.parametrize("b", range(0, rice.MAX_PARAMETER + 1, 8))
def test_every_parameter_decodes_what_the_docstring_of_the_format_describes(b):
    """Written here a second time, bit by bit: remainders, then unary quotients, lowest bit first."""
    gaps = [0, 1, (3 << b) + (b > 0), (1 << b) - 1, (40 << b) | ((1 << b) >> 1)]
    indices, numel = ascending(*(np.cumsum(np.array(gaps) + 1) - 1)), 2**48
    remainders = "".join(format(gap & ((1 << b) - 1), f"0{b}b")[::-1] if b else "" for gap in gaps)
    unary = "".join("0" * (gap >> b) + "1" for gap in gaps)
    data = b"".join(
        int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little") if bits else b"" for bits in (remainders, unary)
    )
    assert np.array_equal(rice.decode(np.frombuffer(data, np.uint8), b, len(gaps), numel), indices)


# --- how many bits


@pytest.mark.parametrize("density", [0.1, 0.01, 0.001, 0.0001])
def test_a_random_selection_takes_at_most_three_percent_more_than_its_information(density):
    count = TopK(density).count(LARGE)
    b, data = rice.encode(chosen(LARGE, count, seed=count), LARGE)
    stream = 8 * (len(varint.pack(count)) + len(bytes([b])) + data.size)
    information = math.lgamma(LARGE + 1) - math.lgamma(count + 1) - math.lgamma(LARGE - count + 1)
    assert information / math.log(2) <= stream <= 1.03 * information / math.log(2)


@laws(200)
@given(selection=selections())
def test_no_selection_takes_more_than_the_bound_of_the_docstring(selection):
    indices, numel = selection
    b, data = rice.encode(indices, numel)
    assert 8 * data.size <= indices.size * (b + 1) + numel / 2**b + 2 * 7  # two streams, each whole bytes


@pytest.mark.parametrize("numel", [10**4, 10**6])
@pytest.mark.parametrize("start", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("density", [0.0001, 0.001, 0.01])
def test_a_cluster_stays_within_the_bound_of_the_usual_parameter(numel, start, density):
    count = max(1, round(density * numel))
    first = min(int(start * numel), numel - count)
    indices = np.arange(first, first + count, dtype=np.int64)
    b, data = rice.encode(indices, numel)
    assert np.array_equal(rice.decode(data, b, count, numel), indices)
    usual = max(0, round(math.log2(0.7 * numel / count)))
    assert 8 * data.size <= count * (usual + 1) + numel / 2**usual + 2 * 7


@laws(300)
@given(selection=selections().filter(lambda s: s[0].size))
@example(selection=(ascending(*range(2**19, 2**19 + 500)), 2**20))  # far from the density's parameter
@example(selection=(ascending(*range(0, 2**20, 2**10), 2**40 - 1), 2**40))
def test_the_parameter_is_the_lowest_with_the_fewest_bits_of_all(selection):
    indices, numel = selection
    gaps = np.diff(indices, prepend=-1) - 1
    bits = [indices.size * (b + 1) + int((gaps >> b).sum()) for b in range(rice.MAX_PARAMETER + 1)]
    plan = rice.plan(indices, numel)
    assert plan.b == bits.index(min(bits))
    assert plan.bits == bits[plan.b]
    assert plan.size == rice.write(indices, plan).size


@laws(200)
@given(selection=selections().filter(lambda s: s[0].size), w=st.integers(1, 8))
def test_numbers_of_blocks_are_planned_without_being_written_down(selection, w):
    indices, numel = selection
    assert rice.plan(indices, numel, w) == rice.plan(np.unique(indices >> w), (numel - 1 >> w) + 1)


# --- what arrives broken


@laws(60)
@given(selection=selections().filter(lambda s: s[0].size))
def test_every_truncation_is_refused(selection):
    indices, numel = selection
    b, data = rice.encode(indices, numel)
    for size in range(data.size):
        with pytest.raises(DecodeError):
            rice.decode(data[:size], b, indices.size, numel)


@laws(60)
@given(selection=selections())
def test_every_flipped_bit_is_refused_or_gives_other_indices(selection):
    indices, numel = selection
    b, data = rice.encode(indices, numel)
    for bit in range(8 * data.size):
        altered = data.copy()
        altered[bit >> 3] ^= 1 << (bit & 7)
        try:
            found = rice.decode(altered, b, indices.size, numel)
        except DecodeError:
            continue
        assert valid(found, indices.size, numel)
        assert not np.array_equal(found, indices)


@laws(60)
@given(selection=selections(), extra=st.binary(min_size=1, max_size=3))
def test_anything_behind_the_stream_is_refused(selection, extra):
    indices, numel = selection
    b, data = rice.encode(indices, numel)
    with pytest.raises(DecodeError):
        rice.decode(np.concatenate([data, np.frombuffer(extra, np.uint8)]), b, indices.size, numel)


@laws(300)
@given(
    data=st.binary(max_size=60),
    b=st.integers(0, 255) | st.integers(0, 8),
    count=st.integers(0, 20) | st.integers(0, 2**62),
    numel=st.integers(0, 100) | st.integers(0, 2**62),
)
def test_random_bytes_are_refused_or_are_valid_indices(data, b, count, numel):
    try:
        found = rice.decode(np.frombuffer(data, np.uint8), b, count, numel)
    except DecodeError:
        return
    assert valid(found, count, numel)


@pytest.mark.parametrize("b", [rice.MAX_PARAMETER, rice.MAX_PARAMETER - 1])
@pytest.mark.parametrize("wrap", [2**22, 2**23, 2**24])
def test_a_quotient_that_would_wrap_around_is_refused(b, wrap):
    """Shifted by ``b``, such a quotient is negative in 64 bits: an index before the array."""
    data = np.zeros(-(-b // 8) + wrap // 8 + 1, np.uint8)
    data[-1] = 1
    with pytest.raises(DecodeError, match="beyond the end"):
        rice.decode(data, b, 1, 1000)


def test_a_parameter_out_of_range_is_refused_by_name():
    with pytest.raises(DecodeError, match="Rice parameter 41; valid is at most 40"):
        rice.decode(np.zeros(100, np.uint8), 41, 1, 1000)
