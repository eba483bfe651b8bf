"""Entropy coding: symbols come back, in fewer bytes than the codes it stands in for, whatever arrives is survived."""

import heapq
import math

import constriction
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import DecodeError
from protocol.coding import digits, entropy

HEAD = 16  # bytes of fields, and of the last word, that are not filled
BASES = [2, 3, 4, 16, 17, 255, 256]


def laws(max_examples):
    return settings(deadline=None, max_examples=max_examples)


def array(*symbols):
    return np.array(symbols, np.uint8)


def drawn(probabilities, count, seed=0):
    """Independent symbols."""
    random = np.random.default_rng(seed)
    return random.choice(len(probabilities), count, p=probabilities).astype(np.uint8)


def sparse(density, count, seed=0):
    """Ternary: zero, or one of two signs."""
    return drawn([1 - density, density / 2, density / 2], count, seed)


def bursty(count, on, off, dense, thin, seed=0):
    """Ternary symbols of density ``dense`` in bursts and ``thin`` between them: a two-state Markov chain.

    A burst begins with probability ``on`` at each symbol, and ends with probability ``off``.
    """
    random = np.random.default_rng(seed)
    lengths = np.stack([random.geometric(on, count), random.geometric(off, count)], axis=1).reshape(-1)
    density = np.repeat(np.tile([thin, dense], count), lengths)[:count]
    return np.where(random.random(count) < density, random.integers(1, 3, count), 0).astype(np.uint8)


def peaked(base, count, seed=0):
    """Like the codes of a quantiser: most in the middle."""
    values = np.random.default_rng(seed).normal(base / 2, base / 6, count)
    return np.clip(values, 0, base - 1).astype(np.uint8)


def information(symbols):
    """The empirical entropy of order 0, in bytes."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(np.sum(counts * np.log2(symbols.size / counts))) / 8


@st.composite
def messages(draw, max_runs=12):
    """A base and symbols of it: runs, alphabets with gaps, patterns, noise."""
    base = draw(st.sampled_from(BASES) | st.integers(2, 256))
    alphabet = draw(st.lists(st.integers(0, base - 1), min_size=1, max_size=8))
    runs = draw(st.lists(st.tuples(st.sampled_from(alphabet), st.integers(1, 40)), min_size=1, max_size=max_runs))
    symbols = np.repeat(array(*(s for s, _ in runs)), [length for _, length in runs])
    noise = np.random.default_rng(draw(st.integers(0, 99))).integers(0, base, draw(st.sampled_from([0, 0, 3, 400])))
    return base, np.concatenate([symbols, noise.astype(np.uint8)])


def coded(base, symbols):
    """The stream, which has come back right."""
    stream = entropy.encode(symbols, base)
    assert stream.dtype == np.uint8
    back = entropy.decode(stream, symbols.size, base)
    assert back.dtype == np.uint8
    assert np.array_equal(back, symbols)
    return stream


# --- round trip


@laws(300)
@given(message=messages())
@example(message=(2, array(1)))
@example(message=(256, array(255)))
@example(message=(2, array(*[0, 1] * 500)))  # each context has one symbol: no words
@example(message=(16, array(*range(16))))
@example(message=(3, array(*[0] * 999, 2)))  # no symbol follows another than the frequent one
@example(message=(3, array(2, *[0] * 999)))
def test_symbols_come_back_in_at_most_a_byte_more_than_packed(message):
    base, symbols = message
    stream = coded(base, symbols)
    assert stream.size <= 1 + digits.size(symbols.size, base)
    assert np.array_equal(entropy.encode(symbols.copy(), base), stream)


@pytest.mark.parametrize("count", [entropy.CHUNK - 1, entropy.CHUNK, entropy.CHUNK + 1, 3 * entropy.CHUNK + 7])
@pytest.mark.parametrize("kind", [entropy.ONE, entropy.TWO])
def test_messages_of_several_chunks_come_back(count, kind):
    symbols = sparse(0.1, count) if kind == entropy.ONE else bursty(count, 0.01, 0.1, 0.9, 0.001)
    assert coded(3, symbols)[0] == kind


@pytest.mark.parametrize("base", BASES)
def test_any_base_is_coded(base):
    symbols = peaked(base, 20_000) if base > 2 else drawn([0.9, 0.1], 20_000)
    assert coded(base, symbols)[0] in (entropy.ONE, entropy.TWO)


def test_a_stream_is_read_where_it_lies():
    """Bytes of a frame cannot be written to, and begin anywhere."""
    symbols = peaked(16, 1000)
    for gap in range(5):
        frame = np.frombuffer(b"x" * gap + entropy.encode(symbols, 16).tobytes(), np.uint8)
        assert np.array_equal(entropy.decode(frame[gap:], symbols.size, 16), symbols)


# --- the format


@pytest.mark.parametrize("base", [2, 3, 16, 256])
@pytest.mark.parametrize("k", [8, 12, 24])
def test_the_model_of_the_library_has_exactly_the_frequencies_that_travel(base, k):
    """A coder whose state is ``q`` decodes the symbol with ``q`` in its share of ``2**24``."""
    random = np.random.default_rng(base)
    inner = np.sort(random.choice((1 << k) - 1, base - 1, replace=False)) + 1
    edges = np.concatenate([[0], inner, [1 << k]]) << (entropy.PRECISION - k)
    model = entropy._model(k, np.diff(edges) >> (entropy.PRECISION - k))
    for symbol, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        for state in (low, high - 1):
            words = np.array([state] if state else [], np.uint32)
            assert constriction.stream.stack.AnsCoder(words).decode(model) == symbol


class Reader:
    """A second decoder, from docs/protocol.md alone: slow, and without the library or any code of ours."""

    def __init__(self, stream):
        self.bytes, self.at = stream.tobytes(), 0

    def byte(self):
        self.at += 1
        return self.bytes[self.at - 1]

    def varint(self):
        byte = self.byte()
        return byte if byte < 128 else byte - 128 + 128 * self.varint()

    def bits(self, start, end):
        return [byte >> i & 1 for byte in self.bytes[start:end] for i in range(8)]

    def tables(self, models, base):
        """The words, and for each model the symbols that occur with their shares of ``2**24``."""
        count = self.varint()
        k, b = self.byte(), self.byte()
        flags = self.bits(self.at, self.at - (-models * base // 8))
        present = [i for i, flag in enumerate(flags) if flag]
        start, end = self.at - (-models * base // 8), len(self.bytes) - 4 * count
        gaps = len(present) - 1
        low, unary = self.bits(start, end), self.bits(start - (-gaps * b // 8), end)
        ones = [-1] + [i for i, bit in enumerate(unary) if bit]
        frequencies = [
            (ones[i + 1] - ones[i] - 1 << b) + sum(low[i * b + j] << j for j in range(b)) + 1 for i in range(gaps)
        ]
        frequencies.append((models << k) - sum(frequencies))
        tables = [{}, {}]
        for i, frequency in zip(present, frequencies, strict=True):
            tables[i // base][i % base] = frequency << (24 - k)
        return [int.from_bytes(self.bytes[i : i + 4], "little") for i in range(end, len(self.bytes), 4)], tables

    def symbols(self, count, base):
        kind = self.byte()
        if kind == 0:
            return [self.byte()] * count
        if kind == 3:
            per_byte = max(p for p in range(1, 9) if base**p <= 256)
            return [byte // base**j % base for byte in self.bytes[1:] for j in range(per_byte)][:count]
        frequent, first = (self.byte(), self.varint()) if kind == 2 else (None, count)
        words, tables = self.tables(kind, base)
        state, sequences = 0, []
        for table, length in zip(tables, (first, count - first), strict=True):
            sequences.append([])
            while len(sequences[-1]) < length:
                if len(table) == 1:
                    sequences[-1] += table
                    continue
                while state < 2**32 and words:
                    state = state << 32 | words.pop()
                prefix, rest = divmod(state, 2**24)
                order = sorted(table)
                while rest >= table[order[0]]:
                    rest -= table[order.pop(0)]
                sequences[-1].append(order[0])
                state = prefix * table[order[0]] + rest
        assert state == 0
        assert not words
        message = []
        for _ in range(count):
            follows = kind == 1 or not message or message[-1] == frequent
            message.append(sequences[not follows].pop(0))
        return message


@laws(150)
@given(message=messages())
@example(message=(2, array(*[0, 1] * 500)))
@example(message=(3, sparse(0.01, 3000)))
@example(message=(3, bursty(3000, 0.02, 0.1, 0.9, 0.001)))
@example(message=(16, peaked(16, 3000)))
@example(message=(256, peaked(256, 3000)))
def test_a_decoder_written_from_the_description_reads_the_same(message):
    base, symbols = message
    assert Reader(entropy.encode(symbols, base)).symbols(symbols.size, base) == symbols.tolist()


@pytest.mark.parametrize(
    ("stream", "base", "symbols"),
    [
        ("0007", 16, [7] * 80),
        (
            "010404020700090c0000407627da358dd4e0eb7a6a7c0100",
            16,
            [(i * i % 19 < 2) + (i**3 % 19 < 2) for i in range(80)],
        ),
        (
            "02009d010604020f1a1c0000c057f540591153a8a080880460fd26b40dd27ef71500",
            3,
            [*[0] * 7, 1, *[0] * 5, 2, 0, 1] * 12,
        ),
        ("03f20103", 3, [2, 2, 2, 2, 2, 1, 0, 0, 0, 0, 0, 1]),
    ],
)
def test_streams_of_the_first_version_are_read_for_ever(stream, base, symbols):
    arrived = np.frombuffer(bytes.fromhex(stream), np.uint8)
    assert entropy.decode(arrived, len(symbols), base).tolist() == symbols
    assert Reader(arrived).symbols(len(symbols), base) == symbols


# --- how many bytes


@pytest.mark.parametrize("count", [1, 1000, 10_000_000])
@pytest.mark.parametrize("base", [2, 3, 256])
def test_a_message_of_one_symbol_takes_two_bytes(base, count):
    assert coded(base, np.full(count, base - 1, np.uint8)).size == 2


SOURCES = {
    "even": (16, np.random.default_rng(0).integers(0, 16, 100_000).astype(np.uint8)),
    "fair signs": (2, drawn([0.5, 0.5], 100_000)),
    "signs": (2, drawn([0.95, 0.05], 100_000)),
    "sparse": (3, sparse(0.01, 100_000)),
    "very sparse": (3, sparse(0.0003, 100_000)),
    "peaked": (16, peaked(16, 100_000)),
    "peaked bytes": (256, peaked(256, 100_000)),
    "halving": (16, drawn([2.0 ** -min(i + 1, 15) for i in range(16)], 100_000)),
}
every_source = pytest.mark.parametrize("name", SOURCES)


@every_source
def test_independent_symbols_take_their_entropy_and_a_table(name):
    base, symbols = SOURCES[name]
    table = 2 * np.unique(symbols).size  # bytes: frequencies are below 2**16, or few
    assert coded(base, symbols).size <= 1.01 * information(symbols) + table + 64


def huffman(symbols):
    """Bytes with the best code that gives each symbol whole bits, the table not counted (Huffman, 1952)."""
    heap = [int(count) for count in np.bincount(symbols) if count]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        bits += merged
        heapq.heappush(heap, merged)
    return bits / 8


@every_source
def test_a_huffman_code_is_matched_without_counting_its_table(name):
    """To the byte, it is matched where all frequencies are powers of two, so our table and fields are allowed for."""
    base, symbols = SOURCES[name]
    table = 2 * np.unique(symbols).size
    assert coded(base, symbols).size <= huffman(symbols) + table + HEAD


@pytest.mark.parametrize(("name", "share"), [("signs", 0.3), ("sparse", 0.1), ("very sparse", 0.01), ("peaked", 0.996)])
def test_a_huffman_code_is_beaten_where_symbols_need_parts_of_bits(name, share):
    base, symbols = SOURCES[name]
    assert coded(base, symbols).size < share * huffman(symbols)


def run_lengths(symbols):
    """Bytes with a Golomb code of the runs of zeros, its parameter the best, and a bit for each sign (Golomb, 1966)."""
    runs = np.diff(np.flatnonzero(np.append(symbols, 1)), prepend=-1) - 1
    best = math.inf
    for m in range(1, 2 + 2 * int(runs.mean())):
        width = (m - 1).bit_length()
        short = runs % m < (1 << width) - m  # remainders with a bit less
        best = min(best, int(np.sum(runs // m + 1 + width - short)))
    return (best + np.count_nonzero(symbols)) / 8


@pytest.mark.parametrize("density", [0.5, 0.1, 0.03, 0.01, 0.001])
def test_run_length_coding_of_independent_symbols_is_matched(density):
    symbols = sparse(density, 300_000)
    assert coded(3, symbols).size <= run_lengths(symbols) + HEAD


@pytest.mark.parametrize("dense", [0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("off", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("thin", [0.0, 0.001, 0.02])
def test_run_length_coding_of_bursts_is_beaten(dense, off, thin):
    symbols = bursty(300_000, 0.01, off, dense, thin)
    assert coded(3, symbols).size < run_lengths(symbols)


def test_runs_of_signs_take_a_fraction_of_a_bit_each():
    """Order 0 sees a fair coin; a change every twenty symbols holds 0.286 bits."""
    changes = np.random.default_rng(0).random(100_000) < 0.05
    signs = (np.cumsum(changes) % 2).astype(np.uint8)
    assert information(signs) > 12_000
    information_of_changes = -100_000 * (0.05 * math.log2(0.05) + 0.95 * math.log2(0.95)) / 8
    assert coded(2, signs).size < 1.02 * information_of_changes + HEAD


# --- what arrives broken


def survived(stream, count, base):
    """The symbols, if any: nothing but ``DecodeError`` may be raised, and nothing but symbols returned."""
    try:
        symbols = entropy.decode(stream, count, base)
    except DecodeError:
        return None
    assert symbols.dtype == np.uint8
    assert symbols.shape == (count,)
    assert (symbols < base).all()
    return symbols


@laws(60)
@given(message=messages())
@example(message=(3, sparse(0.05, 300)))
@example(message=(3, bursty(1000, 0.02, 0.1, 1.0, 0.0)))
@example(message=(2, array(*[0, 1] * 500)))
def test_every_truncation_is_refused(message):
    base, symbols = message
    stream = entropy.encode(symbols, base)
    for size in range(stream.size):
        with pytest.raises(DecodeError):
            entropy.decode(stream[:size], symbols.size, base)


@laws(100)
@given(message=messages(), extra=st.binary(min_size=1, max_size=9) | st.sampled_from([b"\0" * n for n in (1, 4, 8)]))
def test_anything_behind_the_stream_is_refused(message, extra):
    base, symbols = message
    with pytest.raises(DecodeError):
        entropy.decode(
            np.concatenate([entropy.encode(symbols, base), np.frombuffer(extra, np.uint8)]), symbols.size, base
        )


@laws(60)
@given(message=messages(max_runs=5))
@example(message=(3, sparse(0.05, 300)))
@example(message=(3, bursty(1000, 0.02, 0.1, 1.0, 0.0)))
def test_every_flipped_bit_is_refused_or_gives_symbols(message):
    base, symbols = message
    stream = entropy.encode(symbols, base)
    for bit in range(8 * stream.size):
        altered = stream.copy()
        altered[bit >> 3] ^= 1 << (bit & 7)
        survived(altered, symbols.size, base)


@laws(300)
@given(message=messages(), data=st.data())
def test_splices_of_streams_are_survived(message, data):
    base, symbols = message
    other_base, others = data.draw(messages())
    stream, other = entropy.encode(symbols, base), entropy.encode(others, other_base)
    here, there = data.draw(st.integers(0, stream.size)), data.draw(st.integers(0, other.size))
    survived(np.concatenate([stream[:here], other[there:]]), symbols.size, base)
    survived(stream, data.draw(st.integers(1, 1000)), base)
    survived(stream, symbols.size, other_base)


@laws(500)
@given(data=st.binary(max_size=80), count=st.integers(1, 5000), base=st.sampled_from(BASES) | st.integers(2, 256))
def test_random_bytes_are_refused_or_give_symbols(data, count, base):
    survived(np.frombuffer(data, np.uint8), count, base)


def fields(kind=entropy.ONE, contexts=b"", words=0, k=2, b=0, flags=0b11, gaps=b"\2", tail=b""):
    """A ternary stream by hand; as it stands, symbols 0 and 1 with frequencies 2 and 2 of 4, and no words."""
    return np.frombuffer(bytes([kind]) + contexts + bytes([words, k, b, flags]) + gaps + tail, np.uint8)


def test_streams_by_hand_are_read():
    """The state 0 holds the first symbol any number of times."""
    assert survived(fields(), 5, 3).tolist() == [0, 0, 0, 0, 0]
    words = {"words": 1, "tail": (1 << 23).to_bytes(4, "little")}
    assert survived(fields(**words), 5, 3).tolist() == [1, 0, 0, 0, 0]
    alternating = fields(entropy.TWO, b"\0\2", flags=0b001010, gaps=b"\x08")
    assert survived(alternating, 4, 3).tolist() == [1, 0, 1, 0]
    assert survived(alternating, 3, 3).tolist() == [1, 0, 1]
    assert survived(alternating, 5, 3) is None


@pytest.mark.parametrize(
    ("stream", "what"),
    [
        (np.empty(0, np.uint8), "0 bytes of kind None"),
        (array(4, 0), "2 bytes of kind 4"),
        (array(entropy.CONSTANT), "1 bytes of kind 0"),
        (array(entropy.CONSTANT, 3), "2 bytes of kind 0"),
        (array(entropy.CONSTANT, 0, 0), "3 bytes of kind 0"),
        (array(entropy.PACKED, 243), "a byte holds 243"),
        (array(entropy.PACKED, 0, 0), "5 symbols of base 3"),
        (array(entropy.ONE), "ends inside a number"),
        (array(entropy.TWO, 0), "kind 2"),
        (fields(entropy.TWO, b"\3\2", flags=0b001001), "kind 2"),  # no such symbol
        (fields(entropy.TWO, b"\0\0", flags=0b001001), "kind 2"),  # a context without symbols
        (fields(entropy.TWO, b"\0\5", flags=0b001001), "kind 2"),
        (fields(words=1), "too short for 1 words"),
        (fields(words=1, tail=b"\0\0\0\0"), "ends in a word that is zero"),
        (fields(words=1, tail=b"\xff\xff\xff\xff"), "holds more than 5 symbols"),
        (fields(k=25), "precision 25; valid is at most 24"),
        (fields(k=255), "precision 255"),
        (fields(b=41), "Rice parameter 41"),
        (fields(flags=0, gaps=b""), "without symbols"),
        (fields(flags=0b1011), "not zero"),  # a fourth ternary symbol
        (fields(gaps=b"\4\1"), "index stream"),  # two boundaries where there are two symbols
        (fields(gaps=b"\x08"), "do not add up"),  # nothing is left for the last symbol
        (fields(gaps=b"\x10"), "index stream"),
        (fields(k=0), "index stream"),
        (fields(entropy.TWO, b"\0\2", flags=0b000011, gaps=b"\x08"), "do not add up"),  # both of one model
        (fields(entropy.TWO, b"\0\2", flags=0b001001, gaps=b"\x04"), "do not add up"),
    ],
)
def test_what_no_encoder_writes_is_refused_by_name(stream, what):
    with pytest.raises(DecodeError, match=what):
        entropy.decode(stream, 5, 3)


def test_contexts_that_do_not_fit_their_symbols_are_refused():
    """Zeros follow zeros, so that the second context, where all symbols are zeros too, is never entered."""
    stream = fields(entropy.TWO, b"\0\2", flags=0b001001, gaps=b"\x08")
    with pytest.raises(DecodeError, match="contexts that do not fit 5 symbols"):
        entropy.decode(stream, 5, 3)
