"""Hand-written digits: scikit-learn's 1,797 images of 8 x 8, and a small convolutional network.

What it shows: two-way compression by more than 220x with step-ahead error feedback, at the accuracy of
uncompressed training. It needs no file: the images are part of scikit-learn. About a minute on two cores.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from workers import Session


def data() -> tuple[TensorDataset, TensorDataset]:
    """1,437 images to train on and 360 to test on, shape (1, 8, 8), scaled to [0, 1]."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def network() -> nn.Module:
    """151,306 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(session: Session) -> None:
    """What every worker runs."""
    training, testing = data()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-3)
    model, optimizer = session.prepare(model, optimizer)
    for images, labels in session.batches(training, batch_size=32):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        session.report(loss=loss)
    with session.evaluating(model), torch.no_grad():
        images, labels = (tensor.to(session.device) for tensor in testing.tensors)
        accuracy = (model(images).argmax(dim=1) == labels).float().mean()
    session.report(accuracy=100 * accuracy)
