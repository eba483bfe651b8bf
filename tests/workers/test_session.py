"""What user code sees of a session: prepare, the loop, reports, evaluation, and errors that say what to do."""

from __future__ import annotations

import linecache
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from deploy.launch import launch, plans
from deploy.settings import validate
from protocol.errors import RunFailed
from protocol.messages import Refusal
from workers.hooks import StatefulOptimizerWarning
from workers.runner import run

SENDS = ["difference", "gradient"]
DATA = TensorDataset(
    torch.randn(48, 6, generator=torch.Generator().manual_seed(1)),
    torch.randn(48, 2, generator=torch.Generator().manual_seed(2)),
)
TOPK = {"uplink": "topk:0.2", "downlink": "topk:0.2"}
SAEF = {"feedback": {"kind": "saef"}}

sgd = partial(torch.optim.SGD, lr=0.1)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.1), nn.Linear(5, 2))


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def ready(session, make=sgd):
    model = net()
    return session.prepare(model, make(model.parameters()))


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = mse_loss(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return loss


def simple(session, make=sgd):
    """The loop that most tests need."""
    model, optimizer = ready(session, make)
    for batch in session.batches(DATA, 4):
        session.report(loss=step(model, optimizer, batch))


# --- prepare


@pytest.mark.parametrize("send", SENDS)
def test_prepare_returns_the_same_objects_with_the_same_tensors(inline, send):
    def train(session):
        model = net()
        optimizer = sgd(model.parameters())
        tensors = list(model.parameters())
        given = session.prepare(model, optimizer)
        assert given[0] is model is session.model
        assert given[1] is optimizer
        for batch in session.batches(DATA, 4):
            step(model, optimizer, batch)
        assert all(now is then for now, then in zip(model.parameters(), tensors, strict=True))
        assert [p for group in optimizer.param_groups for p in group["params"]] == tensors

    inline.train(train, send=send)


def test_version_0_is_the_model_of_rank_0_with_all_its_tensors(inline):
    starts = {}

    def train(session):
        torch.manual_seed(session._plan.worker)  # every worker begins with a model of its own
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        model[0].bias.requires_grad_(False).normal_()
        model[1].running_mean.normal_()
        model[1].num_batches_tracked += 3 + session._plan.worker
        own = {name: value.clone() for name, value in model.state_dict().items()}
        session.prepare(model, sgd(model.parameters()))
        starts[session.rank] = own, {name: value.clone() for name, value in model.state_dict().items()}
        for batch in session.batches(DATA, 4):
            model(batch[0])

    inline.train(train, rounds=1)
    (pretrained, first), (own, second) = starts[0], starts[1]
    assert not any(torch.equal(own[name], pretrained[name]) for name in ("0.weight", "0.bias", "1.running_mean"))
    for name, value in pretrained.items():
        assert torch.equal(first[name], value)
        assert torch.equal(second[name], value)


@pytest.mark.parametrize("early", ["rank", "world_size"])
def test_rank_and_world_size_are_known_once_the_session_is_prepared(inline, early):
    with pytest.raises(RunFailed, match=r"rank and session\.world_size are known once session\.prepare has returned"):
        inline.train(lambda session: getattr(session, early))

    def train(session):
        model, optimizer = ready(session)
        assert session.world_size == 3
        assert session.rank == session._plan.worker
        for batch in session.batches(DATA, 4):
            step(model, optimizer, batch)

    inline.train(train, workers={"count": 3}, rounds=1)


def test_prepare_cannot_be_called_twice(inline):
    def train(session):
        ready(session)
        ready(session)

    with pytest.raises(RunFailed, match=r"session\.prepare was called twice; one run trains one model"):
        inline.train(train)


def test_an_optimizer_of_another_model_is_refused(inline):
    with pytest.raises(RunFailed, match=r"holds none of the model's parameters; build it from model\.parameters"):
        inline.train(lambda session: session.prepare(net(), sgd(net().parameters())))


def test_a_model_that_differs_between_workers_is_refused_and_names_the_tensor(inline):
    def train(session):
        model = nn.Linear(6, 2 + session._plan.worker)
        session.prepare(model, sgd(model.parameters()))

    with pytest.raises(RunFailed, match=r"model of worker 1 has parameter 'weight' \[3, 6\] float32 where the run has"):
        inline.train(train)
    assert inline.summary["rejected"] == {"layout": 1}


def test_a_model_without_trainable_parameters_is_refused(inline):
    def train(session):
        model = net().requires_grad_(False)
        session.prepare(model, sgd(model.parameters()))

    with pytest.raises(RunFailed, match="no parameters that require grad"):
        inline.train(train)


@pytest.mark.parametrize("use", ["batches", "evaluating"])
def test_batches_and_evaluating_need_a_prepared_session(inline, use):
    def train(session):
        if use == "batches":
            next(session.batches(DATA, 4))
        else:
            session.evaluating(net()).__enter__()

    with pytest.raises(RunFailed, match=rf"session\.{use} needs a model; call session\.prepare"):
        inline.train(train)


# --- warnings about stateful optimizers


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (partial(torch.optim.Adam, lr=0.01), {}),
        (partial(torch.optim.Adam, lr=0.01), SAEF),
        (partial(sgd, momentum=0.9), {}),
    ],
)
def test_a_stateful_optimizer_with_one_local_step_draws_one_warning_at_the_line_of_prepare(inline, make, settings):
    with pytest.warns(StatefulOptimizerWarning, match="`send: gradient` runs it on the server") as drawn:
        inline.train(partial(simple, make=make), rounds=1, **settings)
    (warning,) = drawn
    assert "session.prepare(model" in linecache.getline(warning.filename, warning.lineno)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (sgd, {}),
        (partial(sgd, momentum=0.9), SAEF),  # the paper's own algorithm
        (partial(torch.optim.Adam, lr=0.01), {"workers": {"count": 2, "local_steps": 2}}),
        (partial(torch.optim.Adam, lr=0.01), {"send": "gradient"}),
    ],
)
def test_other_combinations_draw_no_warning(inline, make, settings):
    inline.train(partial(simple, make=make), rounds=1, **settings)  # warnings are errors


# --- the loop


def test_leaving_the_loop_early_is_an_error_that_says_where(inline):
    def train(session):
        model, optimizer = ready(session)
        for batch in session.batches(DATA, 4):
            if session.version == 2:
                break
            step(model, optimizer, batch)

    with pytest.raises(RunFailed, match=r"worker 0 returned at version 2, before the run had done its rounds"):
        inline.train(train, workers={"count": 1})
    assert inline.summary["status"] == "failed"


def test_an_exception_of_the_users_code_fails_the_run_and_keeps_its_traceback(inline):
    def train(session):
        ready(session)
        raise KeyError("labels")

    with pytest.raises(RunFailed, match=r"worker 0 raised KeyError: 'labels'") as failed:
        inline.train(train, workers={"count": 1})
    assert 'raise KeyError("labels")' in failed.value.details


def test_the_loop_ends_after_the_last_round_and_a_second_loop_is_empty(inline):
    counts = []

    def train(session):
        model, optimizer = ready(session)
        counts.append(sum(1 for batch in session.batches(DATA, 4) if step(model, optimizer, batch) is not None))
        assert session.finished
        assert session.version == 4
        assert list(session.batches(DATA, 4)) == []

    inline.train(train, rounds=4, workers={"count": 2, "local_steps": 3})
    assert counts == [12, 12]


@pytest.mark.parametrize("before", [True, False])
def test_changing_requires_grad_after_prepare_is_an_error_that_names_the_parameter(inline, before):
    def train(session):
        model = net()
        model[2].bias.requires_grad_(before)
        optimizer = sgd(model.parameters())
        session.prepare(model, optimizer)
        for batch in session.batches(DATA, 4):
            step(model, optimizer, batch)
            model[2].bias.requires_grad_(session.version < 2 if before else session.version >= 2)

    with pytest.raises(RunFailed, match=rf"requires_grad of '2\.bias' changed to {not before} after session\.prepare"):
        inline.train(train, workers={"count": 1})
    assert inline.summary["rounds"] == 2


def test_replacing_a_parameter_after_prepare_is_an_error_that_names_it(inline):
    def train(session):
        model, optimizer = ready(session)
        for batch in session.batches(DATA, 4):
            step(model, optimizer, batch)
            model[2].weight = nn.Parameter(model[2].weight.detach().clone())

    with pytest.raises(RunFailed, match=r"'2\.weight' was replaced or removed after session\.prepare"):
        inline.train(train)


def test_a_second_step_in_a_round_is_refused_where_it_would_lose_a_gradient(inline):
    def train(session):
        model, optimizer = ready(session)
        for batch in session.batches(DATA, 4):
            step(model, optimizer, batch)
            step(model, optimizer, batch)

    with pytest.raises(RunFailed, match=r"optimizer\.step was called twice in a round"):
        inline.train(train, send="gradient")
    inline.train(train, send="difference")


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_pushes_only_the_residual_and_is_counted(inline, send, fused):
    def train(session):
        model, optimizer = ready(session, partial(sgd, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for x, y in session.batches(DATA, 4):
            loss = mse_loss(model(x), y)
            if (session.rank, session.version) in [(1, 2), (0, 3), (1, 3)]:
                loss = loss * math.inf
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    inline.train(train, send=send, **TOPK)
    assert inline.summary["skipped_steps"] == 3
    assert inline.summary["rejected"] == {}
    norms = {row["version"]: (row["update_norm"]["before"], row["worker_error_norm"]) for row in inline.rows}
    for version in range(2, 6):
        before, carried = norms[version][0], norms[version - 1][1]
        skipped = {"0": version == 4, "1": version in (3, 4)}
        for worker in "01":
            assert carried[worker] > 0
            assert (before[worker] == pytest.approx(carried[worker], rel=1e-5)) == skipped[worker]


# --- reports


def test_reports_are_averaged_over_steps_and_weighted_by_samples_over_workers(inline):
    def train(session):
        model, optimizer = ready(session)
        size = 2 + 4 * session.rank
        for number, batch in enumerate(session.batches(DATA, size)):
            step(model, optimizer, batch)
            session.report(number=number, rank=torch.tensor(float(session.rank), requires_grad=True))
            if session.rank == 1:
                session.report(alone=7)

    inline.train(train, rounds=3, workers={"count": 2, "local_steps": 2})
    for row in inline.rows:
        first = 2 * (row["version"] - 1)
        assert row["reported"] == {"number": first + 0.5, "rank": (2 * 0 + 6 * 1) / 8, "alone": 7.0}
        assert row["samples"] == 16


def test_what_is_reported_after_the_last_round_is_in_the_summary(inline):
    def train(session):
        simple(session)
        session.report(accuracy=10 * session.rank)

    result = inline.train(train)
    assert result.summary["reported"] == {"loss": inline.rows[-1]["reported"]["loss"], "accuracy": 5.0}


def test_five_names_fit_into_a_push_and_a_sixth_is_refused_by_name(inline):
    def train(session, names):
        model, optimizer = ready(session)
        for batch in session.batches(DATA, 4):
            step(model, optimizer, batch)
            session.report(**dict.fromkeys(names, 1.0 / (1 + session.version)))

    # without feedback there is one norm more
    inline.train(partial(train, names="abcde"), rounds=8, feedback={"kind": "none"}, uplink="sign")
    assert inline.rows[7]["reported"] == pytest.approx(dict.fromkeys("abcde", 1 / 8))
    with pytest.raises(RunFailed, match=r"session.report got 'f' beside a, b, c, d, e; at most 5 names are possible"):
        inline.train(partial(train, names="abcdef"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e300])
def test_a_report_that_no_float32_holds_does_not_stop_the_run(inline, value):
    def train(session):
        model, optimizer = ready(session)
        for batch in session.batches(DATA, 4):
            step(model, optimizer, batch)
            session.report(loss=value)

    inline.train(train)
    assert str(inline.rows[-1]["reported"]["loss"]) == {-1e300: "-inf"}.get(value, str(value))


# --- evaluating


@pytest.mark.parametrize("settings", [SAEF, {}, {"send": "gradient"}], ids=["saef", "ef", "gradient"])
def test_evaluating_shows_exactly_w_and_gives_back_tensors_and_modes(inline, settings):
    moved = []

    def train(session):
        model, optimizer = ready(session)
        model[2].eval()  # a mode of the user's own
        for batch in session.batches(DATA, 4):
            for _ in range(2):  # at y, and after the step at y'
                before = flat(model)
                with session.evaluating(model) as same:
                    assert same is model
                    assert torch.equal(flat(model), inline.server.state.w)
                    assert not any(module.training for module in model.modules())
                assert torch.equal(flat(model), before)
                assert [module.training for module in model] == [True, True, False]
                moved.append((session.version, torch.equal(before, inline.server.state.w)))
                if _ == 0:
                    step(model, optimizer, batch)
        with session.evaluating(model):
            assert torch.equal(flat(model), inline.server.state.w)
        assert torch.equal(flat(model), inline.server.state.w)

    result = inline.train(train, **TOPK, **settings)
    if "send" not in settings:
        assert not all(same for version, same in moved if version)
    saved = torch.cat([value.reshape(-1) for value in result.load_model().values()])
    assert torch.equal(saved, torch.cat([v.reshape(-1) for _, v in sorted(named(inline).items())]))


def named(inline):
    state = inline.server.state
    return {s.entry.name: state.w[s.start : s.stop].view(s.entry.shape) for s in state.layout.segments}


def test_evaluating_gives_back_tensors_and_modes_after_an_exception(inline):
    def train(session):
        model, optimizer = ready(session)
        for batch in session.batches(DATA, 4):
            step(model, optimizer, batch)
            before = flat(model)
            with pytest.raises(ZeroDivisionError), session.evaluating(model):
                raise ZeroDivisionError
            assert torch.equal(flat(model), before)
            assert all(module.training for module in model.modules())

    inline.train(train, **TOPK, **SAEF)


def test_evaluating_in_inference_mode_leaves_a_model_that_trains(inline):
    def train(session):
        model, optimizer = ready(session)
        for batch in session.batches(DATA, 4):
            with torch.inference_mode(), session.evaluating(model):
                model(batch[0])
            step(model, optimizer, batch)

    inline.train(train)


# --- NaN and Inf


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("uplink", ["topk:0.2", "sign"])
def test_an_update_that_is_not_finite_is_refused_by_name_and_touches_nothing(inline, send, value, uplink):
    kept = {}

    def state(session):
        sender = session._rounds.method.sender
        return [
            session._rounds.replica.w.clone(),
            sender.residual.clone(),
            torch.from_numpy(sender.ledger.difference.copy()),
        ]

    def train(session):
        model, optimizer = ready(session)
        for x, y in session.batches(DATA, 4):
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            if session.rank == 1 and session.version == 3:
                kept[1] = state(session)
                model[2].bias.grad[1] = value
            optimizer.step()

    with pytest.raises(RunFailed, match=r"^the update of '2\.bias' holds NaN or Inf in round 3 of worker 1$"):
        inline.train(train, send=send, uplink=uplink, downlink="topk:0.2", rounds=50, workers={"count": 3})
    session = inline.sessions[1]
    assert kept[1][1].abs().max() > 0
    assert all(torch.equal(now, then) for now, then in zip(state(session), kept[1], strict=True))
    assert session.version == 3
    assert session._rounds.method.sender.conservation_error() <= 4
    assert inline.summary["status"] == "failed"
    assert inline.summary["rejected"]["not_finite"] == 1
    assert inline.summary["rejected"].keys() <= {"not_finite", "finished"}  # what others still sent to the ended run
    assert inline.summary["rounds"] == inline.server.state.version == 3
    assert torch.equal(inline.server.state.w, kept[1][0])


@pytest.mark.parametrize(("reason", "stopped"), [("finished", True), ("layout", False)])
def test_a_worker_that_is_refused_because_the_run_has_ended_was_stopped_and_did_not_fail(reason, stopped):
    class Refusing:
        def call(self, frame):
            return [Refusal(reason, "no more").pack()]

    settings = validate({"train": "a:b", "workers": {"count": 1}})
    outcome = run(ready, plans(settings)[1][0], Refusing(), 1, torch.device("cpu"))
    assert (outcome.error, outcome.stopped) == ("no more", stopped)


SETTINGS = {"rounds": 2, "backend": "inline", "metrics": {"port": None}}


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_what_is_added_after_prepare_is_an_error_that_names_it(what, tmp_path):
    def train(session):
        model = torch.nn.Linear(2, 1)
        session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in session.batches(range(8), batch_size=2):
            if what == "parameter":
                model.late = torch.nn.Parameter(torch.ones(1))
            else:
                model.register_buffer("late", torch.ones(1))

    with pytest.raises(RunFailed, match=r"'late' was added after session\.prepare"):
        launch(train, {**SETTINGS, "storage": {"dir": tmp_path}}, observe=lambda row: None)


def test_evaluating_another_model_is_refused(tmp_path):
    def train(session):
        model = torch.nn.Linear(2, 1)
        session.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with session.evaluating(torch.nn.Linear(2, 1)):
            pass

    with pytest.raises(RunFailed, match=r"takes the model that was given to session\.prepare, and no other"):
        launch(train, {**SETTINGS, "storage": {"dir": tmp_path}}, observe=lambda row: None)


@pytest.mark.parametrize(("accumulate", "left_after"), [(1, 1), (2, 2), (2, 1)])
def test_a_loop_left_by_break_goes_on_with_nothing_lost_or_says_why_not(tmp_path, accumulate, left_after):
    def train(session, broken):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.prepare(model, optimizer)
        data = TensorDataset(torch.ones(8, 2), torch.ones(8, 1))
        while not session.finished:
            for taken, (x, y) in enumerate(session.batches(data, batch_size=2), 1):
                mse_loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                if broken and taken == left_after:
                    break

    def fingerprint(broken):
        settings = {**SETTINGS, "workers": {"count": 2, "accumulate": accumulate}, "storage": {"dir": tmp_path}}
        settings |= {"arguments": {"broken": broken}, "rounds": 3}
        return launch(train, settings, observe=lambda row: None).summary["fingerprint"]

    if left_after < accumulate:
        with pytest.raises(RunFailed, match="left after 1 of the 2 batches of a round"):
            fingerprint(True)
    else:
        assert fingerprint(True) == fingerprint(False)
