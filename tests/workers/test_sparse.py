"""Embeddings with sparse gradients: what was never touched costs a residual nothing."""

import pytest
import torch
from torch.utils.data import TensorDataset

ROWS, WIDTH, TOUCHED = 20_000, 32, 50


def train(session):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(ROWS, WIDTH, sparse=True), torch.nn.Linear(WIDTH, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = session.prepare(model, optimizer)
    words = torch.randint(0, TOUCHED, (256,), generator=torch.Generator().manual_seed(1)) * (ROWS // TOUCHED)
    for x, y in session.batches(TensorDataset(words, (words // (ROWS // TOUCHED)) % 2), batch_size=16):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        session.report(loss=loss)


@pytest.mark.parametrize("feedback", ["ef", "saef"])
def test_a_sparse_residual_holds_the_rows_that_were_touched_and_trains_the_same(inline, feedback):
    settings = {"feedback": {"kind": feedback}, "uplink": "topk:0.0005", "downlink": "topk:0.0005"}
    found = {}
    for memory in ("float32", "sparse"):
        own = {"count": 2, "residual": memory}
        inline.train(train, rounds=30, workers=own, server={"residual": memory}, **settings)
        senders = [session._rounds.method.sender for session in inline.sessions.values()] + [inline.server.state.sender]
        found[memory] = inline.summary["fingerprint"], [sender._residual.nbytes for sender in senders]
        assert inline.summary["reported"]["loss"] < 0.69
    assert found["float32"][0] == found["sparse"][0]
    for whole, sparse in zip(found["float32"][1], found["sparse"][1], strict=True):
        assert sparse - 4 * ROWS * WIDTH < whole / 10  # beside the scratch vector of the largest tensor
