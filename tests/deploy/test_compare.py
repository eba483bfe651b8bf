"""``carryover compare``: what it refuses, its figures, tables and plots, and whole comparisons in processes."""

import _thread
import fcntl
import json
import math
import os
import re
import shutil
import statistics
import sys

import numpy as np
import pytest

from deploy.compare import output, plots, tables
from deploy.compare.figures import Comparison, Spread, Target, falls, last_tenth, reach
from deploy.compare.runs import INTERRUPTED, Runs
from deploy.compare.variations import Plan, Variation, plan, split
from deploy.curves import seeds_curve
from deploy.settings import resolved, validate

# -- what is run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label", "overrides"),
    [
        ("feedback.kind=ef", "feedback.kind=ef", ["feedback.kind=ef"]),
        ("feedback.kind=ef  uplink=topk:0.1+int4", "feedback.kind=ef uplink=topk:0.1+int4", None),
        ("dense: uplink=none downlink=none", "dense", ["uplink=none", "downlink=none"]),
        ("1 %, both ways: uplink=topk:0.01", "1 %, both ways", ["uplink=topk:0.01"]),
        ("overrides={conv*: f32, b: f16} rounds=3", None, ["overrides={conv*: f32, b: f16}", "rounds=3"]),
        ("mixed: overrides={conv*: f32}", "mixed", ["overrides={conv*: f32}"]),
        ("arguments.text=two words", "arguments.text=two words", ["arguments.text=two words"]),
        ("sign", "sign", ["sign"]),
    ],
)
def test_a_variation_is_overrides_behind_a_label_or_without_one(text, label, overrides):
    found = split(text)
    assert found[0] == (label or text)
    assert list(found[1]) == (overrides or text.split())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--vary", "feedback.kind=efx"],
            ["--vary 'feedback.kind=efx': feedback.kind is efx", "none, ef, ef_momentum, saef"],
        ),
        (["--vary", "a: rounds=2", "--vary", "b: roundz=2"], ["--vary 'b: roundz=2': roundz is not a setting"]),
        (["--vary", "sign"], ["--vary 'sign': 'sign' is not an override; valid is key=value"]),
        (["--vary", "a: "], ["--vary 'a: '", "valid is key=value, or LABEL: key=value"]),
        (["--vary", "a: rounds=2", "--vary", "a: rounds=3"], ["--vary 'a: rounds=3' has the label 'a', as one before"]),
        (["--baseline", "--vary", "baseline: rounds=3"], ["has the label 'baseline', as one before it"]),
        (["--vary", "train=myproject:trian"], ["--vary 'train=myproject:trian'", "it has train, never"]),
        (["--vary", "arguments.size=3"], ["--vary 'arguments.size=3': arguments do not fit myproject:train"]),
        (["--vary", "seed=3"], ["--vary 'seed=3': seed cannot be varied; valid is seed=VALUE outside --vary"]),
        (["--vary", "name=x"], ["name cannot be varied"]),
        (["--vary", "storage.dir=x"], ["storage.dir cannot be varied"]),
        (["rounds=0", "--vary", "uplink=sign"], ["carryover: rounds is 0"]),
        (["--target", "loss"], ["--target is 'loss'; valid is NAME=VALUE with a number"]),
        (["--target", "loss=low"], ["--target is 'loss=low'"]),
        (["--target", "loss=nan"], ["--target is 'loss=nan'"]),
        (["--plot", "nowhere/at/all.png"], ["--plot nowhere/at/all.png cannot be written"]),
        (["--out", "."], [". holds something else than a comparison; choose another folder with --out"]),
        (["--out", "run.yaml/x"], ["the folder run.yaml/x cannot be written"]),
    ],
)
def test_what_is_not_valid_is_one_sentence_before_anything_is_run(carryover, project, arguments, parts):
    status, out, err = carryover("compare", "run.yaml", *arguments)
    assert (status, out) == (2, "")
    for part in parts:
        assert part in err, err
    assert err.startswith("carryover: ")
    assert err.count("\n") == 1
    assert not (project / "runs").exists()


def test_variations_share_seeds_and_differ_by_their_overrides_alone(project):
    vary = ["uplink=sign", "Saef 1 %: uplink=topk:0.01 feedback.kind=saef", "saef, 1: uplink=topk:0.01"]
    planned = plan(project / "run.yaml", ["seed=5", "rounds=9"], vary, 2, with_baseline=True)
    assert [variation.label for variation in planned.variations] == ["baseline", "uplink=sign", "Saef 1 %", "saef, 1"]
    assert planned.seeds == (5, 6)
    runs = [settings for variation in planned.variations for settings in variation.runs]
    assert [settings.seed for settings in runs] == [5, 6] * 4
    assert [settings.uplink for settings in runs[::2]] == ["topk:0.5", "sign", "topk:0.01", "topk:0.01"]
    assert {settings.rounds for settings in runs} == {9}
    assert len({settings.name.lower() for settings in runs}) == 8
    assert {str(settings.storage.dir) for settings in runs} == {"runs/mine-compare"} == {str(planned.directory)}
    assert all(validate(settings.model_dump()) == settings for settings in runs), "names are valid"


def test_runs_are_inline_and_without_a_port_unless_the_command_line_says_otherwise(project):
    def settings(overrides, vary=()):
        return plan(project / "ray.yaml", overrides, vary, 1).variations[0].runs[0]

    text = (project / "run.yaml").read_text()
    (project / "ray.yaml").write_text(text.replace("inline", "ray").replace("port: null", "port: 9464"))
    assert (settings([]).backend, settings([]).metrics.port) == ("inline", None)
    assert settings(["backend=ray"]).backend == settings([], ["backend=ray"]).backend == "ray"
    assert settings(["metrics.port=0"]).metrics.port == 0
    assert settings([]).metrics.sketch_every == 2, "the rest of the map is the file's"


# -- figures -----------------------------------------------------------------------------------------------------------


def rows_of(values, name="loss", size=10):
    """Rows of two workers that report `values`, None for a round without a report."""
    return [
        {
            "version": version,
            "position": 8 * version,
            "workers": 2,
            "reported": {} if value is None else {name: value},
            "uplink_bytes": size * version,
            "downlink_bytes": 2 * size * version,
        }
        for version, value in enumerate(values, start=1)
    ]


def run_directory(settings, rows, reported=None, size=10):
    path = settings.storage.dir / settings.name
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.yaml").write_text(resolved(settings))
    summary = {
        "status": "finished",
        "rounds": len(rows),
        "seconds": 2.0 + settings.seed,
        "uplink_bytes": size * len(rows),
        "downlink_bytes": 2 * size * len(rows),
        "uplink_ratio": 240.0,
        "downlink_ratio": 120.0,
        "fingerprint": "f00d",
        "reported": {**rows[-1]["reported"], **(reported or {})},
    }
    (path / "summary.json").write_text(json.dumps(summary))


def comparison_of(folder, losses, accuracies=None, failures=None, target=None):
    """A comparison of variations a, b, ... from run directories; `losses` is a list a variation of a list a seed."""
    variations, accuracies = [], accuracies or {}
    for label, seeds in zip("abcdef", losses, strict=False):
        runs = []
        for seed, values in enumerate(seeds):
            storage = {"dir": folder}
            runs.append(validate({"train": "m:f", "name": f"{label}-{seed}", "seed": seed, "storage": storage}))
            if values is not None:
                accuracy = accuracies.get(label)
                run_directory(runs[-1], rows_of(values), accuracy and {"accuracy": accuracy[seed]})
        variations.append(Variation(label, (f"uplink={label}",), tuple(runs)))
    planned = Plan("test", folder, tuple(range(len(losses[0]))), tuple(variations))
    ended = {settings.name: None for variation in variations for settings in variation.runs} | (failures or {})
    return Comparison.read(planned, ended, target)


def test_the_last_tenth_is_meant_where_every_round_of_it_reports_and_nothing_comes_after():
    rows = rows_of([9.0] * 17 + [1.0, 2.0, 3.0])
    assert last_tenth(rows, {"loss": 3.0}) == {"loss": 2.5}
    assert last_tenth(rows, {"loss": 0.5}) == {}, "it was reported again after the last round"
    assert last_tenth(rows_of([9.0] * 18 + [None, 3.0]), {"loss": 3.0}) == {}
    assert last_tenth(rows_of([2.0]), {"loss": 2.0, "accuracy": 7.0}) == {"loss": 2.0}
    assert math.isnan(last_tenth(rows_of([1.0, None, math.nan])[2:], {"loss": math.nan}).get("loss", math.nan))
    assert last_tenth([], {}) == {}


def test_spread_is_the_sample_standard_deviation_and_unknown_for_one_seed():
    values = [98.33, 98.33, 97.5]
    found = Spread.of(values)
    assert (found.mean, found.deviation) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert Spread.of([4.0]) == Spread(4.0, None, 1)
    assert math.isnan(Spread.of([1.0, math.inf]).mean)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([98.33, 98.33, 97.5], "98.05 \u00b1 0.48"),
        ([89.72, 7.78, 82.22], "60 \u00b1 45"),
        ([5.0, 5.0], "5 \u00b1 0"),
        ([2e-9, 4e-9], "3e-09 \u00b1 1.4e-09"),
        ([1234.5], "1234"),
        ([math.nan, 1.0], "nan"),
    ],
)
def test_a_mean_is_written_to_two_digits_of_its_deviation(values, text):
    assert tables.spread_text(Spread.of(values)) == text


def test_a_target_is_reached_by_the_mean_over_a_twentieth_of_the_reports():
    falling = [1.0 - 0.01 * n for n in range(100)]  # windows of five reports
    target = Target("loss", 0.5)
    means = [statistics.mean(falling[end - 5 : end]) for end in range(5, 101)]
    first = 5 + next(i for i, mean in enumerate(means) if mean <= 0.5)
    assert reach(rows_of(falling), target, True) == {"rounds": first, "bytes": 30 * first}
    assert reach(rows_of([0.0, *falling[1:]]), target, True)["rounds"] == first, "one lucky round is not enough"
    assert reach(rows_of(falling), Target("loss", 0.001), True) is None
    assert reach(rows_of([-value for value in falling]), Target("loss", -0.5), False)["rounds"] == first


def test_a_target_takes_quantities_that_are_reported_now_and_then_and_not_a_number():
    rows = rows_of([None, None, 10.0, None, None, math.nan, None, 60.0], "accuracy")
    assert reach(rows, Target("accuracy", 50.0), False) == {"rounds": 8, "bytes": 240}
    assert reach(rows, Target("loss", 50.0), False) is None
    assert reach([], Target("loss", 50.0), True) is None


def test_the_direction_to_a_target_follows_from_where_the_runs_begin():
    losses, shares = rows_of([math.nan, 2.0, 9.0]), rows_of([0.1, 0.0])
    assert falls([losses], Target("loss", 0.5))
    assert not falls([shares], Target("loss", 0.5))
    assert falls([losses, shares], Target("loss", 0.5)), "one direction for all runs: they begin at 1.05 in the mean"
    assert not falls([losses], Target("accuracy", 50.0))


def test_a_table_says_how_many_seeds_reached_the_target(tmp_path):
    fast, slow = [1.0, 0.4, 0.2], [1.0, 0.9, 0.8]
    found = comparison_of(tmp_path, [[fast, slow], [slow, slow]], target=Target("loss", 0.5))
    head, (a, b) = tables.tables(found)[0].head, tables.tables(found)[0].rows
    at = head.index("rounds to loss \u2264 0.5")
    assert (a[at], b[at]) == ("2 (1 of 2)", "not reached")
    assert (a[at + 1], b[at + 1]) == ("60 B", "")


def test_tables_hold_mean_and_deviation_of_every_figure(tmp_path):
    losses = [[[1.0] * 18 + [0.2, 0.4], [1.0] * 18 + [0.4, 0.6]]]
    found = comparison_of(tmp_path, losses, {"a": [90.0, 92.0]})
    outcome, cost = tables.tables(found)
    assert outcome.head == ["variation", "loss, last 10 %", "accuracy, final", "ratio up", "ratio down"]
    assert outcome.rows == [["a", "0.40 \u00b1 0.14", "91.0 \u00b1 1.4", "240x", "120x"]]
    assert dict(zip(cost.head, cost.rows[0], strict=True)) == {
        "variation": "a",
        "rounds": "20",
        "samples": "160",
        "bytes up": "200 B",
        "bytes down": "400 B",
        "up a sample": "1.25 B",
        "down a sample": "2.5 B",
        "time a run": "2.5 s",
    }


def test_a_variation_that_failed_says_why_and_the_others_keep_their_figures(tmp_path):
    failures = {"b-1": "worker | 1\nfailed", "c-0": INTERRUPTED}
    found = comparison_of(tmp_path, [[[1.0], [2.0]], [[1.0], None], [None, [3.0]]], failures=failures)
    outcome = tables.tables(found)[0]
    assert outcome.head[-1] == "status"
    assert [row[-1] for row in outcome.rows] == ["", "1 of 2 failed: worker | 1 failed", "1 of 2 not finished"]
    assert [row[1] for row in outcome.rows] == ["1.50 \u00b1 0.71", "1", "3"]
    lines = [line for line in tables.markdown(found).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:5]}) == 1, "a bar in a reason is no new cell"


def test_files_are_written_even_where_every_run_failed(tmp_path):
    found = comparison_of(tmp_path, [[None], [None]], failures={"a-0": "boom", "b-0": "boom"})
    names = {file.name for file in output.write(found, None)}
    assert names == {"comparison.md", "comparison.json", "comparison.html"}
    assert "boom" in (tmp_path / "comparison.html").read_text()


def test_the_file_holds_the_figures_of_every_seed_as_strict_json(tmp_path):
    found = comparison_of(tmp_path, [[[1.0, math.nan], [1.0, 0.5]]], target=Target("loss", 0.6))
    output.write(found, None)

    def refuse(text):
        raise AssertionError(text)

    record = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=refuse)
    assert record["target"] == {"quantity": "loss", "value": 0.6, "from": "above"}
    (a,) = record["variations"]
    assert (a["label"], a["overrides"]) == ("a", ["uplink=a"])
    assert [run["final"]["loss"] for run in a["runs"]] == [None, 0.5]
    assert [run["reached"] for run in a["runs"]] == [None, {"rounds": 2, "bytes": 60}]
    assert a["spread"]["values"]["seconds"] == {"mean": 2.5, "deviation": pytest.approx(0.5**0.5), "count": 2}
    assert a["spread"]["final"]["loss"]["mean"] is None


# -- plots -------------------------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_over_seeds_and_its_band_their_range():
    seeds = [rows_of([4.0, 2.0, 1.0]), rows_of([2.0, math.nan, 3.0], size=30)]
    curve = seeds_curve("a", 0, seeds, "loss", lambda row: row["uplink_bytes"])
    assert curve.left_out == 1
    np.testing.assert_array_equal(curve.x, [20, 60])
    np.testing.assert_array_equal(curve.middle, [3, 2])
    np.testing.assert_array_equal((curve.low, curve.high), [[2, 1], [4, 3]])


def test_a_band_is_that_of_running_means_so_noise_in_one_round_does_not_widen_it():
    noise = np.random.default_rng(0).normal(size=(3, 400))
    curve = seeds_curve("a", 0, [rows_of(list(5 + values)) for values in noise], "loss")
    assert (curve.high - curve.low)[100:].max() < np.ptp(noise, axis=0)[100:].mean()
    assert curve.reach == 0, "it is smooth already"


def test_figures_draw_every_quantity_against_rounds_and_bytes_a_worker(tmp_path):
    losses = [[[3.0, 2.0, 1.0], [3.0, 1.0, 0.5]], [[3.0, 2.5, 2.0], [3.0, 2.6, 2.1]]]
    found = comparison_of(tmp_path, losses, {"a": [90.0, 92.0], "b": [80.0, 70.0]})
    figure = plots.whole(found).figure
    rounds, sent, beside, against = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "loss", "accuracy", "accuracy"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2, 2]
    np.testing.assert_array_equal(rounds.lines[0].get_xydata(), [[1, 3.0], [2, 1.5], [3, 0.75]])
    np.testing.assert_array_equal(sent.lines[0].get_xdata(), [15, 30, 45])
    np.testing.assert_array_equal(against.lines[1].get_xydata(), [[45, 80.0], [45, 70.0]])
    assert beside.lines[0].get_linestyle() == "None", "nothing joins the seeds"
    assert max(beside.lines[0].get_xdata()) < min(beside.lines[1].get_xdata())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert [plot.title for plot in plots.each(found)] == ["loss", "accuracy"]


def test_the_page_asks_no_host_for_anything_and_leads_to_the_reports(tmp_path):
    found = comparison_of(tmp_path, [[[3.0, 1.0]], [[3.0, 2.0]]], {"a": [90.0], "b": [80.0]})
    output.write(found, tmp_path / "copy.png")
    html = (tmp_path / "comparison.html").read_text()
    assert not re.search(r"https?:|//\w|@import|<script", re.sub(r'xmlns(:\w+)?="[^"]*"', "", html))
    assert re.findall(r'<a href="([^"]*)"', html) == ["a-0/report.html", "b-0/report.html"]
    assert html.count("<svg") == 2
    assert (tmp_path / "copy.png").read_bytes() == (tmp_path / "comparison.png").read_bytes()


# -- whole comparisons, in processes -----------------------------------------------------------------------------------


@pytest.mark.faults
def test_fingerprints_do_not_depend_on_jobs_and_finished_runs_are_taken_over(carryover, project):
    command = ["compare", "run.yaml", "rounds=40", "seed=3", "--seeds", "2", "--target", "loss=0.1"]
    status, out, err = carryover(*command, "--jobs", "2")
    assert status == 0, err
    folder = project / "runs" / "mine-compare"
    first = json.loads((folder / "comparison.json").read_text())
    (variation,) = first["variations"]
    for run, seed in zip(variation["runs"], (3, 4), strict=True):
        path = project / run["path"]
        summary = json.loads((path / "summary.json").read_text())
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert (run["seed"], run["fingerprint"], run["final"]) == (seed, summary["fingerprint"], summary["reported"])
        assert run["values"]["samples"] == 40 * 2 * 4
        assert run["values"]["uplink_bytes_per_sample"] == summary["uplink_bytes"] / 320
        assert run["last_tenth"]["loss"] == pytest.approx(statistics.mean(r["reported"]["loss"] for r in rows[-4:]))
        assert run["reached"] == reach(rows, Target("loss", 0.1), True)
        assert {"config.yaml", "model.safetensors", "report.html"} <= {file.name for file in path.iterdir()}
    losses = [run["last_tenth"]["loss"] for run in variation["runs"]]
    assert variation["spread"]["last_tenth"]["loss"]["mean"] == pytest.approx(statistics.mean(losses))
    assert variation["spread"]["last_tenth"]["loss"]["deviation"] == pytest.approx(statistics.stdev(losses))
    assert "1/2 baseline, seed" in out
    assert "2/2 baseline, seed" in out
    assert tables.spread_text(Spread.of(losses)) in out
    assert "\x1b" not in out

    kept = (folder / "baseline-seed-3" / "summary.json").stat().st_ino
    shutil.rmtree(folder / "baseline-seed-4")
    status, out, err = carryover(*command, "--jobs", "1", "--reuse")
    assert status == 0, err
    assert "1 of 2 runs were finished before and are kept" in out
    assert "1/1 baseline, seed 4" in out
    assert (folder / "baseline-seed-3" / "summary.json").stat().st_ino == kept
    again = json.loads((folder / "comparison.json").read_text())
    prints = [[run["fingerprint"] for run in record["variations"][0]["runs"]] for record in (first, again)]
    assert prints[0] == prints[1]
    assert len(set(prints[0])) == 2


@pytest.mark.faults
def test_a_run_that_fails_says_why_and_one_that_goes_on_stops_with_its_round_at_ctrl_c(project, capfd):
    ended, said = {}, []

    def observe(settings, failure):
        ended[settings.name] = failure
        if settings.name == "fails-seed-0":
            _thread.interrupt_main()

    vary = ["fails: arguments.act=raise", "goes on: arguments.act=slow rounds=10000"]
    planned = plan(project / "run.yaml", [], vary, 1, out=project)
    with pytest.raises(KeyboardInterrupt):
        Runs(2, lambda rounds: None, observe, said.append).run([one.runs[0] for one in planned.variations])
    boom = "the training function of worker 1 raised ValueError: boom in the user's code"
    assert ended == {"fails-seed-0": boom, "goes-on-seed-0": INTERRUPTED}
    assert json.loads((project / "goes-on-seed-0" / "summary.json").read_text())["status"] == "interrupted"
    assert "myproject.py" in (project / "fails-seed-0.log").read_text()
    assert said == ["stopping after this round; press Ctrl-C again to stop at once"]
    assert capfd.readouterr() == ("", "")


# A run that does what its name says, in the folder of the runs: two rounds, and then this or that.
ACTOR = """
import json, os, sys, time
settings = json.loads(sys.stdin.readline())
name = settings["name"]
os.chdir(settings["storage"]["dir"])
print('{"round": 1}', flush=True)
print('{"round": 2}', flush=True)
if name.startswith("alone"):
    os.mkdir("busy")
    time.sleep(0.1)
    os.rmdir("busy")
if name.startswith("meets"):
    os.mkdir(name)
    while sum(other.startswith("meets") and os.path.isdir(other) for other in os.listdir()) < 3:
        time.sleep(0.01)
if name.startswith("waits"):
    sys.stdin.read()
    sys.exit(130)
if name.startswith("deaf"):
    time.sleep(1000)
if name.startswith("dies"):
    os.kill(os.getpid(), 9)
if name.startswith("prints"):
    print("by the user", file=sys.stderr)
"""


@pytest.fixture
def acts(monkeypatch, tmp_path):
    """Run actors by their names; returns how they ended, all rounds, and whether Ctrl-C came through."""
    monkeypatch.setattr("deploy.compare.runs.COMMAND", (sys.executable, "-S", "-c", ACTOR))

    def run(jobs, *names, interrupt_after=None):
        ended, rounds = {}, []
        storage = {"dir": tmp_path}

        def observe(settings, failure):
            ended[settings.name] = failure
            if settings.name == interrupt_after:
                _thread.interrupt_main()

        def say(text):
            if "deaf" in names:
                _thread.interrupt_main()

        runs = Runs(jobs, rounds.append, observe, say)
        try:
            runs.run([validate({"train": "m:f", "name": name, "storage": storage}) for name in names])
        except KeyboardInterrupt:
            return ended, sum(rounds), True
        return ended, sum(rounds), False

    return run


def test_a_run_that_dies_keeps_no_other_from_running(acts, tmp_path):
    ended, rounds, interrupted = acts(2, "dies", "a", "b", "prints")
    assert not interrupted
    assert rounds == 8
    log = tmp_path / "dies.log"
    assert ended.pop("dies") == f"its process was killed by signal 9; what it wrote is in {log}"
    assert ended == {"a": None, "b": None, "prints": None}
    assert sorted(tmp_path.glob("*.log")) == [tmp_path / "prints.log"], "empty ones are gone"


def test_as_many_runs_as_jobs_say_go_on_at_a_time(acts):
    assert set(acts(3, "meets-a", "meets-b", "meets-c")[0].values()) == {None}
    assert set(acts(1, "alone-a", "alone-b", "alone-c")[0].values()) == {None}


def test_after_ctrl_c_nothing_more_is_begun(acts):
    ended, _, interrupted = acts(2, "waits", "a", "waits-too", "never", interrupt_after="a")
    assert interrupted
    assert ended.pop("a") is None
    assert ended.pop("waits") == INTERRUPTED
    assert set(ended) <= {"waits-too"}
    assert set(ended.values()) <= {INTERRUPTED}


def test_a_second_ctrl_c_ends_what_does_not_stop(acts):
    ended, _, interrupted = acts(2, "deaf", "a", interrupt_after="a")
    assert interrupted
    assert ended == {"a": None, "deaf": INTERRUPTED}


class InThisProcess:
    """Stands in for ``Runs`` where the processes are not what is tested: a run leaves one round."""

    ran = []

    def __init__(self, jobs, advanced, ended, say):
        self.ended = ended

    def run(self, all_settings):
        for settings in all_settings:
            self.ran.append(settings)
            if settings.uplink == "sign":
                self.ended(settings, "it does not like signs")
                continue
            run_directory(settings, rows_of([1.0]))
            self.ended(settings, None)


@pytest.fixture
def quick(monkeypatch):
    """The settings that are run, without processes."""
    monkeypatch.setattr("deploy.compare.command.Runs", InThisProcess)
    monkeypatch.setattr(InThisProcess, "ran", [])
    return InThisProcess.ran


def test_a_failed_run_gives_exit_status_1_and_every_other_figure(carryover, project, quick):
    status, out, err = carryover("compare", "run.yaml", "--vary", "a: uplink=sign", "--vary", "b: uplink=f16")
    assert status == 1
    assert err == ("carryover: 3 of 6 runs failed; the reasons are above, and tracebacks in runs/mine-compare/*.log\n")
    assert "3 of 3 failed: it does not like signs" in out
    assert "3 of 3 failed: it does not like signs" in (project / "runs/mine-compare/comparison.md").read_text()


def test_only_finished_runs_of_exactly_the_same_settings_are_taken_over(carryover, project, quick):
    command = ["compare", "run.yaml", "--seeds", "2"]
    carryover(*command, "--vary", "a: uplink=f16", "--vary", "b: rounds=7")
    assert len(quick) == 4
    (project / "runs/mine-compare/a-seed-1/summary.json").write_text('{"status": "interrupted"}')
    quick.clear()
    carryover(*command, "--vary", "a: uplink=f16", "--vary", "b: rounds=8", "--reuse")
    ran = [(settings.name, settings.rounds) for settings in quick]
    assert ran == [("a-seed-1", 6), ("b-seed-0", 8), ("b-seed-1", 8)]
    assert not (project / "runs/mine-compare.1").exists()


def test_an_earlier_comparison_moves_aside(carryover, project, quick):
    for number in range(3):
        assert carryover("compare", "run.yaml", f"rounds={number + 1}", "--seeds", "1")[0] == 0
    rounds = [
        re.search(r"rounds: (\d)", (project / "runs" / name / "baseline-seed-0/config.yaml").read_text()).group(1)
        for name in ("mine-compare.1", "mine-compare.2", "mine-compare")
    ]
    assert rounds == ["1", "2", "3"]


def test_two_comparisons_in_one_folder_are_refused(carryover, project, quick):
    carryover("compare", "run.yaml", "--seeds", "1")
    handle = os.open(project / "runs/mine-compare", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    for more in ([], ["--reuse"]):
        status, _, err = carryover("compare", "run.yaml", "--seeds", "1", *more)
        assert status == 2
        assert "a comparison is going on in runs/mine-compare; choose another folder with --out" in err
    os.close(handle)


def test_a_target_that_no_round_reports_is_said_after_the_table(carryover, project, quick):
    status, out, err = carryover("compare", "run.yaml", "--seeds", "1", "--target", "accuracy=90")
    assert status == 2
    assert err == (
        "carryover: --target is of 'accuracy', which no run reported in its rounds; reported were loss; "
        "change it and add --reuse\n"
    )
    assert "loss, last 10 %" in out


def test_ctrl_c_gives_exit_status_130_and_the_figures_of_what_is_finished(carryover, project, quick, monkeypatch):
    def run(self, all_settings):
        original(self, all_settings[:1])
        self.ended(all_settings[1], INTERRUPTED)
        raise KeyboardInterrupt

    original = InThisProcess.run
    monkeypatch.setattr(InThisProcess, "run", run)
    status, out, err = carryover("compare", "run.yaml")
    assert status == 130
    assert err == "carryover: stopped by Ctrl-C; what is finished is kept, and --reuse goes on from there\n"
    assert "2 of 3 not finished" in out
    record = json.loads((project / "runs/mine-compare/comparison.json").read_text())
    assert [run["failure"] for run in record["variations"][0]["runs"]] == [None, INTERRUPTED, "it was not run"]
