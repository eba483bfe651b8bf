"""What each kind of error feedback at a cut is worth: the network of examples/split_digits.py, in one process.

usage: python benchmarks/split.py [--seeds 3]
"""

import argparse
from multiprocessing import Pipe
from threading import Thread
from unittest.mock import patch

import torch

from examples.split_digits import SAMPLES, SHAPE, SPEC, halves, train_first, train_second
from protocol.errors import NotFiniteError
from workers import Cut, crossing

SCENES = {  # title: epochs and learning rate; epochs at 0.03 without compression before that
    "from scratch, learning rate 0.03, 15 epochs": (15, 0.03, 0),
    "from scratch, learning rate 0.003, 40 epochs": (40, 0.003, 0),
    "after 5 uncompressed epochs, learning rate 0.003, 15 epochs": (15, 0.003, 5),
}
NONE = {"activations": "none", "gradients": "none"}
ROWS = {
    "uncompressed": {"forward": "none", "backward": "none"},
    "none, none": NONE,
    "none, none; the test images compressed too": {**NONE, "plain": SPEC},
    "memory, none": {"gradients": "none"},
    "none, memory": {"activations": "none"},
    "memory, memory (default)": {},
    "memory, memory, never forgotten": {},
    "memory, residual": {"gradients": "residual"},
    "memory, memory; first f32": {"first": "f32"},
    "memory, memory; first int4": {"first": "int4"},
    "memory, memory; kept in bfloat16": {"memory": "bfloat16"},
    "sign: none, none": {**NONE, "forward": "sign", "backward": "sign"},
    "sign: memory, memory": {"forward": "sign", "backward": "sign"},
    "sign: memory, residual": {"forward": "sign", "backward": "sign", "gradients": "residual"},
}


def never(rows: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(rows), dtype=torch.bool)


def run(models, cut, epochs, seed, lr):
    """Both halves at once; None if one of them met NaN or Inf."""
    here, there = Pipe()
    failed = []

    def first():
        try:
            train_first(models[0], cut, here, epochs, seed, lr)
        except (NotFiniteError, EOFError) as error:
            failed.append(error)
        finally:
            here.close()

    thread = Thread(target=first)
    thread.start()
    try:
        return train_second(models[1], cut, there, epochs, lr)
    except (NotFiniteError, EOFError):
        return None
    finally:
        there.close()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for title, (epochs, lr, before) in SCENES.items():
        columns = ("activations, gradients", "accuracy, by seed", "loss, by seed", "there", "back")
        print(f"\n{title}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for name, settings in ROWS.items():
            cut = Cut(SHAPE, SAMPLES, **{"forward": SPEC, "backward": SPEC, **settings})
            found = []
            for seed in range(options.seeds):
                models = halves(seed)
                if before:
                    run(models, Cut(SHAPE, SAMPLES, "none", "none"), before, seed, 0.03)
                with patch.object(crossing, "farther", never if "never" in name else crossing.farther):
                    found.append(run(models, cut, epochs, seed, lr))
            accuracies = ", ".join(f"{one[0]:.2f}" if one else "diverged" for one in found)
            losses = ", ".join(f"{one[1]:.4f}" if one else "-" for one in found)
            last = next((one for one in found if one), None)
            ratios = " | ".join(f"{way.ratio:.0f}x" for way in last[2:]) if last else "- | -"
            print(f"| {name} | {accuracies} | {losses} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
