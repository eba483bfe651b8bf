"""Bytes are counted with ``len(frame)``, by direction and kind, and none is forgotten."""

from collections import Counter

import numpy as np
import pytest
import torch


class Book:
    """Every frame of a scenario with the kind that ``docs/protocol.md`` gives it."""

    def __init__(self, one):
        self.one, self.wire = one, Counter()

    def send(self, kind, message, *answered):
        """Send; book the frame as ``kind``, and the answer to each of ``answered`` (kind, ticket)."""
        frame = message if isinstance(message, np.ndarray) else message.pack()
        ticket = self.one.send(frame)
        self.wire["uplink", kind] += frame.size
        for answer, whose in answered:
            frames = self.one.heard[ticket if whose is None else whose]
            self.wire["downlink", answer] += sum(f.size for f in frames)
        return ticket


def test_every_frame_is_counted_once_under_its_kind(rig):
    one = rig(downlink="topk:0.1")
    book = Book(one)
    early = [book.send("snapshot", one.join(worker)) for worker in (1, 1, 2)]
    book.send("snapshot", one.join(0), ("snapshot", None), *(("snapshot", t) for t in early))
    book.send("update", np.arange(50, dtype=np.uint8), ("update", None))  # refused
    # an average, with a resend before and one after its answer
    average = one.average(0, 1.0)
    first = book.send("average", average)
    again = book.send("resend", average)
    second = book.send("average", one.average(1, 2.0))
    answers = ("average", first), ("resend", again), ("average", second), ("average", None)
    book.send("average", one.average(2, 3.0), *answers)
    book.send("resend", average, ("resend", None))
    # a round, with a late joiner and refused messages of every sort
    joiner = book.send("snapshot", one.join(7))
    push = one.push(0, torch.arange(25.0))
    first = book.send("update", push)
    again = book.send("resend", push)
    book.send("update", one.push(1, version=9), ("update", None))
    book.send("average", one.average(1, version=9), ("update", None))
    book.send("snapshot", one.join(8, layout=type(one.layout)(one.layout.entries[:1])), ("update", None))
    book.send("update", one.leave(9), ("update", None))
    second = book.send("update", one.push(1, 2.0, sequence=2))
    leave = one.leave(2, 1.0)
    answers = ("update", first), ("resend", again), ("update", second), ("snapshot", joiner)
    book.send("update", leave, ("update", None), *answers)
    book.send("resend", push, ("resend", None))
    book.send("resend", leave, ("resend", None))
    assert one.vitals.wire == book.wire
    assert set(book.wire) == {
        (d, k) for d in ("uplink", "downlink") for k in ("update", "average", "snapshot", "resend")
    }
    for direction in ("uplink", "downlink"):
        assert sum(n for (d, _), n in one.vitals.wire.items() if d == direction) == one.counted[direction]


def test_the_ratio_is_dense_bytes_over_those_of_updates_and_averages(rig):
    one = rig().start()
    assert one.vitals.ratio("uplink") == one.vitals.ratio("downlink") == 0.0
    sizes = Counter()
    for worker in (0, 1, 2):
        average = one.average(worker, 1.0).pack()
        sizes["up"] += average.size
        ticket = one.send(average)
    sizes["down"] += 3 * one.heard[ticket][0].size
    for worker in (0, 1, 2):
        push = one.push(worker, 1.0).pack()
        sizes["up"] += push.size
        ticket = one.send(push)
    sizes["down"] += 3 * one.heard[ticket][0].size
    one.send(push)  # a resend is counted apart
    dense = 3 * 4 * 23  # three workers, float32, parameters without buffers
    assert one.vitals.dense == {"uplink": dense, "downlink": dense}
    assert one.vitals.ratio("uplink") == pytest.approx(dense / sizes["up"])
    assert one.vitals.ratio("downlink") == pytest.approx(dense / sizes["down"])
    assert (one.vitals.bytes("uplink"), one.vitals.bytes("downlink")) == (sizes["up"], sizes["down"])


def test_a_run_that_is_stopped_early_counts_its_refusals(rig):
    one = rig()
    one.send(one.join(1))
    one.take(one.server.stop())
    assert one.vitals.wire["downlink", "update"] == one.counted["downlink"] > 0


def test_snapshot_bytes_are_models_of_both_ways(rig):
    one = rig().start()
    assert one.vitals.snapshot_bytes() == one.counted["uplink"] + one.counted["downlink"]
    assert one.vitals.summary()["snapshot_bytes"] == one.vitals.snapshot_bytes()
