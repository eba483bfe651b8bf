"""Frames that must decode for ever, to the last bit, by this package and by the specification alone.

``golden/*.frame`` are bytes that some version has sent; ``golden/frames.json`` says what each must decode
to. New frames are added in ``new_frames`` and written by ``python tests/protocol/test_golden.py --write``,
which never touches a frame that exists.
"""

import dataclasses
import hashlib
import json
import re
import struct
import sys
import zlib
from pathlib import Path

import msgpack
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
INDEX = GOLDEN / "frames.json"
DOCUMENT = ROOT / "docs" / "protocol.md"
EXAMPLE = "example"  # the frame that the document explains byte by byte

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from protocol import Layout, messages, snapshot, wire  # noqa: E402
from protocol.layout import Entry as Tensor  # noqa: E402
from protocol.messages import (  # noqa: E402
    Average,
    Entry,
    Farewell,
    Join,
    Leave,
    Mean,
    Push,
    Refusal,
    Welcome,
    pack_statistics,
)
from protocol.segment import pack_dense, pack_exact, pack_sparse, unpack  # noqa: E402
from protocol.values import BY_NAME  # noqa: E402

CODES = ("f64", "f32", "bf16", "sign", "int8", "int4")
MODEL = Layout(
    (
        Tensor("weight", (2, 3), "float32", "parameter"),
        Tensor("bias", (2,), "bfloat16", "parameter"),
        Tensor("running_mean", (2,), "float32", "buffer"),
        Tensor("steps", (), "int64", "static"),
        Tensor("mask", (3,), "bool", "static"),
    )
)


# -- what is in a frame, as JSON ---------------------------------------------------------------------


def plain(value):
    """A field as JSON carries it."""
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"map": [[plain(k), plain(v)] for k, v in value.items()]}
    return [plain(v) for v in value] if isinstance(value, list) else value


def segment(numel, values, indices):
    """A decoded segment as JSON carries it: floats in their shortest form, which is exact."""
    places = None if indices is None else [int(i) for i in indices]
    return {"numel": numel, "float": 8 * values.itemsize, "indices": places, "values": [float(v) for v in values]}


def same_values(found, expected):
    """Equal in every bit: JSON keeps the sign of a zero, and ``==`` does not."""
    as_bytes = [struct.pack(f"<{len(s['values'])}d", *s["values"]) for s in (found, expected)]
    return found == expected and as_bytes[0] == as_bytes[1]


def decoded_here(frame, expected):
    """What this package reads in a frame."""
    parts, message = wire.unpack(frame), messages.parse(frame)
    bodies = []
    for body, known in zip(message.bodies, expected["bodies"], strict=True):
        if "raw" in known:
            bodies.append({"raw": bytes(body).hex()})
        else:
            update = unpack(body, known["numel"])
            bodies.append(segment(update.numel, update.values, update.indices))
    return {
        "message": type(message).__name__,
        "layout": message.layout.hex(),
        "fields": plain(parts.fields),
        "bodies": bodies,
    }


# -- a second reader, written from docs/protocol.md with nothing but the standard library and msgpack -----


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


def read_values(code, wide, data, count):
    size, form = (8, "d") if wide else (4, "f")

    def rounded(number):  # to the working precision; the product of two float32 is exact in a float64
        return struct.unpack(f"<{form}", struct.pack(f"<{form}", number))[0]

    if code == 0:
        return [rounded(v) for v in struct.unpack(f"<{count}d", data)]
    if code == 1:
        return list(struct.unpack(f"<{count}f", data))
    if code == 3:
        return [struct.unpack("<f", b"\0\0" + data[2 * i : 2 * i + 2])[0] for i in range(count)]
    if code == 4:
        (scale,) = struct.unpack_from(f"<{form}", data)
        return [-scale if read_bits(data[size:], i, 1) else scale for i in range(count)]
    bits = {5: 8, 6: 4}[code]
    low, step = struct.unpack_from(f"<2{form}", data)
    levels = [low]
    while len(levels) < 2 ** (bits - 1):
        levels.append(rounded(levels[-1] * step))
    signed = levels + [-level for level in levels]
    return [signed[read_bits(data[2 * size :], bits * i, bits)] for i in range(count)]


def read_size(code, wide, count):
    size = 8 if wide else 4
    each = {0: 64, 1: 32, 3: 16, 4: 1, 5: 8, 6: 4}[code]
    return {4: size, 5: 2 * size, 6: 2 * size}.get(code, 0) + (count * each + 7) // 8


def read_indices(data, b, count):
    split = (count * b + 7) // 8
    unary, at, previous, indices = data[split:], 0, -1, []
    for i in range(count):
        quotient = 0
        while not read_bits(unary, at, 1):
            quotient, at = quotient + 1, at + 1
        at += 1
        previous += 1 + (quotient << b) + read_bits(data[:split], i * b, b)
        indices.append(previous)
    return indices


def read_segment(data):
    index_code, code, wide = data[0], data[1] & 127, bool(data[1] & 128)
    numel, at = read_varint(data, 2)
    indices, values = [], []
    if index_code == 0:
        indices, values = None, read_values(code, wide, data[at:], numel)
    if index_code == 2:
        count, at = read_varint(data, at)
        end = at + 1 + read_size(code, wide, count)
        values = read_values(code, wide, data[at + 1 : end], count)
        indices = read_indices(data[end:], data[at], count)
    return {"numel": numel, "float": 64 if wide else 32, "indices": indices, "values": values}


KINDS = ("Join", "Welcome", "Push", "Entry", "Average", "Mean", "Refusal", "Leave", "Farewell")


def decoded_elsewhere(data, expected):
    """What the second reader reads in a frame."""
    kind, layout, fields, bodies = read_frame(data)
    read = [
        {"raw": body.hex()} if "raw" in known else read_segment(body)
        for body, known in zip(bodies, expected["bodies"], strict=True)
    ]
    return {"message": KINDS[kind - 1], "layout": layout.hex(), "fields": plain(fields), "bodies": read}


# -- the frames that are there ----------------------------------------------------------------------


def known_frames():
    return json.loads(INDEX.read_text(encoding="utf-8")) if INDEX.exists() else {}


every_frame = pytest.mark.parametrize("name", sorted(known_frames()))


def load(name):
    return (GOLDEN / f"{name}.frame").read_bytes()


def agree(found, expected):
    assert {**found, "bodies": None} == {**expected, "bodies": None}
    for body, known in zip(found["bodies"], expected["bodies"], strict=True):
        assert body == known if "raw" in known else same_values(body, known)


@every_frame
def test_a_golden_frame_decodes_as_ever(name):
    expected = known_frames()[name]
    agree(decoded_here(np.frombuffer(load(name), np.uint8), expected), expected)


@every_frame
def test_the_specification_alone_suffices_to_read_it(name):
    expected = known_frames()[name]
    agree(decoded_elsewhere(load(name), expected), expected)


def test_every_golden_frame_is_listed_and_no_other_file_is_there():
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.frame" for name in known_frames()} | {INDEX.name}


def test_the_golden_frames_cover_every_message_and_every_code():
    frames = known_frames()
    assert {frame["message"] for frame in frames.values()} == set(KINDS)
    seen = set()
    for name, frame in frames.items():
        seen |= {
            (b[0], b[1]) for b, s in zip(read_frame(load(name))[3], frame["bodies"], strict=True) if "raw" not in s
        }
    ids = {BY_NAME[code].wire_id + wide for code in CODES for wide in (0, 128)}
    assert seen >= {(index_code, code) for index_code in (0, 2) for code in ids}
    assert {code for index_code, code in seen if index_code == 1} >= {1, 128}
    assert set(BY_NAME) == set(CODES), "a new value code needs a golden frame"


def test_the_layout_of_the_golden_frames_has_the_hash_that_the_specification_gives():
    join = known_frames()["join"]
    (described,) = (value for key, value in join["fields"]["map"] if key == 2)
    assert described == MODEL.describe()
    assert join["layout"] == hashlib.blake2b(msgpack.packb(described), digest_size=8).hexdigest()
    assert join["layout"] == MODEL.hash.hex()


def test_a_snapshot_among_them_loads():
    w, statics = snapshot.unpack_snapshot(MODEL, wire.unpack(np.frombuffer(load("welcome"), np.uint8)).bodies)
    assert w.tolist() == np.float32([0.5, -0.25, 0.0, 3.0, 1e-30, -7.0, 1.5, -2.0, 0.1875, 0.0]).tolist()
    restored = [snapshot.restore_static(b, e.shape, e.dtype) for b, e in zip(statics, MODEL.statics, strict=True)]
    assert restored[0].item() == 2**40 + 1
    assert restored[1].tolist() == [True, False, True]


def test_the_frame_that_the_document_explains_is_the_golden_one():
    """The hexadecimal digits in the first column of the table, one row after the other."""
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text[text.index("## A frame, byte by byte") :]
    rows = re.findall(r"^\| *\d+ *\| `((?:[0-9a-f]{2} ?)+)` \|", section, re.MULTILINE)
    assert bytes.fromhex("".join(rows)) == load(EXAMPLE)
    starts = [int(start) for start in re.findall(r"^\| *(\d+) *\| `[0-9a-f]{2}", section, re.MULTILINE)]
    sizes = [len(bytes.fromhex(row)) for row in rows]
    assert starts == [sum(sizes[:i]) for i in range(len(sizes))]


def test_the_document_lists_every_message_with_its_kind_and_its_keys():
    text = DOCUMENT.read_text(encoding="utf-8")
    found = {}
    for part in re.split(r"^(?=\*\*\d+ \w+\*\*: )", text, flags=re.MULTILINE)[1:]:
        kind, name = re.match(r"\*\*(\d+) (\w+)\*\*", part).groups()
        part = part[: part.index("\n## ")] if "\n## " in part else part
        rows = re.findall(r"^\| (\d+) \| (\w+) \|", part, re.MULTILINE)
        found[name] = int(kind), {field: int(key) for key, field in rows}
    expected = {}
    for message in (Join, Welcome, Push, Entry, Average, Mean, Refusal, Leave, Farewell):
        fields = {f.name: f.metadata["key"] for f in dataclasses.fields(message) if "key" in f.metadata}
        expected[message.__name__] = message.KIND, fields
    assert found == expected


def test_the_document_lists_every_reason_and_every_value_code():
    text = DOCUMENT.read_text(encoding="utf-8")
    reasons = text[text.index("## Refusals") : text.index("## Statistics")]
    assert tuple(re.findall(r"^\| `(\w+)` \|", reasons, re.MULTILINE)) == messages.REASONS
    codes = text[text.index("### Value codes") : text.index("### Golomb-Rice")]
    found = re.findall(r"^\| (\d+) \| `(\w+)` \|", codes, re.MULTILINE)
    assert {name: int(number) for number, name in found} == {name: code.wire_id for name, code in BY_NAME.items()}


# -- writing new ones ---------------------------------------------------------------------------------


def code_values(dtype):
    """Thirteen values with a gap around zero, both signs, ties and a heavy tail."""
    magnitudes = [0.0123, 0.02, 0.02, 0.5, 1 / 3, 1.0, 1.5, 2.0**-20, 7.25, 100.0, 0.75, 3e-5, 0.1]
    return np.array([-m if i % 3 == 1 else m for i, m in enumerate(magnitudes)], dtype)


def code_bodies(dtype, sparse):
    """One body a value code; when sparse, in segments of growing size and so with growing Rice parameters."""
    values, bodies = code_values(dtype), []
    for n, code in enumerate(CODES):
        if not sparse:
            bodies.append(pack_dense(BY_NAME[code], values)[0])
            continue
        numel = 13 * 7**n
        indices = np.unique(np.array([0, *(numel * f // 97 for f in range(5, 90, 8)), numel - 1]))
        bodies.append(pack_sparse(BY_NAME[code], numel, indices, values[: indices.size])[0])
    return tuple(bodies)


def nothings():
    """Empty segments of sizes with one, two and three bytes, both widths."""
    return tuple(pack_exact(np.zeros(n, t)) for t in (np.float32, np.float64) for n in (0, 1, 300, 20000))


def new_frames():
    """Every frame by name, from the encoders of today."""
    at = {"layout": MODEL.hash}
    w = np.array([0.5, -0.25, 0.0, 3.0, 1e-30, -7.0, 1.5, -2.0, 0.1875, 0.0], np.float32)
    parts = (w[:6], w[6:8], w[8:])
    statics = (np.array([2**40 + 1], "<i8").view(np.uint8), np.array([1, 0, 1], np.uint8))
    exact = tuple(pack_exact(part) for part in parts)
    top = pack_sparse(BY_NAME["int4"], 1000, np.array([3, 141, 592]), np.array([0.5, -2, 1], np.float32))[0]
    optimizer = {
        "kind": "torch.optim.sgd.SGD",
        "groups": [{"params": ["weight", "bias"], "lr": 0.1, "momentum": 0.9, "nesterov": False, "foreach": None}],
    }
    statistics = pack_statistics({0: 1.5, 1: 1.25, 2: 0.5, 8: 0.75, 16: float("-inf"), 17: 0.1})
    large = np.unique(np.array([0, 1, 2, 130, 131, 4_000_000, 4_000_100, 9_999_999]))
    ramp = np.linspace(-1, 1, large.size, dtype=np.float32)
    return {
        EXAMPLE: Push(3, 9, 7, 32, bodies=(top, pack_exact(np.zeros(10, np.float32))), layout=bytes(range(16, 24))),
        "join": Join(3, MODEL.describe(), **at),
        "join_founder": Join(0, MODEL.describe(), optimizer, bodies=(*exact, *statics), **at),
        "join_again": Join(3, MODEL.describe(), version=70000, **at),
        "welcome": Welcome(7, 640, {0: 0.25, 3: 0.75}, bodies=(*exact, *statics), **at),
        "welcome_held": Welcome(7, 2**40, {0: 1.0}, **at),
        "push_dense_float32": Push(0, 1, 0, 8, bodies=code_bodies(np.float32, False)),
        "push_dense_float64": Push(0, 2, 1, 8, bodies=code_bodies(np.float64, False)),
        "push_sparse_float32": Push(0, 3, 2, 8, bodies=code_bodies(np.float32, True)),
        "push_sparse_float64": Push(0, 4, 3, 8, bodies=code_bodies(np.float64, True)),
        "push_nothing": Push(0, 5, 4, 8, bodies=nothings()),
        "push_all_fields": Push(
            2**33,
            2**32,
            2**31,
            2**16,
            statistics,
            ["loss", "Genauigkeit: größer"],
            2**63 - 1,
            [{"lr": 0.05, "betas": [0.9, 0.999]}, {}],
            3,
            bodies=exact,
            **at,
        ),
        "entry": Entry(8, 672, bodies=exact, **at),
        "entry_final": Entry(9, 704, {0: 0.5, 1: 1 / 3, 3: 1 / 6}, True, bodies=exact, **at),
        "entry_large": Entry(1, 1, bodies=(pack_sparse(BY_NAME["bf16"], 10_000_000, large, ramp)[0],)),
        "average": Average(3, 10, 8, bodies=exact, **at),
        "mean": Mean(8, 0.75, bodies=tuple(pack_exact(3 * part) for part in parts), **at),
        "refusal": Refusal("version", "worker 3 sent an update of version 7 in round 8"),
        "leave": Leave(3, "spot", bodies=exact, **at),
        "leave_without_residual": Leave(3, "not_finite", **at),
        "farewell": Farewell(8, **at),
    }


def write():
    """Write the frames that are not there yet."""
    GOLDEN.mkdir(exist_ok=True)
    known = known_frames()
    for name, message in new_frames().items():
        if name in known:
            print(f"{name} exists and stays as it is")
            continue
        frame, bodies = message.pack(), []
        statics = 2 if len(message.bodies) == 5 else 0
        for number, body in enumerate(message.bodies):
            raw = number >= len(message.bodies) - statics
            bodies.append({"raw": ""} if raw else {"numel": read_segment(bytes(body))["numel"]})
        with open(GOLDEN / f"{name}.frame", "xb") as file:
            file.write(bytes(frame))
        known[name] = decoded_here(frame, {"bodies": bodies})
        print(f"{name}: {frame.size} bytes")
    rows = (f"{json.dumps(name)}: {json.dumps(known[name], ensure_ascii=False)}" for name in sorted(known))
    INDEX.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/protocol/test_golden.py --write")
    write()
