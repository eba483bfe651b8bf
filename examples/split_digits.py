"""Hand-written digits, the network cut in two: convolutions in one process, the rest in another, a pipe between.

    python -m examples.split_digits

What it shows: activations and their gradients compressed by more than 200x, with and without the memory of every
sample that error feedback is here. It needs no Ray, no settings and no file. Half a minute on two cores.
"""

import argparse
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.digits import data, network
from workers import Cut, Downstream, Upstream
from workers.cut import Channel, Traffic

SAMPLES, BATCH = 1437, 64
STEPS = SAMPLES // BATCH  # an epoch
SHAPE = (64, 4, 4)  # of what crosses, for each image
SPEC = "topk:0.01+int4"
CUTS = {
    "uncompressed": Cut(SHAPE, SAMPLES, "none", "none"),
    # the test images compressed as well, because that is what this second half has been trained on
    "compressed": Cut(SHAPE, SAMPLES, SPEC, SPEC, activations="none", gradients="none", plain=SPEC),
    "with feedback": Cut(SHAPE, SAMPLES, SPEC, SPEC),
}


def halves(seed: int) -> tuple[nn.Module, nn.Module]:
    """The network of examples/digits.py, before and behind the cut."""
    torch.manual_seed(seed)
    whole = network()
    return whole[:5], whole[5:]


def batches(epochs: int, seed: int) -> Iterator[torch.Tensor]:
    """Indices of training images, every epoch in another order."""
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(SAMPLES, generator=order)[: STEPS * BATCH].split(BATCH)


def train_first(model: nn.Module, cut: Cut, channel: Channel, epochs: int, seed: int, lr: float = 0.03) -> None:
    """What the process with the images runs."""
    training, testing = data()
    head, optimizer = Upstream(cut, channel), torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for indices in batches(epochs, seed):
        optimizer.zero_grad()
        head(model(training.tensors[0][indices]), indices).backward()
        optimizer.step()
    with torch.no_grad():
        head(model(testing.tensors[0]))


def train_second(
    model: nn.Module, cut: Cut, channel: Channel, epochs: int, lr: float = 0.03
) -> tuple[float, float, Traffic, Traffic]:
    """What the process with the labels runs.

    Returns:
        The test accuracy in per cent, the loss of the last epoch, and what crossed in training, there and back.
    """
    training, testing = data()
    tail, optimizer = Downstream(cut, channel), torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    losses = []
    for _ in range(epochs * STEPS):
        optimizer.zero_grad()
        activation, indices = tail()
        loss = cross_entropy(model(activation), training.tensors[1][indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    there, back = replace(tail.received), replace(tail.sent)
    with torch.no_grad():
        right = (model(tail()[0]).argmax(dim=1) == testing.tensors[1]).float().mean()
    return 100 * right.item(), sum(losses[-STEPS:]) / STEPS, there, back


def second_process(name: str, channel: Channel, epochs: int, seed: int) -> None:
    torch.set_num_threads(1)
    accuracy, loss, *crossed = train_second(halves(seed)[1], CUTS[name], channel, epochs)
    there, back = (f"{way.bytes:,} ({way.ratio:.1f}x)" for way in crossed)
    print(f"{name:14}{accuracy:8.2f} %{loss:9.4f}{there:>24}{back:>24}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the processes take turns, and what they compute is small
    spawn = multiprocessing.get_context("spawn")
    print(f"{'':14}{'accuracy':>10}{'loss':>9}{'bytes of activations':>24}{'bytes of gradients':>24}")
    for name, cut in CUTS.items():
        here, there = spawn.Pipe()
        other = spawn.Process(target=second_process, args=(name, there, options.epochs, options.seed))
        other.start()
        there.close()  # so that this process is told if the other one dies
        train_first(halves(options.seed)[0], cut, here, options.epochs, options.seed)
        other.join()
        if other.exitcode:
            raise SystemExit(f"the second process of {name!r} ended with status {other.exitcode}")


if __name__ == "__main__":
    main()
