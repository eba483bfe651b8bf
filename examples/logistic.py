"""Logistic regression with a non-convex regulariser, equation (19) of the EF21 paper, on a LibSVM file of yours.

Get a file of two classes such as ``a9a`` or ``mushrooms`` from the LibSVM collection (Chang and Lin 2011)::

    carryover train examples/logistic.yaml arguments.file=FILE

What it shows: with EF21, messages of a single element lead to a stationary point, to the last digits of double
precision, at a step 64 times what the theory allows; ``feedback.kind=ef`` stalls. Every worker has rows of its
own and sends the gradient of them all. About a minute for a9a on two cores.
"""

from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_svmlight_file
from torch import Tensor, nn

from workers import Session
from workers.feedback.ef21 import step_size


@lru_cache(maxsize=1)  # workers that share a process read the file once
def data(file: str, features: int | None = None) -> Tensor:
    """The rows ``y_i a_i``, shape (rows, features), float64; of the two labels the larger is +1."""
    try:
        rows, labels = load_svmlight_file(file, n_features=features)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist; set arguments.file to a LibSVM file of two classes") from None
    return torch.from_numpy(rows.toarray() * np.where(labels == labels.max(), 1.0, -1.0)[:, None])


def parts(rows: Tensor, workers: int) -> Tensor:
    """In order, shape (workers, rows, features). The last rows, fewer than there are workers, are cut off."""
    return rows[: len(rows) // workers * workers].view(workers, -1, rows.shape[1])


class Model(nn.Module):
    """A vector ``x``."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(features, dtype=torch.float64))


@torch.no_grad()
def gradient(x: Tensor, rows: Tensor, regulariser: float) -> Tensor:
    """Of ``mean_i log(1 + exp(-y_i a_i.x)) + lambda sum_j x_j^2 / (1 + x_j^2)``.

    In closed form, since for so small a vector autograd takes three times as long as the products.
    """
    loss = rows.T @ torch.sigmoid(-(rows @ x)) / -len(rows)
    return loss + 2 * regulariser * x / (1 + x.square()).square()


@lru_cache(maxsize=1)
def largest_step(rows: Tensor, workers: int, regulariser: float, sent: int) -> float:
    """By the EF21 paper's Theorem 2, if ``sent`` elements travel.

    The second derivative of ``log(1 + exp(-t))`` is at most 1/4, that of ``t^2 / (1 + t^2)`` at most 2.
    """

    def smoothness(rows: Tensor) -> float:
        return torch.linalg.matrix_norm(rows.T @ rows, 2).item() / (4 * len(rows)) + 2 * regulariser

    each = parts(rows, workers)
    return step_size([smoothness(part) for part in each], smoothness(each.flatten(0, 1)), sent / rows.shape[1])


def train(
    session: Session,
    file: str,
    features: int | None = None,
    regulariser: float = 0.1,
    multiple: float = 1.0,
    sent: int = 1,
    every: int = 10,
) -> None:
    """What every worker runs.

    Args:
        features: columns, if the file's largest index does not say it.
        regulariser: lambda.
        multiple: of the largest step that the theory allows.
        sent: elements that the uplink sends.
        every: rounds between reports of ``|grad f|^2`` over all rows; once more at the end.
    """
    rows = data(file, features)
    model = Model(rows.shape[1])
    model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer.param_groups[0]["lr"] = multiple * largest_step(rows, session.world_size, regulariser, sent)
    each = parts(rows, session.world_size)

    def stationarity() -> Tensor:
        return gradient(model.x, each.flatten(0, 1), regulariser).square().sum()

    own = [each[session.rank]]  # one sample: a batch is all that the worker has
    for batch in session.batches(own, batch_size=1, collate=lambda samples: samples[0], shared=False):
        if session.rank == 0 and session.version % every == 0:
            session.report(stationarity=stationarity())
        model.x.grad = gradient(model.x, batch, regulariser)
        optimizer.step()
    with session.evaluating(model):
        session.report(stationarity=stationarity())
