"""Rounds in which the server's optimizer must not step, or steps out of all bounds."""

import torch

MOMENTUM = {"kind": "torch.optim.SGD", "lr": 1.0, "momentum": 0.9, "weight_decay": 0.1}
WORKERS = (0, 1, 2)


def test_a_round_that_every_worker_skipped_moves_no_parameter_and_no_momentum(rig):
    one, other = rig(optimizer=MOMENTUM).start(), rig(optimizer=MOMENTUM).start()
    for run in (one, other):
        run.round(dict.fromkeys(WORKERS, 0.5))
    before = one.w.clone()
    one.round(dict.fromkeys(WORKERS, 0.0), skipped=1)
    assert torch.equal(one.w, before)
    for run in (one, other):
        run.round(dict.fromkeys(WORKERS, 0.25))
    assert torch.equal(one.w, other.w)


def test_residuals_that_arrive_in_a_skipped_round_go_through_the_optimizer(rig):
    """They are owed gradients, or the differences of the steps that did happen; never steps of the server's own."""
    one, other = rig(optimizer=MOMENTUM).start(), rig(optimizer=MOMENTUM).start()
    for run, skipped in ((one, 1), (other, 0)):
        run.round(dict.fromkeys(WORKERS, 0.5))
        run.round(dict.fromkeys(WORKERS, 0.25), skipped=skipped)
    assert torch.equal(one.w, other.w)


def test_buffers_move_in_a_skipped_round_and_parameters_do_not(rig):
    one = rig(optimizer=MOMENTUM).start()
    one.round(dict.fromkeys(WORKERS, 0.5))
    before, buffers = one.w, torch.zeros(25)
    buffers[23:] = 1.0
    one.round(dict.fromkeys(WORKERS, buffers), skipped=1)
    assert torch.equal(one.w, before - 3 * buffers)


def test_a_round_that_one_worker_skipped_is_stepped(rig):
    run = rig(optimizer=MOMENTUM).start()
    before = run.w.clone()
    tickets = [run.send(run.push(worker, 0.0 if worker else 1.0, skipped=worker)) for worker in WORKERS]
    assert all(not run.waits(ticket) for ticket in tickets)
    assert not torch.equal(run.w, before)


def test_a_step_that_is_not_finite_ends_the_run_at_the_last_whole_version(rig):
    run = rig(optimizer={**MOMENTUM, "lr": 1e38}).start()
    version, position, before = run.version, run.vitals.position, run.w.clone()
    tickets = [run.send(run.push(worker, 1e6)) for worker in WORKERS]
    for ticket in tickets:
        assert run.answer(ticket).reason == "finished"
        assert "'weight' holds NaN or Inf, after the server's optimizer" in run.answer(ticket).detail
    assert run.vitals.rejected == {"not_finite": 1}
    assert (run.version, run.server.state.position) == (version, position)
    assert torch.equal(run.w, before)
    assert run.server.finished
