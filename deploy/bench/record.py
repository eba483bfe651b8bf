"""The file that ``--json`` writes: what was measured, on which machine, with which versions, when."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from protocol.errors import SettingsError

CPU_INFO = Path("/proc/cpuinfo")  # Linux alone has it


def check_writable(file: Path | None) -> None:
    """Before an hour is measured, not after.

    Raises:
        SettingsError: the file's folder is not there, or may not be written.
    """
    if file is not None and not (file.absolute().parent.is_dir() and os.access(file.absolute().parent, os.W_OK)):
        raise SettingsError(f"--json {file} cannot be written: {file.parent} is no folder that you may write to")


def write(file: Path | None, command: str, options: dict[str, Any], found: dict[str, Any]) -> None:
    """Write the record of one run of ``command``, or nothing if there is no file."""
    if file is not None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        head = {"command": command, "date": now, "hardware": hardware(), "versions": versions(), "options": options}
        file.write_text(json.dumps({**head, **found}, indent=1) + "\n")


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in bytes, GPU if there is one."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    """Of what the durations and bytes depend on."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "numba": numba.__version__,
        "platform": platform.platform(),
    }
