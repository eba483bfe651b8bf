"""A real scrape over the loopback address gives every documented metric, and no other, with its value."""

import re
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from protocol import SettingsError, energies, ledger
from protocol.messages import Stat, pack_statistics
from ps.metrics import Endpoint, VitalsCollector
from ps.settings import MetricsSettings
from ps.vitals import BUCKETS, VERSIONS, Vitals

TEXT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
ANY_PORT = MetricsSettings(port=0)


def families_in(text):
    return {family.name: family for family in text_string_to_metric_families(text)}


def scrape(endpoint):
    """Families by name, as Prometheus reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return families_in(answer.read().decode())


def read(vitals):
    """The same without a network."""
    registry = CollectorRegistry()
    registry.register(VitalsCollector(vitals))
    return families_in(generate_latest(registry).decode())


def documented():
    """Rows of the document: name -> (type, labels)."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| [\w ]+ \|(.*?)\| \w.* \|$", TEXT, re.MULTILINE)
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def a_run(rig):
    """Two workers, one round, and at least one of everything that is measured."""
    one = rig(workers=(0, 1), downlink="topk:0.1").start()
    residuals = [energies.pack_sketch(ledger.sketch(torch.arange(25.0) * scale)) for scale in (1, 2)]
    first = {Stat.BEFORE: 5.0, Stat.SENT: 4.0, Stat.ERROR: 3.0, Stat.COMPUTE: 0.02, Stat.REPORTED: 1.0}
    second = {Stat.BEFORE: 2.0, Stat.SENT: 1.5, Stat.ERROR: 0.0, Stat.DISCARDED: 1.0, Stat.ENCODE: 0.0001}
    second |= {Stat.CONSERVATION: 2.5, Stat.REPORTED: 0.75, Stat.REPORTED + 1: 4.0}
    one.send(one.average(0, 1.0))
    one.send(one.average(1, 1.0))
    push = one.push(
        0, torch.arange(25.0), samples=8, names=["loss"], statistics=pack_statistics(first), sketch=residuals[0]
    )
    one.send(push)
    one.send(push)
    one.send(one.join(7))
    one.send(one.push(1, version=9))
    names = ["accuracy", "loss"]
    last = {"samples": 24, "sequence": 2, "names": names, "skipped": 2, "sketch": residuals[1]}
    one.send(one.push(1, 0.0, statistics=pack_statistics(second), **last))
    one.send(one.push(1, digest=5))
    one.sequences[1] = 2
    one.send(one.leave(7, 1.0))
    return one


def expected(one):
    """Every sample but those of the histogram: (name, labels) -> value."""
    values = {
        ("version",): 1,
        ("workers", "state", "training"): 3,
        ("error_norm", "role", "worker", "worker", "0"): 3,
        ("error_norm", "role", "worker", "worker", "1"): 0,
        ("error_norm", "role", "server", "worker", ""): one.server.state.sender.error_norm(),
        ("update_norm", "worker", "0", "stage", "before"): 5,
        ("update_norm", "worker", "0", "stage", "after"): 4,
        ("update_norm", "worker", "1", "stage", "before"): 2,
        ("update_norm", "worker", "1", "stage", "after"): 1.5,
        ("contraction", "direction", "uplink"): (9 / 25 + 1 / 4) / 2,
        ("contraction", "direction", "downlink"): (one.server.state.sender.error_norm() / 70) ** 2,
        ("worker_joins_total",): 3,
        ("worker_leaves_total", "cause", "spot"): 1,
        ("residual_handed_over_total",): 1,
        ("rejected_messages_total", "reason", "version"): 1,
        ("rejected_messages_total", "reason", "replica"): 1,
        ("replica_mismatches_total",): 1,
        ("skipped_steps_total",): 2,
        ("discarded_norm_total", "cause", "compression"): 1,
        ("discarded_norm_total", "cause", "staleness"): 0,
        ("mismatch_norm", "at", "replica"): one.vitals.mismatch.replica,
        ("mismatch_norm", "at", "ahead"): one.vitals.mismatch.ahead,
        ("conservation_error",): 2.5,
        ("reported", "name", "loss"): (8 * 1.0 + 24 * 4.0) / 32,
        ("reported", "name", "accuracy"): 0.75,
    }
    for direction in ("uplink", "downlink"):
        values["dense_bytes_total", "direction", direction] = dense = 2 * 4 * 23
        sizes = {kind: one.vitals.wire[direction, kind] for kind in ("update", "average", "snapshot", "resend")}
        assert all(sizes.values())
        assert sum(sizes.values()) == one.counted[direction]
        for kind, size in sizes.items():
            values["wire_bytes_total", "direction", direction, "kind", kind] = size
        values["compression_ratio", "direction", direction] = dense / (sizes["update"] + sizes["average"])
    return {
        (f"carryover_{name}", frozenset(zip(labels[::2], labels[1::2], strict=True))): value
        for (name, *labels), value in values.items()
    }


def test_every_value_arrives_and_no_other(rig):
    one = a_run(rig)
    endpoint = Endpoint(one.vitals, ANY_PORT)
    try:
        families = scrape(endpoint)
    finally:
        endpoint.close()
    samples = [s for family in families.values() if family.type != "histogram" for s in family.samples]
    found = {(s.name, frozenset(s.labels.items())): s.value for s in samples}
    assert len(found) == len(samples), "a sample came twice"
    assert found == pytest.approx(expected(one))


def test_the_durations_arrive_as_a_histogram(rig):
    family = read(a_run(rig).vitals)["carryover_phase_seconds"]
    assert family.type == "histogram"
    found = {(s.name[24:], s.labels["phase"], s.labels.get("le")): s.value for s in family.samples}
    bounds = [*map(str, BUCKETS), "+Inf"]
    for phase, seconds in (("compute", 0.02), ("encode", 0.0001), ("aggregate", 0.0)):
        expected_buckets = [float(seconds <= float(bound) + 1e-9) for bound in bounds]
        assert [found.pop(("bucket", phase, bound)) for bound in bounds] == expected_buckets
        assert found.pop(("count", phase, None)) == 1
        assert found.pop(("sum", phase, None)) == pytest.approx(seconds)
    assert not found


def test_staleness_arrives_as_a_histogram_of_versions_and_what_it_drops_by_its_cause(rig):
    staleness = {"kind": "hinge", "a": 1.0, "b": 0}
    one = rig(workers=range(4), server={"mode": "async", "buffer": 1, "staleness": staleness}).start()
    for worker in (0, 1, 2, 3):  # 0, 1, 2 and 3 versions late
        one.send(one.push(worker, 1.0, version=0))
    families = read(one.vitals)
    family = families["carryover_staleness_versions"]
    found = {(s.name[29:], s.labels.get("le")): s.value for s in family.samples}
    buckets = {("bucket", str(bound)): float(sum(late <= bound for late in range(4))) for bound in VERSIONS}
    assert found == {**buckets, ("bucket", "+Inf"): 4, ("count", None): 4, ("sum", None): 6}
    assert [found["bucket", bound] for bound in ("0.0", "1.0", "2.0", "4.0")] == [1, 2, 3, 4]
    dropped = {s.labels["cause"]: s.value for s in families["carryover_discarded_norm"].samples}
    assert dropped == {"compression": 0, "staleness": pytest.approx(5 * (1 / 2 + 2 / 3 + 3 / 4))}


def test_the_document_lists_every_metric_with_its_type_and_labels(rig):
    found = {}
    for family in read(a_run(rig).vitals).values():
        name = family.name + "_total" * (family.type == "counter")
        (labels,) = {tuple(label for label in s.labels if label != "le") for s in family.samples}
        found[name] = (family.type, labels)
        assert family.documentation.endswith("."), "a sentence"
    assert {name: (kind, set(labels)) for name, (kind, labels) in found.items()} == {
        name: (kind, set(labels)) for name, (kind, labels) in documented().items()
    }
    assert len(TEXT.split("\n| `carryover_")) - 1 == len(documented()), "a row was not understood"


def test_a_run_that_has_not_begun_can_be_scraped():
    families = read(Vitals())
    assert {name + "_total" * (f.type == "counter") for name, f in families.items()} == set(documented())
    assert families["carryover_version"].samples[0].value == 0
    assert families["carryover_workers"].samples[0].labels == {"state": "joining"}


def test_workers_without_statistics_have_none(rig):
    one = rig().start()
    one.send(one.push(0, statistics=pack_statistics({Stat.ERROR: 2.0})))
    one.round({1: 0.0, 2: 0.0})
    families = read(one.vitals)
    roles = [(s.labels["role"], s.labels["worker"]) for s in families["carryover_error_norm"].samples]
    assert roles == [("worker", "0"), ("server", "")]
    assert not families["carryover_update_norm"].samples
    assert not families["carryover_contraction"].samples


def test_who_has_left_is_no_longer_shown_and_owes_nothing(rig):
    one = rig().start()
    for worker in (0, 1, 2):
        one.send(one.push(worker, statistics=pack_statistics({Stat.BEFORE: 5.0, Stat.SENT: 4.0, Stat.ERROR: 3.0})))
    assert one.vitals.summary()["worker_error_norm"] == pytest.approx(27**0.5)
    one.send(one.leave(1, 1.0))
    one.round({0: 0.0, 2: 0.0})
    workers = {s.labels["worker"] for s in read(one.vitals)["carryover_error_norm"].samples}
    assert workers == {"0", "2", ""}
    assert one.vitals.summary()["worker_error_norm"] == pytest.approx(18**0.5)


@pytest.mark.parametrize("name", ['quotes " and\nlines \\', "größer", ""])
def test_any_name_that_a_user_reports_is_a_valid_label(rig, name):
    one = rig(workers=(0,)).start()
    one.round({0: 0.0}, names=[name], statistics=pack_statistics({Stat.REPORTED: float("nan")}))
    (sample,) = read(one.vitals)["carryover_reported"].samples
    assert sample.labels == {"name": name}
    assert sample.value != sample.value


# -- the endpoint ------------------------------------------------------------------------------------


def test_a_port_that_is_in_use_is_a_settings_error_of_one_sentence():
    endpoint = Endpoint(Vitals(), ANY_PORT)
    try:
        with pytest.raises(SettingsError) as refused:
            Endpoint(Vitals(), MetricsSettings(port=endpoint.port))
        assert str(refused.value) == (
            f"metrics.port {endpoint.port} cannot be opened on 127.0.0.1: Address already in use; "
            "choose another, 0 for any free port, or null for none"
        )
    finally:
        endpoint.close()


def test_a_host_that_is_not_of_this_machine_is_a_settings_error():
    with pytest.raises(SettingsError, match=r"metrics\.port 0 cannot be opened on 192\.0\.2\.1: .+; choose another"):
        Endpoint(Vitals(), MetricsSettings(host="192.0.2.1", port=0))


def test_a_closed_endpoint_leaves_no_thread_and_frees_its_port():
    before = threading.active_count()
    endpoint = Endpoint(Vitals(), ANY_PORT)
    assert threading.active_count() == before + 1
    endpoint.close()
    assert threading.active_count() == before
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10)
    again = Endpoint(Vitals(), MetricsSettings(port=endpoint.port))
    assert again.port == endpoint.port
    again.close()


def test_the_endpoint_listens_on_the_host_that_it_was_given_alone():
    endpoint = Endpoint(Vitals(), ANY_PORT)
    try:
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", endpoint.port))
    finally:
        endpoint.close()


def test_two_endpoints_do_not_share_a_registry(rig):
    one, other = rig(workers=(0,)).start(), rig(workers=(0,)).start()
    one.round({0: 0.0})
    endpoints = [Endpoint(each.vitals, ANY_PORT) for each in (one, other)]
    try:
        assert [scrape(endpoint)["carryover_version"].samples[0].value for endpoint in endpoints] == [1, 0]
    finally:
        for endpoint in endpoints:
            endpoint.close()
