"""The inline backend: workers on threads, one running at a time, in an order that never changes."""

import threading
import time

import pytest

from protocol import messages
from protocol.errors import RunStopped
from protocol.messages import Entry, Refusal, Welcome
from ps.inline import InlineServer, InlineTransport, first_come


class Crew:
    """Workers on threads; ``events`` is what happened, in order."""

    def __init__(self, one, work, order=first_come):
        self.one, self.events, self.errors = one, [], []
        self.workers = one.server.plan.workers
        self.shell = InlineServer(one.server, self.workers, order=order)
        self.threads = [threading.Thread(target=self.run, args=(worker, work)) for worker in self.workers]

    def run(self, worker, work):
        transport = InlineTransport(self.shell, worker)
        try:
            self.shell.enter(worker)
            work(self, worker, lambda message: [messages.parse(f) for f in transport.call(message.pack())])
        except RunStopped as error:
            self.errors.append((worker, str(error)))
        self.shell.exit(worker)

    def go(self):
        for thread in self.threads:
            thread.start()
        self.shell.begin()
        self.wait()
        return self

    def wait(self):
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()


def trains(crew, worker, call):
    """Three rounds; every step of every worker is an event."""
    crew.events.append((worker, "joins"))
    (welcome,) = call(crew.one.join(worker))
    assert isinstance(welcome, Welcome)
    for version in range(3):
        crew.events.append((worker, version))
        (entry,) = call(crew.one.push(worker, worker + 1.0, version=version))
        assert isinstance(entry, Entry)
        assert entry.version == version + 1
    crew.events.append((worker, "leaves"))


def test_rounds_close_and_the_order_of_events_is_the_same_every_time(rig):
    crews = [Crew(rig(rounds=3), trains).go() for _ in range(5)]
    assert all(crew.one.server.finished and not crew.errors for crew in crews)
    assert len({tuple(crew.events) for crew in crews}) == 1
    assert len({crew.one.w.numpy().tobytes() for crew in crews}) == 1
    assert len(crews[0].events) == 15


def test_who_runs_next_can_be_chosen(rig):
    def last_come(ready):
        assert set(ready) <= {0, 1, 2}
        return ready[-1]

    asynchronous = {"mode": "async", "buffer": 1}
    alike, turned = [Crew(rig(rounds=9, server=asynchronous), hurries, order) for order in (first_come, last_come)]
    for crew in (alike.go(), turned.go()):
        assert crew.one.server.finished
        assert not crew.errors
    assert alike.events == [worker for _ in range(3) for worker in (0, 1, 2)]
    assert turned.events == [2] * 9, "whoever was answered last goes on"


def hurries(crew, worker, call):
    """Pushes until the run has ended; every push is an event."""
    (welcome,) = call(crew.one.join(worker))
    version = welcome.version
    while not crew.one.server.finished:
        crew.events.append(worker)
        version = call(crew.one.push(worker, version=version))[-1].version


def test_only_one_worker_runs_at_a_time(rig):
    running, most = [], []

    def busy(worker):
        running.append(worker)
        time.sleep(0.001)  # any thread that could run would
        most.append(len(running))
        running.remove(worker)

    def work(crew, worker, call):
        busy(worker)
        call(crew.one.join(worker))
        for version in range(5):
            busy(worker)
            call(crew.one.push(worker, version=version))

    Crew(rig(rounds=5), work).go()
    assert most == [1] * 18


def test_when_nobody_is_left_to_cause_an_answer_the_rest_are_told(rig):
    def work(crew, worker, call):
        call(crew.one.join(worker))
        if worker != 1:  # worker 1 ends without a push or a farewell
            call(crew.one.push(worker))

    crew = Crew(rig(), work).go()
    assert sorted(crew.errors) == [(w, "the run ended while this worker was waiting") for w in (0, 2)]


def test_a_run_that_is_stopped_while_workers_join_ends_for_all_of_them(rig):
    answers = {}

    def work(crew, worker, call):
        if worker == 2:  # the others wait already
            crew.shell.stop()
        (answers[worker],) = call(crew.one.join(worker))

    crew = Crew(rig(), work).go()
    assert not crew.errors
    assert all(isinstance(answer, Refusal) and answer.reason == "finished" for answer in answers.values())
    assert sorted(answers) == [0, 1, 2]


def test_a_cancelled_run_ends_for_everyone_who_waits(rig):
    def work(crew, worker, call):
        call(crew.one.join(worker))
        if worker == 2:
            crew.shell.cancel()
        call(crew.one.push(worker))

    crew = Crew(rig(rounds=1), work).go()
    assert {worker for worker, _ in crew.errors} >= {0, 1}
    with pytest.raises(RunStopped):
        crew.shell.enter(0)


def test_a_worker_of_a_cancelled_run_is_told_so_every_time_that_it_asks(rig):
    shell, told = InlineServer(rig(workers=(0,)).server, (0,)), []
    shell.cancel()

    def ask():
        for _ in range(2):
            with pytest.raises(RunStopped):
                shell.enter(0)
            told.append(0)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(10)
    assert told == [0, 0]
