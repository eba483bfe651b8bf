"""The Prometheus endpoint: metrics are read from the vital signs when they are scraped."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.errors import SettingsError
from protocol.messages import Stat
from ps.settings import MetricsSettings
from ps.vitals import Histogram, Vitals

DIRECTIONS = ("uplink", "downlink")


class VitalsCollector(Collector):
    """All metrics of a server. Names and labels are the contract of ``docs/metrics.md``."""

    def __init__(self, vitals: Vitals) -> None:
        self.vitals = vitals

    def collect(self) -> Iterator[Metric]:
        """One consistent reading of the vital signs."""
        with self.vitals.lock:
            yield from list(_read(self.vitals))


def _gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"carryover_{name}", text, labels=labels)


def _counter(name: str, text: str, labels: tuple[str, ...] = ()) -> CounterMetricFamily:
    return CounterMetricFamily(f"carryover_{name}", text, labels=labels)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Upper bounds with the counts up to them, as Prometheus adds them up."""
    bounds = [*map(str, histogram.bounds), "+Inf"]
    return list(zip(bounds, itertools.accumulate(map(float, histogram.counts)), strict=True))


def _read(vitals: Vitals) -> Iterator[Metric]:
    present = {str(worker): vitals.workers[worker] for worker in vitals.members}
    version = _gauge("version", "Version of the model: rounds folded so far.")
    version.add_metric([], vitals.version)
    yield version

    members = _gauge("workers", "Workers by state.", ("state",))
    members.add_metric([vitals.state], len(vitals.members))
    yield members

    error = _gauge("error_norm", "Norm of what a sender still owes: its residual.", ("role", "worker"))
    update = _gauge("update_norm", "Norm of the update before and after compression.", ("worker", "stage"))
    for name, worker in present.items():
        if Stat.ERROR in worker.latest:
            error.add_metric(["worker", name], worker.latest[Stat.ERROR])
        for key, stage in ((Stat.BEFORE, "before"), (Stat.SENT, "after")):
            if key in worker.latest:
                update.add_metric([name, stage], worker.latest[key])
    for relay, seen in sorted(vitals.relays.items()):
        error.add_metric(["relay", str(relay)], seen.latest.get(Stat.ERROR, 0.0))
    error.add_metric(["server", ""], vitals.server_left**0.5)
    yield error
    yield update

    contraction = _gauge(
        "contraction",
        "Share of the squared norm that compression left behind, the mean over senders.",
        ("direction",),
    )
    measured = [w.contraction() for w in present.values() if Stat.BEFORE in w.latest]
    if measured:
        contraction.add_metric(["uplink"], sum(measured) / len(measured))
        contraction.add_metric(["downlink"], vitals.server_contraction())
    yield contraction

    wire = _counter("wire_bytes", "Bytes passed to and returned by exchanges.", ("direction", "kind"))
    for (direction, kind), count in sorted(vitals.wire.items()):
        wire.add_metric([direction, kind], count)
    yield wire

    dense = _counter("dense_bytes", "Bytes that the same updates would take as float32.", ("direction",))
    ratio = _gauge("compression_ratio", "Dense bytes over bytes of updates and averages.", ("direction",))
    for direction in DIRECTIONS:
        dense.add_metric([direction], vitals.dense[direction])
        ratio.add_metric([direction], vitals.ratio(direction))
    yield dense
    yield ratio

    phases = HistogramMetricFamily("carryover_phase_seconds", "Duration of the phases of a round.", labels=("phase",))
    for phase, histogram in sorted(vitals.phases.items()):
        phases.add_metric([phase], _buckets(histogram), histogram.total)
    yield phases

    staleness = HistogramMetricFamily("carryover_staleness_versions", "Versions that folded updates were behind.")
    staleness.add_metric([], _buckets(vitals.staleness), vitals.staleness.total)
    yield staleness

    rejected = _counter("rejected_messages", "Messages that were refused.", ("reason",))
    for reason, count in sorted(vitals.rejected.items()):
        rejected.add_metric([reason], count)
    yield rejected

    leaves = _counter("worker_leaves", "Workers that left.", ("cause",))
    for cause, count in sorted(vitals.leaves.items()):
        leaves.add_metric([cause], count)
    yield leaves

    for name, text, value in (
        ("worker_joins", "Workers that joined.", vitals.joins),
        ("residual_handed_over", "Residuals that leaving workers handed over.", vitals.handed_over),
        (
            "skipped_steps",
            "Optimizer steps that did not happen, as when a GradScaler skips.",
            vitals.skipped_steps,
        ),
        ("replica_mismatches", "Replicas that differed from the server's.", vitals.replica_mismatches),
    ):
        counter = _counter(name, text)
        counter.add_metric([], value)
        yield counter

    discarded = _counter("discarded_norm", "Sum of the norms of what senders dropped.", ("cause",))
    for cause, norm in vitals.discarded.items():
        discarded.add_metric([cause], norm)
    yield discarded

    distance = _gauge("mismatch_norm", "Distance from the model to where gradients are taken.", ("at",))
    if vitals.mismatch is not None:
        distance.add_metric(["replica"], vitals.mismatch.replica)
        distance.add_metric(["ahead"], vitals.mismatch.ahead)
    yield distance

    conservation = _gauge(
        "conservation_error",
        "Largest imbalance of a ledger in units of its rounding error; at most 4 is healthy.",
    )
    conservation.add_metric([], vitals.conservation())
    yield conservation

    reported = _gauge("reported", "What the training function reported, the mean over workers.", ("name",))
    for name, mean in sorted(vitals.reported.items()):
        reported.add_metric([name], mean)
    yield reported


class Endpoint:
    """The HTTP server of one run's metrics, on its own thread.

    Raises:
        SettingsError: the port is in use, or the host is not an address of this machine.
    """

    def __init__(self, vitals: Vitals, settings: MetricsSettings) -> None:
        assert settings.port is not None
        registry = CollectorRegistry()
        registry.register(VitalsCollector(vitals))
        try:
            self._server: WSGIServer
            self._thread: threading.Thread
            self._server, self._thread = start_http_server(settings.port, settings.host, registry)
        except OSError as error:
            raise SettingsError(
                f"metrics.port {settings.port} cannot be opened on {settings.host}: {error.strerror}; "
                "choose another, 0 for any free port, or null for none"
            ) from None
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
