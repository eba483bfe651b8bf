"""Vital signs: rows for the report, the summary, and means of what users report."""

import json

import pytest
import torch

from protocol.messages import Stat, pack_statistics
from ps import vitals as module
from ps.vitals import BUCKETS, Histogram, Vitals

PROMISED = (
    *("rounds", "uplink_bytes", "downlink_bytes", "uplink_ratio", "downlink_ratio", "snapshot_bytes"),
    *("uplink_bytes_per_sample", "downlink_bytes_per_sample"),
    *("server_error_norm", "worker_error_norm", "discarded_norm", "conservation_error", "reported"),
)  # the launcher adds workers, seconds and the fingerprint


def test_a_duration_falls_into_the_first_bucket_that_holds_it():
    histogram = Histogram()
    for seconds in (0.0, *BUCKETS, 1e9):
        histogram.observe(seconds)
    assert histogram.counts == [2] + [1] * len(BUCKETS)
    assert histogram.total == pytest.approx(sum(BUCKETS) + 1e9)


def test_the_summary_has_what_was_promised_and_goes_into_json(rig):
    one = rig().start()
    one.round(dict.fromkeys((0, 1, 2), 1.0), statistics=pack_statistics({Stat.ERROR: 2.0}))
    summary = one.vitals.summary()
    assert set(PROMISED) <= set(summary)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["rounds"] == 1
    assert summary["worker_error_norm"] == pytest.approx(12**0.5)
    assert summary["uplink_bytes"] == one.vitals.bytes("uplink") > 0
    for direction in ("uplink", "downlink"):
        assert summary[f"{direction}_bytes_per_sample"] == one.vitals.bytes(direction) / 24 > 0


def test_there_is_a_row_a_round_and_rows_can_be_asked_for_from_any_version(rig):
    one = rig(downlink="topk:0.1").start()
    statistics = pack_statistics({Stat.BEFORE: 5.0, Stat.SENT: 4.0, Stat.ERROR: 3.0})
    for second in range(1, 5):
        one.now = 2.0 * second
        one.round(dict.fromkeys((0, 1, 2), torch.arange(25.0)), statistics=statistics)
    rows = one.vitals.rows_since(0)
    assert [row["version"] for row in rows] == [1, 2, 3, 4]
    assert [row["seconds"] for row in rows] == [2, 4, 6, 8]
    assert one.vitals.rows_since(2) == rows[2:]
    assert one.vitals.rows_since(4) == []
    assert json.loads(json.dumps(rows)) == rows
    last = rows[-1]
    assert last["worker_error_norm"] == {"0": 3, "1": 3, "2": 3}
    assert last["update_norm"] == {"before": {"0": 5, "1": 5, "2": 5}, "after": {"0": 4, "1": 4, "2": 4}}
    assert last["contraction"]["up"] == pytest.approx({"0": 9 / 25, "1": 9 / 25, "2": 9 / 25})
    assert 0 < last["contraction"]["down"] < 1
    assert last["server_error_norm"] == pytest.approx(one.server.state.sender.error_norm())
    assert last["uplink_bytes"] == one.vitals.bytes("uplink")


def test_old_rows_are_dropped(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 3)
    vitals = Vitals()
    for version in range(1, 6):
        vitals.version = version
        vitals.close(float(version), 8, {})
    assert [row["version"] for row in vitals.rows_since(0)] == [3, 4, 5]


def test_a_row_counts_the_workers_of_its_round(rig):
    one = rig().start()
    one.round(dict.fromkeys((0, 1, 2), 0.0))
    one.send(one.join(7))
    one.send(one.leave(0))
    one.send(one.leave(1))
    one.send(one.push(2))
    one.round(dict.fromkeys((2, 7), 0.0))
    assert [row["workers"] for row in one.vitals.rows_since(0)] == [3, 3, 2]


def test_reported_values_are_means_over_workers_weighted_by_their_samples(rig):
    one = rig().start()
    for worker, samples, value in ((0, 10, 1.0), (1, 30, 2.0)):
        statistics = pack_statistics({Stat.REPORTED: value})
        one.send(one.push(worker, samples=samples, names=["loss"], statistics=statistics))
    one.send(one.push(2, samples=99))
    assert one.vitals.reported == {"loss": 1.75}
    assert one.vitals.rows_since(0)[0]["reported"] == {"loss": 1.75}
    one.round(dict.fromkeys((0, 1, 2), 0.0))
    assert one.vitals.rows_since(1)[0]["reported"] == {}, "a row has what its round reported"
    assert one.vitals.reported == {"loss": 1.75}, "a metric keeps the last value"


def test_each_worker_numbers_its_names_for_itself(rig):
    one = rig(workers=(0, 1)).start()
    values = {Stat.REPORTED: 1.0, Stat.REPORTED + 1: 5.0}
    one.send(one.push(0, names=["loss", "accuracy"], statistics=pack_statistics(values)))
    one.send(one.push(1, names=["accuracy", "loss"], statistics=pack_statistics(values)))
    assert one.vitals.reported == {"loss": 3.0, "accuracy": 3.0}
    later = pack_statistics({Stat.REPORTED + 1: 7.0, Stat.REPORTED + 5: 9.0})  # names are announced once
    one.round({0: 0.0, 1: 0.0}, statistics=later)
    assert one.vitals.reported == {"loss": 7.0, "accuracy": 7.0}


def test_a_resent_push_reports_once(rig):
    one = rig(workers=(0, 1)).start()
    statistics = {Stat.DISCARDED: 2.0, Stat.COMPUTE: 0.5, Stat.REPORTED: 1.0}
    push = one.push(0, names=["loss"], statistics=pack_statistics(statistics), skipped=3)
    one.send(push)
    one.send(push)
    one.send(one.push(1))
    one.send(push)
    assert (one.vitals.discarded["compression"], one.vitals.skipped_steps) == (2.0, 3)
    assert one.vitals.phases["compute"].total == 0.5
    assert one.vitals.workers[0].names == ["loss"]


def test_what_was_dropped_in_one_round_is_not_dropped_again_in_the_next(rig):
    one = rig(workers=(0,)).start()
    norms = {Stat.BEFORE: 2.0, Stat.SENT: 1.0}
    one.round({0: 0.0}, statistics=pack_statistics({**norms, Stat.DISCARDED: 1.0}))
    assert one.vitals.workers[0].contraction() == 0.25
    one.round({0: 0.0}, statistics=pack_statistics({**norms, Stat.ERROR: 0.0}))
    assert one.vitals.workers[0].contraction() == 0
    assert one.vitals.discarded == {"compression": 1.0, "staleness": 0.0}


def test_the_conservation_error_is_the_largest_of_any_sender(rig):
    one = rig(workers=(0, 1)).start()
    one.send(one.push(0, statistics=pack_statistics({Stat.CONSERVATION: 0.5})))
    one.send(one.push(1, statistics=pack_statistics({Stat.CONSERVATION: 1.5})))
    assert one.vitals.conservation() == 1.5
    one.vitals.server_conservation = 3.0
    assert one.vitals.conservation() == 3.0


def test_ledgers_are_checked_as_often_as_the_plan_says_and_at_the_end(rig):
    one = rig(workers=(0,), rounds=5, sketch_every=3, downlink="topk:0.1").start()
    seen = []
    for _ in range(5):
        one.server.state.sender.ledger.difference += 1  # a fault that grows
        one.round({0: 1.0})
        seen.append(one.vitals.server_conservation)
    assert seen[0] == seen[1] == 0
    assert seen[2] == seen[3] > 0
    assert seen[4] > 0
    assert seen[4] != seen[3]
