"""Which compressors a sender uses in which round: those of the specifications, but for schedule and announcements."""

import pytest

from protocol import Layout, compressor
from protocol.compression import Compression, count_of, ratio_of, selects, sends_all, with_ratio
from protocol.errors import SettingsError
from protocol.layout import CONTROL, Entry
from protocol.settings import Schedule

LAYOUT = Layout(
    (
        Entry("weight", (30, 10), "float32", "parameter"),
        Entry("bias", (10,), "float32", "parameter"),
        Entry("head", (8, 10), "float32", "parameter"),
        Entry("running_mean", (5,), "float32", "buffer"),
        Entry(f"{CONTROL}weight", (30, 10), "float32", "control"),
    )
)


def compression(spec="topk:0.1+int4", overrides=None, **schedule):
    return Compression(LAYOUT, spec, overrides or {}, Schedule(**schedule))


def specs(compressors):
    return [one.spec for one in compressors]


def test_without_schedule_and_announcement_they_are_those_of_the_specifications():
    one = compression(overrides={"bias": "f32"})
    expected = ["topk:0.1+int4", "f32", "topk:0.1+int4", "bf16", "topk:0.1+int4"]
    assert specs(one.final) == specs(one.at(0)) == specs(one.at(1000)) == expected


def test_before_the_start_nothing_is_compressed_but_buffers_go_their_own_way():
    one = compression(start_round=3)
    assert specs(one.at(2)) == ["none", "none", "none", "bf16", "none"]
    assert one.at(3) == one.final


def test_a_warm_up_changes_the_ratios_and_nothing_else():
    one = compression(overrides={"head": "blocktopk:0.5,block=16", "bias": "sign"}, warmup_rounds=2, warmup_ratio=0.4)
    assert specs(one.at(0)) == ["topk:0.4+int4", "sign", "blocktopk:0.5,block=16", "bf16", "topk:0.4+int4"]
    assert ratio_of(one.at(1)[0]) == pytest.approx(0.2)  # half way from 0.4 to 0.1, in factors
    assert one.at(2) == one.final


def test_announced_ratios_replace_those_of_the_specifications_and_0_says_nothing():
    one = compression(overrides={"bias": "sign"})
    found = one.at(7, [0.3, 0.9, 0.0, 0.0, 0.01])
    assert specs(found) == ["topk:0.3+int4", "sign", "topk:0.1+int4", "bf16", "topk:0.01+int4"]
    assert one.at(7) == one.final


def test_a_warm_up_goes_on_above_what_is_announced():
    one = compression(warmup_rounds=4, warmup_ratio=0.4)
    assert ratio_of(one.at(0, [0.2] * 5)[0]) == 0.4
    assert ratio_of(one.at(2, [0.1] * 5)[0]) == pytest.approx(0.2)
    assert ratio_of(one.at(2, [0.5] * 5)[0]) == 0.5
    assert ratio_of(one.at(4, [0.2] * 5)[0]) == 0.2


def test_announcements_wait_for_the_start():
    assert specs(compression(start_round=5).at(4, [0.3] * 5))[0] == "none"


@pytest.mark.parametrize(
    ("spec", "ratio", "selecting"),
    [
        ("topk:0.1", 0.1, True),
        ("blocktopk:0.2,block=64+sign", 0.2, True),
        ("randk:0.3+int8+entropy", 0.3, True),
        ("threshold:0.5", None, True),
        ("none", None, False),
        ("sign", None, False),
        ("lowrank:2", None, False),
    ],
)
def test_what_selects_and_by_which_ratio(spec, ratio, selecting):
    one = compressor(spec, (40, 40))
    assert ratio_of(one) == ratio
    assert selects(one) == selecting
    if ratio is None:
        with pytest.raises(ValueError, match="does not select by a ratio"):
            with_ratio(one, 0.5)
    else:
        assert with_ratio(one, 0.05).spec == spec.replace(str(ratio), "0.05")
        assert with_ratio(one, ratio) == one


@pytest.mark.parametrize(
    ("spec", "numel", "count"), [("topk:0.1", 40, 4), ("topk:0.01", 40, 1), ("topk:0.9", 3, 3), ("randk:1", 7, 7)]
)
def test_how_many_are_sent(spec, numel, count):
    one = compressor(spec)
    assert count_of(one, numel) == count
    assert sends_all(one, numel) == (count == numel)


def test_what_does_not_select_by_a_ratio_sends_up_to_all():
    for spec in ("sign", "threshold:3", "lowrank:1"):
        assert count_of(compressor(spec, (40, 40)), 1600) == 1600
        assert not sends_all(compressor(spec, (40, 40)), 1600)


def test_a_glob_that_matches_nothing_is_refused():
    with pytest.raises(SettingsError, match="matches no tensor"):
        compression(overrides={"tail*": "f32"})
