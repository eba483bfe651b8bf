"""From the command line's arguments to a folder with tables and figures."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.bench.tables import console
from deploy.compare import output, tables
from deploy.compare.figures import Comparison, Target
from deploy.compare.progress import Shown
from deploy.compare.runs import INTERRUPTED, Failure, Runs, is_finished
from deploy.compare.variations import plan
from deploy.rundir import SUMMARY, move_aside
from deploy.settings import RunSettings
from protocol.errors import RunFailed, SettingsError

WIDE = 400  # columns of a file or a pipe, which need not fit on a screen


def compare(
    file: Path,
    overrides: Sequence[str] = (),
    vary: Sequence[str] = (),
    seeds: int = 3,
    with_baseline: bool = False,
    target: str | None = None,
    out: Path | None = None,
    jobs: int = 1,
    reuse: bool = False,
    plot: Path | None = None,
) -> Comparison:
    """Run every variation with every seed, print the tables, write the files.

    Args:
        file, overrides, vary, seeds, with_baseline, out: see ``variations.plan``.
        target: ``NAME=VALUE``; see ``figures.reach``.
        jobs: runs that go on at a time.
        reuse: keep finished runs of exactly the same settings that are in the folder, instead of moving it aside.
        plot: file for one more copy of the plot.

    Raises:
        SettingsError: an argument or a setting is not valid, or the folder holds something else. Nothing has been
            run then, except where the target turns out to be of a quantity that is not reported in rounds.
        RunFailed: a run failed; everything else is there.
        KeyboardInterrupt: after a clean stop; the tables and figures are those of the runs that finished.
    """
    aim = None if target is None else Target.parse(target)
    planned = plan(file, overrides, vary, seeds, with_baseline, out)
    if plot is not None and not os.access(plot.absolute().parent, os.W_OK):
        raise SettingsError(f"--plot {plot} cannot be written: {plot.parent} is no folder that you may write to")
    everything = [settings for variation in planned.variations for settings in variation.runs]
    labels = {settings.name: v.label for v in planned.variations for settings in v.runs}
    screen = console(WIDE)
    with _held(planned.directory, reuse):
        failures: dict[str, Failure] = {s.name: None for s in everything if reuse and is_finished(s)}
        todo = [settings for settings in everything if settings.name not in failures]
        output.begin(planned)
        try:
            with Shown(screen, todo) as shown:
                if failures:
                    shown.say(f"{len(failures)} of {len(everything)} runs were finished before and are kept")

                def ended(settings: RunSettings, failure: Failure) -> None:
                    failures[settings.name] = failure
                    shown.ended(f"{labels[settings.name]}, seed {settings.seed}", failure, _summary(settings))

                Runs(jobs, shown.advanced, ended, shown.say).run(todo)
        finally:
            comparison = Comparison.read(planned, failures, aim)
            if set(failures.values()) - {INTERRUPTED}:
                written = output.write(comparison, plot)
                screen.print()
                tables.show(comparison, screen)
                screen.print(*("", *map(str, written)), sep="\n", soft_wrap=True)
    _complain(comparison, len(everything))
    return comparison


def _complain(comparison: Comparison, count: int) -> None:
    if failed := count - len(comparison.finished()):
        folder = comparison.plan.directory
        raise RunFailed(f"{failed} of {count} runs failed; the reasons are above, and tracebacks in {folder}/*.log")
    known = comparison.in_rounds()
    if comparison.target is not None and comparison.target.quantity not in known:
        raise SettingsError(
            f"--target is of {comparison.target.quantity!r}, which no run reported in its rounds; reported were "
            f"{', '.join(known) or 'no quantities'}; change it and add --reuse"
        )


@contextmanager
def _held(folder: Path, reuse: bool) -> Iterator[None]:
    """Keep the folder for this comparison alone; an earlier one in it moves aside unless its runs are reused."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            if not (folder / output.JSON).exists():
                raise SettingsError(
                    f"{folder} holds something else than a comparison; choose another folder with --out"
                )
            handle = _lock(folder)
            if not reuse:
                move_aside(folder)
            os.close(handle)
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder)
    except OSError as error:
        raise SettingsError(f"the folder {folder} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        os.close(handle)


def _lock(folder: Path) -> int:
    """A descriptor of the folder that no other process can have; the system closes it however this process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise SettingsError(f"a comparison is going on in {folder}; choose another folder with --out") from None
    return handle


def _summary(settings: RunSettings) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((settings.storage.dir / settings.name / SUMMARY).read_text())
    except (OSError, ValueError):
        return {}
    return found
