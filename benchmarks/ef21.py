"""Figures 1 and 2 of the EF21 paper on LibSVM files: how large a step each method bears, and what it sends.

usage: python -m benchmarks.ef21 FILE[:ROUNDS] ... [--multiples 1 2 ... 64] [--jobs 2] [--out runs/ef21]
                                 [--images docs/images] [--quick]

Every run is examples/logistic.yaml: 20 workers, lambda 0.1, double precision both ways. Runs that are in ``--out``
already are not repeated, so that an interrupted command goes on where it was.

Figure 1: Top-1, steps that are multiples of the theory's: the largest for ROUNDS rounds, by default 2,000, the
others for a quarter of them. Figure 2: a tenth of ROUNDS with every k and multiple of a grid; of each method the
run that is lowest when as many bytes are sent as by the thriftiest. Gradient descent is EF21 with all elements.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from deploy import launch
from deploy.settings import load
from examples.logistic import data, largest_step

WORKERS, REGULARISER = 20, 0.1
METHODS = {"ef": "EF", "ef21": "EF21", "ef21_plus": "EF21+"}
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
SENT = (1, 16)  # k of figure 2
TUNED = (16, 64, 256)  # multiples of figure 2; of gradient descent: 1 and 2
POINTS = 200  # of a curve at least, if it has as many rounds
COLOURS = {"EF": "#d55e00", "EF21": "#0072b2", "EF21+": "#009e73", "GD": "#000000"}
DASHES = {"EF": "-", "EF21": "-", "EF21+": "--", "GD": ":"}


@dataclass(frozen=True)
class Job:
    """One run: ``kind`` of feedback, ``sent`` of the ``features`` elements, a multiple of the theory's step."""

    file: str
    features: int
    kind: str
    sent: int
    multiple: float
    rounds: int

    @property
    def name(self) -> str:
        return f"{label(self.file)}-{self.kind}-k{self.sent}-{self.multiple:g}x-{self.rounds}"

    @property
    def method(self) -> str:
        return "GD" if self.sent == self.features else METHODS[self.kind]

    def overrides(self) -> list[str]:
        return [
            f"name={self.name}",
            f"rounds={self.rounds}",
            f"feedback.kind={self.kind}",
            f"uplink={'none' if self.sent == self.features else f'topk:{self.sent / self.features!r}'}",
            f"arguments.file={self.file}",
            f"arguments.multiple={self.multiple}",
            f"arguments.sent={self.sent}",
            f"arguments.every={min(10, max(1, self.rounds // POINTS))}",
            "metrics.port=null",
        ]


@dataclass(frozen=True)
class Curve:
    """``|grad f|^2`` and the bytes that the average worker had sent by then, by round; shape (points,) each."""

    rounds: np.ndarray
    stationarity: np.ndarray
    sent_bytes: np.ndarray

    def at(self, budget: float) -> float:
        """``|grad f|^2`` at the last point within a budget of bytes."""
        return float(self.stationarity[self.sent_bytes <= budget][-1])

    def bytes_to(self, target: float) -> float | None:
        """The bytes after which ``|grad f|^2`` stays below the target."""
        above = np.flatnonzero(self.stationarity > target)
        after = int(above[-1]) + 1 if above.size else 0
        return float(self.sent_bytes[after]) if after < self.rounds.size else None


def label(file: str) -> str:
    return Path(file).name.removesuffix(".bz2").removesuffix(".gz")


def curve_of(rows: Sequence, summary: dict) -> list[list[float]]:
    """What a row reports was measured before its round, when the bytes were those of the row before."""
    found, before = [], 0
    for row in rows:
        if "stationarity" in row["reported"]:
            found.append([row["version"] - 1, row["reported"]["stationarity"], before / WORKERS])
        before = row["uplink_bytes"]
    return [*found, [summary["rounds"], summary["reported"]["stationarity"], summary["uplink_bytes"] / WORKERS]]


def measure(job: Job, out: Path) -> None:
    """Run a job, unless its result is there."""
    if (out / f"{job.name}.json").exists():
        return
    rows: list = []
    with TemporaryDirectory() as folder:
        settings = load(Path("examples/logistic.yaml"), [*job.overrides(), f"storage.dir={folder}"])
        summary = launch(settings.train, settings, observe=rows.append).summary
    write(job, out, curve_of(rows, summary))


def write(job: Job, out: Path, points: list[list[float]]) -> None:
    part = out / f"{job.name}.part"
    part.write_text(json.dumps(points))
    part.rename(out / f"{job.name}.json")


def read(job: Job, out: Path) -> Curve:
    return Curve(*np.array(json.loads((out / f"{job.name}.json").read_text())).T)


def tolerance(file: str, features: int, rounds: int, multiples: Sequence[float]) -> list[Job]:
    """The jobs of figure 1, in order of method and multiple; smaller ones take a quarter of the rounds."""
    lengths = {multiple: rounds if multiple == max(multiples) else rounds // 4 for multiple in multiples}
    return [Job(file, features, kind, 1, m, lengths[m]) for kind in METHODS for m in sorted(multiples)]


def tuning(file: str, features: int, rounds: int, quick: bool) -> list[Job]:
    """The jobs of figure 2. Steps above 2 / L are left out: with those, gradient descent itself need not converge."""

    def step(sent: int) -> float:
        return largest_step(data(file), WORKERS, REGULARISER, sent)

    grid = [(k, m) for k, m in itertools.product(SENT, TUNED) if k < features and m * step(k) <= 2 * step(features)]
    grid = grid[:: 4 if quick else 1]
    tuned = [Job(file, features, kind, k, m, rounds) for kind in METHODS for k, m in grid]
    return tuned + [Job(file, features, "ef21", features, multiple, rounds) for multiple in (1, 2)]


def best(jobs: Sequence[Job], out: Path) -> dict[str, Job]:
    """Of each method, the job that is lowest when the bytes of the thriftiest are sent."""
    curves = {job: read(job, out) for job in jobs}
    budget = min(curve.sent_bytes[-1] for curve in curves.values())
    found: dict[str, Job] = {}
    for job in sorted(jobs, key=lambda job: curves[job].at(budget)):
        found.setdefault(job.method, job)
    return {method: found[method] for method in COLOURS}


# -- figures ---------------------------------------------------------------------------------------


def axes_of(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(10, 0.5 + 2.9 * rows), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row")
    for axes in grid.flat:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel(r"$|\nabla f|^2$")
    return figure, grid


def draw(axes: Axes, x: np.ndarray, curve: Curve, **look) -> None:
    axes.plot(x, curve.stationarity, linewidth=1.4, **look)


def figure_1(results: dict[str, list[Job]], out: Path, path: Path) -> None:
    figure, grid = axes_of(len(results), len(METHODS))
    multiples = sorted({job.multiple for jobs in results.values() for job in jobs})
    colours = dict(zip(multiples, colormaps["viridis"](np.linspace(0.9, 0.0, len(multiples))), strict=True))
    for row, (name, jobs) in zip(grid, results.items(), strict=True):
        for axes, method in zip(row, METHODS.values(), strict=True):
            axes.set_title(f"{name}: {method}, Top-1", fontsize=9.5, loc="left")
            for job in (job for job in jobs if job.method == method):
                curve = read(job, out)
                draw(axes, curve.rounds, curve, color=colours[job.multiple], label=f"{job.multiple:g}x")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in grid[-1]:
        axes.set_xlabel("round")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def figure_2(results: dict[str, dict[str, Job]], out: Path, path: Path) -> None:
    figure, grid = axes_of(len(results), 2)
    for row, (name, chosen) in zip(grid, results.items(), strict=True):
        curves = {method: read(job, out) for method, job in chosen.items()}
        reach = [max(c.sent_bytes[-1] for m, c in curves.items() if m != "GD"), 0.0]
        for method, job in chosen.items():
            curve = curves[method]
            bits = 64.0 * job.sent * curve.rounds
            reach[1] = max(reach[1], bits[-1] if method != "GD" else 0.0)
            text = f"{method}, k = {job.sent}, {job.multiple:g}x"
            for axes, x in zip(row, (curve.sent_bytes, bits), strict=True):
                draw(axes, x, curve, color=COLOURS[method], linestyle=DASHES[method], label=text)
        for axes, end in zip(row, reach, strict=True):
            axes.set_xlim(0, end)  # gradient descent sends far more
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        row[0].set_title(f"{name}: bytes counted", fontsize=9.5, loc="left")
        row[1].set_title(f"{name}: values alone, 64 bits each", fontsize=9.5, loc="left")
        row[1].legend(fontsize=8, frameon=False)
    grid[-1, 0].set_xlabel("bytes that a client has sent, whole frames")
    grid[-1, 1].set_xlabel("bits/n")
    figure.savefig(path, dpi=150, metadata={"Software": None})


# -- tables ----------------------------------------------------------------------------------------


def table_1(results: dict[str, list[Job]], out: Path) -> None:
    print(f"\n| data set | step | rounds | {' | '.join(METHODS.values())} |")
    print("|---" * (3 + len(METHODS)) + "|")
    for name, jobs in results.items():
        for multiple, rounds in sorted({(job.multiple, job.rounds) for job in jobs}):
            same = [job for kind in METHODS for job in jobs if (job.kind, job.multiple) == (kind, multiple)]
            last = " | ".join(f"{read(job, out).stationarity[-1]:.1e}" for job in same)
            print(f"| {name} | {multiple:g}x | {rounds:,} | {last} |")


def table_2(results: dict[str, dict[str, Job]], out: Path, target: float) -> None:
    print(f"\n| data set | method | k | step | at equal bytes | kB a client to {target:g} | kbit/n to {target:g} |")
    print("|---" * 7 + "|")
    for name, chosen in results.items():
        curves = {method: read(job, out) for method, job in chosen.items()}
        budget = min(curve.sent_bytes[-1] for curve in curves.values())
        for method, job in chosen.items():
            curve, needed = curves[method], curves[method].bytes_to(target)
            cells = ["not reached"] * 2
            if needed is not None:
                bits = 64 * job.sent * int(curve.rounds[np.searchsorted(curve.sent_bytes, needed)])
                cells = [f"{needed / 1000:.1f}", f"{bits / 1000:.1f}"]
            row = [name, method, job.sent, f"{job.multiple:g}x", f"{curve.at(budget):.1e}", *cells]
            print(f"| {' | '.join(map(str, row))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE[:ROUNDS]", help="LibSVM files of two classes")
    parser.add_argument("--multiples", type=float, nargs="+", default=MULTIPLES)
    parser.add_argument("--target", type=float, default=1e-6, help="|grad f|^2 in figure 2's table")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/ef21"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--quick", action="store_true", help="400 rounds and few steps, to see whether all works")
    options = parser.parse_args()
    if options.quick:
        options.multiples = (4, 64)
    options.out.mkdir(parents=True, exist_ok=True)
    options.images.mkdir(parents=True, exist_ok=True)
    first: dict[str, list[Job]] = {}
    second: dict[str, list[Job]] = {}
    for given in options.files:
        file, _, rounds = given.partition(":")
        features = data(file).shape[1]
        length = 400 if options.quick else int(rounds or 2000)
        first[label(file)] = tolerance(file, features, length, options.multiples)
        second[label(file)] = tuning(file, features, length // 10, options.quick)
    jobs = sorted({job for some in (first, second) for each in some.values() for job in each}, key=lambda j: -j.rounds)
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        running = {pool.submit(measure, job, options.out): job for job in jobs}
        for number, future in enumerate(as_completed(running), 1):
            future.result()
            print(f"{number} of {len(jobs)}: {running[future].name}", flush=True)
    chosen = {name: best(each, options.out) for name, each in second.items()}
    figure_1(first, options.out, options.images / "ef21-figure1.png")
    figure_2(chosen, options.out, options.images / "ef21-figure2.png")
    table_1(first, options.out)
    table_2(chosen, options.out, options.target)


if __name__ == "__main__":
    main()
