"""The table of federated methods in docs/algorithms.md: digits that are divided unevenly, three seeds each.

usage: python benchmarks/federated.py [--seeds 3] [--out runs/federated]

Every run is examples/federated_digits.yaml on the inline backend; a seed also divides the images anew.
"""

import argparse
import statistics
from pathlib import Path

from deploy import launch
from deploy.settings import load

AVERAGING = ["federated.control_variates=false"]
EXACT = ["uplink=none", "downlink=none"]
HALF = ["federated.participation=0.5"]


def server(kind: str, **options: object) -> list[str]:
    return [*AVERAGING, f"server.optimizer={{kind: {kind}, {', '.join(f'{k}: {v}' for k, v in options.items())}}}"]


RUNS = {
    "FedAvg": AVERAGING,
    "FedAvg, lr 0.8": [*AVERAGING, "arguments.lr=0.8"],
    "FedAvg, lr 0.8, 120 rounds": [*AVERAGING, "arguments.lr=0.8", "rounds=120"],
    "FedProx, mu 0.1": [*AVERAGING, "federated.proximal=0.1"],
    "FedProx, mu 0.01, lr 0.8": [*AVERAGING, "federated.proximal=0.01", "arguments.lr=0.8"],
    "FedAvgM": server("torch.optim.SGD", lr=0.3, momentum=0.9),
    "FedAdam": server("torch.optim.Adam", lr=0.03, betas=[0.9, 0.99], eps=0.001),
    "FedYogi": server("ps.yogi.Yogi", lr=0.01),
    "SCAFFOLD": [],
    "FedAvg, lr 0.8, half of the workers a round": [*AVERAGING, "arguments.lr=0.8", *HALF],
    "SCAFFOLD, half of the workers a round": HALF,
    "FedAvg, lr 0.8, uncompressed": [*AVERAGING, "arguments.lr=0.8", *EXACT],
    "SCAFFOLD, uncompressed": EXACT,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/federated"))
    options = parser.parse_args()
    print("| method | accuracy, mean (each seed) | up | down |")
    print("|---|---|---|---|")
    for number, (label, changes) in enumerate(RUNS.items()):
        summaries = []
        for seed in range(options.seeds):
            common = [
                "backend=inline",
                "metrics.port=null",
                f"seed={seed}",
                f"arguments.split={seed}",
                f"name=run-{number}-{seed}",
                f"storage.dir={options.out}",
            ]
            settings = load(Path("examples/federated_digits.yaml"), [*common, *changes])
            summaries.append(launch(settings.train, settings, observe=lambda row: None).summary)
        accuracies = [summary["reported"]["accuracy"] for summary in summaries]
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        ratios = [statistics.mean(s[f"{way}_ratio"] for s in summaries) for way in ("uplink", "downlink")]
        up, down = (f"{ratio:.1f}x" for ratio in ratios)
        print(f"| {label} | {statistics.mean(accuracies):.2f} % ({each}) | {up} | {down} |", flush=True)


if __name__ == "__main__":
    main()
