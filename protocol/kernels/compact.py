"""Vectors in less memory: rounded to bfloat16, rounded to int8 by blocks, or only the blocks that hold anything.

Rounding is stochastic and unbiased: a value becomes one of its two neighbours, the nearer the likelier.
The randomness is a hash of (key, number of the element) and of nothing else, so neither threads nor
order can change a bit. Loops go by blocks, so that temporaries stay in the first-level cache.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from protocol.kernels import sketch

BLOCK = 256  # values that share a seed; in int8 also a scale
PATCH = 32  # values of one block of a sparse vector
LARGEST = float.fromhex("0x1.fep+127")  # of bfloat16
STEPS = 127  # of int8, to each side


@njit(cache=True, nogil=True)
def _seed(key, block):  # type: ignore[no-untyped-def]
    """32 bits of the finaliser of splitmix64."""
    bits = np.uint64(key) + np.uint64(block + 1) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.uint32(bits >> np.uint64(32))


@njit(cache=True, nogil=True)
def _random(seed, place):  # type: ignore[no-untyped-def]
    """32 bits for one element of a block: a mixer of 32 bits, which vector registers can do."""
    bits = np.uint32(seed + np.uint32(np.uint32(place) * np.uint32(0x9E3779B9)))
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x21F0AAAD))
    bits = np.uint32((bits ^ (bits >> np.uint32(15))) * np.uint32(0xD35A2D97))
    return np.uint32(bits ^ (bits >> np.uint32(15)))


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _squares(values):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(values.size):
        total += np.float64(values[i]) * np.float64(values[i])
    return total


@njit(cache=True, nogil=True)
def _round_bfloat16(bits, seed, codes):  # type: ignore[no-untyped-def]
    for i in range(codes.size):
        codes[i] = np.uint32(bits[i] + (_random(seed, i) >> np.uint32(16))) >> np.uint32(16)


@njit(cache=True, nogil=True)
def _clamp(values, near):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        near[i] = min(max(values[i], -LARGEST), LARGEST)


@njit(cache=True, nogil=True)
def to_bfloat16(values, key, codes, position, changed, start, stop):  # type: ignore[no-untyped-def]
    """Round ``values[start:stop]``; ``start`` is a multiple of BLOCK.

    The lower half of a float32's bits is the distance to the next smaller magnitude in bfloat16: adding
    random bits and dropping the half rounds up exactly that often. Float64 becomes float32 first.

    What that takes away is added to the sketch ``changed`` (see ``kernels.sketch``), in which ``values`` stand at
    ``position``. Returns an upper bound of its expected square: a value between two neighbours at distance ``s``
    moves by at most ``s / 2`` in root mean square, which is at most ``2**-8 |value|``, or ``2**-134`` for a
    denormal number.
    """
    near = np.empty(BLOCK, np.float32)
    bits = near.view(np.uint32)
    squares = 0.0
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        _clamp(values[first:last], near)
        squares += _squares(near[: last - first])
        _round_bfloat16(bits, _seed(key, first // BLOCK), codes[first:last])
        _widen(codes[first:last], bits)
        sketch.add_difference(values[first:last], near, position + first, changed)
    return 2.0**-16 * squares + 2.0**-268 * (stop - start)


@njit(cache=True, nogil=True)
def _widen(codes, bits):  # type: ignore[no-untyped-def]
    for i in range(codes.size):
        bits[i] = np.uint32(codes[i]) << np.uint32(16)


@njit(cache=True, nogil=True)
def _copy(values, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = values[i]


@njit(cache=True, nogil=True)
def _add(values, added, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = values[i] + added[i]


@njit(cache=True, nogil=True)
def from_bfloat16(codes, added, out, start, stop):  # type: ignore[no-untyped-def]
    """``out = codes``, or ``codes + added`` if ``added`` is not empty."""
    near = np.empty(BLOCK, np.float32)
    bits = near.view(np.uint32)
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        _widen(codes[first:last], bits)
        if added.size:
            _add(near, added[first:last], out[first:last])
        else:
            _copy(near, out[first:last])


@njit(cache=True, nogil=True)
def _scale(largest, scales, block):  # type: ignore[no-untyped-def]
    """The smallest scale, in the precision of ``scales``, of which the largest magnitude has at most 127."""
    scales[block] = max(largest / STEPS, 2.0**-1000)  # below, a float64 has no inverse
    if scales[block] * np.float64(STEPS) < largest:  # rounded down, in the extreme to zero
        scales[block] = np.nextafter(scales[block], scales.dtype.type(np.inf))
    while not np.isfinite(scales[block] * scales.dtype.type(STEPS)):
        scales[block] = np.nextafter(scales[block], scales.dtype.type(0))
    return np.float64(scales[block])


@njit(cache=True, nogil=True)
def _largest(bits, mask):  # type: ignore[no-untyped-def]
    """The bits of the largest magnitude: without their sign, numbers are ordered as their bits are."""
    largest = bits.dtype.type(0)
    for i in range(bits.size):
        largest = max(largest, bits.dtype.type(bits[i] & mask))
    return largest


@njit(cache=True, nogil=True)
def _round_int8(values, inverse, seed, codes):  # type: ignore[no-untyped-def]
    for i in range(codes.size):
        draw = np.float64(_random(seed, i)) * 2.0**-32
        steps = np.floor(np.float64(values[i]) * inverse + draw)
        codes[i] = np.int8(np.int32(min(max(steps, -127.0), 127.0)))


@njit(cache=True, nogil=True)
def to_int8(values, bits, mask, key, codes, scales, position, changed, start, stop):  # type: ignore[no-untyped-def]
    """Round ``values[start:stop]`` to multiples of a scale a block, ``largest magnitude / 127``.

    ``bits`` are the values as integers, ``mask`` is all bits of one but the sign. For the rest see
    ``to_bfloat16``; the bound is ``(scale / 2)**2`` a value.
    """
    expected = 0.0
    near = np.empty(BLOCK, values.dtype)
    largest = np.empty(1, values.dtype)
    largest_bits = largest.view(bits.dtype)
    for first in range(start, stop, BLOCK):
        last, block = min(first + BLOCK, stop), first // BLOCK
        largest_bits[0] = _largest(bits[first:last], mask)
        if largest[0] == 0:
            scales[block] = 0
            codes[first:last] = 0
            continue
        scale = _scale(largest[0], scales, block)
        _round_int8(values[first:last], 1.0 / scale, _seed(key, block), codes[first:last])
        _multiply(codes[first:last], scales[block], near[: last - first])
        sketch.add_difference(values[first:last], near, position + first, changed)
        expected += (last - first) * (scale / 2) ** 2
    return expected


@njit(cache=True, nogil=True)
def _multiply(codes, scale, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = scale * codes[i]


@njit(cache=True, nogil=True)
def from_int8(codes, scales, added, out, start, stop):  # type: ignore[no-untyped-def]
    """``out = codes * scales``, or that ``+ added`` if ``added`` is not empty; rounded before it is added."""
    for first in range(start, stop, BLOCK):
        last, scale = min(first + BLOCK, stop), scales[first // BLOCK]
        _multiply(codes[first:last], scale, out[first:last])
        if added.size:
            _add(out[first:last], added[first:last], out[first:last])


@njit(cache=True, nogil=True)
def _any_bit(bits):  # type: ignore[no-untyped-def]
    found = bits.dtype.type(0)
    for i in range(bits.size):
        found |= bits[i]
    return found != 0


@njit(cache=True, nogil=True)
def occupied(bits, numbers):  # type: ignore[no-untyped-def]
    """Note the numbers of the patches in which any bit is set (so ``-0.0`` counts), and how many there are."""
    count = 0
    for number in range(numbers.size):
        numbers[count] = number
        count += _any_bit(bits[number * PATCH : (number + 1) * PATCH])
    return count


@njit(cache=True, nogil=True)
def gather(values, numbers, patches):  # type: ignore[no-untyped-def]
    """Copy the patches with these numbers, each to its row; the last is padded with zeros."""
    for row in range(numbers.size):
        start = numbers[row] * PATCH
        size = min(PATCH, values.size - start)
        patches[row, :size] = values[start : start + size]
        patches[row, size:] = 0.0


@njit(cache=True, nogil=True)
def scatter(numbers, patches, added, out):  # type: ignore[no-untyped-def]
    """``out`` = the patches in their places and zero elsewhere, ``+ added`` if ``added`` is not empty."""
    for i in range(out.size):
        out[i] = added[i] + 0.0 if added.size else 0.0  # the sum makes -0.0 to 0.0, as elsewhere
    for row in range(numbers.size):
        start = numbers[row] * PATCH
        part = out[start : start + PATCH]
        if added.size:
            _add(patches[row], added[start : start + PATCH], part)
        else:
            _copy(patches[row], part)
