"""Packed digits: symbols come back, in as few bytes as whole symbols allow, and the layout is the one described."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import DecodeError
from protocol.coding import digits

WIDTHS = {2: 8, 3: 5, 4: 4, 5: 3, 6: 3, 7: 2, 16: 2, 17: 1, 255: 1, 256: 1}
every_base = pytest.mark.parametrize("base", WIDTHS)


def laws(max_examples):
    return settings(deadline=None, max_examples=max_examples)


def some(count, base, seed=0):
    return np.random.default_rng(seed).integers(0, base, count).astype(np.uint8)


@st.composite
def messages(draw):
    """A base and symbols of it."""
    base = draw(st.sampled_from(list(WIDTHS)) | st.integers(2, 256))
    return base, np.array(draw(st.lists(st.integers(0, base - 1), max_size=40)), np.uint8)


def test_a_byte_holds_as_many_symbols_as_fit():
    assert {base: digits.per_byte(base) for base in WIDTHS} == WIDTHS
    for base in range(2, 257):
        assert base ** digits.per_byte(base) <= 256 < base ** (digits.per_byte(base) + 1)


@pytest.mark.parametrize("base", [-3, 0, 1, 257])
def test_a_base_that_does_not_fit_into_bytes_is_named(base):
    with pytest.raises(ValueError, match=f"base {base} "):
        digits.per_byte(base)


@laws(300)
@given(message=messages())
def test_symbols_come_back(message):
    base, symbols = message
    data = digits.pack(symbols, base)
    assert data.dtype == np.uint8
    assert data.size == digits.size(symbols.size, base)
    assert np.array_equal(digits.unpack(data, symbols.size, base), symbols)


@laws(300)
@given(message=messages())
def test_the_first_symbol_is_the_lowest_digit(message):
    base, symbols = message
    width = digits.per_byte(base)
    groups = [symbols.tolist()[i : i + width] for i in range(0, symbols.size, width)]
    assert digits.pack(symbols, base).tolist() == [sum(s * base**j for j, s in enumerate(g)) for g in groups]


def test_bases_that_are_powers_of_two_fill_bits_from_the_lowest_upward():
    bits, nibbles = some(1003, 2), some(1003, 16)
    assert np.array_equal(digits.pack(bits, 2), np.packbits(bits, bitorder="little"))
    padded = np.append(nibbles, np.uint8(0))
    assert np.array_equal(digits.pack(nibbles, 16), padded[::2] | padded[1::2] << 4)


def test_symbols_that_take_a_byte_each_are_not_copied():
    symbols = some(100, 256)
    assert digits.pack(symbols, 256) is symbols
    assert np.shares_memory(digits.unpack(symbols, symbols.size, 256), symbols)


@every_base
@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_chunks_that_begin_at_whole_bytes_join_to_the_whole(base, chunk):
    symbols = some(1003, base)
    step = chunk * digits.per_byte(base)
    data = np.full(digits.size(symbols.size, base), 255, np.uint8)
    back = np.full(symbols.size, 255, np.uint8)
    for start in range(0, symbols.size, step):
        part = symbols[start : start + step]
        at = start // digits.per_byte(base)
        place = data[at : at + digits.size(part.size, base)]
        digits.pack_into(part, base, place)
        digits.unpack_into(place, base, back[start : start + step])
    assert np.array_equal(data, digits.pack(symbols, base))
    assert np.array_equal(back, symbols)


@every_base
def test_what_arrives_is_read_where_it_lies(base):
    """Bytes of a frame cannot be written to, and begin anywhere."""
    symbols = some(1003, base)
    frame = np.frombuffer(b"x" + digits.pack(symbols, base).tobytes(), np.uint8)
    assert not frame.flags.writeable
    assert np.array_equal(digits.unpack(frame[1:], symbols.size, base), symbols)


# --- what arrives broken


@laws(300)
@given(base=st.sampled_from(list(WIDTHS)) | st.integers(2, 256), data=st.binary(max_size=20), spare=st.integers(0, 8))
def test_bytes_are_refused_unless_they_are_what_pack_writes(base, data, spare):
    """Whatever is read packs to the same bytes: there is one way to write symbols."""
    arrived = np.frombuffer(data, np.uint8)
    count = max(0, arrived.size * digits.per_byte(base) - spare)
    try:
        symbols = digits.unpack(arrived, count, base)
    except DecodeError:
        return
    assert symbols.shape == (count,)
    assert (symbols < base).all()
    assert np.array_equal(digits.pack(symbols, base), arrived)


@every_base
def test_every_byte_that_is_no_combination_of_digits_is_refused(base):
    width = digits.per_byte(base)
    for byte in range(256):
        data = np.array([0, byte, 0], np.uint8)
        if byte < base**width:
            assert digits.unpack(data, 3 * width, base)[width : 2 * width].tolist() == [
                byte // base**j % base for j in range(width)
            ]
        else:
            with pytest.raises(DecodeError, match=f"a byte holds {byte}; "):
                digits.unpack(data, 3 * width, base)


@pytest.mark.parametrize("base", [base for base, width in WIDTHS.items() if width > 1])
def test_digits_behind_the_last_symbol_must_be_zero(base):
    width = digits.per_byte(base)
    for used in range(1, width):
        data = digits.pack(np.full(width + used, base - 1, np.uint8), base)
        digits.unpack(data, width + used, base)
        data[-1] += base**used
        with pytest.raises(DecodeError, match="not zero"):
            digits.unpack(data, width + used, base)


@every_base
@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_bytes_is_refused(base, change):
    data = np.zeros(digits.size(100, base) + change, np.uint8)
    with pytest.raises(DecodeError, match=f"100 symbols of base {base} "):
        digits.unpack(data, 100, base)
