"""A second reader of frames, written from docs/protocol.md with nothing but the standard library and msgpack.

It shares no line with the package, is as slow as it is short, and refuses nothing. ``test_golden`` loads it.
"""

import struct
import zlib
from itertools import pairwise

import msgpack


def read_varint(data, at):
    number = shift = 0
    while True:
        number |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return number, at


def read_frame(data):
    magic, version, kind, zero, layout, table_size, body_size = struct.unpack_from("<4sBBH8sIQ", data)
    assert (magic, version, zero) == (b"CRRY", 1, 0)
    assert len(data) == 28 + table_size + body_size + 4
    assert struct.unpack_from("<I", data, len(data) - 4) == (zlib.crc32(data[:-4]),)
    fields = msgpack.unpackb(data[28 : 28 + table_size], strict_map_key=False)
    lengths, at, place, bodies = fields.pop(0, b""), 0, 28 + table_size, []
    while at < len(lengths):
        size, at = read_varint(lengths, at)
        bodies.append(data[place : place + size])
        place += size
    return kind, layout, fields, bodies


def read_bits(data, at, width):
    return int.from_bytes(data, "little") >> at & (1 << width) - 1


def read_digits(data, count, base):
    most = max(p for p in range(1, 9) if base**p <= 256)
    return [data[i // most] // base ** (i % most) % base for i in range(count)]


def digits_size(count, base):
    return -(-count // max(p for p in range(1, 9) if base**p <= 256))


class Width:
    """The working precision of a segment."""

    def __init__(self, wide):
        self.size, self.form = (8, "d") if wide else (4, "f")

    def rounded(self, number):
        """Of a sum or product of two such numbers, which a float64 holds exactly or rounds harmlessly."""
        return struct.unpack(f"<{self.form}", struct.pack(f"<{self.form}", number))[0]

    def floats(self, data, at, count):
        return list(struct.unpack_from(f"<{count}{self.form}", data, at)), at + count * self.size

    def halves(self, data, at, count):
        half = self.size // 2
        parts = (bytes(half) + data[at + i * half : at + (i + 1) * half] for i in range(count))
        return [struct.unpack(f"<{self.form}", part)[0] for part in parts], at + count * half


CASTS = {0: (8, "d"), 1: (4, "f"), 2: (2, "e"), 3: (2, None)}  # bytes of a number, and its format


def read_numbers(code, data, width):
    size, form = CASTS[code]
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    if form is None:  # bfloat16: the upper half of a float32
        form, parts = "f", [b"\0\0" + part for part in parts]
    return [width.rounded(struct.unpack(f"<{form}", part)[0]) for part in parts]


def read_grid(code, data, at, width):
    """What the symbols stand for, and the place behind."""
    half = {5: 128, 6: 8, 7: 128, 8: 8, 9: 2}[code]
    if code in (5, 6):
        (low, step), at = width.floats(data, at, 2)
        levels = [low]
        while len(levels) < half:
            levels.append(width.rounded(levels[-1] * step))
    else:
        number, at = data[at], at + 1
        levels, at = (width.floats if code == 7 or number == 1 else width.halves)(data, at, number)
        if code == 7 and number > 1:
            cells = [(low, width.rounded(high - low)) for low, high in pairwise(levels)]
            places = [(2 * j + 1) / 32 for j in range(16)]
            levels = [width.rounded(low + width.rounded(step * place)) for low, step in cells for place in places]
    levels += [0.0] * (half - len(levels))
    return 2 * half, levels + [-level for level in levels], at


def read_values(code, coded, width, data, at, count):
    """A section of values, and the place behind it."""
    if code in CASTS:
        size = CASTS[code][0]
        if not coded:
            return read_numbers(code, data[at : at + count * size], width), at + count * size
        planes = []
        for _ in range(size):
            plane, at = read_stream(data, at, count, 256)
            planes.append(plane)
        return read_numbers(code, bytes(byte for number in zip(*planes, strict=True) for byte in number), width), at
    units, bucket = [1.0], count
    if code == 4:
        (scale,), at = width.floats(data, at, 1)
        base, meaning = 2, [scale, -scale]
    elif code == 10:
        levels, (bucket, at) = data[at], read_varint(data, at + 1)
        bucket = min(bucket, count) or count
        units, at = width.floats(data, at, -(-count // bucket))
        base, meaning = 2 * levels + 1, [*range(levels + 1), *range(-1, -levels - 1, -1)]
    elif code == 11:
        (scale,), at = width.floats(data, at, 1)
        powers = [0.0, *(width.rounded(scale * 2.0 ** (i - 127)) for i in range(1, 128))]
        base, meaning = 256, powers + [-power for power in powers]
    else:
        base, meaning, at = read_grid(code, data, at, width)
    if coded:
        symbols, at = read_stream(data, at, count, base)
    else:
        symbols, at = read_digits(data[at:], count, base), at + digits_size(count, base)
    return [width.rounded(meaning[s] * units[i // bucket]) for i, s in enumerate(symbols)], at


def read_stream(data, at, count, base):
    """Entropy-coded symbols behind their length, and the place behind them."""
    length, at = read_varint(data, at)
    stream, end = data[at : at + length], at + length
    kind, at = stream[0], 1
    if kind == 0:
        return [stream[1]] * count, end
    if kind == 3:
        return read_digits(stream[1:], count, base), end
    frequent, first = None, count
    if kind == 2:
        frequent, (first, at) = stream[1], read_varint(stream, 2)
    words, at = read_varint(stream, at)
    k, b = stream[at : at + 2]
    at += 2
    models = 1 if frequent is None else 2
    flags, at = read_digits(stream[at:], models * base, 2), at + -(-models * base // 8)
    split = len(stream) - 4 * words
    ends = [end + 1 for end in read_rice(stream[at:split], b, sum(flags) - 1)] + [models << k]
    steps = iter(end - begin for begin, end in pairwise([0, *ends]))
    widths = [(next(steps) if flag else 0) << (24 - k) for flag in flags]
    stack, x = list(struct.unpack(f"<{words}I", stream[split:])), 0
    symbols = []
    for model, number in ((widths[:base], first), (widths[base:], count - first)):
        starts = [sum(model[:i]) for i in range(base)]
        for _ in range(number):
            while x < 2**32 and stack:
                x = x << 32 | stack.pop()
            if max(model) == 2**24:
                symbols.append(model.index(2**24))
                continue
            q = x % 2**24
            symbol = next(i for i in range(base) if starts[i] <= q < starts[i] + model[i])
            x = model[symbol] * (x >> 24) + q - starts[symbol]
            symbols.append(symbol)
    assert (x, stack) == (0, [])
    if frequent is None:
        return symbols, end
    queues, joined = (iter(symbols[:first]), iter(symbols[first:])), [frequent]
    for _ in range(count):
        joined.append(next(queues[joined[-1] != frequent]))
    return joined[1:], end


def read_rice(data, b, count):
    split = (count * b + 7) // 8
    unary, at, previous, numbers = data[split:], 0, -1, []
    for i in range(count):
        quotient = 0
        while not read_bits(unary, at, 1):
            quotient, at = quotient + 1, at + 1
        at += 1
        previous += 1 + (quotient << b) + read_bits(data[:split], i * b, b)
        numbers.append(previous)
    return numbers


def read_blocks(data, w, count):
    blocks, at = read_varint(data, 0)
    split = len(data) - blocks * 2**w // 8
    numbers = read_rice(data[at + 1 : split], data[at], blocks)
    maps = [read_bits(data[split:], i * 2**w, 2**w) for i in range(blocks)]
    return [(n << w) + bit for n, bits in zip(numbers, maps, strict=True) for bit in range(2**w) if bits >> bit & 1]


def read_indices(code, parameter, data, count, numel):
    if code == 2:
        return read_rice(data, parameter, count)
    if code == 4:
        return read_blocks(data, parameter, count)
    if code == 3:
        return [i for i in range(numel) if data[i // 8] >> i % 8 & 1]
    bits = max(1, (numel - 1).bit_length())
    return [read_bits(data, i * bits, bits) for i in range(count)]


def draw(key, count, numel):
    """The elements that a key chooses."""
    bits = max(8, (numel - 1).bit_length())
    low = bits // 2
    keys = []
    for r in range(1, 7):
        z = (key + r * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        keys.append((z ^ z >> 31) >> 32)

    def mix(x, k):
        x ^= k
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    chosen = set()
    for x in range(count):
        while True:
            upper, lower = x >> low, x % 2**low
            for r in range(0, 6, 2):
                upper ^= mix(lower, keys[r]) % 2 ** (bits - low)
                lower ^= mix(upper, keys[r + 1]) % 2**low
            x = upper << low | lower
            if x < numel:
                break
        chosen.add(x)
    return sorted(chosen)


def read_product(code, coded, width, data, at, numel):
    rows, at = read_varint(data, at)
    rank, at = read_varint(data, at)
    left, at = read_values(code, coded, width, data, at, rows * rank)
    right, at = read_values(code, coded, width, data, at, numel // rows * rank)
    values = []
    for i in range(rows):
        for j in range(numel // rows):
            steps = [width.rounded(left[i * rank + r] * right[j * rank + r]) for r in range(rank)]
            total = steps[0]
            for step in steps[1:]:
                total = width.rounded(total + step)
            values.append(total)
    return values, at


def read_segment(data):
    index_code, code, coded, width = data[0], data[1] & 63, bool(data[1] & 64), Width(data[1] & 128)
    numel, at = read_varint(data, 2)
    indices, values, end = None, [], len(data)
    if index_code == 0:
        values, end = read_values(code, coded, width, data, at, numel)
    elif index_code == 1:
        indices, end = [], at
    elif index_code == 7:
        values, end = read_product(code, coded, width, data, at, numel)
    else:
        count, at = read_varint(data, at)
        size = 8 if index_code == 6 else 1
        parameter = int.from_bytes(data[at : at + size], "little")
        values, at = read_values(code, coded, width, data, at + size, count)
        if index_code == 6:
            indices, end = draw(parameter, count, numel), at
        else:
            indices = read_indices(index_code, parameter, data[at:], count, numel)
    assert end == len(data)
    return {"numel": numel, "float": 8 * width.size, "indices": indices, "values": values}
