"""The examples do what they and the README say."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import dump_svmlight_file

from deploy import launch
from deploy.settings import load
from examples import logistic
from protocol.errors import RunFailed

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("CARRYOVER_DATA", ROOT.parent / "shared" / "data"))


def run(example, tmp_path, *overrides):
    rows = []
    common = ["backend=inline", "metrics.port=null", f"storage.dir={tmp_path}"]
    settings = load(ROOT / "examples" / example, [*common, *overrides])
    return launch(settings.train, settings, observe=rows.append).summary, rows


def test_digits_reaches_its_accuracy_at_220x_both_ways(tmp_path):
    summary, rows = run("digits.yaml", tmp_path)
    assert len(rows) == 400
    assert summary["reported"]["accuracy"] >= 98.0
    assert summary["uplink_ratio"] >= 220
    assert summary["downlink_ratio"] >= 220
    assert summary["conservation_error"] <= 4


@pytest.mark.papers
def test_step_ahead_is_far_ahead_of_plain_feedback_at_one_in_a_thousand(tmp_path):
    def loss(kind):
        aggressive = ["uplink=topk:0.001+int4", "downlink=topk:0.001+int4", f"feedback.kind={kind}", "rounds=100"]
        rows = run("digits.yaml", tmp_path, f"name={kind}", *aggressive)[1]
        return sum(row["reported"]["loss"] for row in rows[-20:]) / 20

    with pytest.warns(UserWarning, match="keeps its state on each worker"):
        plain = loss("ef")
    assert loss("saef") < plain / 2


@pytest.mark.skipif(not (DATA / "fashion-mnist").is_dir(), reason="Fashion-MNIST is not there; set CARRYOVER_DATA")
def test_fashion_mnist_trains_from_its_idx_files(tmp_path):
    summary, rows = run("fashion_mnist.yaml", tmp_path, f"arguments.folder={DATA / 'fashion-mnist'}", "rounds=60")
    assert rows[0]["reported"]["loss"] > 2.2
    assert rows[-1]["reported"]["loss"] < 1.2
    assert summary["reported"]["accuracy"] > 60
    assert summary["uplink_ratio"] > 220


def test_a_missing_data_folder_is_named_with_the_setting(tmp_path):
    with pytest.raises(RunFailed, match=r"nowhere/train-images-idx3-ubyte\.gz does not exist; set arguments\.folder"):
        run("fashion_mnist.yaml", tmp_path, "arguments.folder=nowhere", "rounds=1")


@pytest.mark.parametrize("partition", ["by_label", "iid"])
def test_federated_digits_trains_on_parts_of_other_kinds_too(tmp_path, partition):
    summary, rows = run("federated_digits.yaml", tmp_path, "rounds=2", f"arguments.partition={partition}")
    assert (len(rows), summary["workers"]) == (2, 8)
    assert 0 < summary["reported"]["accuracy"] < 100


def test_a_partition_that_is_none_is_named_with_those_that_are(tmp_path):
    with pytest.raises(RunFailed, match=r"arguments\.partition is 'even'; valid are dirichlet, by_label and iid"):
        run("federated_digits.yaml", tmp_path, "rounds=1", "arguments.partition=even")


@pytest.fixture
def libsvm(tmp_path):
    """A LibSVM file of 43 rows, 6 features and the labels 1 and 2."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(43, 6))
    labels = np.where(rows @ random.normal(size=6) + random.normal(size=43) > 0, 2, 1)
    dump_svmlight_file(rows, labels, str(tmp_path / "rows"), zero_based=False)
    return tmp_path / "rows"


def test_the_gradient_of_logistic_regression_is_that_of_its_objective(libsvm):
    rows, x = logistic.data(str(libsvm)), torch.linspace(-2, 2, 6, dtype=torch.float64, requires_grad=True)
    loss = torch.log1p(torch.exp(-(rows @ x))).mean() + 0.1 * (x**2 / (1 + x**2)).sum()
    (expected,) = torch.autograd.grad(loss, x)
    assert torch.allclose(logistic.gradient(x, rows, 0.1), expected, rtol=1e-12, atol=0)


def test_logistic_regression_gets_by_with_messages_of_one_element(libsvm, tmp_path):
    overrides = [f"arguments.file={libsvm}", "arguments.multiple=4", "workers.count=4", "rounds=300"]
    summary, rows = run("logistic.yaml", tmp_path, *overrides)
    assert rows[0]["reported"]["stationarity"] > 0.1
    assert summary["reported"]["stationarity"] < 1e-7
    assert summary["conservation_error"] <= 4


def test_logistic_regression_names_a_missing_file_and_its_setting(tmp_path):
    with pytest.raises(RunFailed, match=r"nowhere does not exist; set arguments\.file"):
        run("logistic.yaml", tmp_path, "arguments.file=nowhere", "rounds=1")
