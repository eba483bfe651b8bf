"""The README's table and plot: digits with and without step-ahead error feedback, three seeds each.

usage: python benchmarks/contrast.py [--seeds 3] [--out runs/contrast] [--plot docs/images/contrast.png]

Every run is examples/digits.yaml on the inline backend, which gives the same fingerprints as Ray.
"""

import argparse
import statistics
from pathlib import Path

from deploy import launch
from deploy.report import write_plot
from deploy.settings import load

RUNS = {
    "uncompressed": ["feedback.kind=saef", "uplink=none", "downlink=none"],
    "saef 1 %": ["feedback.kind=saef", "uplink=topk:0.01+int4", "downlink=topk:0.01+int4"],
    "ef 1 %": ["feedback.kind=ef", "uplink=topk:0.01+int4", "downlink=topk:0.01+int4"],
    "saef 0.1 %": ["feedback.kind=saef", "uplink=topk:0.001+int4", "downlink=topk:0.001+int4"],
    "ef 0.1 %": ["feedback.kind=ef", "uplink=topk:0.001+int4", "downlink=topk:0.001+int4"],
    "no feedback 0.1 %": ["feedback.kind=none", "uplink=topk:0.001+int4", "downlink=topk:0.001+int4"],
}
PLOTTED = ("uncompressed", "saef 1 %", "saef 0.1 %", "ef 0.1 %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/contrast"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/contrast.png"))
    options = parser.parse_args()
    print("| run | accuracy, mean (each seed) | loss at round 80 | bytes up, ratio | bytes down, ratio |")
    print("|---|---|---|---|---|")
    pictures = []
    for label, changes in RUNS.items():
        accuracies, early, last = [], [], None
        for seed in range(options.seeds):
            name = f"{label.replace(' ', '-').replace('%', 'percent')}-{seed}"
            common = [
                "backend=inline",
                "metrics.port=null",
                f"seed={seed}",
                f"name={name}",
                f"storage.dir={options.out}",
            ]
            settings = load(Path("examples/digits.yaml"), [*common, *changes])
            rows: list = []
            last = launch(settings.train, settings, observe=rows.append)
            accuracies.append(last.summary["reported"]["accuracy"])
            early.append(statistics.mean(row["reported"]["loss"] for row in rows[70:90]))
            if seed == 0 and label in PLOTTED:
                pictures.append(last.path)
        each = ", ".join(f"{a:.2f}" for a in accuracies)
        ratios = [
            f"{last.summary[f'{way}_bytes']:,}, {last.summary[f'{way}_ratio']:.1f}x" for way in ("uplink", "downlink")
        ]
        mean = f"{statistics.mean(accuracies):.2f} % ({each})"
        print(f"| {label} | {mean} | {statistics.mean(early):.2f} | {' | '.join(ratios)} |", flush=True)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    write_plot(pictures, "loss", options.plot)


if __name__ == "__main__":
    main()
