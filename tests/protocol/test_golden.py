"""Frames that must decode for ever, to the last bit, by this package and by the specification alone.

``golden/*.frame`` are bytes that some version has sent; ``golden/frames.json`` says what each must decode
to. New frames are added in ``new_frames`` and written by ``python tests/protocol/test_golden.py --write``,
which never touches a frame that exists. Some of those that do are of encoders that are no more.
"""

import hashlib
import importlib.util
import json
import struct
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
INDEX = GOLDEN / "frames.json"

_spec = importlib.util.spec_from_file_location("second_reader", Path(__file__).with_name("second_reader.py"))
reader = importlib.util.module_from_spec(_spec)  # not of a package, so pytest cannot import it by name
_spec.loader.exec_module(reader)

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from protocol import Layout, compressor, halves, messages, snapshot, wire  # noqa: E402
from protocol.halves import Activations, Gradients, pack_numbers  # noqa: E402
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
from protocol.segment import pack_exact, unpack  # noqa: E402
from protocol.values import BY_ID  # noqa: E402

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
    parts = wire.unpack(frame)
    message = (halves if parts.kind >= 64 else messages).parse(frame)
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


# -- what a second reader makes of a frame ---------------------------------------------------------------


KINDS = ("Join", "Welcome", "Push", "Entry", "Average", "Mean", "Refusal", "Leave", "Farewell")
HALVES = ("Activations", "Gradients")  # from 64 on


def decoded_elsewhere(data, expected):
    """What the second reader reads in a frame."""
    kind, layout, fields, bodies = reader.read_frame(data)
    read = [
        {"raw": body.hex()} if "raw" in known else reader.read_segment(body)
        for body, known in zip(bodies, expected["bodies"], strict=True)
    ]
    name = HALVES[kind - 64] if kind >= 64 else KINDS[kind - 1]
    return {"message": name, "layout": layout.hex(), "fields": plain(fields), "bodies": read}


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
    assert {frame["message"] for frame in frames.values()} == {*KINDS, *HALVES}
    heads = set()
    for name, frame in frames.items():
        for body, known in zip(reader.read_frame(load(name))[3], frame["bodies"], strict=True):
            if "raw" not in known:
                heads.add((body[0], body[1] & 63, body[1] & 64, body[1] & 128))
    for code in BY_ID:
        for wide in (0, 128):
            assert (0, code, 0, wide) in heads
            assert code in (5, 6) or (0, code, 64, wide) in heads  # no longer written, and never entropy-coded
    assert {head[0] for head in heads} == set(range(8))
    assert {(index, wide) for index, _, _, wide in heads} == {(index, wide) for index in range(8) for wide in (0, 128)}
    assert {(7, coded) for index, _, coded, _ in heads if index == 7} == {(7, 0), (7, 64)}


def test_the_golden_frames_hold_every_kind_of_entropy_coded_stream(monkeypatch):
    kinds, real = set(), reader.read_stream

    def spied(data, at, count, base):
        kinds.add(data[reader.read_varint(data, at)[1]])
        return real(data, at, count, base)

    monkeypatch.setattr(reader, "read_stream", spied)
    for name, frame in known_frames().items():
        decoded_elsewhere(load(name), frame)
    assert kinds == {0, 1, 2, 3}


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


# -- writing new ones ---------------------------------------------------------------------------------


VALUES = ("f64", "f32", "f16", "bf16", "sign", "int8", "int4", "int2", "ternary", "qsgd:4,bucket=5", "natural")
PLACES = {  # a selection that gives each index code, and the elements that are not zero
    "2": (1000, [3, 141, 592, 653, 700, 951, 960, 999]),
    "3": (24, [0, 1, 3, 4, 6, 9, 10, 12, 13, 16, 17, 18, 20, 23]),
    "4": (4000, [*range(64, 80), *range(1000, 1024, 2), 1600, 1601, 1607, *range(3000, 3008)]),
    "5": (65_536, [31_415, 65_535]),
}


def body(spec, values, shape=(), key=2**63 + 5):
    """As a sender makes it that keeps what it does not send."""
    vector = torch.from_numpy(np.ascontiguousarray(values).reshape(-1))
    return compressor(spec, shape).encode(vector, (), key, None, torch.empty_like(vector))[0]


def code_values(dtype):
    """Thirteen values with a gap around zero, both signs, ties and a heavy tail."""
    magnitudes = [0.0123, 0.02, 0.02, 0.5, 1 / 3, 1.0, 1.5, 2.0**-20, 7.25, 100.0, 0.75, 3e-5, 0.1]
    return np.array([-m if i % 3 == 1 else m for i, m in enumerate(magnitudes)], dtype)


def few(dtype, count, runs):
    """Values that entropy coding makes smaller: mostly one, here and there others; in runs, or anywhere."""
    random = np.random.default_rng(count)
    lengths = random.integers(3, 25, count) if runs else np.ones(count, int)
    drawn = np.repeat(random.choice([1.0, -1.0, 0.5, -2.0], count, p=[0.7, 0.1, 0.1, 0.1]), lengths)[:count]
    return drawn.astype(dtype)


def code_bodies(dtype):
    """Every value code of thirteen values; those with several knots also of equal ones."""
    values = code_values(dtype)
    return (*(body(code, values) for code in VALUES), *(body(code, np.sign(values)) for code in ("int8", "int2")))


def coded_bodies(dtype):
    """Every value code, entropy-coded: by one model, by two, with bytes of a number that are packed or all the same."""
    mantissas = np.random.default_rng(0).integers(2**15, 2**16, 40).astype(dtype)
    return (
        *(body(f"{code}+entropy", few(dtype, 120, runs=False)) for code in VALUES),
        *(body(f"{code}+entropy", few(dtype, 300, runs=True)) for code in ("sign", "int4")),
        body("f32+entropy", mantissas),
    )


def place_bodies(dtype):
    """Every index code, each with another value code."""
    bodies = []
    for spec, (numel, places) in zip(("none", "int4", "sign", "f16"), PLACES.values(), strict=True):
        values = np.zeros(numel, dtype)
        values[places] = np.resize(code_values(dtype), len(places))
        bodies.append(body(f"threshold:1e-9+{spec}", values))
    for numel, spec in ((5, "randk:0.4"), (300, "randk:0.05+int8"), (1000, "randk:0.01+natural+entropy")):
        bodies.append(body(spec, np.linspace(-1, 2, numel).astype(dtype)))
    return tuple(bodies)


def product_bodies(dtype):
    """Matrices of nine by eight, of which rank 1 and 3 are sent."""
    random = np.random.default_rng(4)
    matrix, ones = random.normal(size=(9, 8)).astype(dtype), np.outer(np.ones(18), np.arange(16) % 2 + 1)
    return (
        *(body(spec, matrix, (9, 8)) for spec in ("lowrank:1", "lowrank:3+f32", "lowrank:3+bf16")),
        body("lowrank:1+f16+entropy", ones.astype(dtype), (18, 16)),
    )


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
    three = np.zeros(1000, np.float32)
    three[[3, 141, 592]] = 0.5, -2, 1
    pair = (body("topk:0.003+int4", three), pack_exact(np.zeros(10, np.float32)))
    optimizer = {
        "kind": "torch.optim.sgd.SGD",
        "groups": [{"params": ["weight", "bias"], "lr": 0.1, "momentum": 0.9, "nesterov": False, "foreach": None}],
    }
    statistics = pack_statistics({0: 1.5, 1: 1.25, 2: 0.5, 8: 0.75, 16: float("-inf"), 17: 0.1})
    return {
        "example_of_knots": Push(3, 9, 7, 32, bodies=pair, layout=bytes(range(16, 24))),  # docs/protocol.md explains it
        "join": Join(3, MODEL.describe(), **at),
        "join_founder": Join(0, MODEL.describe(), optimizer, bodies=(*exact, *statics), **at),
        "join_again": Join(3, MODEL.describe(), version=70000, **at),
        "welcome": Welcome(7, 640, {0: 0.25, 3: 0.75}, bodies=(*exact, *statics), **at),
        "welcome_held": Welcome(7, 2**40, {0: 1.0}, **at),
        **{
            f"push_{what}_{dtype.__name__}": Push(0, 6 + n, 5 + n, 8, bodies=bodies(dtype))
            for n, (what, bodies) in enumerate(
                {
                    "codes": code_bodies,
                    "coded": coded_bodies,
                    "places": place_bodies,
                    "products": product_bodies,
                }.items()
            )
            for dtype in (np.float32, np.float64)
        },
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
        "average": Average(3, 10, 8, bodies=exact, **at),
        "mean": Mean(8, 0.75, bodies=tuple(pack_exact(3 * part) for part in parts), **at),
        "refusal": Refusal("version", "worker 3 sent an update of version 7 in round 8"),
        "leave": Leave(3, "spot", bodies=exact, **at),
        "leave_without_residual": Leave(3, "not_finite", **at),
        "farewell": Farewell(8, **at),
        "activations": Activations(
            7, 3, "bfloat16", pack_numbers(np.array([41, 3, 1436]), 1437), bytes([0b010]), bodies=pair, **at
        ),
        "activations_plain": Activations(8, 2, awaited=False, bodies=exact[:1], **at),
        "gradients": Gradients(7, bytes([0b101]), bodies=pair[:1], **at),
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
            bodies.append({"raw": ""} if raw else {"numel": reader.read_segment(bytes(body))["numel"]})
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
