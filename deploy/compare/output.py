"""The files of a comparison: its figures as JSON, its tables as Markdown, its plots as PNG, and all of it as a page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deploy.bench.record import hardware, versions
from deploy.compare import plots, tables
from deploy.compare.figures import Comparison, Result, RunFigures, Spread
from deploy.compare.variations import Plan
from deploy.display import number_text, seconds_text
from deploy.page import figure, page, table
from deploy.plots import to_png
from deploy.report import read_run, settings_sections
from deploy.rundir import strict

JSON, MARKDOWN, PNG, HTML = "comparison.json", "comparison.md", "comparison.png", "comparison.html"


def begin(plan: Plan) -> None:
    """Mark the folder as that of a comparison."""
    _write_json(plan.directory / JSON, {"name": plan.name, "seeds": plan.seeds, "variations": []})


def write(comparison: Comparison, plot: Path | None) -> list[Path]:
    """Write all files; the plot also to ``plot``. Where they are."""
    folder = comparison.plan.directory
    _write_json(folder / JSON, _record(comparison))
    (folder / MARKDOWN).write_text(tables.markdown(comparison), encoding="utf-8")
    written = [folder / MARKDOWN, folder / JSON]
    if (drawn := plots.whole(comparison)) is not None:
        to_png(drawn, folder / PNG)
        written.append(folder / PNG)
        if plot is not None:
            shutil.copyfile(folder / PNG, plot)
            written.append(plot)
    (folder / HTML).write_text(_page(comparison), encoding="utf-8", errors="replace")
    return [*written, folder / HTML]


def _write_json(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(strict(found), indent=1, allow_nan=False) + "\n")


def _record(comparison: Comparison) -> dict[str, Any]:
    target = comparison.target
    return {
        "name": comparison.plan.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "seeds": comparison.plan.seeds,
        "target": None if target is None else {**vars(target), "from": "above" if comparison.is_falling else "below"},
        "variations": [_variation(result) for result in comparison.results],
    }


def _variation(result: Result) -> dict[str, Any]:
    runs = result.finished
    spreads: dict[str, Any] = {}
    for group in ("values", "final", "last_tenth"):
        names = list(dict.fromkeys(name for run in runs for name in getattr(run, group)))
        spreads[group] = {name: _spread(result, group, name) for name in names}
    reached = [run.reached for run in runs if run.reached is not None]
    spreads["reached"] = {key: vars(Spread.of(one[key] for one in reached)) for key in (reached[0] if reached else ())}
    return {
        "label": result.variation.label,
        "overrides": result.variation.overrides,
        "spread": spreads,
        "runs": [run.record() for run in result.runs],
    }


def _spread(result: Result, group: str, name: str) -> dict[str, Any]:
    found = result.spread(lambda run: getattr(run, group).get(name))
    assert found is not None
    return vars(found)


def _page(comparison: Comparison) -> str:
    sections = [
        table(one.head, [[escape(cell) for cell in row] for row in one.rows]) for one in tables.tables(comparison)
    ]
    sections.append(f'<p class="note">{escape(tables.note(comparison))}</p>')
    sections += [figure(drawn, f"plot{index}") for index, drawn in enumerate(plots.each(comparison))]
    sections += ["<h2>Runs</h2>", _runs(comparison), "<h2>Settings</h2>", *_settings(comparison.results)]
    return page(f"{comparison.plan.name}: comparison", sections)


def _runs(comparison: Comparison) -> str:
    names = comparison.reported()
    head = ["variation", "seed", *(f"{name}, final" for name in names), "time", "fingerprint", "report"]

    def cells(label: str, run: RunFigures) -> list[str]:
        if run.failure is not None:
            return [escape(label), str(run.seed), *[""] * len(names), "", "", escape(run.failure)]
        finals = [escape(number_text(run.final.get(name, ""))) for name in names]
        link = f'<a href="{quote(Path(run.path).name)}/report.html">report</a>'
        return [
            escape(label),
            str(run.seed),
            *finals,
            seconds_text(run.values["seconds"]),
            f"<code>{escape(run.fingerprint)}</code>",
            link,
        ]

    return table(head, [cells(result.variation.label, run) for result in comparison.results for run in result.runs])


def _settings(results: Sequence[Result]) -> list[str]:
    """Of the first finished run of every variation, without the name, which only says where the run is."""
    runs = [read_run(Path(result.finished[0].path), result.variation.label) for result in results if result.finished]
    return settings_sections(
        [replace(run, settings={key: value for key, value in run.settings.items() if key != "name"}) for run in runs]
    )
