"""Messages: round trips, numbers that never change, and input that no honest sender packs."""

import contextlib
import dataclasses
import struct
import zlib

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import DecodeError, Layout, compressor, messages, wire
from protocol.layout import Entry as Tensor
from protocol.messages import (
    REASONS,
    STATISTICS_LIMIT,
    Average,
    Entry,
    Farewell,
    Join,
    Leave,
    Mean,
    Pull,
    Push,
    Refusal,
    Stat,
    Welcome,
    pack_statistics,
    unpack_statistics,
)
from protocol.segment import pack_exact

LAYOUT = Layout((Tensor("weight", (2, 3), "float32", "parameter"), Tensor("bias", (2,), "float32", "parameter")))
VALUES = np.array([1, -2, 0, 3, 0.5, 0], np.float32)
BODIES = (pack_exact(VALUES), pack_exact(VALUES[:2]))

RARE = (b"sketch", b"energies", [b"a push", b"another"])  # fields of a Push that few have

SAMPLES = (
    Join(3, LAYOUT.describe(), {"kind": "torch.optim.SGD", "groups": [{"params": ["weight"], "lr": 0.5}]}, 7, 90),
    Welcome(7, 640, {0: 0.25, 3: 0.75}, [0.125, 0.0], True, bodies=BODIES),
    Push(3, 9, 7, 32, pack_statistics({0: 1.5}), ["loss"], 2**63 - 1, [{"lr": 0.1}], 2, [1], *RARE, bodies=BODIES),
    Entry(8, 672, {3: 1.0}, True, [0.5, 1.0], bodies=BODIES),
    Average(3, 10, 8, bodies=BODIES),
    Mean(8, 0.75, bodies=BODIES),
    Refusal("version", "worker 3 sent an update of version 7 in round 8"),
    Leave(3, "spot", bodies=BODIES),
    Farewell(8),
    Pull(3, 8),
)
every_message = pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
laws = settings(deadline=None, max_examples=60)

whole = st.integers(0, 2**63 - 1)
count = st.integers(0, 2**32 - 1)
weights = st.dictionaries(whole, st.floats(0, 1, exclude_min=True), max_size=4)
ratios = st.lists(st.floats(0, 1), max_size=3)
options = st.dictionaries(
    st.text(max_size=5).filter("params".__ne__),
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.lists(st.floats(0, 1), max_size=2),
    max_size=3,
)
groups = st.builds(lambda o, names: {**o, "params": names}, options, st.lists(st.text(max_size=5), max_size=2))
common = {
    "bodies": st.lists(st.binary(max_size=20).map(lambda b: np.frombuffer(b, np.uint8)), max_size=3).map(tuple),
    "layout": st.binary(min_size=8, max_size=8),
}
described = st.lists(
    st.tuples(st.text(max_size=5), st.lists(count, max_size=3), st.just("bool"), st.integers(0, 2)).map(list),
    max_size=3,
)
drawn = st.one_of(
    st.builds(
        Join,
        whole,
        described,
        st.none() | st.fixed_dictionaries({"kind": st.text(max_size=9), "groups": st.lists(groups, max_size=2)}),
        st.none() | whole,
        st.none() | count,
        **common,
    ),
    st.builds(Welcome, whole, whole, weights, st.none() | ratios, st.booleans(), **common),
    st.builds(
        Push,
        whole,
        whole,
        whole,
        count,
        st.binary(max_size=STATISTICS_LIMIT),
        st.none() | st.lists(st.text(max_size=5), max_size=3),
        st.none() | whole,
        st.none() | st.lists(options, max_size=2),
        count,
        st.none() | st.lists(whole, max_size=3),
        st.binary(max_size=9),
        st.binary(max_size=9),
        st.none() | st.lists(st.binary(max_size=9), max_size=2),
        **common,
    ),
    st.builds(Entry, whole, whole, st.none() | weights, st.booleans(), st.none() | ratios, **common),
    st.builds(Average, whole, whole, whole, **common),
    st.builds(Mean, whole, st.floats(0, 2, exclude_min=True), **common),
    st.builds(Refusal, st.sampled_from(REASONS), st.text(), **common),
    st.builds(Leave, whole, st.text(), **common),
    st.builds(Farewell, whole, **common),
    st.builds(Pull, whole, whole, **common),
)


def seen(message):
    """All of a message in a form that can be compared."""
    values = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    return type(message), values | {"bodies": [bytes(body) for body in message.bodies]}


def keys(message):
    return {f.name: f.metadata["key"] for f in dataclasses.fields(message) if "key" in f.metadata}


def forge(kind, fields):
    """A frame with a good CRC; ``fields`` is a map, or its raw bytes."""
    table = fields if isinstance(fields, bytes) else msgpack.packb(fields)
    data = struct.pack("<4sBBH8sIQ", b"CRRY", 1, kind, 0, bytes(8), len(table), 0) + table
    return np.frombuffer(data + struct.pack("<I", zlib.crc32(data)), np.uint8)


def fields_of(message):
    return wire.unpack(dataclasses.replace(message, bodies=()).pack()).fields


@settings(deadline=None, max_examples=300)
@given(drawn)
def test_every_message_comes_out_as_it_went_in(message):
    assert seen(messages.parse(message.pack())) == seen(message)


def test_the_samples_cover_every_kind():
    assert sorted(message.KIND for message in SAMPLES) == list(range(1, 11))


def test_kinds_and_keys_never_change():
    """What is written here has been sent; numbers may be added and none may be used again."""
    assert {type(m).__name__: (m.KIND, keys(m)) for m in SAMPLES} == {
        "Join": (1, {"worker": 1, "description": 2, "optimizer": 3, "version": 4, "samples": 5}),
        "Welcome": (2, {"version": 1, "position": 2, "weights": 3, "ratios": 4, "final": 5}),
        "Push": (
            3,
            {
                "worker": 1,
                "sequence": 2,
                "version": 3,
                "samples": 4,
                "statistics": 5,
                "names": 6,
                "digest": 7,
                "options": 8,
                "skipped": 9,
                "replaced": 10,
                "sketch": 11,
                "energies": 12,
                "relayed": 13,
            },
        ),
        "Entry": (4, {"version": 1, "position": 2, "weights": 3, "final": 4, "ratios": 5}),
        "Average": (5, {"worker": 1, "sequence": 2, "version": 3}),
        "Mean": (6, {"version": 1, "weight": 2}),
        "Refusal": (7, {"reason": 1, "detail": 2}),
        "Leave": (8, {"worker": 1, "cause": 2}),
        "Farewell": (9, {"version": 1}),
        "Pull": (10, {"worker": 1, "version": 2}),
    }


def test_a_field_at_its_default_does_not_travel():
    assert set(wire.unpack(Push(0, 1, 0, 8).pack()).fields) == {1, 2, 3, 4}
    assert set(wire.unpack(Entry(1, 8).pack()).fields) == {1, 2}
    assert set(wire.unpack(Entry(1, 8, {}).pack()).fields) == {1, 2, 3}  # no weights at all, not no news


@every_message
def test_every_truncation_is_a_decode_error(message):
    frame = message.pack()
    for size in range(frame.size):
        with pytest.raises(DecodeError):
            messages.parse(frame[:size])


@every_message
def test_every_flip_of_a_single_bit_is_a_decode_error(message):
    frame = message.pack()
    for bit in range(8 * frame.size):
        altered = frame.copy()
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DecodeError):
            messages.parse(altered)


@pytest.mark.parametrize("kind", [0, *range(11, 256)])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(DecodeError, match=f"kind {kind}; valid are 1, 2, 3, 4, 5, 6, 7, 8, 9, 10"):
        messages.parse(forge(kind, {1: 0}))


@every_message
def test_a_missing_field_is_named(message):
    given_fields = fields_of(message)
    for field in dataclasses.fields(message):
        if "key" in field.metadata and field.default is dataclasses.MISSING:
            rest = {key: value for key, value in given_fields.items() if key != field.metadata["key"]}
            with pytest.raises(DecodeError, match=f"lacks its field '{field.name}'"):
                messages.parse(forge(message.KIND, rest))


@every_message
def test_an_unknown_field_is_refused(message):
    with pytest.raises(DecodeError, match=r"unknown fields \[99\]"):
        messages.parse(forge(message.KIND, {**fields_of(message), 99: 1}))


NO_NUMBER = (None, True, -1, 2**63, 1.0, "1", b"1", [], {})
NO_COUNT = (*NO_NUMBER, 2**32)
NO_WEIGHTS = (1, [], "", {0: 0.0}, {0: 1.5}, {0: -0.5}, {0: float("nan")}, {0: 1}, {-1: 0.5}, {"0": 0.5})
NO_RATIOS = (1, {}, b"", [1], [-0.5], [1.5], [float("nan")], ["0.5"], [None])
NO_TEXT = (None, 1, b"text", ["text"], {})
MALFORMED = {
    ("Join", "worker"): NO_NUMBER,
    ("Join", "description"): (None, {}, "", 1),
    ("Join", "optimizer"): (
        1,
        [],
        {},
        {"kind": "SGD"},
        {"kind": 1, "groups": []},
        {"kind": "SGD", "groups": {}},
        {"kind": "SGD", "groups": [{}]},
        {"kind": "SGD", "groups": [{"params": [1]}]},
        {"kind": "SGD", "groups": [{"params": ["weight"], 1: 2}]},
    ),
    ("Join", "version"): NO_NUMBER[1:],
    ("Join", "samples"): NO_COUNT[1:],
    ("Welcome", "version"): NO_NUMBER,
    ("Welcome", "position"): NO_NUMBER,
    ("Welcome", "weights"): (None, *NO_WEIGHTS),
    ("Welcome", "ratios"): NO_RATIOS,
    ("Welcome", "final"): (None, 1, 0, "true"),
    ("Push", "worker"): NO_NUMBER,
    ("Push", "sequence"): NO_NUMBER,
    ("Push", "version"): NO_NUMBER,
    ("Push", "samples"): NO_COUNT,
    ("Push", "statistics"): (None, "text", 1, []),
    ("Push", "names"): ("loss", [1], [b"loss"], {}, [None]),
    ("Push", "digest"): NO_NUMBER[1:],
    ("Push", "options"): ({}, [1], [[]], [{1: 2}], [{"params": []}], "lr"),
    ("Push", "skipped"): NO_COUNT,
    ("Push", "replaced"): (1, {}, "1", [None], [-1], [True], [0.5]),
    ("Push", "sketch"): (None, "text", 1, []),
    ("Push", "energies"): (None, "text", 1, []),
    ("Push", "relayed"): (1, b"push", {}, [1], ["push"], [None]),
    ("Entry", "version"): NO_NUMBER,
    ("Entry", "position"): NO_NUMBER,
    ("Entry", "weights"): NO_WEIGHTS,
    ("Entry", "final"): (None, 1, 0, "true"),
    ("Entry", "ratios"): NO_RATIOS,
    ("Average", "worker"): NO_NUMBER,
    ("Average", "sequence"): NO_NUMBER,
    ("Average", "version"): NO_NUMBER,
    ("Mean", "version"): NO_NUMBER,
    ("Mean", "weight"): (None, 1, "1.0", True, 0.0, -0.5, float("nan"), float("inf")),
    ("Refusal", "reason"): (None, 1, "because", "", ["frame"]),
    ("Refusal", "detail"): NO_TEXT,
    ("Leave", "worker"): NO_NUMBER,
    ("Leave", "cause"): NO_TEXT,
    ("Farewell", "version"): NO_NUMBER,
    ("Pull", "worker"): NO_NUMBER,
    ("Pull", "version"): NO_NUMBER,
}


def test_every_field_has_malformed_values_to_be_tried():
    assert set(MALFORMED) == {(type(m).__name__, name) for m in SAMPLES for name in keys(m)}


@every_message
def test_a_malformed_field_is_named(message):
    name = type(message).__name__
    for field, key in keys(message).items():
        for value in MALFORMED[name, field]:
            with pytest.raises(DecodeError, match=f"field '{field}' of a {name} message is malformed"):
                messages.parse(forge(message.KIND, {**fields_of(message), key: value}))


@laws
@given(st.integers(1, 9), st.dictionaries(st.integers(0, 10), st.none() | whole | st.binary() | described | options))
def test_arbitrary_fields_give_a_message_or_a_decode_error(kind, fields):
    with contextlib.suppress(DecodeError):
        messages.parse(forge(kind, fields))


@laws
@given(st.integers(0, 255), st.binary(max_size=40))
def test_noise_with_a_good_crc_gives_a_message_or_a_decode_error(kind, noise):
    with contextlib.suppress(DecodeError):
        messages.parse(forge(kind, noise))


# -- bodies ------------------------------------------------------------------------------------------


def test_bodies_decode_by_the_segments_of_the_layout():
    first, second = messages.updates(Push(0, 1, 0, 8, bodies=BODIES), LAYOUT)
    assert first.dense().tolist() == VALUES.tolist()
    assert second.dense().tolist() == VALUES[:2].tolist()


@pytest.mark.parametrize("bodies", [(), BODIES[:1], (*BODIES, BODIES[0])])
def test_too_few_or_too_many_bodies_are_refused(bodies):
    with pytest.raises(DecodeError, match=f"{len(bodies)} segments where the layout has 2"):
        messages.updates(Push(0, 1, 0, 8, bodies=bodies), LAYOUT)


def test_a_bad_body_is_named_by_its_segment():
    with pytest.raises(DecodeError, match="segment 'bias': the segment has 6 elements where the layout has 2"):
        messages.updates(Push(0, 1, 0, 8, bodies=(BODIES[0], BODIES[0])), LAYOUT)


def test_float64_values_are_refused_where_the_model_has_float32():
    layout = Layout((Tensor("weight", (3,), "float32", "parameter"),))
    body, _ = compressor("none").encode(torch.tensor([1.0, 1e100, 2.0], dtype=torch.float64), (), 0)
    with pytest.raises(DecodeError, match="segment 'weight': it holds float64 values where the model has float32"):
        messages.updates(Push(0, 1, 0, 8, bodies=(body,)), layout)


# -- statistics --------------------------------------------------------------------------------------


@laws
@given(st.dictionaries(st.integers(0, 127), st.floats(-(2.0**99), 2.0**99, width=32), max_size=10))
def test_statistics_come_out_as_they_went_in(statistics):
    assert unpack_statistics(pack_statistics(statistics)) == statistics


def test_ten_statistics_fit_and_the_limit_is_64_bytes():
    full = dict.fromkeys((0, 1, 2, 3, 8, 16, 17, 18, 19, 20), 1.0)
    assert len(pack_statistics(full)) <= STATISTICS_LIMIT == 64
    with pytest.raises(AssertionError, match="11 statistics take"):
        pack_statistics({**full, 21: 1.0})
    longer = msgpack.packb({**full, 21: 1.0}, use_single_float=True)
    with pytest.raises(DecodeError, match=f"take {len(longer)} bytes; at most 64"):
        unpack_statistics(longer)


def test_the_limit_holds_to_the_byte():
    fits = dict.fromkeys((*range(16, 23), 128, 129, 130), 1.0)  # keys from 128 take a byte more
    longer = dict.fromkeys((*range(16, 22), 128, 129, 130, 131), 1.0)
    assert len(pack_statistics(fits)) == 64
    assert unpack_statistics(pack_statistics(fits)) == fits
    with pytest.raises(AssertionError, match="10 statistics take 65 bytes"):
        pack_statistics(longer)
    with pytest.raises(DecodeError, match="take 65 bytes; at most 64"):
        unpack_statistics(msgpack.packb(longer, use_single_float=True))


def test_no_statistics_are_no_bytes():
    assert unpack_statistics(b"") == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_a_user_reports_need_not_be_finite_but_a_norm_must(value):
    (arrived,) = unpack_statistics(pack_statistics({Stat.REPORTED: value})).values()
    assert repr(arrived) == repr(value)
    with pytest.raises(DecodeError, match="not finite"):
        unpack_statistics(pack_statistics({Stat.BEFORE: value}))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_finite_statistic_beyond_float32_arrives_as_the_largest(sign):
    assert unpack_statistics(pack_statistics({Stat.BEFORE: sign * 1e300})) == {
        0: sign * float(np.finfo(np.float32).max)
    }


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x01",
        b"\x90",
        b"\x81\x01",
        b"\x80\x80",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\x01\x01",  # 1 instead of 1.0
        *(b"\x81" + key + b"\xca" + bytes(4) for key in (b"\xa1a", b"\xc3", b"\xff", b"\x80")),
    ],
)
def test_malformed_statistics_are_refused(data):
    with pytest.raises(DecodeError, match="the statistics"):
        unpack_statistics(data)
