"""Training for real on Ray: four worker actors and a server actor."""

import json
import subprocess

import pytest

from deploy import launch
from examples.digits import network

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

ROUNDS = 12


def settings(folder, **changed):
    return {
        "name": "digits",
        "rounds": ROUNDS,
        "metrics": {"port": 0, "sketch_every": 4},
        "storage": {"dir": folder},
        "feedback": {"kind": "saef", "average_every": 5, "average": "topk:0.1"},
        **changed,
    }


def untimed_rows(path):
    """The rows of a run without what depends on the clock."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def listeners() -> str:
    return subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout


def test_ray_and_inline_give_the_same_fingerprint_the_same_bytes_and_the_same_rows(local_ray, tmp_path):
    addresses = []

    def observe(row):
        if not addresses:
            addresses.extend(line.split()[3] for line in listeners().splitlines() if "ray" in line or "python" in line)

    on_ray = launch("examples.digits:train", settings(tmp_path / "ray"), observe=observe)
    inline = launch("examples.digits:train", settings(tmp_path / "inline", backend="inline"), observe=lambda row: None)

    assert on_ray.summary["fingerprint"] == inline.summary["fingerprint"] != ""
    same = ("uplink_bytes", "downlink_bytes", "snapshot_bytes", "server_error_norm", "worker_error_norm", "reported")
    for key in same:
        assert on_ray.summary[key] == inline.summary[key], key
    assert on_ray.summary["rounds"] == ROUNDS
    assert on_ray.summary["conservation_error"] <= 4
    assert untimed_rows(on_ray.path) == untimed_rows(inline.path)
    model = network()
    model.load_state_dict(on_ray.load_model())
    assert addresses
    assert all("127.0.0." in address for address in addresses), addresses


def test_an_asynchronous_run_ends_for_every_worker_with_one_model(local_ray, tmp_path):
    server = {"mode": "async", "buffer": 1, "max_staleness": 8, "staleness": {"kind": "polynomial"}}
    values = settings(tmp_path, name="async", rounds=2 * ROUNDS, server=server, feedback={"kind": "saef"})
    result = launch("examples.digits:train", values, observe=lambda row: None)  # one fingerprint, or it fails
    summary = result.summary
    assert (summary["status"], summary["rounds"]) == ("finished", 2 * ROUNDS)
    assert summary["fingerprint"]
    assert set(summary["rejected"]) <= {"finished"}
    assert summary["conservation_error"] <= 4
    assert 0 < summary["reported"]["accuracy"] <= 100
    rows = untimed_rows(result.path)
    assert [row["version"] for row in rows] == list(range(1, 2 * ROUNDS + 1))
    assert {row["samples"] for row in rows} <= {32, 64, 96, 128}, "those who waited for the slowest fold together"
    assert {row["samples"] for row in rows} & {32, 64}


def test_two_runs_with_the_same_seed_give_the_same_fingerprint_and_another_seed_another(tmp_path):
    def fingerprint(name, seed):
        values = settings(tmp_path, backend="inline", name=name, seed=seed, rounds=4, metrics={"port": None})
        return launch("examples.digits:train", values, observe=lambda row: None).summary["fingerprint"]

    first, second, other = fingerprint("a", 0), fingerprint("b", 0), fingerprint("c", 1)
    assert first == second != other


def test_a_large_broadcast_goes_through_the_object_store_and_arrives_intact(local_ray, tmp_path):
    """Uncompressed frames of 600 kB are above Ray's limit for replies and take the other way."""
    values = settings(tmp_path, rounds=3, uplink="none", downlink="none", feedback={"kind": "saef"})
    on_ray = launch("examples.digits:train", {**values, "name": "big"}, observe=lambda row: None)
    inline = launch("examples.digits:train", {**values, "name": "small", "backend": "inline"}, observe=lambda row: None)
    assert on_ray.summary["downlink_bytes"] > 3 * 4 * 600_000
    assert on_ray.summary["fingerprint"] == inline.summary["fingerprint"]
