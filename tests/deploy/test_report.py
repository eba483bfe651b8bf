"""Reports of run directories that tests write themselves: finished, killed, empty, strange and large."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.curves import running_mean
from deploy.plots import plots
from deploy.report import read_run, write_report
from protocol.errors import SettingsError

PLOT_TITLES = ["loss", "accuracy", "Error norms", "Compression ratio", "Contraction"]
VOID = {"meta", "br", "hr", "link", "img"}


def row(version: int, workers: int = 4, **changes: Any) -> dict[str, Any]:
    ids = [str(worker) for worker in range(workers)]
    return {
        "version": version,
        "seconds": version * 0.5,
        "workers": workers,
        "reported": {"loss": 2.0 / version, "accuracy": 1 - 1 / version},
        "worker_error_norm": {worker: 0.1 + 0.01 * int(worker) for worker in ids},
        "server_error_norm": 0.2,
        "contraction": {"up": dict.fromkeys(ids, 0.7), "down": 0.8},
        "uplink_bytes": 1000 * version,
        "downlink_bytes": 1500 * version,
        "uplink_ratio": 224.125,
        "downlink_ratio": 149.5,
        "conservation_error": 0.3,
        **changes,
    }


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "rounds": 20,
        "workers": 4,
        "seconds": 75.0,
        "uplink_bytes": 20_000,
        "downlink_bytes": 30_000,
        "uplink_ratio": 224.125,
        "downlink_ratio": 149.5,
        "snapshot_bytes": 590_000,
        "server_error_norm": 0.2,
        "worker_error_norm": 0.115,
        "discarded_norm": 0.0,
        "conservation_error": 0.3125,
        "fingerprint": "9f86d081884c7d65",
        "reported": {"loss": 0.1, "accuracy": 0.9625},
        "status": "finished",
        **changes,
    }


def run_directory(
    path: Path,
    rows: list[dict[str, Any]] | None = None,
    outcome: dict[str, Any] | None = None,
    settings: str = "name: digits\ntrain: examples.digits:train\nfeedback:\n  kind: saef\n",
) -> Path:
    path.mkdir(parents=True)
    rows = [row(version) for version in range(1, 21)] if rows is None else rows
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (path / "config.yaml").write_text(settings)
    if outcome is not None:
        (path / "summary.json").write_text(json.dumps(outcome))
    return path


class Page(HTMLParser):
    """A parsed page: its text, headings and attributes; refuses tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def text(self, tag: str) -> str:
        return "\n".join(self.texts.get(tag, []))


def report(*run_dirs: Path) -> Page:
    return Page(write_report(run_dirs).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a finished run, drawn once for the tests that only look at it."""
    return report(run_directory(tmp_path_factory.mktemp("runs") / "digits", outcome=summary()))


def test_a_report_shows_the_headline_figures(page: Page) -> None:
    cards = dict(zip(page.texts["dt"], re.findall(r"<dd>(.*?)</dd>", page.html), strict=True))
    assert cards["status"] == "finished"
    assert cards["rounds"] == "20"
    assert cards["workers"] == "4"
    assert cards["duration"] == "1 min 15 s"
    assert cards["ratio up"] == "224.1×"
    assert cards["ratio down"] == "149.5×"
    assert cards["bytes up"] == "20 kB"
    assert cards["bytes down"] == "30 kB"
    assert cards["accuracy, final"] == "0.9625"
    assert cards["conservation error (limit 4)"] == "0.3125"
    assert cards["fingerprint"] == "<code>9f86d081884c7d65</code>"
    assert "kind: saef" in page.text("pre")


def test_every_plot_is_there_under_its_title(page: Page) -> None:
    assert page.texts["h2"] == [*PLOT_TITLES, "Settings"]
    assert page.tags.count("svg") == len(PLOT_TITLES)
    for text in (
        "against rounds",
        "against bytes sent, both ways",
        "worker 0",
        "worker 3",
        "workers to server",
    ):
        assert text in page.text("text")


def test_a_report_asks_no_other_host_for_anything(page: Page, tmp_path: Path) -> None:
    runs = [run_directory(tmp_path / name, outcome=summary()) for name in ("a", "b")]
    for one in (page, report(*runs)):
        outside = [value for _, name, value in one.attributes if "//" in value and not name.startswith("xmlns")]
        assert outside == []
        without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", one.html)
        assert not re.search(r"https?:|//\w|@import|url\((?!#)", without_namespaces)
        assert not {"script", "link", "img", "iframe", "object"} & set(one.tags)
        assert not {name for _, name, _ in one.attributes} & {"src", "srcset", "data"}


def test_ids_in_a_page_are_unique_and_references_lead_to_them(page: Page) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = {value[1:] for _, name, value in page.attributes if name.endswith("href")}
    references |= set(re.findall(r"url\(#([^)]*)\)", page.html))
    assert references
    assert references <= set(ids)


def test_the_same_directory_gives_the_same_bytes(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "digits", outcome=summary())
    assert write_report([run]).read_bytes() == write_report([run], tmp_path / "again" / "r.html").read_bytes()


def test_a_torn_last_line_is_skipped_and_said(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "digits")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"version": 21, "seco')
    assert [one["version"] for one in read_run(run).rows] == list(range(1, 21))
    page = report(run)
    assert "torn lines of metrics.jsonl, as killed runs leave them: line 21." in page.text("p")


def test_a_run_that_died_is_reported_from_its_rounds(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "digits")
    page = report(run)
    assert "There is no summary.json" in page.text("p")
    assert "not finished" in page.texts["dd"]
    assert "224.1×" in page.texts["dd"]
    assert "0.95" in page.texts["dd"]


def test_a_torn_summary_is_said(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "digits", rows=[])
    (run / "summary.json").write_text('{"rounds": 2')
    assert "summary.json cannot be read" in report(run).text("p")


def test_rounds_repeated_after_a_resume_replace_the_earlier_ones(tmp_path: Path) -> None:
    rows = [row(version) for version in (1, 2, 3, 4)] + [row(3, server_error_norm=9.0)]
    read = read_run(run_directory(tmp_path / "digits", rows=rows)).rows
    assert [(one["version"], one["server_error_norm"]) for one in read] == [(1, 0.2), (2, 0.2), (3, 9.0)]


def test_a_run_without_rounds_says_so(tmp_path: Path) -> None:
    empty = run_directory(tmp_path / "empty", rows=[], outcome=summary(rounds=0, status="failed"))
    page = report(empty)
    assert "No round was completed" in page.text("p")
    assert "failed" in page.texts["dd"]
    assert "svg" not in page.tags
    (empty / "metrics.jsonl").unlink()
    assert "There is no metrics.jsonl" in report(empty).text("p")


def test_nan_and_infinity_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [row(version) for version in range(1, 11)]
    rows[3]["reported"]["loss"] = math.nan
    rows[4]["reported"]["loss"] = math.inf
    rows[5]["reported"]["loss"] = 1e300
    rows[6]["worker_error_norm"]["2"] = math.nan
    outcome = summary(reported={"loss": math.nan}, conservation_error=math.nan)
    page = report(run_directory(tmp_path / "digits", rows=rows, outcome=outcome))
    assert "Left out: 3 values that were NaN or infinite." in page.text("figcaption")
    assert "Left out: 1 values" in page.text("figcaption")
    assert "nan, not within the limit" in page.text("strong")
    assert not re.search(r"\bnan\b", "".join(value for _, name, value in page.attributes if name == "d"))


def test_a_quantity_that_is_never_finite_is_still_named(tmp_path: Path) -> None:
    rows = [row(version, reported={"loss": math.nan}) for version in range(1, 4)]
    page = report(run_directory(tmp_path / "digits", rows=rows, outcome=summary()))
    assert "loss" in page.texts["h2"]
    assert page.text("text").count("no finite values") == 2


def test_a_conservation_error_above_the_limit_stands_out(tmp_path: Path) -> None:
    page = report(run_directory(tmp_path / "digits", rows=[], outcome=summary(conservation_error=4.5)))
    assert page.text("strong") == "4.5, not within the limit"


def test_what_users_name_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    rows = [row(version, reported={evil: 1.0, "$a$": 2.0, "_b": 3.0}) for version in range(1, 4)]
    settings = f"name: '{evil}'\ntrain: 'a & b'\n"
    runs = [
        run_directory(tmp_path / name, rows=rows, outcome=summary(status=evil), settings=settings)
        for name in ("$x$ <b>&", '_y id="z"')
    ]
    for page in (report(runs[0]), report(*runs)):
        assert "script" not in page.tags
        assert "b" not in page.tags
        assert evil in page.texts["h2"]
        assert "&amp;lt;" not in page.html
        assert "a & b" in page.text("pre")
    assert {"$x$ <b>&", '_y id="z"'} <= {text.strip() for text in page.texts["text"]}


def test_several_runs_are_overlaid_and_compared(tmp_path: Path) -> None:
    settings = "name: digits\nfeedback:\n  kind: {}\n"
    saef = run_directory(tmp_path / "saef", outcome=summary(), settings=settings.format("saef"))
    none = run_directory(tmp_path / "none", outcome=summary(uplink_ratio=1.0), settings=settings.format("none <i>"))
    assert write_report([saef, none]) == tmp_path / "comparison.html"
    page = report(saef, none)
    assert page.texts["h2"] == [*PLOT_TITLES, "Settings"]
    assert page.texts["text"].count("saef") == len(PLOT_TITLES)
    assert {"224.1×", "1×", "saef", "none", "none <i>", "0.9625"} <= set(page.texts["td"])
    assert {"ratio up", "accuracy, final", "feedback.kind"} <= set(page.texts["th"])
    assert "name" not in page.texts["th"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [run_directory(tmp_path / seed / "digits", outcome=summary()) for seed in ("one", "two")]
    page = report(*runs, runs[0])
    assert {"one/digits", "two/digits", "one/digits (3)"} <= set(page.texts["text"])


def test_many_workers_are_drawn_as_a_band(tmp_path: Path) -> None:
    rows = [row(version, workers=300) for version in range(1, 6)]
    run = run_directory(tmp_path / "digits", rows=rows, outcome=summary())
    page = report(run)
    assert "The pale band spans the workers" in page.text("figcaption")
    assert "worker 0" not in page.text("text")
    errors = next(plot for plot in plots({"digits": rows}) if plot.title == "Error norms")
    assert len(errors.figure.axes[0].lines) == 1
    (band,) = errors.figure.axes[0].collections
    assert band.get_datalim(errors.figure.axes[0].transData).y0 == pytest.approx(0.1)
    assert band.get_datalim(errors.figure.axes[0].transData).y1 == pytest.approx(0.1 + 0.01 * 299)


def test_workers_that_join_and_leave_have_lines_of_their_own(tmp_path: Path) -> None:
    rows = [row(version, workers=2 if version < 5 else 3) for version in range(1, 11)]
    del rows[9]["worker_error_norm"]["0"]
    errors = next(plot for plot in plots({"digits": rows}) if plot.title == "Error norms")
    lines = errors.figure.axes[0].lines
    spans = {line.get_label(): np.asarray(line.get_xdata()) for line in lines}
    ends = {label: (x[0], x[-1]) for label, x in spans.items()}
    assert ends == {"worker 0": (1, 9), "worker 1": (1, 10), "worker 2": (5, 10)}


def test_a_long_run_stays_small_and_keeps_its_peaks(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"version": 1 + n, "reported": {"loss": 1.0}} for n in range(5000)]
    rows[2500]["reported"]["loss"] = 7.0
    path = write_report([run_directory(tmp_path / "digits", rows=rows, outcome=summary())])
    assert path.stat().st_size < 200_000
    loss = plots({"digits": rows})[0].figure.axes[0]
    assert loss.collections[0].get_datalim(loss.transData).y1 == 7.0
    assert np.size(loss.lines[0].get_xdata()) <= 1000


def test_bytes_of_very_different_size_are_on_a_logarithmic_axis(tmp_path: Path) -> None:
    small = [row(version) for version in range(1, 5)]
    large = [row(version, uplink_bytes=900_000 * version) for version in range(1, 5)]
    assert plots({"a": small, "b": large})[0].figure.axes[1].get_xscale() == "log"
    assert plots({"a": small, "b": small})[0].figure.axes[1].get_xscale() == "linear"


def test_a_loss_that_falls_far_is_on_a_logarithmic_axis_and_a_rising_share_is_not() -> None:
    rows = [row(1 + n, reported={"loss": 10.0**-n, "share": 10.0 ** (n - 4)}) for n in range(5)]
    loss, share = (plot.figure.axes[0].get_yscale() for plot in plots({"digits": rows})[:2])
    assert (loss, share) == ("log", "linear")


def test_rows_with_missing_keys_are_drawn_as_far_as_they_go(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"version": 1},
        {"version": 2, "reported": {"loss": 1.0}},
        {"version": 3, "server_error_norm": None},
    ]
    page = report(run_directory(tmp_path / "digits", rows=rows))
    assert page.texts["h2"] == ["loss", "Settings"]


def test_the_running_mean_keeps_constants_and_its_window_grows_from_the_start() -> None:
    np.testing.assert_array_equal(running_mean(np.ones(50), 5), np.ones(50))
    line = np.arange(60.0)
    np.testing.assert_allclose(running_mean(line, 5)[:-5], line[:-5])
    spike = np.zeros(60)
    spike[30] = 11.0
    np.testing.assert_allclose(running_mean(spike, 5)[25:36], np.ones(11))


def test_a_folder_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SettingsError, match=rf"{re.escape(str(folder))} is not a run directory: expected"):
            write_report([folder])
    with pytest.raises(SettingsError, match="no run directory was given"):
        write_report([])


def test_settings_that_are_not_yaml_are_shown_as_they_stand(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "digits", rows=[], settings="name: [unclosed")
    page = report(run)
    assert "name: [unclosed" in page.text("pre")
    assert "config.yaml is not a YAML mapping" in page.text("p")
    (run / "config.yaml").unlink()
    assert "There is no config.yaml" in report(run).text("p")


def test_a_name_in_another_script_raises_no_warning(tmp_path: Path) -> None:
    runs = [run_directory(tmp_path / name, outcome=summary()) for name in ("実験", "b")]
    assert "実験" in report(*runs).texts["text"]
