"""Runs as a user starts them, in processes of their own: kills, Ctrl-C, a port in use. Nothing stays behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(400)]

PROJECT = """
import os
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset


def train(session, act="train"):
    inputs = torch.linspace(-1, 1, 64).reshape(16, 4)
    dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    model = nn.Linear(4, 1)
    session.prepare(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.05))
    for x, y in session.batches(dataset, batch_size=4):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        session.report(loss=loss)
        if act == "raise" and session.version == 3 and session.rank == 1:
            raise ValueError("boom in the user's code")
        if act == "slow":
            time.sleep(0.05)
            with open("pids", "a") as file:
                file.write(f"{os.getpid()}\\n")
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "myproject.py").write_text(PROJECT)
    settings = {
        "name": "mine",
        "train": "myproject:train",
        "rounds": 8,
        "workers": {"count": 2},
        "metrics": {"port": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def start(project, *overrides):
    command = [str(Path(sys.executable).with_name("carryover")), "train", "run.yaml", *overrides]
    return subprocess.Popen(
        command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def descendants(pid):
    """Every process below ``pid``, by /proc."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), set()).add(int(stat.parent.name))
    found, todo = set(), [pid]
    while todo:
        fresh = children.get(todo.pop(), set()) - found
        found |= fresh
        todo += fresh
    return found


def alive(pids):
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.add(pid)
    return found


def wait_for_training(project, process, workers=2):
    """The processes of the workers, once each has trained a little."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = (project / "pids").read_text().split() if (project / "pids").exists() else []
        if len(set(lines)) == workers and len(lines) > 10 * workers:
            return sorted({int(line) for line in lines})
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    raise AssertionError("the workers did not begin to train")


def end(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def assert_gone(pids):
    deadline = time.monotonic() + 20
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(pids)


def summary(project):
    return json.loads((project / "runs" / "mine" / "summary.json").read_text())


def test_a_run_ends_with_status_0_and_leaves_no_process(project):
    process = start(project)
    seen = set()
    while process.poll() is None:
        seen |= descendants(process.pid)
        time.sleep(0.2)
    status, out, err = end(process)
    assert status == 0, err
    assert "finished after 8 rounds with 2 workers" in out
    assert len(seen) >= 4  # server, workers, raylet, GCS
    assert_gone(seen)


def test_nothing_listens_beyond_the_loopback_address(project):
    process = start(project, "rounds=100000", "arguments.act=slow")
    wait_for_training(project, process)
    ours = descendants(process.pid) | {process.pid}
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    mine = [line for line in lines if any(f"pid={pid}," in line for pid in ours)]
    process.send_signal(signal.SIGINT)
    end(process)
    assert len(mine) >= 4
    for line in mine:
        assert line.split()[3].rpartition(":")[0].strip("[]").removeprefix("::ffff:").startswith("127."), line
    assert_gone(ours)


def test_ctrl_c_stops_cleanly_and_what_was_done_is_saved(project):
    process = start(project, "rounds=100000", "arguments.act=slow")
    wait_for_training(project, process)
    seen = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    status, out, err = end(process)
    assert status == 130, (out, err)
    assert err.endswith("carryover: stopped by Ctrl-C; what was done is saved\n")
    assert "Traceback" not in err
    result = summary(project)
    assert result["status"] == "interrupted"
    rows = (project / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    assert 10 < result["rounds"] == len(rows) < 100000
    assert (project / "runs" / "mine" / "model.safetensors").exists()
    assert result["fingerprint"]
    assert_gone(seen)


def test_a_killed_worker_ends_the_run_with_its_number(project):
    process = start(project, "rounds=100000", "arguments.act=slow")
    pids = wait_for_training(project, process)
    seen = descendants(process.pid)
    os.kill(pids[-1], signal.SIGKILL)
    status, _, err = end(process)
    assert not alive(pids[-1:])
    assert status == 1
    assert err.strip().splitlines()[-1].startswith("carryover: worker ")
    assert "died" in err.strip().splitlines()[-1]
    assert summary(project)["status"] == "failed"
    assert summary(project)["rounds"] > 5
    assert_gone(seen)


def test_a_raising_function_shows_its_traceback_once(project):
    status, out, err = end(start(project, "arguments.act=raise"))
    assert status == 1
    assert (out + err).count("Traceback (most recent call last)") == 1
    assert err.endswith("carryover: the training function of worker 1 raised ValueError: boom in the user's code\n")
    assert summary(project)["rounds"] == 3


def test_a_port_in_use_is_one_sentence(project):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, _, err = end(start(project, f"metrics.port={port}"))
    assert status == 2
    assert f"metrics.port {port} cannot be opened on 127.0.0.1: Address already in use" in err
    assert "Traceback" not in err
