"""The live display, on streams that say they are a terminal and on streams that say they are not."""

from __future__ import annotations

import io
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.display import Display, bytes_text, number_text, seconds_text, summary_lines, worker_mean

ESCAPE = "\x1b"


class Terminal(io.StringIO):
    """A stream that counts its flushes and claims to be a terminal."""

    def isatty(self) -> bool:
        return True


class Pipe(io.StringIO):
    """A stream that is no terminal and remembers what had been flushed."""

    flushed = ""

    def flush(self) -> None:
        self.flushed = self.getvalue()


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def row(version: int, **changes: Any) -> dict[str, Any]:
    return {
        "version": version,
        "seconds": version * 0.5,
        "workers": 4,
        "reported": {"loss": 0.53125},
        "worker_error_norm": {"0": 0.1, "1": 0.3},
        "server_error_norm": 0.25,
        "uplink_ratio": 224.125,
        "downlink_ratio": 149.5,
        **changes,
    }


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "rounds": 400,
        "workers": 4,
        "seconds": 75.0,
        "uplink_bytes": 1_062_000,
        "downlink_bytes": 2_000_000,
        "uplink_ratio": 223.8,
        "downlink_ratio": 118.0,
        "conservation_error": 0.3125,
        "fingerprint": "9f86d081884c7d65",
        "reported": {"loss": 0.11, "accuracy": 0.9625},
        "status": "finished",
        **changes,
    }


def plain_lines(rounds: int, rows: list[dict[str, Any]], seconds_apart: float) -> list[str]:
    stream, clock = Pipe(), Clock()
    with Display(rounds, "digits", stream, clock) as display:
        for one in rows:
            display.update(one)
            clock.seconds += seconds_apart
    return stream.getvalue().splitlines()


def rounds_of(lines: list[str]) -> list[int]:
    return [int(re.findall(r"round (\d+)/", line)[0]) for line in lines]


def test_a_plain_line_is_complete_in_itself() -> None:
    lines = plain_lines(400, [row(version) for version in range(1, 41)], seconds_apart=1)
    assert lines[1] == (
        "digits: round 40/400, 20.0 s, loss 0.5312, up 224.1x, down 149.5x, worker residual 0.2, "
        "server residual 0.25, workers 4, rounds/s 2, 3 min 0 s left"
    )


def test_slow_rounds_give_a_line_about_every_tenth() -> None:
    lines = plain_lines(400, [row(version) for version in range(1, 401)], seconds_apart=1)
    assert rounds_of(lines) == [1, *range(40, 401, 40)]


def test_fast_rounds_give_one_line_a_second_and_the_first_and_the_last() -> None:
    lines = plain_lines(400, [row(version) for version in range(1, 401)], seconds_apart=1 / 128)
    assert rounds_of(lines) == [1, 129, 257, 385, 400]


def test_few_rounds_give_a_line_each() -> None:
    assert rounds_of(plain_lines(3, [row(version) for version in (1, 2, 3)], seconds_apart=5)) == [1, 2, 3]


def test_a_resumed_run_starts_with_a_line_and_a_rate_of_its_own() -> None:
    lines = plain_lines(400, [row(version, seconds=version * 0.25) for version in range(300, 401)], 1)
    assert rounds_of(lines) == [300, 320, 360, 400]
    assert "rounds/s 4, 20.0 s left" in lines[1]
    assert "left" not in lines[-1]


def test_plain_lines_have_no_escape_codes_even_if_the_environment_forces_colour(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    stream = Pipe()
    with Display(2, "\x1b[31mdigits", stream) as display:
        display.update(row(1, reported={"lo\x1b[0mss\n": 1.0}))
        display.message("worker 3\x1b[31m left\nits residual\rwas handed over")
        display.update(row(2))
        display.finish(summary(status="fin\x1b[0mished"), tmp_path)
    assert ESCAPE not in stream.getvalue()
    assert "\r" not in stream.getvalue()
    assert " [31mdigits: worker 3 [31m left its residual was handed over\n" in stream.getvalue()


def test_every_plain_line_is_flushed_at_once() -> None:
    stream = Pipe()
    with Display(10, "digits", stream) as display:
        display.update(row(1))
        assert stream.flushed.endswith("\n")
        assert stream.flushed.count("round 1/10") == 1
        display.message("worker 3 left")
        assert stream.flushed.endswith("digits: worker 3 left\n")


def test_text_that_the_stream_cannot_encode_is_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Display(10, "実験", stream) as display:
        display.update(row(1))
    assert raw.getvalue().startswith(b"??: round 1/10")


def test_a_quantity_stays_on_show_until_it_is_reported_again() -> None:
    rows = [row(1, reported={"accuracy": 0.5}), row(2, reported={"loss": 0.25}), row(3, reported={})]
    assert "accuracy 0.5, loss 0.25" in plain_lines(3, rows, seconds_apart=2)[-1]


def test_rows_with_missing_keys_and_strange_values_are_shown() -> None:
    rows: list[dict[str, Any]] = [
        {"version": 1},
        {"version": 2, "seconds": None, "reported": None, "server_error_norm": math.nan},
    ]
    assert plain_lines(2, rows, seconds_apart=2) == [
        "digits: round 1/2, 0.0 s",
        "digits: round 2/2, 0.0 s, server residual nan",
    ]


def test_a_terminal_shows_a_bar_and_the_figures() -> None:
    stream = Terminal()
    with Display(400, "digits [red]", stream) as display:
        for version in range(1, 101):
            display.update(row(version))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\u00a0", " ")
    assert ESCAPE in stream.getvalue()
    last = shown[shown.rindex("digits [red]") :]
    for text in ("━", "100/400", "left", "loss 0.5312", "up 224.1x", "down 149.5x", "worker residual 0.2"):
        assert text in last
    for text in ("server residual 0.25", "workers 4", "rounds/s 2"):
        assert text in last


def test_a_terminal_too_dumb_to_move_the_cursor_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Display(10, "digits", stream) as display:
        display.update(row(1))
    assert ESCAPE not in stream.getvalue()
    assert "round 1/10" in stream.getvalue()


def test_the_terminal_is_redrawn_at_most_eight_times_a_second() -> None:
    stream = Terminal()
    started = time.monotonic()
    with Display(100_000, "digits", stream) as display:
        while time.monotonic() < started + 0.5:
            display.update(row(1))
    elapsed = time.monotonic() - started
    # One drawing at the start and one at the end come on top.
    assert 2 <= stream.getvalue().count("digits") <= 8 * elapsed + 3


@pytest.mark.parametrize("stream", [Terminal(), Pipe()], ids=["terminal", "pipe"])
def test_an_update_is_cheap(stream: io.StringIO) -> None:
    one = row(1)
    with Display(100_000, "digits", stream) as display:
        started = time.perf_counter()
        for _ in range(2000):
            display.update(one)
        seconds = time.perf_counter() - started
    # A thousand a second must leave nearly all of the second to training.
    assert seconds / 2000 < 200e-6


def test_the_summary_comes_after_the_bar_and_stops_it(tmp_path: Path) -> None:
    stream = Terminal()
    with Display(400, "digits", stream) as display:
        display.update(row(400))
        display.message("[bold]worker 3 left")
        display.finish(summary(), tmp_path)
        after_summary = len(stream.getvalue())
        time.sleep(0.3)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert shown.rindex("━") < shown.index("digits: finished after 400 rounds")
    assert len(stream.getvalue()) == after_summary
    assert "[bold]worker 3 left" in shown


def test_what_goes_to_a_file_meanwhile_still_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, errors = Terminal(), Pipe()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", errors)
    with Display(400, "digits"):
        print("from the training loop")
        print("a warning", file=sys.stderr)
    assert "from the training loop" in terminal.getvalue()
    assert errors.getvalue() == "a warning\n"


def test_an_error_inside_the_display_gives_the_terminal_back() -> None:
    stream = Terminal()
    with pytest.raises(KeyError), Display(400, "digits", stream):
        raise KeyError
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1


def test_the_summary_is_aligned_and_names_the_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "metrics.jsonl").touch()
    assert summary_lines("digits", summary(), tmp_path) == [
        "digits: finished after 400 rounds with 4 workers in 1 min 15 s",
        "  loss                0.11",
        "  accuracy            0.9625",
        "  sent up             1.06 MB, compressed 223.8x",
        "  sent down           2 MB, compressed 118x",
        "  conservation error  0.3125 (at most 4 is sound)",
        "  fingerprint         9f86d081884c7d65",
        f"  run directory       {tmp_path}",
        "    model.safetensors  the trained model",
        "    metrics.jsonl      one line a round",
    ]


def test_a_summary_with_little_in_it_is_shown(tmp_path: Path) -> None:
    lines = summary_lines("digits", {"status": "failed", "rounds": 1, "seconds": None}, tmp_path)
    assert lines == ["digits: failed after 1 round", f"  run directory  {tmp_path}"]


def test_numbers_are_written_for_people() -> None:
    assert [number_text(value) for value in (0.123456, 12345, math.inf, "x")] == [
        "0.1235",
        "12,345",
        "inf",
        "x",
    ]
    counts = (0, 999, 1000, 33_012, 999_600, 5e15)
    assert [bytes_text(count) for count in counts] == ["0 B", "999 B", "1 kB", "33 kB", "1 MB", "5,000 TB"]
    durations = (0.04, 59.94, 59.96, 61, 7322, math.nan)
    assert [seconds_text(seconds) for seconds in durations] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "1 min 1 s",
        "2 h 2 min",
        "unknown",
    ]
    assert worker_mean({"0": 1.0, "1": 2.0}) == 1.5
    assert worker_mean(3) == 3.0
    assert worker_mean({}) is None
    assert worker_mean(None) is None
