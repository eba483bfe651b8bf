"""A whole run in one process: what it leaves behind, and how it ends when something is wrong."""

import json
import socket

import pytest
import safetensors.torch
import torch
from torch import nn

from deploy import launch
from deploy.settings import load
from protocol import SettingsError
from protocol.errors import RunFailed

SUMMARY = {
    "rounds",
    "workers",
    "seconds",
    "uplink_bytes",
    "downlink_bytes",
    "uplink_ratio",
    "downlink_ratio",
    "snapshot_bytes",
    "server_error_norm",
    "worker_error_norm",
    "discarded_norm",
    "conservation_error",
    "fingerprint",
    "reported",
}


def run(project, *overrides, observe=lambda row: None):
    settings = load(project / "run.yaml", overrides)
    return launch(settings.train, settings, observe=observe)


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_the_whole_run_directory(project):
    seen = []
    result = run(project, observe=seen.append)
    assert result.path.resolve() == project / "runs" / "mine"
    names = {file.name for file in result.path.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "model.safetensors", "report.html"} <= names
    assert json.loads((result.path / "summary.json").read_text()) == result.summary
    assert result.summary.keys() >= SUMMARY
    assert result.summary["status"] == "finished"
    assert [row["version"] for row in rows(result.path)] == [1, 2, 3, 4, 5, 6] == [row["version"] for row in seen]
    assert load(result.path / "config.yaml") == load(project / "run.yaml")


def test_the_saved_model_loads_with_plain_load_state_dict(project):
    result = run(project, "rounds=200")
    model = nn.Linear(4, 1)
    model.load_state_dict(result.load_model())
    x = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert model(x).item() == pytest.approx(1.0, abs=0.05)


def test_bytes_in_the_summary_are_those_of_the_rows_and_ratios_follow(project):
    result = run(project)
    last, summary = rows(result.path)[-1], result.summary
    assert last["uplink_bytes"] == summary["uplink_bytes"] > 0
    assert summary["uplink_ratio"] == pytest.approx(4 * 5 * 2 * 6 / summary["uplink_bytes"])
    assert summary["downlink_ratio"] == pytest.approx(4 * 5 * 2 * 6 / summary["downlink_bytes"])


def test_an_earlier_run_of_the_same_name_is_kept(project):
    first, second, third = run(project), run(project, "seed=1"), run(project, "seed=2")
    assert first.path == second.path == third.path
    kept = [json.loads((first.path.with_name(f"mine.{i}") / "summary.json").read_text()) for i in (1, 2)]
    assert [k["fingerprint"] for k in kept] == [first.summary["fingerprint"], second.summary["fingerprint"]]


def test_launch_takes_a_function_and_a_mapping(project):
    def train(session):
        model = nn.Linear(2, 1)
        session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in session.batches(range(8), batch_size=2):
            pass

    settings = {"rounds": 2, "backend": "inline", "metrics": {"port": None}}
    assert launch(train, settings, observe=lambda row: None).summary["rounds"] == 2


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        ("raise", "the training function of worker 1 raised ValueError: boom in the user's code"),
        ("nan", "the update of 'weight' holds NaN or Inf in round 3 of worker 1"),
        ("return", "the training function of worker 1 returned at version 3"),
        ("no parameters", "the model has no parameters that require grad"),
        ("empty", "the model of worker 0 has no parameters, so there is nothing to train"),
    ],
)
def test_a_failing_worker_ends_the_run_with_its_sentence_and_what_was_done_is_kept(project, act, sentence):
    with pytest.raises(RunFailed) as caught:
        run(project, f"arguments.act={act}")
    assert sentence in str(caught.value)
    assert (act == "raise") == (not caught.value.expected)
    path = project / "runs" / "mine"
    summary = json.loads((path / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert len(rows(path)) == summary["rounds"] == (0 if act in ("no parameters", "empty") else 3)
    assert (path / "report.html").exists()
    if act == "nan":
        assert summary["rejected"] == {"not_finite": 1}
    if act == "raise":
        assert caught.value.details.count("Traceback") == 1
        assert "myproject.py" in caught.value.details


def test_a_run_that_cannot_start_leaves_the_earlier_one_in_place(project):
    first = run(project)
    with pytest.raises(SettingsError):
        run(project, "metrics={host: 192.0.2.1, port: 0}")
    assert json.loads((first.path / "summary.json").read_text()) == first.summary
    assert [path.name for path in first.path.parent.iterdir()] == ["mine"]


def test_two_runs_of_one_name_at_the_same_time_are_refused(project):
    refused = []

    def observe(row):
        if not refused:
            with pytest.raises(SettingsError, match="a run is going on in runs/mine; give this one another name") as e:
                run(project, "seed=1")
            refused.append(e)

    result = run(project, "rounds=40", observe=observe)
    assert refused
    assert len(rows(result.path)) == 40
    assert run(project).path == result.path


def test_a_function_that_calls_exit_ends_the_run(project):
    with pytest.raises(RunFailed, match="the training function of worker 1 raised SystemExit: 3"):
        run(project, "arguments.act=exit")


def test_a_failing_evaluation_after_the_last_round_does_not_cost_the_model(project):
    with pytest.raises(RunFailed, match="the test set is gone"):
        run(project, "arguments.act=late")
    path = project / "runs" / "mine"
    assert json.loads((path / "summary.json").read_text())["rounds"] == 6
    nn.Linear(4, 1).load_state_dict(safetensors.torch.load_file(path / "model.safetensors"))


def test_every_rank_draws_the_same_after_prepare_on_one_process_too(project):
    drawn = []

    def train(session):
        model = nn.Linear(2, 1)
        session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        drawn.append(torch.rand(3).tolist())
        for _ in session.batches(range(8), batch_size=2):
            pass
        drawn.append(torch.rand(3).tolist())

    launch(train, {"rounds": 2, "backend": "inline", "metrics": {"port": None}}, observe=lambda row: None)
    assert len(drawn) == 8
    assert len({tuple(values) for values in drawn}) == 2


def test_the_ledgers_are_checked_after_the_last_round_whatever_the_interval(project):
    def train(session):
        model = nn.Linear(4, 1)
        session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in session.batches(range(8), batch_size=2):
            model.weight.data.add_(0.1)
            if session.version == 3 and session.rank == 1:
                session._rounds.method.sender.residual.add_(0.01)

    settings = {"rounds": 6, "backend": "inline", "metrics": {"port": None, "sketch_every": 1000}}
    result = launch(train, settings, observe=lambda row: None)
    assert result.summary["conservation_error"] > 16


def test_a_port_in_use_is_named_and_what_to_do_about_it(project):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"metrics\.port {port} cannot be opened .*choose another"):
            run(project, f"metrics.port={port}")


def test_overrides_that_match_nothing_are_refused_with_the_names_that_exist(project):
    with pytest.raises(RunFailed, match=r"'conv\*', which matches no tensor; the model has weight, bias"):
        run(project, "overrides={conv*: f32}")


def test_an_override_changes_the_bytes_of_its_tensor_only(project):
    plain, dense = run(project), run(project, "overrides={bias: f64}")
    assert dense.summary["uplink_bytes"] > plain.summary["uplink_bytes"]


def test_a_server_optimizer_that_diverges_fails_the_run_with_its_sentence(project):
    with pytest.raises(RunFailed, match="holds NaN or Inf, after the server's optimizer"):
        run(project, "server.optimizer={kind: torch.optim.SGD, lr: 1e38, weight_decay: 1e30}")
    assert json.loads((project / "runs" / "mine" / "summary.json").read_text())["status"] == "failed"


def test_metrics_hold_null_where_a_value_is_not_finite(project):
    def train(session):
        model = nn.Linear(2, 1)
        session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in session.batches(range(8), batch_size=2):
            session.report(loss=float("nan"))

    settings = {"rounds": 2, "backend": "inline", "metrics": {"port": None}}
    result = launch(train, settings, observe=lambda row: None)

    def refuse(text):
        raise AssertionError(text)

    text = (result.path / "metrics.jsonl").read_text()
    assert [json.loads(line, parse_constant=refuse)["reported"]["loss"] for line in text.splitlines()] == [None, None]
