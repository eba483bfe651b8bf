"""A small project of a user's, in a folder of its own, and the command in it."""

import sys

import pytest
import yaml

from deploy import cli

PROJECT = """
import os
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset


def train(session, act="train"):
    inputs = torch.linspace(-1, 1, 64).reshape(16, 4)
    dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    model = nn.ReLU() if act == "empty" else nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if act == "no parameters":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    session.prepare(model, optimizer)
    for x, y in session.batches(dataset, batch_size=4):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        session.report(loss=loss)
        if session.version == 3 and session.rank == session.world_size - 1:
            if act == "raise":
                raise ValueError("boom in the user's code")
            if act == "nan":
                with torch.no_grad():
                    model.weight[0, 0] = float("nan")
            if act == "exit":
                raise SystemExit(3)
            if act == "return":
                return
            if act == "die":
                os.kill(os.getpid(), 9)
        if act == "slow":
            time.sleep(0.05)
    if act == "late":
        raise OSError("the test set is gone")


def never(session):
    pass


nothing = 3
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The folder of the project, which is also the current one; ``myproject:train`` is its function."""
    (tmp_path / "myproject.py").write_text(PROJECT)
    settings = {
        "name": "mine",
        "train": "myproject:train",
        "rounds": 6,
        "backend": "inline",
        "workers": {"count": 2},
        "uplink": "topk:0.5",
        "downlink": "topk:0.5",
        "metrics": {"port": None, "sketch_every": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("myproject", None)
    yield tmp_path
    sys.modules.pop("myproject", None)


@pytest.fixture
def carryover(project, monkeypatch, capfd):
    """Run ``carryover`` with arguments; returns exit status, standard output, standard error."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["carryover", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return command
