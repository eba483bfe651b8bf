"""What a comparison runs: variations of one settings file, each over the same seeds, all validated beforehand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.importing import function
from deploy.settings import RunSettings, load
from protocol.errors import SettingsError

# Before all overrides, so that only what was said on the command line goes against it: in one process a run needs no
# Ray and no port, several can go on at once, and the fingerprint is the same.
FORCED = ("backend=inline", "metrics.port=null")
BASELINE = "baseline"  # label of the settings file as it stands
FOLDER_LENGTH = 60  # characters of a label that the names of its run directories keep


@dataclass(frozen=True)
class Variation:
    """One row of the table.

    Attributes:
        label: how the table and the figures call it.
        overrides: what is changed in the settings file, as ``key=value``.
        runs: settings of its runs, one a seed, in the order of the seeds.
    """

    label: str
    overrides: tuple[str, ...]
    runs: tuple[RunSettings, ...]


@dataclass(frozen=True)
class Plan:
    """All that a comparison runs, and the folder for it."""

    name: str  # that of the settings file
    directory: Path
    seeds: tuple[int, ...]
    variations: tuple[Variation, ...]


def plan(
    file: Path,
    overrides: Sequence[str],
    vary: Sequence[str],
    seeds: int,
    with_baseline: bool = False,
    out: Path | None = None,
) -> Plan:
    """Read, vary and validate the settings; nothing is written or run.

    Args:
        file: the settings file.
        overrides: ``key=value`` for every run.
        vary: one text a variation: ``key=value key=value``, or ``LABEL: key=value key=value``.
        seeds: how many, from the ``seed`` of the settings on.
        with_baseline: run the settings without any variation too, first. Without ``vary`` that is all there is to run.
        out: folder for the runs; by default NAME-compare in ``storage.dir``.

    Raises:
        SettingsError: one sentence about the first setting that is not valid, naming its variation.
    """
    load(file, overrides)  # so that what is wrong with the file itself is said in the words of the other commands
    base = load(file, [*FORCED, *overrides])
    function(base.train, base.arguments)
    found: dict[str, tuple[tuple[str, ...], RunSettings]] = {}
    if with_baseline or not vary:
        found[BASELINE] = (), base
    for text in vary:
        label, changes = split(text)
        if label in found:
            raise SettingsError(f"--vary {text!r} has the label {label!r}, as one before it; give it another")
        try:
            varied = load(file, [*FORCED, *overrides, *changes])
            _refuse_places(base, varied)
            function(varied.train, varied.arguments)
        except SettingsError as error:
            raise SettingsError(f"--vary {text!r}: {error}") from None
        found[label] = changes, varied
    directory = out if out is not None else base.storage.dir / f"{base.name}-compare"
    numbers = tuple(range(base.seed, base.seed + seeds))
    folders = _folders(list(found))
    variations = [
        Variation(label, changes, tuple(_placed(settings, directory, folders[label], seed) for seed in numbers))
        for label, (changes, settings) in found.items()
    ]
    return Plan(base.name, directory, numbers, tuple(variations))


def split(text: str) -> tuple[str, tuple[str, ...]]:
    """The label and the overrides of one ``--vary``.

    A label stands before the first colon that is followed by a space, and holds no ``=``. A new override starts at
    every ``key=`` behind a space, so values may hold spaces and colons. Without a label, the overrides are it.

    Raises:
        SettingsError: there is no override in it.
    """
    match = re.match(r"([^=]*?):(?:\s+|$)(.*)", text.strip(), re.DOTALL)
    label, rest = match.groups() if match else ("", text)
    overrides = tuple(re.split(r"\s+(?=[\w.]+=)", rest.strip()))
    if not overrides[0]:
        raise SettingsError(f"--vary {text!r} has no override; valid is key=value, or LABEL: key=value key=value")
    return " ".join((label or " ".join(overrides)).split()), overrides


def _refuse_places(base: RunSettings, varied: RunSettings) -> None:
    """Names, seeds and folders are given out by the comparison, so that no two runs share one."""
    for key, before, after in (
        ("name", base.name, varied.name),
        ("seed", base.seed, varied.seed),
        ("storage.dir", base.storage.dir, varied.storage.dir),
    ):
        if before != after:
            raise SettingsError(f"{key} cannot be varied; valid is {key}=VALUE outside --vary, for all runs")


def _folders(labels: Sequence[str]) -> dict[str, str]:
    """For each label a name that a folder can have, told apart whatever the case of its letters."""
    taken: dict[str, str] = {}
    for label in labels:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", label)[:FOLDER_LENGTH].strip("-._") or "variation"
        number, free = 1, name
        while free.lower() in (other.lower() for other in taken.values()):
            number += 1
            free = f"{name}-{number}"
        taken[label] = free
    return taken


def _placed(settings: RunSettings, directory: Path, folder: str, seed: int) -> RunSettings:
    storage = settings.storage.model_copy(update={"dir": directory})
    return settings.model_copy(update={"name": f"{folder}-seed-{seed}", "seed": seed, "storage": storage})
