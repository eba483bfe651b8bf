"""A model in two halves: what crosses, what both ends remember, and what that is worth."""

import multiprocessing
from dataclasses import replace
from threading import Thread

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from examples import split_digits
from protocol import NotFiniteError, compressor
from workers import Cut, Downstream, Upstream, crossing
from workers.crossing import Table

SHAPE, SAMPLES = (3, 8), 40
NUMEL = 24
PLAIN = Cut(SHAPE, SAMPLES, "topk:0.25", "topk:0.25")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Everything here is small, and two halves that take turns would wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ends(cut):
    """Both ends of a cut, in this process; its frames are small enough for the pipe to hold several."""
    here, there = multiprocessing.Pipe()
    return Upstream(cut, here), Downstream(cut, there)


def cross(head, tail, activation, indices=None, gradient=None):
    """One batch there and its gradient back: what arrives at either side."""
    activation = activation.clone().requires_grad_()
    scalar = head(activation, indices)
    arrived, _ = tail()
    arrived.backward(torch.ones_like(arrived) if gradient is None else gradient)
    scalar.backward()
    return arrived.detach(), activation.grad


def tables(*ends):
    """Every memory of these ends, by direction."""
    found = {"forward": [], "backward": []}
    for end in ends:
        for direction, method in (
            (end._sends, end._out),
            ({"forward": "backward"}.get(end._sends, "forward"), end._in),
        ):
            if (table := getattr(method, "_table", None)) is not None:
                rows = table._rows.clone()
                rows[~table._seen] = 0
                found[direction].append((rows, table._seen.clone()))
    return found


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def epochs(count, size=8, seed=0):
    order = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield from torch.randperm(SAMPLES, generator=order).split(size)


# -- both ends remember the same --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"forward": "topk:0.1+int4", "backward": "sign", "memory": "bfloat16"},
        {"forward": "int2", "backward": "randk:0.2+qsgd:3", "memory": "float16", "first": "f16"},
        {"forward": "lowrank:2", "backward": "ternary+entropy", "first": "f32", "memory": "float64"},
        {"forward": "blocktopk:0.1,block=16+natural", "backward": "threshold:0.5", "first": "int8"},
    ],
    ids=str,
)
def test_both_ends_remember_the_same_bits_after_any_batches(settings):
    head, tail = ends(replace(PLAIN, **settings))
    random = torch.Generator().manual_seed(1)
    for step in range(30):
        size = int(torch.randint(1, 12, (), generator=random))
        indices = torch.randperm(SAMPLES, generator=random)[:size]
        scale = 10.0 ** float(torch.randint(-3, 6, (), generator=random))
        activation, gradient = (scale * torch.randn(size, *SHAPE, generator=random) for _ in range(2))
        if step % 5 == 4:
            indices = None  # between them, a batch that is not remembered
        arrived, returned = cross(head, tail, activation, indices, gradient)
        assert arrived.isfinite().all()
        assert returned.isfinite().all()
    found = tables(head, tail)
    for direction in found.values():
        assert len(direction) == 2
        assert direction[0][1].sum() > 30
        assert same(*direction)
    assert head.nbytes == tail.nbytes == 2 * SAMPLES * (NUMEL * found["forward"][0][0].itemsize + 1)


def test_what_arrives_is_what_is_remembered_in_the_order_of_the_batch():
    head, tail = ends(PLAIN)
    indices = torch.tensor([7, 0, 39, 3])
    for _ in range(3):
        head(torch.randn(4, *SHAPE), indices.tolist())
        arrived, known = tail()
        assert torch.equal(known, indices)
        assert torch.equal(arrived.view(4, -1), tail._in._table._rows[indices])


def test_batches_may_be_in_flight_together_and_their_gradients_come_in_any_order():
    head, tail = ends(PLAIN)
    for step in range(5):
        sent = [torch.randn(6, *SHAPE).requires_grad_() for _ in range(3)]
        indices = torch.arange(6) + step  # the same samples in all three
        scalars = [head(activation, indices) for activation in sent]
        arrived = [tail()[0] for _ in sent]
        for number in (2, 0, 1):
            (arrived[number] * (number + 1)).sum().backward()
        for scalar in scalars:
            scalar.backward()
        assert all(activation.grad.abs().sum() > 0 for activation in sent)
    assert same(*tables(head, tail)["forward"])
    assert same(*tables(head, tail)["backward"])


# -- exactness ----------------------------------------------------------------------------------------


def network():
    torch.manual_seed(3)
    layers = (nn.Linear(5, 24), nn.Unflatten(1, SHAPE), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(24, 2))
    return nn.Sequential(*layers)


def train(parameters, loss_of, x, y):
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for indices in epochs(3):
        optimizer.zero_grad()
        loss_of(x[indices], y[indices], indices)
        optimizer.step()


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [("none", "float32"), ("none", "float64"), ("f32", "float32"), ("f64", "float64"), ("entropy", "float32")],
)
def test_with_an_exact_compressor_training_is_that_of_the_whole_model_bit_for_bit(spec, dtype):
    x, y = (
        torch.randn(SAMPLES, n, dtype=getattr(torch, dtype), generator=torch.Generator().manual_seed(5)) for n in (5, 2)
    )
    whole, split = network().to(x.dtype), network().to(x.dtype)
    train(whole.parameters(), lambda x, y, _: mse_loss(whole(x), y).backward(), x, y)
    head, tail = ends(Cut(SHAPE, SAMPLES, spec, spec, memory=dtype))

    def step(x, y, indices):
        scalar = head(split[:2](x), indices)
        mse_loss(split[2:](tail()[0]), y).backward()
        scalar.backward()

    train(split.parameters(), step, x, y)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), split.parameters(), strict=True))
    assert head.nbytes == tail.nbytes == 0  # nothing to remember


def test_the_scalar_may_be_scaled_and_added_to_other_terms():
    head, tail = ends(Cut(SHAPE, SAMPLES, "none", "none"))
    activation = torch.randn(4, *SHAPE, requires_grad=True)
    loss = head(activation, range(4)) * 0.5 + activation.square().sum()
    (tail()[0] * 3).sum().backward()
    loss.backward()
    assert torch.allclose(activation.grad, 1.5 + 2 * activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["topk:0.25+int4", "lowrank:2"])
def test_half_precision_crosses_as_what_it_is_and_is_summed_in_float32(dtype, spec):
    x = torch.randn(8, 5)
    seen = []
    for inside in (False, True):
        head, tail = ends(replace(PLAIN, forward=spec, backward=spec))
        for _ in range(3):
            with torch.autocast("cpu", dtype):
                activation = network()[:2](x)
            with torch.autocast("cpu", dtype, enabled=inside):  # which must change nothing at the cut
                scalar = head(activation, range(8))
                arrived, _ = tail()
            assert activation.dtype == arrived.dtype == dtype
            with torch.autocast("cpu", dtype, enabled=inside):
                arrived.backward(torch.ones_like(arrived))
                scalar.backward()
        assert same(*tables(head, tail)["forward"])
        seen.append(tables(head)["forward"][0])
    assert same(*seen)


def test_what_half_precision_cannot_hold_arrives_as_the_largest():
    head, tail = ends(replace(PLAIN, memory="float16", plain="sign"))
    for indices in (None, range(4)):
        head(torch.full((4, *SHAPE), 60000.0).half(), indices)
        assert tail()[0].isfinite().all()
    head(torch.full((4, *SHAPE), 1e30), range(4))  # after float16, as evaluation comes after autocast
    assert tail()[0].max() == 1e30
    assert tail._in._table._rows[:4].max() == 65504


# -- what the memory is worth -------------------------------------------------------------------------


def errors(cut, count=30):
    """``|a - received|^2`` over all samples, after each epoch with the first half fixed."""
    activation = torch.randn(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(2))
    gradient = activation.flip(0) ** 3
    head, tail = ends(cut)
    found = [(float(activation.square().sum()), float(gradient.square().sum()))]
    for epoch in range(count):
        left = torch.zeros(2)
        for indices in epochs(1, seed=epoch):
            arrived, returned = cross(head, tail, activation[indices], indices, gradient[indices])
            left += torch.stack(
                [(arrived - activation[indices]).square().sum(), (returned - gradient[indices]).square().sum()]
            )
        found.append(tuple(left.tolist()))
    return torch.tensor(found).T


@pytest.mark.parametrize("spec", ["topk:0.1", "topk:0.1+int4", "int2", "blocktopk:0.1,block=48"])
def test_what_arrives_converges_to_an_activation_that_stands_still(spec):
    """EF21's law, for both directions: every visit contracts what is missing by ``1 - delta``."""
    delta = compressor(spec).delta(8 * NUMEL)
    for left in errors(replace(PLAIN, forward=spec, backward=spec)):
        bound = left[0] * (1 - delta) ** torch.arange(len(left)) + 1e-12 * left[0]
        assert (left <= bound).all()
        assert left[-1] < 1e-2 * left[0]


@pytest.mark.parametrize(
    "broken", [{"activations": "none", "gradients": "none"}, "forgets", "memory of another sample"]
)
def test_without_the_memory_that_law_is_broken(broken, monkeypatch):
    cut = replace(PLAIN, forward="topk:0.1", backward="topk:0.1")
    if isinstance(broken, dict):
        cut = replace(cut, **broken)
    elif broken == "forgets":
        monkeypatch.setattr(Table, "store", lambda *_: None)
    else:
        store = Table.store
        monkeypatch.setattr(Table, "store", lambda self, indices, rows: store(self, (indices + 1) % SAMPLES, rows))
    for left in errors(cut, 10):
        assert left[-1] > 0.3 * left[1]


def test_a_compact_memory_rounds_and_no_more():
    exact, rounded = (errors(replace(PLAIN, memory=memory))[0, -1] for memory in ("float32", "bfloat16"))
    assert exact < 1e-9
    assert 1e-9 < rounded < (2.0**-8) ** 2 * SAMPLES * NUMEL * 2


def test_a_residual_delivers_later_what_it_keeps_now():
    """Conservation for every sample: received + residual = given."""
    head, tail = ends(replace(PLAIN, gradients="residual", backward="topk:0.1+int4"))
    given, received = torch.zeros(2, SAMPLES, *SHAPE)
    random = torch.Generator().manual_seed(4)
    for indices in epochs(20):
        gradient = torch.randn(len(indices), *SHAPE, generator=random)
        given[indices] += gradient
        received[indices] += cross(head, tail, gradient, indices, gradient)[1]
    owed = tail._out._table._rows.view(SAMPLES, *SHAPE)
    assert owed.abs().max() > 0.1
    assert torch.allclose(received + owed, given, atol=1e-4)
    assert tail.nbytes - head.nbytes == SAMPLES * (4 * NUMEL + 1)  # of the gradient only the sender keeps anything


def test_a_memory_that_is_farther_than_zero_is_forgotten(monkeypatch):
    def left():
        head, tail = ends(replace(PLAIN, forward="topk:0.05"))
        activation = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
        for _ in range(60):
            cross(head, tail, activation, range(8))
        turned = torch.cat([-activation[:4], activation[4:]])  # four turn round, four stay
        arrived, _ = cross(head, tail, turned, range(8))
        assert same(*tables(head, tail)["forward"])
        return float((arrived - turned).square().sum() / turned[:4].square().sum()), head.sent.forgotten

    left_over, forgotten = left()
    assert left_over < 0.9
    assert forgotten == 4
    monkeypatch.setattr(crossing, "farther", lambda rows, known: torch.zeros(len(rows), dtype=torch.bool))
    left_over, forgotten = left()
    assert left_over > 2.0  # where zeros leave 1
    assert forgotten == 0


def test_an_unbiased_compressor_stays_unbiased_where_nothing_is_remembered():
    head, tail = ends(replace(PLAIN, forward="randk:0.25", activations="none"))
    activation = torch.ones(10, *SHAPE)
    arrived = torch.zeros(10, *SHAPE)
    for _ in range(300):
        head(activation, range(10))
        arrived += tail()[0] / 300
    assert arrived.mean() == pytest.approx(1.0)  # a share of 0.25, four times as large
    assert (arrived - 1).abs().max() < 0.5


# -- evaluation, bytes, errors inside a run ------------------------------------------------------------


def test_batches_without_indices_are_sent_plainly_and_not_remembered():
    head, tail = ends(PLAIN)
    activation = torch.randn(5, *SHAPE)
    with torch.no_grad():
        head(activation)
        arrived, indices = tail()
    assert torch.equal(arrived, activation)
    assert indices is None
    assert not arrived.requires_grad
    assert not tail._in._table._seen.any()
    arrived, returned = cross(head, tail, activation)  # with a gradient
    assert torch.equal(returned, torch.ones_like(returned))
    assert not head._in._table._seen.any()


def test_every_byte_of_every_frame_is_counted_at_both_ends():
    head, tail = ends(PLAIN)
    sizes = {}
    for end in (head, tail):
        send, found = end._channel.send_bytes, sizes.setdefault(end, [])
        end._channel.send_bytes = lambda frame, send=send, found=found: (found.append(len(bytes(frame))), send(frame))
    activation = torch.randn(5, *SHAPE)
    for indices in (range(5), None, range(3, 8)):
        cross(head, tail, activation, indices)
    for sent, received, found in ((head.sent, tail.received, sizes[head]), (tail.sent, head.received, sizes[tail])):
        assert (sent.frames, sent.bytes, sent.dense_bytes) == (3, sum(found), 3 * 5 * NUMEL * 4)
        assert (received.frames, received.bytes, received.dense_bytes) == (3, sum(found), 3 * 5 * NUMEL * 4)
        assert sent.ratio == received.ratio == sent.dense_bytes / sum(found)


def test_the_error_at_the_cut_is_measured():
    head, tail = ends(PLAIN)
    activation = torch.randn(5, *SHAPE)
    for _ in range(2):
        arrived, _ = cross(head, tail, activation, range(5))
        assert head.sent.given == pytest.approx(float(activation.norm()))
        assert head.sent.left == pytest.approx(float((activation - arrived).norm()))


def test_nan_is_neither_sent_nor_remembered():
    head, tail = ends(PLAIN)
    cross(head, tail, torch.ones(4, *SHAPE), range(4))
    before = tables(head, tail)
    bad = torch.ones(4, *SHAPE)
    bad[2, 1] = float("nan")
    with pytest.raises(NotFiniteError, match="the activation at the cut holds NaN or Inf in batch 1"):
        head(bad, range(4))
    scalar = head(torch.ones(4, *SHAPE, requires_grad=True), range(4))
    with pytest.raises(NotFiniteError, match="the gradient at the cut holds NaN or Inf in batch 1"):
        tail()[0].backward(bad)
    assert same(before["backward"][0], tables(tail)["backward"][0])
    assert scalar.item() == 0
    assert not head._channel.poll()


def test_the_same_seed_gives_the_same_bytes():
    def frames(seed):
        here, there = multiprocessing.Pipe()
        head = Upstream(replace(PLAIN, forward="randk:0.2+ternary", seed=seed), here)
        for _ in range(3):
            head(torch.ones(6, *SHAPE), range(6))
        return [there.recv_bytes() for _ in range(3)]

    assert frames(1) == frames(1)
    assert frames(1) != frames(2)
    assert len(set(frames(1))) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_half_on_a_gpu_and_one_on_the_cpu_remember_the_same():
    here, there = multiprocessing.Pipe()
    head, tail = Upstream(PLAIN, here, "cuda"), Downstream(PLAIN, there)
    for indices in epochs(5):
        cross(head, tail, torch.randn(8, *SHAPE).cuda(), indices)
    for (a, seen), (b, known) in tables(head, tail).values():
        assert torch.equal(a.cpu(), b)
        assert torch.equal(seen, known)


# -- whole trainings ----------------------------------------------------------------------------------


def trained(**settings):
    """The example with a smaller network: test accuracy, loss, and what crossed there and back."""
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU()), nn.Linear(256, 10)
    cut = Cut((256,), split_digits.SAMPLES, split_digits.SPEC, split_digits.SPEC, **settings)
    here, there = multiprocessing.Pipe()
    thread = Thread(target=split_digits.train_first, args=(first, cut, here, 20, 0), daemon=True)
    thread.start()
    result = split_digits.train_second(second, cut, there, 20)
    thread.join()
    return result


def test_the_memory_beats_compression_alone_at_the_same_bytes():
    direct, high, *ways = trained(activations="none", gradients="none", plain=split_digits.SPEC)
    accuracy, loss, there, back = trained()
    assert accuracy > direct + 4
    assert accuracy > 94
    assert loss < high / 2
    assert there.ratio > 150
    assert back.ratio > 150
    assert there.bytes + back.bytes < 1.2 * sum(way.bytes for way in ways)


def test_the_halves_train_in_two_processes(capfd):
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    other = spawn.Process(target=split_digits.second_process, args=("with feedback", there, 1, 0))
    other.start()
    there.close()
    cut = split_digits.CUTS["with feedback"]
    split_digits.train_first(split_digits.halves(0)[0], cut, here, 1, 0)
    other.join(60)
    assert other.exitcode == 0
    assert "with feedback" in capfd.readouterr().out


def test_each_half_may_be_prepared_in_a_run_of_its_own(inline, tmp_path):
    cut = Cut((24,), SAMPLES, "topk:0.25", "topk:0.25")
    here, there = multiprocessing.Pipe()
    x = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(0))
    labels = (x.sum(1) > 0).long()
    ended = {}

    def first(session):
        model = nn.Sequential(nn.Linear(5, 24), nn.Tanh())
        model, optimizer = session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
        ended["head"] = head = Upstream(cut, here)
        for indices in session.batches(range(SAMPLES), batch_size=10):
            optimizer.zero_grad()
            head(model(x[indices]), indices).backward()
            optimizer.step()

    def second():
        ended["tail"] = tail = Downstream(cut, there)
        model = nn.Linear(24, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(40):
            optimizer.zero_grad()
            activation, indices = tail()
            loss = cross_entropy(model(activation), labels[indices])
            loss.backward()
            optimizer.step()
        ended["loss"] = loss.item()

    thread = Thread(target=second, daemon=True)
    thread.start()
    inline.train(first, rounds=40, workers={"count": 1})
    thread.join()
    assert ended["loss"] < 0.4
    assert inline.summary["uplink_bytes"] > 0
    assert same(*tables(ended["head"], ended["tail"])["forward"])
