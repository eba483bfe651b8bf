"""Triton kernels of selection; ``protocol.kernels.cuda`` launches them and says what they add up to.

What keeps the answer the same on every device, and equal to the CPU's to the bit:

- Magnitudes are compared as the integers that their bits are, in which order NaN stands above
  infinity and denormal numbers above zero, whatever the device does to denormals in arithmetic.
- Every place in an output is computed from counts. Atomics only add integers, in any order.
- Places are 64 bits wide as soon as the number of a program is multiplied by the size of its block.
- Nothing that a kernel reads from memory decides where it writes without a mask that bounds it.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

# numbers that differ from call to call: without this each is compiled once more for 1 and for multiples of 16
_NUMBERS = ["n", "blocks", "room", "k", "k_last", "rank", "stride", "level", "block"]


@triton.jit
def _bits(values):
    """The magnitudes as integers of their own width."""
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def _added(vector, residual, total, start, lane, stop, tile: tl.constexpr, add: tl.constexpr, write: tl.constexpr):
    """``vector + residual`` from ``start`` on, also written to ``total``; zero from ``stop`` on."""
    vector += start
    residual += start
    total += start
    if start + tile <= stop:  # without a mask, accesses are as wide as the addresses allow
        value = tl.load(vector + lane)
        if add:
            value += tl.load(residual + lane)
        if write:
            tl.store(total + lane, value)
    else:
        inside = lane < stop - start
        value = tl.load(vector + lane, mask=inside, other=0.0)
        if add:
            value += tl.load(residual + lane, mask=inside, other=0.0)
        if write:
            tl.store(total + lane, value, mask=inside)
    return value


@triton.jit
def _squares(values):
    wide = values.to(tl.float64)
    return tl.sum(wide * wide)


@triton.jit
def _kth_bits(bits, k, top: tl.constexpr):
    """A number above which lie fewer than ``k`` of ``bits``, and at or above which lie at least ``k``.

    Found from the highest bit (``top``) down, and not beyond what tells the k-th from the next one.
    """
    kth = tl.min(bits) & 0
    one = kth + 1
    bit = top
    while bit >= 0:
        trial = kth | (one << bit)
        reaching = tl.sum((bits >= trial).to(tl.int32))
        kth = tl.where(reaching >= k, trial, kth)
        bit = tl.where(reaching == k, -1, bit - 1)
    return kth


@triton.jit
def _ordered(bits, kth, inside):
    """Which bits are above the k-th and which are its equals, and how many of each come before."""
    above, equal = inside & (bits > kth), inside & (bits == kth)
    both = (above.to(tl.int32) << 16) | equal.to(tl.int32)  # one scan for two counts of 2**15 at most
    before = tl.cumsum(both, 0) - both
    return above, equal, before >> 16, before & 0xFFFF


# --- the pass over the vector


@triton.jit(do_not_specialize=_NUMBERS)
def sample(vector, residual, threshold, stride, rank, add: tl.constexpr, samples: tl.constexpr, top: tl.constexpr):
    """The bits that ``rank`` of ``samples`` sampled magnitudes reach: one of each ``stride``, at a random place."""
    number = tl.arange(0, samples)
    random = tl.randint(0, number).to(tl.int64) & 0xFFFFFFFF
    place = number.to(tl.int64) * stride + (random * stride >> 32)
    value = tl.load(vector + place)
    if add:
        value += tl.load(residual + place)
    tl.store(threshold, _kth_bits(_bits(value), rank, top))


@triton.jit(do_not_specialize=_NUMBERS)
def scan(
    vector,
    residual,
    total,
    threshold,
    flags,
    counts,
    squares,
    n,
    blocks,
    add: tl.constexpr,
    write: tl.constexpr,
    words: tl.constexpr,
):
    """Add, write the sum, and leave a bit for each element that reaches the threshold and is not zero.

    ``counts`` gets, for each block of ``32 * words`` elements, how many reach the threshold, and in
    its second row how many are not zero; ``squares`` the sum of squares.
    """
    number = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, words), tl.arange(0, 32)[None, :]
    lane = row[:, None] * 32 + column
    value = _added(vector, residual, total, number * words * 32, lane, n, words * 32, add, write)
    bits = _bits(value)
    flag = ((bits >= tl.load(threshold)) & (bits > 0)).to(tl.int32)
    tl.store(flags + number * words + row, tl.sum(flag << column, axis=1))
    tl.store(counts + number, tl.sum(flag).to(tl.int64))
    tl.store(counts + blocks + number, tl.sum((bits > 0).to(tl.int32)).to(tl.int64))
    tl.store(squares + number, _squares(value))


# --- radix select among candidates, eight bits at a time from the top


@triton.jit
def _radix(tallies, k, levels):
    """The first ``levels`` digits of the k-th largest magnitude, and its rank among those that share them."""
    digit = tl.arange(0, 256)
    rank = k.to(tl.int64)
    prefix = rank * 0
    for level in range(levels):
        counts = tl.load(tallies + level * 256 + digit)
        reaching = tl.sum(counts) - tl.cumsum(counts, 0) + counts  # never rises with the digit
        found = tl.sum((reaching >= rank).to(tl.int32)) - 1
        rank -= tl.sum(tl.where(digit > found, counts, 0))
        prefix = prefix * 256 + found
    return prefix, rank


@triton.jit
def _candidate_bits(values, size, room, tile: tl.constexpr):
    """Places and bits of this program's candidates, and which of them there are."""
    place = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = place < tl.minimum(tl.load(size), room)
    return place, _bits(tl.load(values + place, mask=inside, other=0.0)).to(tl.int64), inside


@triton.jit(do_not_specialize=_NUMBERS)
def tally(values, size, tallies, room, k, level, levels: tl.constexpr, tile: tl.constexpr):
    """Count the digits of this level among the candidates that share all higher digits with the k-th."""
    prefix, _ = _radix(tallies, k, level)
    _, bits, inside = _candidate_bits(values, size, room, tile)
    bits = bits >> (8 * (levels - 1 - level))
    inside = inside & ((bits >> 8) == prefix)
    counts = tl.histogram(tl.where(inside, bits & 255, 0).to(tl.int32), 256)
    digit = tl.arange(0, 256)
    counts -= tl.where(digit == 0, tile - tl.sum(inside.to(tl.int32)), 0)  # those that are not inside
    tl.atomic_add(tallies + level * 256 + digit, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=_NUMBERS)
def count(values, size, tallies, counts, room, k, blocks, levels: tl.constexpr, tile: tl.constexpr):
    """How many candidates of each block are above the k-th, and in the second row how many are its equals."""
    kth, _ = _radix(tallies, k, levels)
    _, bits, inside = _candidate_bits(values, size, room, tile)
    number = tl.program_id(0)
    tl.store(counts + number, tl.sum((inside & (bits > kth)).to(tl.int64)))
    tl.store(counts + blocks + number, tl.sum((inside & (bits == kth)).to(tl.int64)))


@triton.jit(do_not_specialize=_NUMBERS)
def refine(
    values,
    places,
    size,
    tallies,
    counts,
    ends,
    indices,
    kept,
    room,
    k,
    blocks,
    with_places: tl.constexpr,
    levels: tl.constexpr,
    tile: tl.constexpr,
):
    """Keep what is above the k-th, and of its equals the first; ``ends`` is ``counts`` summed up to each block.

    The places are those of the candidates themselves if there are no ``places``.
    """
    kth, ties = _radix(tallies, k, levels)
    place, bits, inside = _candidate_bits(values, size, room, tile)
    above, equal, higher, equals = _ordered(bits, kth, inside)
    number = tl.program_id(0)
    higher += tl.load(ends + number) - tl.load(counts + number)
    equals += tl.load(ends + blocks + number) - tl.load(counts + blocks + number)
    at = higher + tl.minimum(equals, ties)
    chosen = (above | (equal & (equals < ties))) & (at < k)
    tl.store(kept + at, tl.load(values + place, mask=chosen), mask=chosen)
    if with_places:
        place = tl.load(places + place, mask=chosen)
    tl.store(indices + at, place, mask=chosen)


# --- selection inside blocks


@triton.jit(do_not_specialize=_NUMBERS)
def block_top_k(
    vector,
    residual,
    total,
    indices,
    kept,
    counts,
    squares,
    n,
    block,
    k,
    k_last,
    add: tl.constexpr,
    write: tl.constexpr,
    tile: tl.constexpr,
    top: tl.constexpr,
):
    """The largest of one block. Where fewer than it may select are not zero, the rest of its indices is -1."""
    number = tl.program_id(0).to(tl.int64)
    start = number * block
    stop = tl.minimum(start + block, n)
    most = tl.where(start + block <= n, k, k_last)
    lane = tl.arange(0, tile)
    value = _added(vector, residual, total, start, lane, stop, tile, add, write)
    bits = _bits(value)
    kth = _kth_bits(bits, most, top)
    above, equal, higher, equals = _ordered(bits, kth, bits > 0)
    ties = most - tl.sum(above.to(tl.int32))
    chosen = above | (equal & (equals < ties))
    at = higher + tl.minimum(equals, ties)
    indices += number * k
    tl.store(indices + at, start + lane, mask=chosen)
    tl.store(kept + number * k + at, value, mask=chosen)
    found = tl.sum(chosen.to(tl.int32))
    tl.store(indices + lane, tl.full([tile], -1, tl.int64), mask=(lane >= found) & (lane < most))
    tl.store(counts + number, found.to(tl.int64))
    tl.store(squares + number, _squares(value))
