"""int8, int4 and int2 on what the examples really send, against the best quantiser with as many magnitudes.

usage: python benchmarks/grids.py [--rounds 100] [--fashion-mnist FOLDER]

Trains the examples on the inline backend and takes what goes into the compressors of worker 0 (update and
residual) in some rounds. Of every tensor with 10,000 elements or more, the largest 1 % are fitted.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

from deploy import launch
from deploy.bench.quantisers import CODES, fit
from deploy.settings import load
from protocol import compressor
from protocol.segment import unpack
from protocol.sender import Sender

LEAST = 10_000  # elements of a tensor that is looked at


@contextmanager
def captured(rounds: tuple[int, ...]) -> Iterator[list[tuple[int, str, torch.Tensor]]]:
    """What the first sender of a run, worker 0, compresses in these rounds: (round, tensor, values)."""
    found: list[tuple[int, str, torch.Tensor]] = []
    stage, first = Sender.stage, []

    def watching(self: Sender, given: torch.Tensor, sequence: int):
        first.append(self)
        if self is first[0] and sequence in rounds:
            total = given + self.residual
            for place in self.layout.segments:
                if place.numel >= LEAST:
                    found.append((sequence, place.entry.name, total[place.start : place.stop].clone()))
        return stage(self, given, sequence)

    with patch.object(Sender, "stage", watching):
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--fashion-mnist", type=Path, help="folder of the Fashion-MNIST files; left out without it")
    options = parser.parse_args()
    examples = {"examples/digits.yaml": []}
    if options.fashion_mnist:
        examples["examples/fashion_mnist.yaml"] = [f"arguments.folder={options.fashion_mnist}"]
    print("| example | round | tensor | values | " + " | ".join(f"{code}, uniform grid" for code in CODES) + " |")
    print("|---" * (4 + len(CODES)) + "|")
    for path, changes in examples.items():
        with TemporaryDirectory() as folder, captured((1, options.rounds // 4, options.rounds)) as found:
            common = ["backend=inline", "metrics.port=null", f"rounds={options.rounds}", f"storage.dir={folder}"]
            settings = load(Path(path), [*common, *changes])
            launch(settings.train, settings)
        for number, name, total in found:
            values = unpack(compressor("topk:0.01").encode(total, (), 0)[0], total.numel()).values
            errors = [fit(name, values, code) for code in CODES]
            each = " | ".join(f"{e.ours:.2f}, {e.uniform:.1f}" for e in errors)
            print(f"| {Path(path).stem} | {number} | {name} | {values.size} | {each} |", flush=True)


if __name__ == "__main__":
    main()
