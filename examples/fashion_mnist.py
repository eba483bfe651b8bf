"""Fashion-MNIST: 60,000 images of clothes, from the original idx files in a folder of yours.

Get the four ``*-ubyte.gz`` files of the data set (Xiao, Rasul, Vollgraf 2017) and name their folder::

    carryover train examples/fashion_mnist.yaml arguments.folder=FOLDER

What it shows: the same settings as for digits on a data set forty times larger. About four minutes on two cores.
"""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from workers import Session


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped idx file of unsigned bytes."""
    with gzip.open(path) as file:
        data = file.read()
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def data(folder: Path, part: str) -> TensorDataset:
    """Images of shape (1, 28, 28), scaled to mean 0 and deviation 1, and labels; part is train or t10k."""
    try:
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} does not exist; set arguments.folder to the folder with Fashion-MNIST's idx files"
        ) from None
    pixels = (torch.tensor(images, dtype=torch.float32).unsqueeze(1) / 255 - 0.286) / 0.353
    return TensorDataset(pixels, torch.tensor(labels, dtype=torch.int64))


def network() -> nn.Module:
    """About 215,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1568, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(session: Session, folder: str) -> None:
    """What every worker runs."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model, optimizer = session.prepare(model, optimizer)
    for images, labels in session.batches(data(Path(folder), "train"), batch_size=64):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        session.report(loss=loss)
    images, labels = data(Path(folder), "t10k").tensors
    right = 0
    with session.evaluating(model), torch.no_grad():
        for part, truth in zip(images.split(1000), labels.split(1000), strict=True):
            right += int((model(part.to(session.device)).argmax(dim=1).cpu() == truth).sum())
    session.report(accuracy=100 * right / len(labels))
