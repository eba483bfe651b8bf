"""The log of broadcasts keeps the newest entries and knows what it no longer has."""

import numpy as np
import pytest

from ps.log import Log


def filled(count, window=64, first=1):
    log = Log(window)
    for version in range(first, first + count):
        log.append(version, np.full(3, version, np.uint8))
    return log


def versions(frames):
    return None if frames is None else [int(frame[0]) for frame in frames]


def test_an_empty_log_has_no_entries_after_any_version():
    assert Log().since(0) == []


def test_the_entries_after_a_version_come_in_order():
    log = filled(5)
    assert [versions(log.since(v)) for v in range(6)] == [[*range(v + 1, 6)] for v in range(6)]


def test_what_has_left_the_window_is_gone():
    log = filled(10, window=3)
    assert versions(log.since(7)) == [8, 9, 10]
    assert [log.since(v) for v in (0, 5, 6)] == [None] * 3
    assert log.since(10) == []


def test_the_window_slides():
    log = filled(3, window=2)
    assert versions(log.since(1)) == [2, 3]
    log.append(4, np.full(3, 4, np.uint8))
    assert log.since(1) is None
    assert versions(log.since(2)) == [3, 4]


def test_a_log_may_begin_anywhere():
    log = filled(3, first=40)
    assert versions(log.since(39)) == [40, 41, 42]
    assert log.since(38) is None


@pytest.mark.parametrize("version", [0, 3, 5])
def test_an_entry_must_follow_the_last_one(version):
    with pytest.raises(ValueError, match=f"entry {version} does not follow entry 3"):
        filled(3).append(version, np.zeros(1, np.uint8))


def test_frames_are_kept_as_they_are():
    log, frame = Log(), np.arange(9, dtype=np.uint8)
    log.append(1, frame)
    assert log.since(0)[0] is frame
