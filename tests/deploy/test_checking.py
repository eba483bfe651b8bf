"""What ``carryover check`` says a run will cost."""

import re

import pytest
import torch
from torch import nn

from deploy.checking import describe
from deploy.display import bytes_text
from deploy.settings import validate

SIZE = 4 * (1000 * 1000 + 1000)  # bytes of the model
LARGEST = 4 * 1000 * 1000  # of its largest tensor
TWO = {  # halves of a residual, and the scratch vector
    "float32": 2 * SIZE,
    "bfloat16": SIZE + LARGEST,
    "int8": 2 * (SIZE // 4 + 4 * (3907 + 4)) + LARGEST,
    "sparse": 2 * SIZE + LARGEST,
}


def train(session):
    model = nn.Linear(1000, 1000)
    session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def memories(**settings):
    """What the page says of each worker's memory and of the server's."""
    text = describe(validate({"train": "m:f", **settings}), train)
    return re.findall(r"^memory, (?:each worker|server) +(.*?)(?: beside.*)?$", text, re.MULTILINE)


@pytest.mark.parametrize("memory", TWO)
def test_memory_depends_on_how_each_side_keeps_its_residual(memory):
    most = "at most " if memory == "sparse" else ""
    compact, whole = bytes_text(3 * SIZE + TWO[memory]), bytes_text(2 * SIZE + 2 * SIZE)
    assert memories(workers={"residual": memory}) == [most + compact, whole]
    compact, whole = bytes_text(2 * SIZE + TWO[memory]), bytes_text(3 * SIZE + 2 * SIZE)
    assert memories(server={"residual": memory}) == [whole, most + compact]


def test_control_variates_double_what_is_exchanged_and_a_worker_keeps_its_own_and_the_sum_for_the_next():
    both = 2 * SIZE
    expected = [bytes_text(3 * both + 2 * both + 2 * SIZE), bytes_text(2 * both + 2 * both)]
    assert memories(federated={"control_variates": True}) == expected


def test_a_worker_without_feedback_keeps_no_residual():
    assert memories(feedback={"kind": "none"})[0] == bytes_text(3 * SIZE)


@pytest.mark.parametrize(
    ("settings", "pushes"),
    [
        ({}, 8),
        ({"federated": {"participation": 0.25}}, 2),
        ({"server": {"mode": "async"}}, 2),
        ({"server": {"mode": "async", "buffer": 5}}, 5),
    ],
)
def test_the_servers_link_carries_the_pushes_of_a_round_and_an_entry_for_everyone(settings, pushes):
    text = describe(validate({"train": "m:f", "workers": {"count": 8}, "uplink": "f32", **settings}), train)
    sizes = [
        int(size.replace(",", "")) for size in re.findall(r"^(?:update|answer), .*? ([\d,]+) bytes", text, re.MULTILINE)
    ]
    (link,) = re.findall(r"^server's link +(.*) a round$", text, re.MULTILINE)
    assert link == f"{bytes_text(pushes * sizes[0])} in and {bytes_text(8 * sizes[1])} out"
