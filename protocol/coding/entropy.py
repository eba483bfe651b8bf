"""Entropy coding of symbols: a model that travels, then one number that holds them all.

The coder is the asymmetric numeral system of the library ``constriction`` (words of 32 bits, state of
64, precision 24; Duda, "Asymmetric numeral systems", arXiv:1311.2540). Symbols are coded with their
frequencies, or with two sets of frequencies: of symbols that follow the most frequent one, and of the
others. Two sets catch runs, which is what run-length coding is for; one takes no more than a Huffman
code but for its table. docs/protocol.md says how to write another decoder::

    byte 0       kind        0 constant, 1 one model, 2 two models, 3 packed digits
    -- kind 0 --
    byte         the symbol
    -- kind 3 --
    digits       exactly the bytes of ``digits.pack``
    -- kind 2 only --
    byte         the frequent symbol
    varint       symbols that the first model codes
    -- kinds 1 and 2 --
    varint       number of words
    byte         precision k: the frequencies of a model have the sum 2**k
    byte         Rice parameter
    flags        one for each symbol of each model that occurs, packed in base 2
    frequencies  Rice stream of their running sums minus one, but the last
    words        the rest, 4 bytes each, little-endian
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np
import numpy.typing as npt
from numba import njit

from protocol.coding import digits, rice, varint
from protocol.errors import DecodeError

U8 = npt.NDArray[np.uint8]
Table = npt.NDArray[np.int64]  # counts or frequencies, shape (models, base)

CONSTANT, ONE, TWO, PACKED = 0, 1, 2, 3
PRECISION = 24  # of the library's models
CHUNK = 1 << 14  # symbols a call: the library takes four bytes for each, and keeps other threads waiting

_Coder: Any = constriction.stream.stack.AnsCoder
_Categorical: Any = constriction.stream.model.Categorical


@njit(cache=True, nogil=True)
def _count(symbols, counts):  # type: ignore[no-untyped-def]
    """``counts`` has shape (4, 256): an addition need not wait for the one before, to the same place."""
    for i in range(symbols.size):
        counts[i & 3, symbols[i]] += 1


@njit(cache=True, nogil=True)
def _count_by_context(symbols, frequent, counts):  # type: ignore[no-untyped-def]
    """``counts`` has shape (2, 256). The first symbol counts as one that follows the frequent one."""
    context = 0
    for i in range(symbols.size):
        counts[context, symbols[i]] += 1
        context = int(symbols[i] != frequent)


@njit(cache=True, nogil=True)
def _split(symbols, frequent, first, second):  # type: ignore[no-untyped-def]
    """Each symbol goes to the sequence of its context; the return value is the length of the first.

    It is written to both, where the next overwrites it in one: a branch would be mispredicted at every
    change. So both have a place to spare.
    """
    at, context = 0, 0
    for i in range(symbols.size):
        first[at] = symbols[i]
        second[i - at] = symbols[i]
        at += 1 - context
        context = int(symbols[i] != frequent)
    return at


@njit(cache=True, nogil=True)
def _join(first, second, frequent, symbols):  # type: ignore[no-untyped-def]
    """The inverse of ``_split``, without places to spare; False if a sequence ends before ``symbols``."""
    at, context = 0, 0
    for i in range(symbols.size):
        if context == 0:
            if at == first.size:
                return False
            symbols[i] = first[at]
            at += 1
        else:
            if i - at == second.size:
                return False
            symbols[i] = second[i - at]
        context = int(symbols[i] != frequent)
    return True


def _frequencies(counts: Table) -> tuple[int, Table]:
    """The precision ``k``, and frequencies in proportion to the counts, at least 1, with the sum ``2**k`` a row.

    Rounding costs about ``total**2 / count / 4**k`` bits a symbol of the alphabet, and each further bit
    of precision costs one bit a symbol in the table: ``k`` is where the two balance.
    """
    present = counts > 0
    totals = counts.sum(axis=1, keepdims=True)
    cost = float(np.mean((totals.astype(np.float64) ** 2 / np.maximum(counts, 1))[present]))
    needed = int(present.sum(axis=1).max() - 1).bit_length()
    k = max(needed, min(PRECISION, (int(cost / 5).bit_length() + 1) // 2))
    frequencies = np.zeros_like(counts)
    for row, of_row, total in zip(frequencies, counts, totals, strict=True):
        places = np.flatnonzero(of_row)
        ends = np.cumsum(of_row[places]) * ((1 << k) - places.size) // total + np.arange(1, places.size + 1)
        row[places] = np.diff(ends, prepend=0)
    return k, frequencies


def _pack_tables(words: int, k: int, frequencies: Table) -> bytes:
    flags = (frequencies > 0).reshape(-1).astype(np.uint8)
    ends = np.cumsum(frequencies[frequencies > 0]) - 1
    b, stream = rice.encode(ends[:-1], frequencies.shape[0] << k)
    return varint.pack(words) + bytes([k, b]) + digits.pack(flags, 2).tobytes() + stream.tobytes()


def _take_tables(stream: U8, at: int, models: int, base: int) -> tuple[int, Table, U8]:
    """The precision, the frequencies and the words, as bytes, of what begins at ``stream[at]``.

    Raises:
        DecodeError: the stream has another size than it says, or frequencies that are none.
    """
    words, at = varint.take(stream, at)
    split = at + 2 + digits.size(models * base, 2)
    end = stream.size - 4 * words
    if end < split:
        raise DecodeError(f"an entropy-coded stream of {stream.size} bytes is too short for {words} words")
    k, b = int(stream[at]), int(stream[at + 1])
    if k > PRECISION:
        raise DecodeError(f"an entropy-coded stream has precision {k}; valid is at most {PRECISION}")
    present = np.flatnonzero(digits.unpack(stream[at + 2 : split], models * base, 2))
    if not present.size:
        raise DecodeError("an entropy-coded stream has models without symbols")
    ends = np.append(rice.decode(stream[split:end], b, present.size - 1, models << k) + 1, models << k)
    steps = np.diff(ends, prepend=0)
    frequencies = np.zeros((models, base), np.int64)
    frequencies.reshape(-1)[present] = steps
    if steps.min() == 0 or (frequencies.sum(axis=1) != 1 << k).any():
        raise DecodeError(f"an entropy-coded stream has frequencies that do not add up to 2**{k}")
    return k, frequencies, stream[end:]


def _model(k: int, frequencies: npt.NDArray[np.int64]) -> Any:
    """The library's model with exactly these frequencies, at least two of them.

    It gives each symbol ``1`` of ``2**24`` and shares out the rest in proportion to what it is given.
    Given the rest itself, its factor is exactly 1 and all its sums are integers below ``2**24``.
    """
    return _Categorical((frequencies << (PRECISION - k)).astype(np.float64) - 1.0, perfect=False)


def _push(coder: Any, symbols: U8, k: int, frequencies: npt.NDArray[np.int64]) -> None:
    """Onto the coder, a stack: the last symbol first."""
    places = np.flatnonzero(frequencies)
    if places.size == 1:  # known without being told, which the library has no model for
        return
    model = _model(k, frequencies[places])
    ranks = np.zeros(256, np.int32)
    ranks[places] = np.arange(places.size)
    for start in reversed(range(0, symbols.size, CHUNK)):
        coder.encode_reverse(ranks[symbols[start : start + CHUNK]], model)


def _pop(coder: Any, count: int, k: int, frequencies: npt.NDArray[np.int64]) -> U8:
    places = np.flatnonzero(frequencies).astype(np.uint8)
    if places.size == 1:
        return np.full(count, places[0], np.uint8)
    model = _model(k, frequencies[places])
    symbols = np.empty(count, np.uint8)
    for start in range(0, count, CHUNK):  # never all at once: the library aborts where memory ends
        part = symbols[start : start + CHUNK]
        part[:] = places[coder.decode(model, part.size)]
    return symbols


def _plan(counts: Table) -> tuple[float, int, Table]:
    """The estimated bytes behind the fields of the kind, the precision and the frequencies."""
    k, frequencies = _frequencies(counts)
    coded = counts > 0
    bits = float(np.sum(counts[coded] * (k - np.log2(frequencies[coded]))))
    return len(_pack_tables(int(bits) // 32, k, frequencies)) + bits / 8, k, frequencies


def _encode(symbols: U8, frequent: int, k: int, frequencies: Table) -> U8:
    """With the frequencies of all symbols, or of the two contexts."""
    coder = _Coder()
    if len(frequencies) == 1:
        head = bytes([ONE])
        _push(coder, symbols, k, frequencies[0])
    else:
        first, second = np.empty(symbols.size + 1, np.uint8), np.empty(symbols.size + 1, np.uint8)
        ends = _split(symbols, frequent, first, second)
        head = bytes([TWO, frequent]) + varint.pack(ends)
        _push(coder, second[: symbols.size - ends], k, frequencies[1])
        _push(coder, first[:ends], k, frequencies[0])
    words = coder.get_compressed().astype("<u4")
    head += _pack_tables(words.size, k, frequencies)
    return np.concatenate([np.frombuffer(head, np.uint8), words.view(np.uint8)])


def encode(symbols: U8, base: int) -> U8:
    """The stream of ``symbols``, one or more, each below ``base``: at most one byte more than packed digits."""
    quarters = np.zeros((4, 256), np.int64)
    _count(symbols, quarters)
    counts = quarters.sum(axis=0, keepdims=True)[:, :base]
    if np.count_nonzero(counts) == 1:
        return np.array([CONSTANT, symbols[0]], np.uint8)
    frequent = int(np.argmax(counts))
    by_context = np.zeros((2, 256), np.int64)
    _count_by_context(symbols, frequent, by_context)
    tables = [counts, by_context[:, :base]] if by_context[1].any() else [counts]
    estimate, k, frequencies = min((_plan(table) for table in tables), key=lambda plan: plan[0])
    packed = digits.size(symbols.size, base)
    if estimate < packed:
        stream = _encode(symbols, frequent, k, frequencies)
        if stream.size <= packed:
            return stream
    return np.concatenate([np.array([PACKED], np.uint8), digits.pack(symbols, base)])


def _decode(stream: U8, at: int, count: int, base: int, frequent: int | None, first: int) -> U8:
    """What begins at ``stream[at]``; with one model, ``frequent`` is None and ``first`` is the count."""
    k, frequencies, words = _take_tables(stream, at, 1 if frequent is None else 2, base)
    if words.size and not words[-4:].any():
        raise DecodeError("an entropy-coded stream ends in a word that is zero")
    coder = _Coder(words.view("<u4").astype(np.uint32))
    symbols = _pop(coder, first, k, frequencies[0])
    if frequent is not None:
        second = _pop(coder, count - first, k, frequencies[1])
        both, symbols = symbols, np.empty(count, np.uint8)
        if not _join(both, second, frequent, symbols):
            raise DecodeError(f"an entropy-coded stream has contexts that do not fit {count} symbols")
    if not coder.is_empty():
        raise DecodeError(f"an entropy-coded stream holds more than {count} symbols")
    return symbols


def decode(stream: U8, count: int, base: int) -> U8:
    """``count`` symbols, one or more, each below ``base``.

    Takes memory for a few bytes a symbol, however few bytes the stream has: ``count`` is to be checked
    before.

    Raises:
        DecodeError: the stream is truncated, extended or altered, or holds another number of symbols.
    """
    kind = int(stream[0]) if stream.size else None
    if kind == PACKED:
        return digits.unpack(stream[1:], count, base)
    if kind == CONSTANT and stream.size == 2 and stream[1] < base:
        return np.full(count, stream[1], np.uint8)
    if kind == ONE:
        return _decode(stream, 1, count, base, None, count)
    if kind == TWO and stream.size > 2:
        first, at = varint.take(stream, 2)
        if stream[1] < base and 0 < first < count:
            return _decode(stream, at, count, base, int(stream[1]), first)
    raise DecodeError(f"{stream.size} bytes of kind {kind} are no entropy-coded stream of {count} symbols")
