"""The vital signs of a run: what the metrics endpoint, the terminal and the report read.

Numbers only; nothing here influences training. A lock makes them safe to read from a scrape's thread.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter, defaultdict, deque
from dataclasses import asdict, dataclass, field
from typing import Any

from protocol.kernels.sketch import Sketch
from protocol.messages import Stat
from ps.steering import Mismatch

BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds
VERSIONS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # that an update was behind
ROWS = 4096  # rounds that are kept for whoever watches


@dataclass
class Histogram:
    """Counts by bucket (upper bounds, inclusive), and the sum: of durations in seconds unless bounds say otherwise."""

    bounds: tuple[float, ...] = BUCKETS
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass
class WorkerVitals:
    """The latest statistics of one worker; see ``protocol.messages.Stat`` for their units."""

    latest: dict[int, float] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    sketch: Sketch | None = None  # of the residual

    def contraction(self) -> float:
        """``|p - C(p)|**2 / |p|**2`` of the last push."""
        before = self.latest.get(Stat.BEFORE, 0.0) ** 2
        # without error feedback, what was left behind is what was discarded
        left = self.latest.get(Stat.ERROR, 0.0) or self.latest.get(Stat.DISCARDED, 0.0)
        return left**2 / before if before else 0.0


class Vitals:
    """Counters since the start of the run, and the latest state. All bytes are ``len(frame)``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.version = 0
        self.position = 0
        self.members: tuple[int, ...] = ()
        self.state = "joining"
        self.workers: dict[int, WorkerVitals] = defaultdict(WorkerVitals)
        self.relays: dict[int, WorkerVitals] = {}
        self.wire: Counter[tuple[str, str]] = Counter()  # (direction, kind) -> bytes
        self.dense: Counter[str] = Counter()  # direction -> bytes that float32 updates would take
        self.rejected: Counter[str] = Counter()
        self.phases: dict[str, Histogram] = defaultdict(Histogram)
        self.staleness = Histogram(VERSIONS)
        self.mismatch: Mismatch | None = None  # of the last round in which it was measured
        self.server_before = self.server_left = 0.0  # squared norms of the last round
        self.server_conservation = 0.0
        self.discarded = {"compression": 0.0, "staleness": 0.0}  # cause -> sum over pushes of norms of what was dropped
        self.skipped_steps = 0
        self.joins = 0
        self.leaves: Counter[str] = Counter()
        self.handed_over = 0
        self.reported: dict[str, float] = {}
        self.rows: deque[dict[str, Any]] = deque(maxlen=ROWS)

    @property
    def replica_mismatches(self) -> int:
        """Pushes whose digest showed a replica other than the server's."""
        return self.rejected["replica"]

    def ratio(self, direction: str) -> float:
        """Dense float32 bytes over the bytes of updates and averages; 0 before the first round."""
        sent = self.wire[direction, "update"] + self.wire[direction, "average"]
        return self.dense[direction] / sent if sent else 0.0

    def bytes(self, direction: str) -> int:
        """Bytes of updates and averages."""
        return self.wire[direction, "update"] + self.wire[direction, "average"]

    def snapshot_bytes(self) -> int:
        """Bytes of models sent to and by joiners."""
        return self.wire["uplink", "snapshot"] + self.wire["downlink", "snapshot"]

    def observe_push(self, worker: int, statistics: dict[int, float], names: list[str], skipped: int) -> None:
        """Take over the statistics of an accepted push."""
        seen = self.workers[worker]
        seen.names.extend(names)
        seen.latest.pop(Stat.DISCARDED, None)
        for key, value in statistics.items():
            if key in Stat.PHASES:
                self.phases[Stat.PHASES[key]].observe(value)
            elif key < Stat.REPORTED:
                seen.latest[key] = value
        self.discarded["compression"] += statistics.get(Stat.DISCARDED, 0.0)
        self.skipped_steps += skipped

    def observe_relay(self, relay: int, statistics: dict[int, float]) -> None:
        """Take over the statistics of a relay's own sender."""
        self.relays.setdefault(relay, WorkerVitals()).latest.update(statistics)

    def report(self, statistics: dict[int, dict[int, float]], samples: dict[int, int]) -> dict[str, float]:
        """The sample-weighted means over workers of what the users' loops reported this round."""
        sums: dict[str, tuple[float, float]] = {}
        for worker, values in statistics.items():
            for key, value in values.items():
                place = key - Stat.REPORTED
                if 0 <= place < len(self.workers[worker].names):
                    name, share = self.workers[worker].names[place], float(max(1, samples[worker]))
                    weighted, total = sums.get(name, (0.0, 0.0))
                    sums[name] = (weighted + share * value, total + share)
        means = {name: weighted / total for name, (weighted, total) in sums.items()}
        self.reported.update(means)
        return means

    def close(self, seconds: float, samples: int, reported: dict[str, float]) -> None:
        """Add the row of a round that was just folded; ``seconds`` since the start of training."""
        present = {w: self.workers[w] for w in self.members}

        def each(key: int) -> dict[str, float]:
            return {str(w): vitals.latest[key] for w, vitals in present.items() if key in vitals.latest}

        self.rows.append(
            {
                "version": self.version,
                "seconds": round(seconds, 6),
                "position": self.position,
                "samples": samples,
                "workers": len(self.members),
                "reported": reported,
                "worker_error_norm": each(Stat.ERROR),
                "server_error_norm": self.server_left**0.5,
                "relay_error_norm": {str(r): v.latest.get(Stat.ERROR, 0.0) for r, v in sorted(self.relays.items())},
                "update_norm": {"before": each(Stat.BEFORE), "after": each(Stat.SENT)},
                "contraction": {
                    "up": {str(w): vitals.contraction() for w, vitals in present.items()},
                    "down": self.server_contraction(),
                },
                **self.traffic(),
                "conservation_error": self.conservation(),
                "mismatch": asdict(self.mismatch) if self.mismatch else None,
            }
        )

    def server_contraction(self) -> float:
        """``|p - C(p)|**2 / |p|**2`` of the last entry."""
        return self.server_left / self.server_before if self.server_before else 0.0

    def conservation(self) -> float:
        """The largest conservation error of any sender."""
        return max([self.server_conservation, *(w.latest.get(Stat.CONSERVATION, 0.0) for w in self.workers.values())])

    def traffic(self) -> dict[str, float]:
        """Bytes and ratios of updates and averages."""
        ways = ("uplink", "downlink")
        return {f"{way}_bytes": self.bytes(way) for way in ways} | {f"{way}_ratio": self.ratio(way) for way in ways}

    def summary(self) -> dict[str, Any]:
        """The keys of ``summary.json`` that the server knows."""
        errors = [self.workers[worker].latest.get(Stat.ERROR, 0.0) for worker in self.members]
        return {
            "rounds": self.version,
            **self.traffic(),
            "uplink_bytes_per_sample": self.bytes("uplink") / max(1, self.position),
            "downlink_bytes_per_sample": self.bytes("downlink") / max(1, self.position),
            "snapshot_bytes": self.snapshot_bytes(),
            "server_error_norm": self.server_left**0.5,
            "worker_error_norm": sum(e * e for e in errors) ** 0.5,
            "discarded_norm": sum(self.discarded.values()),
            "conservation_error": self.conservation(),
            "skipped_steps": self.skipped_steps,
            "rejected": dict(self.rejected),
            "replica_mismatches": self.replica_mismatches,
            "reported": dict(self.reported),
        }

    def rows_since(self, version: int) -> list[dict[str, Any]]:
        """The rows of the rounds after ``version`` that are still kept."""
        rows: list[dict[str, Any]] = []
        for row in reversed(self.rows):
            if row["version"] <= version:
                break
            rows.append(row)
        return rows[::-1]
