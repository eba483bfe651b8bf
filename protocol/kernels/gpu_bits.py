"""Triton kernels of bit, index and digit streams; ``protocol.kernels.cuda`` and ``cuda_coding`` launch them.

Streams are written as whole int32 words, lowest bit first, which on a little-endian device are the
bytes of the wire. Words start at zero and each bit is set once, so the order of atomics cannot matter.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

# numbers that differ from call to call: without this each is compiled once more for 1 and for multiples of 16
_NUMBERS = ["room", "count", "lowest", "b", "blocks", "split", "size"]


@triton.jit
def _ones(word):
    """How many bits of an int32 are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def count_ones(flags, counts, words: tl.constexpr):
    """How many bits are set in each block of ``words`` words."""
    number = tl.program_id(0).to(tl.int64)
    word = tl.load(flags + number * words + tl.arange(0, words))
    tl.store(counts + number, tl.sum(_ones(word)).to(tl.int64))


@triton.jit(do_not_specialize=_NUMBERS)
def gather(flags, ends, values, found, kept, room, words: tl.constexpr, with_values: tl.constexpr):
    """Places of the bits that are set, and the values there, as far as there is room.

    ``ends`` holds how many are set up to the end of each block. A lane takes a word and the bits of
    it one after the other, so what this costs follows the fullest word of a block.
    """
    number = tl.program_id(0).to(tl.int64)
    lane = number * words + tl.arange(0, words)
    word = tl.load(flags + lane)
    ones = _ones(word)
    at = tl.load(ends + number) - tl.sum(ones) + tl.cumsum(ones, 0) - ones
    for _ in range(tl.max(ones)):
        low = word & -word
        place = lane * 32 + _ones(low - 1)
        inside = (word != 0) & (at < room)
        tl.store(found + at, place, mask=inside)
        if with_values:
            tl.store(kept + at, tl.load(values + place, mask=inside), mask=inside)
        at += 1
        word ^= low


@triton.jit
def _gaps(indices, place, inside):
    """How many elements lie between each index and the one before it; zero outside."""
    index = tl.load(indices + place, mask=inside, other=0)
    before = tl.load(indices + place - 1, mask=inside & (place > 0), other=-1)
    return tl.where(inside, index - before - 1, 0)


@triton.jit(do_not_specialize=_NUMBERS)
def quotients(indices, sums, count, lowest, blocks, widths: tl.constexpr, tile: tl.constexpr):
    """For each block the sum of ``gap >> b``, one row for each of ``widths`` parameters from ``lowest`` on."""
    number = tl.program_id(0).to(tl.int64)
    place = number * tile + tl.arange(0, tile)
    gap = _gaps(indices, place, place < count) >> lowest
    for row in range(widths):
        tl.store(sums + row * blocks + number, tl.sum(gap >> row))


@triton.jit(do_not_specialize=_NUMBERS)
def write_gaps(indices, sums, ends, words, count, b, split, tile: tl.constexpr):
    """Set the bits of the remainders, and from bit ``split`` on those of the unary stream.

    ``ends`` is ``sums``, the sums of quotients, summed up to each block.
    """
    number = tl.program_id(0).to(tl.int64)
    place = number * tile + tl.arange(0, tile)
    inside = place < count
    gap = _gaps(indices, place, inside)
    quotient = gap >> b
    before = tl.load(ends + number) - tl.load(sums + number)
    bit = split + before + tl.cumsum(quotient, 0) + place
    tl.atomic_or(words + (bit >> 5), (tl.full([tile], 1, tl.int64) << (bit & 31)).to(tl.int32), inside, sem="relaxed")
    remainder = gap - (quotient << b)
    bit = place * b
    at, shift = words + (bit >> 5), bit & 31
    # up to 40 bits from any place in a word on touch three words
    low, middle = (remainder << shift).to(tl.int32), (remainder >> (32 - shift)).to(tl.int32)
    high = (remainder >> 32 >> (32 - shift)).to(tl.int32)
    tl.atomic_or(at, low, inside & (low != 0), sem="relaxed")
    tl.atomic_or(at + 1, middle, inside & (middle != 0), sem="relaxed")
    tl.atomic_or(at + 2, high, inside & (high != 0), sem="relaxed")


@triton.jit(do_not_specialize=_NUMBERS)
def read_remainders(data, remainders, count, b, size, tile: tl.constexpr):
    """Numbers of ``b`` bits (40 at most) out of ``size`` bytes, read byte by byte since nothing is aligned."""
    place = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = place < count
    bit = place * b
    word = tl.zeros([tile], tl.int64)
    for i in tl.static_range(6):
        at = (bit >> 3) + i
        word |= tl.load(data + at, mask=inside & (at < size), other=0).to(tl.int64) << (8 * i)
    word = word >> (bit & 7)
    tl.store(remainders + place, word - (word >> b << b), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def pack_digits(symbols, data, count, size, base: tl.constexpr, digits: tl.constexpr, tile: tl.constexpr):
    """Bytes of ``digits`` symbols each, the first symbol the lowest digit."""
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    byte = tl.zeros([tile], tl.int32)
    for i in tl.static_range(digits):
        place = at * digits + (digits - 1 - i)
        byte = byte * base + tl.load(symbols + place, mask=place < count, other=0).to(tl.int32)
    tl.store(data + at, byte.to(tl.uint8), mask=at < size)


@triton.jit(do_not_specialize=_NUMBERS)
def unpack_digits(data, symbols, count, base: tl.constexpr, digits: tl.constexpr, tile: tl.constexpr):
    """The inverse of ``pack_digits``."""
    place = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = place < count
    byte = tl.load(data + place // digits, mask=inside, other=0).to(tl.int32)
    which = (place % digits).to(tl.int32)
    for i in tl.static_range(digits - 1):
        byte = tl.where(which > i, byte // base, byte)
    tl.store(symbols + place, (byte % base).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def lookup_add(out, indices, symbols, table, count, size, sparse: tl.constexpr, tile: tl.constexpr):
    """``out[indices] += table[symbols]``; a symbol beyond the table adds nothing."""
    place = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = place < count
    symbol = tl.load(symbols + place, mask=inside, other=0).to(tl.int32)
    inside = inside & (symbol < size)
    value = tl.load(table + symbol, mask=inside, other=0.0)
    if sparse:
        place = tl.load(indices + place, mask=inside, other=0)
    tl.store(out + place, tl.load(out + place, mask=inside, other=0.0) + value, mask=inside)
