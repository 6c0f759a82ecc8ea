"""The server among threads, each of which speaks for a worker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaledtrain.comm.protocols import Pulled
from scaledtrain.comm.serving.answering import serve_worker
from scaledtrain.comm.serving.host import ServerHost
from scaledtrain.comm.serving.requests import Request
from scaledtrain.comm.wires.wire import LocalWire, Message
from scaledtrain.errors import ClusterError, PeerLostError, WaitTimeoutError
from scaledtrain.replica import Replica
from scaledtrain.server import Admission, Asynchronous, Server, StaleSynchronous, Synchronous
from scaledtrain.server.operations import Kind

LONG = 30.0  # nothing here waits so long, unless something is wrong
SHORT = 0.4
ONE = [torch.ones(1, 1)]


class Exploding(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise ValueError("boom")


def make_server(
    workers: int, admission: Admission | None = None, optimizer: Any = torch.optim.SGD
) -> Server:
    """One parameter, 0 at first; a gradient of 1 takes 1 from it."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    replica = Replica(model, partial(optimizer, lr=1.0))
    return Server(replica.parameters, replica.updater, workers, admission)


def host_of(workers: int, admission: Admission | None = None, seconds: float = LONG) -> ServerHost:
    return ServerHost(make_server(workers, admission), seconds)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def waits(host: ServerHost, *workers: int) -> None:
    """Return when these workers, and no others, wait."""
    until(lambda: host._waiting == set(workers))


def pull(host: ServerHost, worker: int, attempt: int = 0) -> tuple[float, Pulled]:
    values: list[float] = []
    pulled = host.pull(worker, lambda ts: values.append(ts[0].item()), attempt=attempt)
    return values[0], pulled


def settle(host: ServerHost, worker: int, attempt: int = 0) -> float:
    values: list[float] = []
    host.settle(worker, lambda ts: values.append(ts[0].item()), attempt=attempt)
    return values[0]


class Recorded:
    """In place of the wire to another shard."""

    def __init__(self) -> None:
        self.sent: list[list[float]] = []

    def send(self, numbers: Sequence[float], tensors: Sequence[Tensor] | None = None) -> None:
        self.sent.append(list(numbers))


# Who is waited for


def test_a_silent_worker_is_given_up_and_taken_back_when_it_pulls(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = host_of(2, StaleSynchronous(0), SHORT)
    pull(host, 0)
    pull(host, 1)
    host.push(0, ONE, 0)
    signs: list[int] = []
    # Worker 0 is one step ahead of worker 1, which does nothing.
    host.pull(0, lambda tensors: None, lambda: signs.append(1))
    assert signs
    assert host._server.members == {0}
    assert "worker 1 is lost, and the other 1 go on without it" in caplog.text
    assert "worker 0 waited for it in pull, and it showed no sign of life for 0.4 s" in caplog.text
    host.push(1, ONE, 0)  # of a worker that takes no part: not used
    host.skip(1)
    assert (host.version(0), host._server.clocks[1]) == (1, 0)
    host.push(0, ONE, 1)
    value, pulled = pull(host, 1)
    assert (value, pulled.version, pulled.staleness) == (-2.0, 2, -1)
    assert not pulled.complete
    assert host._server.members == {0, 1}
    assert host._server.clocks == [2, 2]  # level with the slowest
    assert "worker 1 is back" in caplog.text


class Nobody(Admission):
    """Lets nobody go on after the first step."""

    def releases(self, worker: int, server: Any) -> bool:
        return server.clocks[worker] == 0


def test_all_waiting_for_each_other_ends_the_run(threads: ThreadPoolExecutor) -> None:
    host = host_of(2, Nobody(), SHORT)
    for worker in (0, 1):
        pull(host, worker)
        host.push(worker, ONE, 0)
    calls = [threads.submit(pull, host, worker) for worker in (0, 1)]
    for call in calls:
        with pytest.raises(
            WaitTimeoutError, match=r"\(steps so far: worker 0: 1, worker 1: 1\): the admission"
        ):
            call.result()
    assert isinstance(host.failure, WaitTimeoutError)


def test_while_a_worker_is_told_to_be_patient_nobody_waits_for_it_to_listen(
    threads: ThreadPoolExecutor,
) -> None:
    host = host_of(2, StaleSynchronous(0), SHORT)
    pull(host, 0)
    host.push(0, ONE, 0)
    asked, listens = threading.Event(), threading.Event()

    def still() -> None:
        asked.set()
        assert listens.wait(LONG)

    call = threads.submit(host.pull, 0, lambda tensors: None, still)
    assert asked.wait(LONG)
    pull(host, 1)
    host.push(1, ONE, 0)
    assert host.version(0) == 2
    listens.set()
    assert call.result().version == 2


# Meetings


def begin(host: ServerHost, threads: ThreadPoolExecutor, *workers: int) -> None:
    for call in [threads.submit(host.start, worker, None) for worker in workers]:
        call.result()


def test_a_worker_that_is_lost_is_not_awaited_in_meetings(threads: ThreadPoolExecutor) -> None:
    host = host_of(3)
    calls = [threads.submit(host.start, worker, 7) for worker in (0, 1)]
    waits(host, 0, 1)
    host.lose(2, "killed")
    for call in calls:
        call.result()
    assert host._server.last_version == 7
    host.push(0, ONE, 0)
    ends = [threads.submit(settle, host, 0)]
    waits(host, 0)
    ends.append(threads.submit(settle, host, 1))
    assert [end.result() for end in ends] == [-1.0, -1.0]


def test_one_that_was_lost_inside_a_meeting_is_awaited_when_it_is_back(
    threads: ThreadPoolExecutor,
) -> None:
    host = host_of(3)
    begin(host, threads, 0, 1, 2)
    before = threads.submit(settle, host, 2)
    waits(host, 2)
    host.replace(2, attempt=1)
    with pytest.raises(PeerLostError, match="a new process has taken the place of worker 2"):
        before.result()
    host.join(2, attempt=1)
    ends = [threads.submit(settle, host, worker) for worker in (0, 1)]
    waits(host, 0, 1)
    host.push(2, ONE, 0, attempt=1)
    assert settle(host, 2, attempt=1) == -1.0
    assert [end.result() for end in ends] == [-1.0, -1.0]


def test_latecomers_neither_wait_nor_set_a_limit(threads: ThreadPoolExecutor) -> None:
    host = host_of(3)
    first = threads.submit(host.start, 0, 9)
    waits(host, 0)
    host.lose(2, "killed")
    host.join(2)
    host.start(2, 5)
    assert not first.done()  # worker 1 is missing
    host.start(1, 9)  # the last: nobody waits for worker 2, which is under way
    first.result()
    assert host._server.last_version == 9
    ends = [threads.submit(settle, host, worker) for worker in (0, 1)]
    waits(host, 0, 1)
    settle(host, 2)  # at the end all meet
    for end in ends:
        end.result()
    again = threads.submit(host.start, 2, 5)  # a worker like all others
    waits(host, 2)
    begin(host, threads, 0, 1)
    again.result()


def test_a_worker_given_up_before_the_start_is_a_latecomer(threads: ThreadPoolExecutor) -> None:
    host = host_of(2, seconds=SHORT)
    host.start(0, 9)  # gives up worker 1
    host.start(1, 5)
    assert host._server.last_version == 9
    assert host._server.members == {0, 1}


def test_a_worker_without_which_the_others_ended_does_not_wait(
    threads: ThreadPoolExecutor,
) -> None:
    host = host_of(2, seconds=SHORT)
    begin(host, threads, 0, 1)
    host.push(1, ONE, 0)
    assert settle(host, 0) == -1.0  # gives up worker 1
    assert settle(host, 1) == -1.0
    host = host_of(2)
    begin(host, threads, 0, 1)
    host.lose(1, "stuck")
    settle(host, 0)
    host.start(0, None)  # the next fit, alone
    host.push(0, ONE, 0)
    assert settle(host, 1) == -1.0
    host.start(1, None)  # under way already
    end = threads.submit(settle, host, 0)
    waits(host, 0)
    settle(host, 1)
    end.result()


def test_a_stop_is_heard_by_all_and_over_with_the_next_fit(threads: ThreadPoolExecutor) -> None:
    host = host_of(2, Synchronous())
    begin(host, threads, 0, 1)
    pull(host, 0)
    host.push(0, ONE, 0)
    call = threads.submit(pull, host, 0)  # waits for worker 1's gradient
    waits(host, 0)
    host.stop()
    assert call.result()[1].stopped
    assert pull(host, 1)[1].stopped
    for end in [threads.submit(settle, host, worker) for worker in (0, 1)]:
        end.result()
    begin(host, threads, 0, 1)
    assert not pull(host, 1)[1].stopped


# What is told


def test_the_fastest_of_those_alive_is_told() -> None:
    host = host_of(3)
    host.push(0, ONE, 0, speed=2.0)
    host.push(1, ONE, 1, speed=5.0)
    assert pull(host, 2)[1].fastest == 5.0
    host.push(1, ONE, 2, speed=1.0)
    assert pull(host, 2)[1].fastest == 2.0
    host.lose(0, "killed")
    assert pull(host, 2)[1].fastest == 1.0


def test_a_staleness_is_told_once() -> None:
    host = host_of(2)
    host.push(0, ONE, 0)
    host.push(1, ONE, 0)  # one update was made since version 0
    assert [pull(host, 1)[1].staleness for _ in range(2)] == [1, -1]


# What ends it


def test_a_hundred_faults_in_a_row_end_the_run(threads: ThreadPoolExecutor) -> None:
    host = host_of(3, StaleSynchronous(150))
    for _ in range(99):
        host.reject(0, 0, "its gradient holds NaN or infinity")
    host.push(0, ONE, 0)  # a good one: they are counted anew
    for _ in range(60):
        host.reject(0, 0, "its gradient holds NaN or infinity")
    waiting = threads.submit(pull, host, 0)  # 160 steps ahead
    waits(host, 0)
    for _ in range(39):
        host.reject(1, 0, "its gradient does not fit the parameters")
    with pytest.raises(ClusterError, match="the last 100 gradients were all rejected.*worker 1: "):
        host.reject(1, 0, "its gradient does not fit the parameters")
    with pytest.raises(ClusterError, match="the last 100 gradients"):
        waiting.result()
    assert host.failure is not None


def test_a_failing_optimizer_ends_all(threads: ThreadPoolExecutor) -> None:
    host = ServerHost(make_server(2, Synchronous(), Exploding), LONG)
    pull(host, 0)
    host.push(0, ONE, 0)
    waiting = threads.submit(pull, host, 0)
    waits(host, 0)
    with pytest.raises(ValueError, match="boom"):
        host.push(1, ONE, 0)
    with pytest.raises(ClusterError, match="the parameter server stopped: boom"):
        waiting.result()
    with pytest.raises(ClusterError, match="the parameter server stopped: boom"):
        host.version(0)


def test_closing_ends_those_that_wait(threads: ThreadPoolExecutor) -> None:
    host = host_of(2)
    waiting = threads.submit(host.start, 0, None)
    waits(host, 0)
    host.close()
    with pytest.raises(ClusterError, match="the rank that holds the parameter server has left"):
        waiting.result()


# Other shards, and processes that took another's place


def pulled(version: int, staleness: int = -1, flags: int = 2) -> list[float]:
    """What an answer holds: the learning rate is 1, no speed is known; flag 2: nobody was lost."""
    return [version, staleness, 1.0, flags, 0.0]


def test_shards_are_told_in_order_and_of_what_will_not_be_used() -> None:
    host, shard = host_of(2), Recorded()
    host.add_shard(shard)  # type: ignore[arg-type]
    pull(host, 1)
    host.push(1, ONE, 0)
    host.lose(1, "stuck")
    host.push(1, ONE, 1)
    assert shard.sent == [
        [Kind.PULL, 1, *pulled(0)],
        [Kind.PUSH, 1, 0, True],
        [Kind.REMOVE, 1, -1, False],
        [Request.DISCARD, 1],
    ]


def test_who_has_only_ended_a_run_is_told_from_who_is_lost(threads: ThreadPoolExecutor) -> None:
    """Of worker 1 something is kept until it is lost, though it had left the run before."""
    host, shard = host_of(2), Recorded()
    host.add_shard(shard)  # type: ignore[arg-type]
    end = threads.submit(settle, host, 1)
    waits(host, 1)
    host.replace(1, attempt=1)
    with pytest.raises(PeerLostError):
        end.result()
    settle(host, 0)
    assert shard.sent == [
        [Kind.REMOVE, 1, 0, False],
        [Kind.REMOVE, 1, -1, False],
        [Request.JOIN, 1, 1],
        [Kind.REMOVE, 0, 0, False],
        [Kind.READ, 0, *pulled(0, flags=0)],
        [Kind.ADD, 0, -1, False],
    ]


def test_a_shard_that_answers_for_this_one_is_told_all_that_workers_hear(
    threads: ThreadPoolExecutor,
) -> None:
    host, shard, silent = host_of(2, StaleSynchronous(0), seconds=4.0), Recorded(), Recorded()
    host.add_shard(shard, relays=True)  # type: ignore[arg-type]
    host.add_shard(silent)  # type: ignore[arg-type]
    host.push(1, ONE, 0)
    waiting = threads.submit(pull, host, 1)  # one step ahead of worker 0
    until(lambda: [Request.STILL, 1] in shard.sent)
    assert host.version(0) == 1
    host.push(0, ONE, 0)
    waiting.result()
    host.lose(1, "its connection broke")
    host.fail(ClusterError("over"))
    host.fail(ClusterError("said before"))
    silent_of = [numbers for numbers in shard.sent if numbers[0] in set(Kind)]
    assert silent.sent == silent_of
    assert [numbers for numbers in shard.sent if numbers != [Request.STILL, 1]] == [
        [Kind.PUSH, 1, 0, True],
        [Request.VERSION, 0, 1],
        [Kind.PUSH, 0, 0, True],
        [Kind.PULL, 1, *pulled(2, staleness=0)],
        [Kind.REMOVE, 1, -1, False],
        [Request.FAILED, 1],
        [Request.FAILED, -1],
    ]


def test_what_a_process_asked_for_before_it_was_replaced_is_not_done(
    threads: ThreadPoolExecutor,
) -> None:
    host, shard = host_of(2, StaleSynchronous(0)), Recorded()
    host.add_shard(shard)  # type: ignore[arg-type]
    host.push(1, ONE, 0)
    waiting = threads.submit(pull, host, 1)  # one step ahead of worker 0
    waits(host, 1)
    host.replace(1, attempt=1)
    with pytest.raises(PeerLostError):
        waiting.result()
    with pytest.raises(PeerLostError):
        host.push(1, ONE, 1)
    host.join(1, attempt=1)
    host.lose(1, "its connection broke")  # the old one's
    assert host._server.members == {0, 1}
    assert shard.sent == [
        [Kind.PUSH, 1, 0, True],
        [Kind.REMOVE, 1, -1, False],
        [Request.JOIN, 1, 1],
        [Kind.ADD, 1, 1, False],
    ]


# The threads that answer


def served(
    host: ServerHost, worker: int, threads: ThreadPoolExecutor
) -> tuple[LocalWire, Future[None]]:
    """The worker's end of a wire, and the thread at the other."""
    like = [torch.empty(1, 1)]
    here, there = LocalWire.pair((like, like), (1, 1), ("the worker", "the server"), LONG)
    return there, threads.submit(serve_worker, host, worker, 0, here, lambda sent: sent)


def test_a_worker_hears_of_a_failure_when_it_asks_and_not_before(
    threads: ThreadPoolExecutor,
) -> None:
    """It may be sending: an answer that nobody asked for would make both ends wait."""
    host = ServerHost(make_server(1, None, Exploding), LONG)
    wire, thread = served(host, 0, threads)
    for _ in range(2):
        wire.send([Request.PUSH, 0, 0.0], ONE)
    wire.send([Request.SKIP])
    until(lambda: host.failure is not None)
    wire.send([Request.PULL])
    assert wire.receive(LONG).numbers[0] == Request.FAILED
    wire.close()
    thread.result()


def test_a_worker_that_leaves_inside_a_fit_is_not_awaited(threads: ThreadPoolExecutor) -> None:
    host = host_of(2)
    wire, thread = served(host, 1, threads)
    wire.send([Request.START, 4])
    host.start(0, 4)
    assert wire.receive(LONG).numbers[0] == Request.START
    wire.send([Request.CLOSE])
    settle(host, 0)
    thread.result()
    assert host._roll.alive == {0}


class Deaf:
    """A wire to a worker that asks for the parameters and does not take them."""

    def __init__(self) -> None:
        self._requests = [Request.START, Request.PULL]

    def receive(self, timeout_seconds: float | None) -> Message:
        return Message([self._requests.pop(0), -1.0, 0.0], None)

    def write(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors

    def send(self, numbers: Sequence[float], tensors: Sequence[Tensor] | None = None) -> None:
        if tensors is not None:
            raise WaitTimeoutError("worker 1 does not take it")


def test_a_worker_that_does_not_take_its_answer_is_lost_alone(
    threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    host = host_of(2, Asynchronous())
    thread = threads.submit(serve_worker, host, 1, 0, Deaf(), lambda sent: sent)  # type: ignore[arg-type]
    host.start(0, None)
    thread.result()
    assert host.failure is None
    assert host._roll.alive == {0}
    assert "worker 1 does not take it" in caplog.text
    assert settle(host, 0) == 0.0
