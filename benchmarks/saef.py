"""What the SAEF paper promises, measured: step-ahead against local error feedback and uncompressed training.

usage: python benchmarks/saef.py [--sets digits fashion] [--seeds 3] [--out runs/saef] [--jobs 1] [--docs]

One factor at a time around 4 workers and two-way topk:0.01+int4: 8 workers, 0.1 %, sign, one-way; and error averaging
every p rounds. Every run goes through the inline backend, frames and all. A run that is finished in --out is not
repeated, so an interrupted benchmark goes on. --docs writes docs/images/saef-*.png and prints the tables.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from deploy import launch
from examples import digits, fashion_mnist

ROUNDS = {"digits": 400, "fashion": 300}
SMOOTH = 10  # rounds of the running mean in which losses are compared
BASE = {"workers": {"count": 4}, "uplink": "topk:0.01+int4", "downlink": "topk:0.01+int4"}
SETTINGS = {
    "4 workers, 1 %": {},
    "8 workers": {"workers": {"count": 8}},
    "0.1 %": {"uplink": "topk:0.001+int4", "downlink": "topk:0.001+int4"},
    "sign": {"uplink": "sign", "downlink": "sign"},
    "one-way": {"downlink": "none"},
}
METHODS = {"saef": {"kind": "saef"}, "ef": {"kind": "ef"}}
PERIODS = (1, 5, 20)  # p of error averaging; beside them never, which is saef itself


@cache
def data(name: str, folder: str):
    """Training and test set; kept, since all workers of a run share the process."""
    if name == "digits":
        return digits.data()
    return tuple(fashion_mnist.data(Path(folder), part) for part in ("train", "t10k"))


def train(session, name: str, folder: str) -> None:
    """The examples' models and optimizers: momentum SGD on every worker, as in the paper's Algorithm 1."""
    training, testing = data(name, folder)
    model = digits.network() if name == "digits" else fashion_mnist.network()
    rate = {"lr": 0.06, "weight_decay": 5e-3} if name == "digits" else {"lr": 0.02}
    model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters(), momentum=0.9, **rate))
    for images, labels in session.batches(training, batch_size=32):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        session.report(loss=loss)
    if session.rank == 0:
        with session.evaluating(model), torch.no_grad():
            images, labels = testing.tensors
            pairs = zip(images.split(500), labels.split(500), strict=True)
            right = sum(int((model(part).argmax(1) == truth).sum()) for part, truth in pairs)
        session.report(accuracy=100 * right / len(labels))


def runs(name: str) -> dict[str, dict]:
    """Label -> settings of everything that is compared on one data set."""
    found = {}
    for (label, changes), (method, feedback) in product(SETTINGS.items(), METHODS.items()):
        found[f"{label}, {method}"] = {**BASE, **changes, "feedback": feedback}
    for count in (4, 8):
        found[f"{count} workers, uncompressed"] = {
            "workers": {"count": count},
            "uplink": "none",
            "downlink": "none",
            "feedback": {"kind": "ef"},
        }
    for period in PERIODS:
        found[f"p = {period}"] = {**BASE, "feedback": {"kind": "saef", "average_every": period}}
    return found


def one(job: tuple[str, str, int, Path, str]) -> str:
    """Run one job, unless it is finished in its folder."""
    name, label, seed, out, folder = job
    torch.set_num_threads(1)
    called = f"{name}-{label}-{seed}".replace(" ", "").replace(",", "-").replace("%", "pc").replace("=", "")
    path = out / called
    if not (path / "summary.json").exists() or json.loads((path / "summary.json").read_text())["status"] != "finished":
        launch(
            train,
            {
                "name": called,
                "rounds": ROUNDS[name],
                "seed": seed,
                "backend": "inline",
                "metrics": {"port": None, "sketch_every": 50},
                "storage": {"dir": out},
                "arguments": {"name": name, "folder": folder},
                **runs(name)[label],
            },
            observe=lambda row: None,
        )
    return called


def losses(path: Path) -> list[float]:
    return [json.loads(line)["reported"]["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def smooth(values: list[float]) -> list[float]:
    return [statistics.mean(values[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(values))]


def mean_curve(paths: list[Path]) -> list[float]:
    return [statistics.mean(column) for column in zip(*(losses(path) for path in paths), strict=True)]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def table(name: str, found: dict[str, list[Path]]) -> None:
    """Print the paper's claims beside what was measured."""
    half, third = ROUNDS[name] // 2, ROUNDS[name] // 3
    accuracy = {
        label: [json.loads((p / "summary.json").read_text())["reported"]["accuracy"] for p in paths]
        for label, paths in found.items()
    }
    print(f"\n{name}: {ROUNDS[name]} rounds, {len(next(iter(found.values())))} seeds\n")
    print(
        "| setting | saef below ef, of the first half | mean loss of rounds 50 to 100: uncompressed, saef, ef |", end=""
    )
    print(" saef below uncompressed, of the first third | accuracy: uncompressed, saef, ef | ratio up, down |")
    print("|---|---|---|---|---|---|")
    for label in SETTINGS:
        plain = f"{8 if label == '8 workers' else 4} workers, uncompressed"
        names = [plain, f"{label}, saef", f"{label}, ef"]
        curves = [mean_curve(found[n]) for n in names]
        full, saef, ef = (smooth(curve) for curve in curves)
        below = sum(s < e for s, e in zip(saef[:half], ef[:half], strict=True)) / half
        ahead = sum(s < u for s, u in zip(saef[:third], full[:third], strict=True)) / third
        early = ", ".join(f"{statistics.mean(curve[50:100]):.2f}" for curve in curves)
        scores = ", ".join(spread(accuracy[n]) for n in names)
        summary = json.loads((found[names[1]][0] / "summary.json").read_text())
        ratios = f"{summary['uplink_ratio']:.0f}x, {summary['downlink_ratio']:.0f}x"
        print(f"| {label} | {100 * below:.0f} % | {early} | {100 * ahead:.0f} % | {scores} | {ratios} |")
    print("\n| error averaging, p | mean loss of rounds 50 to 100 | accuracy | bytes up, ratio |\n|---|---|---|---|")
    for period in (*PERIODS, None):
        label = f"p = {period}" if period else "4 workers, 1 %, saef"
        summary = json.loads((found[label][0] / "summary.json").read_text())
        early = statistics.mean(mean_curve(found[label])[50:100])
        shown = f"{spread(accuracy[label])} | {summary['uplink_bytes']:,}, {summary['uplink_ratio']:.1f}x"
        print(f"| {period or 'never'} | {early:.2f} | {shown} |")


def plot(name: str, found: dict[str, list[Path]], out: Path) -> None:
    """Loss against rounds in every setting: mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.4), layout="constrained")
    axes = figure.subplots(1, len(SETTINGS), sharey=True)
    colours = {"uncompressed": "0.35", "saef": "tab:blue", "ef": "tab:orange"}
    for place, label in zip(axes, SETTINGS, strict=True):
        plain = f"{8 if label == '8 workers' else 4} workers, uncompressed"
        for shown, source in (("uncompressed", plain), ("saef", f"{label}, saef"), ("ef", f"{label}, ef")):
            curves = [smooth(losses(path)) for path in found[source]]
            columns = list(zip(*curves, strict=True))
            place.plot([statistics.mean(c) for c in columns], label=shown, color=colours[shown], linewidth=1.6)
            place.fill_between(
                range(len(columns)),
                [min(c) for c in columns],
                [max(c) for c in columns],
                color=colours[shown],
                alpha=0.2,
            )
        place.set_title(label, fontsize=11)
        place.set_xlabel("round")
        place.set_yscale("log")
        place.grid(alpha=0.3)
    axes[0].set_ylabel(f"training loss ({SMOOTH}-round mean)")
    axes[0].legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=list(ROUNDS), default=list(ROUNDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/saef"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--fashion", default="data/fashion-mnist", help="folder with Fashion-MNIST's four idx files")
    options = parser.parse_args()
    jobs = [
        (name, label, seed, options.out, options.fashion)
        for name in options.sets
        for seed in range(options.seeds)
        for label in runs(name)
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        done = {job[:3]: options.out / called for job, called in zip(jobs, pool.map(one, jobs), strict=True)}
    for name in options.sets:
        found = {label: [done[name, label, seed] for seed in range(options.seeds)] for label in runs(name)}
        table(name, found)
        if options.docs:
            plot(name, found, Path(f"docs/images/saef-{name}.png"))


if __name__ == "__main__":
    sys.exit(main())
