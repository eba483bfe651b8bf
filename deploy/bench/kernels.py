"""``carryover bench kernels``: what one message costs a sender and a receiver, beside the speed of the memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from deploy.bench import record
from deploy.bench.contenders import (
    FRAMES,
    ONE_FRAME,
    SUM,
    TOPK,
    Given,
    alternatives,
    copying,
    decoders,
    encoders,
    specifications,
    summing,
)
from deploy.bench.tables import Goal, console, show, show_goals
from deploy.bench.timing import COPY_BYTES, Durations, take_turns, torch_threads
from deploy.display import bytes_text
from protocol.errors import SettingsError

STATED_NUMEL, STATED_RATIO = {"cpu": 25_000_000, "cuda": 100_000_000}, 0.01  # of the goals
SECTORS = 64  # bytes that adding one value moves on a GPU: 32 in, 32 out
STEP_BYTES = 12  # vector and residual are read, the new residual is written: no step can move less
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    numel: int
    ratio: float
    repeats: int  # rounds
    threads: tuple[int, ...]  # of torch and of our kernels; one run each, on a GPU the first only
    device: str

    @staticmethod
    def parse(numel: int, ratio: float, repeats: int, threads: str, device: str) -> Options:
        """From what a user typed.

        Raises:
            SettingsError: an option is not valid, or there is no such device here.
        """
        counts = threads.split(",")
        if not all(count.isdecimal() and int(count) > 0 for count in counts):
            raise SettingsError(f"--threads is {threads!r}; valid are positive numbers joined by commas, as in 1,2")
        if not 0 < ratio <= 1:
            raise SettingsError(f"--ratio is {ratio:g}; valid is a number above 0 and at most 1")
        if device not in DEVICES:
            raise SettingsError(f"--device is {device!r}; valid are {' and '.join(DEVICES)}")
        if device == "cuda" and not torch.cuda.is_available():
            raise SettingsError("--device is cuda, but torch finds no CUDA device here; valid is cpu")
        found = tuple(int(count) for count in counts)
        return Options(numel, ratio, repeats, found if device == "cpu" else found[:1], device)

    @property
    def stated(self) -> bool:
        """Whether the goals are stated for this size."""
        return self.numel == STATED_NUMEL[self.device] and self.ratio == STATED_RATIO


@dataclass(frozen=True)
class Run:
    """All durations with one number of threads."""

    device: str
    threads: int
    numel: int
    durations: Durations

    @property
    def limit(self) -> float:
        """Milliseconds in which the memory moves ``STEP_BYTES`` a value, at the rate at which it copies."""
        return self.durations.median("copy", "copy") * STEP_BYTES / COPY_BYTES

    @property
    def place(self) -> str:
        """For a reader."""
        return "on the GPU" if self.device == "cuda" else "1 core" if self.threads == 1 else f"{self.threads} cores"


def run(options: Options, file: Path | None) -> None:
    """Measure, print, and write the durations to ``file``."""
    record.check_writable(file)
    screen = console()
    given = Given(options.numel, options.ratio, options.device)
    specs = specifications(options.ratio, given.level)
    ours, bodies = encoders(given, specs)
    rest = [*decoders(given, bodies), *alternatives(given), *summing(given, specs[0])]
    sizes = {spec: body.size for spec, (body, _) in bodies.items()}
    runs, goals = [], []
    for threads in options.threads:
        with torch_threads(threads):
            copied = copying(given, threads)  # twice a round: all is measured against it
            turns = [*copied, *ours, *copied, *rest]
            synchronise = torch.cuda.synchronize if options.device == "cuda" else lambda: None
            taken = Run(options.device, threads, options.numel, take_turns(turns, options.repeats, synchronise))
        runs.append(taken)
        goals += _goals(taken, specs[0]) if options.stated else []
        _show(screen, options, taken, sizes)
    show_goals(screen, goals, f"{STATED_NUMEL[options.device]:,} values and {100 * STATED_RATIO:g} %")
    found = {
        "body_bytes": sizes,
        "runs": [{"threads": r.threads, "limit_ms": r.limit, "milliseconds": r.durations.milliseconds} for r in runs],
        "goals": [goal.record() for goal in goals],
    }
    record.write(file, "bench kernels", asdict(options), found)


def _show(screen: Console, options: Options, taken: Run, sizes: dict[str, int]) -> None:
    durations, limit = taken.durations, taken.limit
    copied = durations.median("copy", "copy")
    rate = bytes_text(COPY_BYTES * options.numel / copied * 1e3)
    screen.print(
        f"{options.numel:,} float32, {100 * options.ratio:g} % sent, {taken.place}; ms, medians and minima of "
        f"{options.repeats} rounds in which all take turns"
    )
    screen.print(f"copy of a vector: {copied:.2f} ms ({rate}/s); limit: {STEP_BYTES} bytes a value: {limit:.2f} ms\n")

    def figures(group: str, name: str) -> list[str]:
        middle = durations.median(group, name)
        return [f"{middle:.2f}", f"{durations.low(group, name):.2f}", f"{middle / limit:.2f}x"]

    def against(group: str, name: str) -> str:
        return f"{durations.median('others', TOPK) / durations.median(group, name):.1f}x"

    ours = [
        [spec, *figures("encode", spec), against("encode", spec), *figures("encode in place", spec), f"{size:,}"]
        for spec, size in sizes.items()
    ]
    rest = [[name, *figures("others", name), against("others", name)] for name in durations.milliseconds["others"]]
    columns = ("encode, with residual", "ms", "min", "x limit", "torch.topk", "in place", "min", "x limit", "bytes")
    show(screen, columns, ours, rest)
    screen.print("torch.topk: how many times faster than that step. Others make no bytes.\n")

    rows = [[spec, *figures("decode", spec)[:2], *figures("decode and add", spec)[:2]] for spec in sizes]
    show(screen, ("decode", "to a vector", "min", "and add", "min"), rows)
    sums = [[name, *figures("sum", name)[:2]] for name in durations.milliseconds["sum"]]
    half = len(sums) // 2
    show(screen, (f"{next(iter(sizes))}, into a vector", "ms", "min"), sums[:half], sums[half:])


def _goals(taken: Run, spec: str) -> list[Goal]:
    """Of encoding on a core, on two and on a GPU; of decoding on a core and on a GPU."""
    encode, ordinary = taken.durations.median("encode", spec), taken.durations.median("others", TOPK)
    most, least = {("cpu", 1): (2.0, 25.0), ("cpu", 2): (2.2, None), ("cuda", taken.threads): (2.0, 10.0)}.get(
        (taken.device, taken.threads), (None, None)
    )
    found = []
    if most is not None:
        what = f"encode {spec}, {taken.place}, of the limit of {STEP_BYTES} bytes a value"
        found.append(Goal(what, encode / taken.limit, most, "x"))
    if least is not None:
        found.append(Goal(f"encode {spec}, {taken.place}, faster than {TOPK}", ordinary / encode, least, "x", True))
    one, several = (taken.durations.median("sum", name) for name in (ONE_FRAME, SUM))
    if taken.device == "cuda":
        limit = taken.limit * STATED_RATIO * SECTORS / STEP_BYTES
        what = f"check, decode and add a frame of {spec}, {taken.place}, of the limit of {SECTORS} bytes a value sent"
        found.append(Goal(what, one / limit, 2.0, "x"))
    elif taken.threads == 1:
        found.append(Goal(f"check, decode and add a frame of {spec}, {taken.place}", one, 5.0, " ms"))
        found.append(Goal(f"the sum of {FRAMES} such frames, {taken.place}", several, 30.0, " ms"))
    return found
