"""Runs settings side by side, each in a fresh process, so that no run can tell what ran before or beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from pathlib import Path
from typing import IO

from deploy.rundir import CONFIG, SUMMARY
from deploy.settings import RunSettings, resolved

COMMAND = (
    sys.executable,
    "-P",
    "-m",
    "deploy.compare.child",
)  # -P: the user's folder must not come before our packages
INTERRUPTED, NOT_RUN = "it was interrupted", "it was not run"  # failures that are nobody's fault

Failure = str | None  # why a run did not finish, in one sentence; None if it did


class Runs:
    """Runs of one comparison.

    Args:
        jobs: how many go on at a time.
        advanced: called with how many rounds a run has done since the last call.
        ended: called with the settings of a run that has ended and its failure.
        say: called with a sentence for the user.

    The first two are called from threads, but never at the same time.
    """

    def __init__(
        self,
        jobs: int,
        advanced: Callable[[int], None],
        ended: Callable[[RunSettings, Failure], None],
        say: Callable[[str], None],
    ) -> None:
        self._jobs, self._advanced, self._ended, self._say = jobs, advanced, ended, say
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[str]] = set()
        self._is_stopping = False

    def run(self, all_settings: Sequence[RunSettings]) -> None:
        """Run everything. What fails does not keep the others from running.

        Raises:
            KeyboardInterrupt: after the runs that were going on have stopped with their round. A second one ends
                them at once.
        """
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = [pool.submit(self._run, settings) for settings in all_settings]
            try:
                for future in as_completed(futures):
                    future.result()
            except KeyboardInterrupt:
                self._say("stopping after this round; press Ctrl-C again to stop at once")
                self._stop()
                wait(futures)
                raise
            finally:
                self._kill()

    def _stop(self) -> None:
        """Let what goes on end with its round, and begin nothing more."""
        with self._lock:
            self._is_stopping = True
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.close()

    def _kill(self) -> None:
        with self._lock:
            self._is_stopping = True
            for process in self._processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _run(self, settings: RunSettings) -> None:
        if self._is_stopping:
            return
        log = log_file(settings)
        with log.open("w") as file:
            process = self._start(settings, file)
            status, failure = self._watch(process) if process is not None else (0, INTERRUPTED)
        if not log.stat().st_size:
            log.unlink()
        if status and failure is None:
            failure = INTERRUPTED if self._is_stopping else _ending(status, log)
        with self._lock:
            self._ended(settings, failure)

    def _watch(self, process: subprocess.Popen[str]) -> tuple[int, Failure]:
        failure, done = None, 0
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                answer = json.loads(line)
                failure, now = answer.get("failure", failure), answer.get("round", done)
                with self._lock:
                    self._advanced(now - done)
                done = now
            status = process.wait()
            with self._lock:
                self._processes.discard(process)
        return status, failure

    def _start(self, settings: RunSettings, log: IO[str]) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._is_stopping:
                return None
            pipe = subprocess.PIPE
            # In a group of its own, so that Ctrl-C reaches it through us alone, and once.
            process = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=log, text=True, process_group=0)
            self._processes.add(process)
            assert process.stdin is not None
            process.stdin.write(json.dumps(settings.model_dump(mode="json")) + "\n")
            process.stdin.flush()
            return process


def _ending(status: int, log: Path) -> str:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"its process {how}; what it wrote is in {log}"


def log_file(settings: RunSettings) -> Path:
    """Where the training function's prints and tracebacks go; removed after a run that wrote nothing."""
    return settings.storage.dir / f"{settings.name}.log"


def is_finished(settings: RunSettings) -> bool:
    """Whether the run directory holds a finished run of exactly these settings."""
    path = settings.storage.dir / settings.name
    try:
        summary = json.loads((path / SUMMARY).read_text())
        return (path / CONFIG).read_text() == resolved(settings) and summary["status"] == "finished"
    except (OSError, ValueError, KeyError, TypeError):
        return False
