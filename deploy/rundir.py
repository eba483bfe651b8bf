"""The run directory: what a run leaves behind, written while it goes on."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import safetensors.torch
from torch import Tensor

from deploy.settings import RunSettings, resolved
from protocol.errors import SettingsError

CONFIG, METRICS, SUMMARY, MODEL = "config.yaml", "metrics.jsonl", "summary.json", "model.safetensors"


class RunDirectory:
    """``DIR/NAME``, always the latest run of that name; an earlier one moves to ``NAME.1``, ``NAME.2`` ...

    Nothing is moved or written before ``begin``, so a run that does not start leaves no trace.

    Raises:
        SettingsError: the directory cannot be written, or a run of that name is going on in it.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.path = settings.storage.dir / settings.name
        self.begun = False
        self._settings = settings
        with self._reasons():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._refuse_if_busy()

    def begin(self) -> None:
        """Move an earlier run aside and open the files of this one."""
        with self._reasons():
            self._refuse_if_busy()
            move_aside(self.path)
            self.path.mkdir()
            (self.path / CONFIG).write_text(resolved(self._settings))
            self._metrics: TextIO = (self.path / METRICS).open("w")
            fcntl.flock(self._metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the run ends, however it ends
        self.begun = True

    def _refuse_if_busy(self) -> None:
        if (self.path / METRICS).exists():
            with (self.path / METRICS).open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise SettingsError(f"a run is going on in {self.path}; give this one another name") from None

    @contextmanager
    def _reasons(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            folder = self._settings.storage.dir
            raise SettingsError(f"storage.dir {folder} cannot be written: {error.strerror}") from None

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append one line a round."""
        for row in rows:
            self._metrics.write(json.dumps(strict(row), allow_nan=False) + "\n")
        self._metrics.flush()

    def save_model(self, data: npt.NDArray[np.uint8]) -> None:
        """Write the model, whole or not at all."""
        _replace(self.path / MODEL, data.tobytes())

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and close the metrics."""
        self._metrics.close()
        _replace(self.path / SUMMARY, (json.dumps(strict(summary), indent=2, allow_nan=False) + "\n").encode())


def load_model(path: Path) -> dict[str, Tensor]:
    """The trained model in a run directory, for ``load_state_dict``."""
    return safetensors.torch.load_file(path / MODEL)


def strict(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def move_aside(path: Path) -> None:
    """Rename a folder that is there to ``NAME.1``, or to the number after the highest in use."""
    if path.exists():
        numbers = (int(p.suffix[1:]) for p in path.parent.glob(f"{path.name}.*") if p.suffix[1:].isdigit())
        path.rename(path.with_name(f"{path.name}.{max(numbers, default=0) + 1}"))


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
