"""The report of one run or of several: one HTML file, plots included, that asks no host for anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import yaml

from deploy.display import bytes_text, number_text, seconds_text, worker_mean
from deploy.page import figure, page, table
from deploy.plots import plots
from protocol.errors import SettingsError

CONSERVATION_LIMIT = 4  # in units of float32 rounding error; a sound run stays below


@dataclass(frozen=True)
class Run:
    """What a run directory says: its rows by version, and what to tell the reader about gaps in it."""

    path: Path
    label: str  # the directory's name, made unique among the runs of a report
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    settings_text: str
    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write a self-contained HTML report of the given run directories and return where it is.

    One run goes to `report.html` inside its directory; several go, overlaid, to `comparison.html` beside the
    first, unless `out` names another file. The same directories give the same bytes. Raises SettingsError for
    a folder that is not a run directory.
    """
    runs = _read_runs(run_dirs)
    if out is None:
        out = runs[0].path / "report.html" if len(runs) == 1 else runs[0].path.parent / "comparison.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page(runs), encoding="utf-8", errors="replace")
    return out


def read_run(path: Path, label: str | None = None) -> Run:
    """Read a run directory, finished or not; gaps become notes, a folder of another kind a SettingsError."""
    if not any((path / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        raise SettingsError(
            f"{path} is not a run directory: expected a folder with metrics.jsonl and config.yaml, such as runs/NAME"
        )
    notes: list[str] = []
    rows = _read_rows(path / "metrics.jsonl", notes)
    settings_text, settings = _read_settings(path / "config.yaml", notes)
    summary = _read_summary(path / "summary.json", notes)
    return Run(path, label or path.name, rows, settings, settings_text, summary, notes)


def _read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    if not run_dirs:
        raise SettingsError("no run directory was given; name at least one, such as runs/NAME")
    paths = [Path(path).resolve() for path in run_dirs]
    names = [path.name for path in paths]
    labels: list[str] = []
    for path in paths:
        label = path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"
        # Even a directory that is given twice must not hide behind its twin.
        labels.append(label if label not in labels else f"{label} ({len(labels) + 1})")
    return [read_run(path, label) for path, label in zip(paths, labels, strict=True)]


def _read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        notes.append("There is no metrics.jsonl: the run ended before its first round.")
        return []
    rows: list[dict[str, Any]] = []
    unreadable = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            version = int(row["version"])
        except (ValueError, TypeError, KeyError, OverflowError):
            unreadable.append(number)
            continue
        # A resumed run repeats the rounds after its snapshot; what it wrote last is what happened.
        while rows and rows[-1]["version"] >= version:
            rows.pop()
        rows.append(row)
    if unreadable:
        listed = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        notes.append(f"Skipped torn lines of metrics.jsonl, as killed runs leave them: line {listed}.")
    return rows


def _read_settings(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        notes.append("There is no config.yaml, so the settings are not known.")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        settings = None
    if not isinstance(settings, dict):
        notes.append("config.yaml is not a YAML mapping; it is shown as it stands.")
        return text, {}
    return text, settings


def _read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append("There is no summary.json: the run is still going or died. Figures are those of its last round.")
        return {}
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        notes.append("summary.json cannot be read; figures are those of the last round.")
        return {}
    return summary


def _final(run: Run) -> dict[str, Any]:
    """Give summary.json's keys, filled from the last row where the summary lacks them."""
    last = run.rows[-1] if run.rows else {}
    reported: dict[str, Any] = {}
    for row in run.rows:
        reported.update(row.get("reported") or {})
    from_rows = {**last, "rounds": last.get("version", 0), "reported": reported}
    return {**from_rows, "status": "not finished", **run.summary}


def _facts(run: Run) -> dict[str, str]:
    """List the headline figures by name, as HTML; those that are not known are left out."""
    final = _final(run)

    def number(key: str, write: Callable[[float], str] = number_text) -> str:
        return _written(final.get(key), write)

    facts = {"status": escape(str(final["status"])), "rounds": number("rounds"), "workers": number("workers")}
    facts["duration"] = number("seconds", seconds_text)
    facts |= {f"{name}, final": _written(value) for name, value in (final.get("reported") or {}).items()}
    for way in ("up", "down"):
        facts[f"ratio {way}"] = number(f"{way}link_ratio", _times)
        facts[f"bytes {way}"] = number(f"{way}link_bytes", bytes_text)
    facts["snapshots"] = number("snapshot_bytes", bytes_text)
    facts["server error norm"] = number("server_error_norm")
    facts["worker error norm"] = _written(worker_mean(final.get("worker_error_norm")))
    facts["discarded norm"] = number("discarded_norm")
    facts[f"conservation error (limit {CONSERVATION_LIMIT})"] = _conservation(final.get("conservation_error"))
    if final.get("fingerprint"):
        facts["fingerprint"] = f"<code>{escape(str(final['fingerprint']))}</code>"
    return {name: value for name, value in facts.items() if value}


def _written(value: Any, write: Callable[[float], str] = number_text) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return escape(write(value) if math.isfinite(value) else str(value))


def _times(ratio: float) -> str:
    return f"{ratio:.4g}\u00d7"


def _conservation(error: Any) -> str:
    text = _written(error)
    # A NaN is no proof of anything, so it must not pass.
    if text and not error <= CONSERVATION_LIMIT:
        return f'<strong class="bad">{text}, not within the limit</strong>'
    return text


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "null" if value is None else str(value)


def _page(runs: Sequence[Run]) -> str:
    rows = {run.label: run.rows for run in runs}
    name = str(runs[0].settings.get("name", runs[0].label))
    title = f"Run {name}" if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    sections = _notes(runs)
    sections.append(_cards(_facts(runs[0])) if len(runs) == 1 else _comparison(runs))
    if not any(rows.values()):
        sections.append('<p class="note">No round was completed, so there is nothing to plot.</p>')
    sections += [figure(plot, f"plot{index}") for index, plot in enumerate(plots(rows))]
    return page(title, [*sections, "<h2>Settings</h2>", *settings_sections(runs)])


def _notes(runs: Sequence[Run]) -> list[str]:
    several = len(runs) > 1
    notes = [(f"{run.label}: " if several else "") + note for run in runs for note in run.notes]
    return [f'<p class="note">{escape(note)}</p>' for note in notes]


def _cards(facts: Mapping[str, str]) -> str:
    cards = (f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f"<dl>{''.join(cards)}</dl>"


def _comparison(runs: Sequence[Run]) -> str:
    facts = {run.label: _facts(run) for run in runs}
    names = list(dict.fromkeys(name for own in facts.values() for name in own))
    return table(
        ["run", *names],
        [[escape(label), *(own.get(name, "") for name in names)] for label, own in facts.items()],
    )


def settings_sections(runs: Sequence[Run]) -> list[str]:
    """Show, as HTML, what differs between the settings of the runs, and each run's settings in full."""
    sections = []
    if len(runs) > 1:
        flat = {run.label: dict(_flat(run.settings)) for run in runs}
        keys = list(dict.fromkeys(key for own in flat.values() for key in own))
        varied = [key for key in keys if len({own.get(key) for own in flat.values()}) > 1]
        if varied:
            cells = [[escape(label), *(escape(own.get(key, "")) for key in varied)] for label, own in flat.items()]
            sections.append("<p>What differs between the runs:</p>" + table(["run", *varied], cells))
    folded = "" if len(runs) > 1 else " open"
    for run in runs:
        text = f"<summary>{escape(run.label)}</summary><pre>{escape(run.settings_text)}</pre>"
        sections.append(f"<details{folded}>{text}</details>")
    return sections
