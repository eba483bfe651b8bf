"""The command as a user types it: what it prints and its exit status."""

import re

import pytest


def test_train_prints_progress_and_where_the_files_are(carryover):
    status, out, err = carryover("train", "run.yaml")
    assert status == 0, err
    assert "round 6/6" in out
    for part in ("finished after 6 rounds", "fingerprint", "runs/mine", "report.html", "model.safetensors"):
        assert part in out
    assert "\x1b" not in out


def test_train_says_where_its_metrics_are(carryover):
    status, out, err = carryover("train", "run.yaml", "metrics.port=0")
    assert status == 0, err
    assert re.search(r"metrics at http://127\.0\.0\.1:\d+/metrics\n", out)


def test_report_rewrites_a_report_and_compares_several(carryover, project):
    carryover("train", "run.yaml")
    (project / "runs" / "mine" / "report.html").unlink()
    status, out, _ = carryover("report", "runs/mine")
    assert (status, out) == (0, f"{project}/runs/mine/report.html\n")
    carryover("train", "run.yaml", "name=other")
    status, out, _ = carryover("report", "runs/mine", "runs/other")
    assert status == 0
    assert (project / out.strip()).read_text().count("<svg") >= 1


def test_check_prints_settings_bytes_and_memory_and_trains_nothing(carryover, project):
    status, out, _ = carryover("check", "run.yaml", "uplink=sign")
    assert status == 0
    for part in ("uplink: sign", "5 parameters in 2 tensors", "bytes a round", "memory, server"):
        assert part in out
    assert not (project / "runs").exists()


def test_check_refuses_a_function_that_prepares_no_model(carryover):
    status, _, err = carryover("check", "run.yaml", "train=myproject:never")
    assert status == 2
    assert err == "carryover: train is 'myproject:never', but that function never calls session.prepare\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train=nowhere:train"], "there is no module 'nowhere'"),
        (["train=myproject.inner:train"], "there is no module 'myproject.inner'"),
        (["train=myproject:trian"], "has no function 'trian'; it has train, never"),
        (["train=myproject:nothing"], "has no function 'nothing'"),
        (["arguments={size: 3}"], "arguments do not fit myproject:train"),
        (["uplink=topk:2"], "uplink: stage 'topk' in compressor 'topk:2' has ratio '2'"),
        (["rounds=1", "storage.dir=/proc/nowhere"], "storage.dir /proc/nowhere cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(carryover, arguments, part):
    status, _, err = carryover("train", "run.yaml", *arguments)
    assert status == 2
    assert part in err
    assert err.startswith("carryover: ")
    assert err.count("\n") == 1


def test_a_raising_function_shows_its_traceback_once_and_exit_status_1(carryover):
    status, _, err = carryover("train", "run.yaml", "arguments.act=raise")
    assert status == 1
    assert err.count("Traceback") == 1
    assert err.endswith("carryover: the training function of worker 1 raised ValueError: boom in the user's code\n")


def test_an_error_of_ours_shows_its_traceback_only_with_debug(carryover):
    assert "Traceback" not in carryover("train", "run.yaml", "arguments.act=nan")[2]
    assert "Traceback" in carryover("train", "run.yaml", "arguments.act=nan", "--debug")[2]


def test_a_project_that_shadows_one_of_our_packages_is_refused_by_its_file(carryover, project):
    (project / "workers.py").write_text("")
    status, _, err = carryover("train", "run.yaml")
    assert status == 2
    assert str(project / "workers.py") in err
    assert "rename it" in err
