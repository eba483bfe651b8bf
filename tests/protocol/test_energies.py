"""Sketches and energies on the wire: what is packed comes back as near as it can be; what is malformed is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol.compressors import Norms
from protocol.energies import pack_energies, pack_sketch, unpack_energies, unpack_sketch
from protocol.errors import DecodeError
from protocol.kernels.sketch import COLUMNS
from protocol.ledger import sketch

laws = settings(deadline=None, max_examples=200)
LARGEST = float(np.finfo(np.float32).max)
squares = st.just(0.0) | st.floats(1e-30, 1e30)


@laws
@given(arrays.arrays(np.float64, COLUMNS, elements=st.floats(-1e30, 1e30)))
def test_a_sketch_comes_back_to_half_a_step_of_its_largest_column(columns):
    data = pack_sketch(columns)
    largest = float(np.abs(columns).max())
    assert len(data) == COLUMNS + 4
    assert np.abs(unpack_sketch(data) - columns).max() <= largest / 254 * (1 + 1e-6) + 1e-36


@laws
@given(arrays.arrays(np.int8, COLUMNS, elements=st.integers(-127, 127)), st.integers(-60, 60))
def test_what_one_byte_can_hold_comes_back_exactly(columns, power):
    columns[0] = 127
    values = columns.astype(np.float64) * 2.0**power
    assert np.array_equal(unpack_sketch(pack_sketch(values)), values)


@pytest.mark.parametrize("value", [0.0, 1e-60, math.inf, math.nan, 1e60])
def test_a_sketch_that_has_no_scale_is_nothing_and_never_malformed(value):
    assert not unpack_sketch(pack_sketch(np.full(COLUMNS, value))).any()


def test_rounding_hardly_changes_the_norm_of_a_sketch():
    vector = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    found = np.linalg.norm(unpack_sketch(pack_sketch(sketch(vector))))
    assert found == pytest.approx(np.linalg.norm(sketch(vector)), rel=2e-3)


@laws
@given(st.binary(max_size=COLUMNS + 10))
def test_a_sketch_of_another_length_is_refused(data):
    if len(data) != COLUMNS + 4:
        with pytest.raises(DecodeError, match=f"takes {len(data)} bytes instead of 260"):
            unpack_sketch(data)


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf, -math.inf])
def test_a_sketch_with_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(DecodeError, match="has the scale"):
        unpack_sketch(np.array([scale], "<f4").tobytes() + bytes(COLUMNS))


@laws
@given(st.binary(min_size=COLUMNS + 4, max_size=COLUMNS + 4))
def test_whatever_arrives_is_a_finite_sketch_or_refused(data):
    try:
        assert np.isfinite(unpack_sketch(data)).all()
    except DecodeError:
        assert not 0.0 <= float(np.frombuffer(data[:4], "<f4")[0]) < math.inf


# --- energies


@laws
@given(st.lists(st.tuples(squares, squares), max_size=20))
def test_energies_come_back_in_float32(pairs):
    data = pack_energies([Norms(before=before, left=left) for before, left in pairs])
    assert len(data) == 8 * len(pairs)
    found = unpack_energies(data, len(pairs))
    assert [one.before for one in found] == pytest.approx([before for before, _ in pairs], rel=1e-7)
    assert [one.left for one in found] == pytest.approx([left for _, left in pairs], rel=1e-7)


def test_energies_beyond_float32_are_its_largest():
    assert unpack_energies(pack_energies([Norms(before=1e300, left=1e39)]), 1) == [(LARGEST, LARGEST)]


def test_without_error_feedback_what_is_left_behind_is_what_was_discarded():
    norms = Norms(before=4.0, sent=1.0, left=0.0, discarded=3.0)
    assert unpack_energies(pack_energies([norms, Norms(before=4.0, left=2.0, discarded=1.0)]), 2) == [(4, 3), (4, 2)]


@laws
@given(st.binary(max_size=80), st.integers(0, 8))
def test_whatever_arrives_is_finite_energies_or_refused(data, segments):
    try:
        found = unpack_energies(data, segments)
    except DecodeError:
        values = np.frombuffer(data, "<f4") if len(data) == 8 * segments else np.array([math.nan])
        assert not (np.isfinite(values).all() and (values >= 0).all())
    else:
        assert len(found) == segments
        assert all(0 <= value < math.inf for one in found for value in one)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_energies_that_are_negative_or_not_finite_are_refused(value):
    with pytest.raises(DecodeError, match="negative or not finite"):
        unpack_energies(np.array([1.0, value], "<f4").tobytes(), 1)


def test_energies_of_another_number_of_segments_are_refused():
    with pytest.raises(DecodeError, match="take 16 bytes instead of 24"):
        unpack_energies(pack_energies([Norms(), Norms()]), 3)
