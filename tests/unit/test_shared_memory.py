"""Two threads stand for two ranks: memory, semaphores and the watch over processes."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from scaledtrain.comm import semaphore, shared_memory
from scaledtrain.comm.process import Process
from scaledtrain.comm.semaphore import Semaphore
from scaledtrain.comm.shared_memory import SharedSegment
from scaledtrain.comm.wires.wiring import Job, open_wire
from scaledtrain.errors import ConfigError, PeerLostError, RendezvousError, WaitTimeoutError

pytestmark = pytest.mark.skipif(not shared_memory.available(), reason="needs Linux")

Pair = tuple[SharedSegment, SharedSegment]


def connect_two(n_bytes: int = 4096, n_semaphores: int = 2) -> list[SharedSegment | None]:
    store = dist.HashStore()

    def one(rank: int) -> SharedSegment | None:
        return SharedSegment.connect(
            store, "test", rank, 2, n_bytes=n_bytes, n_semaphores=n_semaphores, timeout_seconds=10
        )

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(one, range(2)))


@pytest.fixture
def pair() -> Iterator[Pair]:
    a, b = connect_two()
    assert a is not None
    assert b is not None
    yield a, b
    a.close()
    b.close()


def mappings() -> int:
    with open("/proc/self/maps") as file:
        return sum("memfd:scaledtrain" in line for line in file)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Memory


def test_what_one_writes_the_other_reads(pair: Pair) -> None:
    a, b = pair
    a.tensor(64, [2, 3], torch.float32).copy_(torch.arange(6.0).view(2, 3))
    assert b.tensor(64, [2, 3], torch.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert a.memory.data_ptr() != b.memory.data_ptr()


def test_memory_is_zero_at_first_and_starts_at_a_page(pair: Pair) -> None:
    a, _ = pair
    assert not a.memory.any()
    assert a.memory.data_ptr() % 4096 == 0


def test_a_tensor_has_the_asked_dtype_and_may_be_empty_or_a_scalar(pair: Pair) -> None:
    a, b = pair
    a.tensor(8, [], torch.int64).fill_(7)
    assert b.tensor(8, [], torch.int64).item() == 7
    assert a.tensor(4096, [0, 5], torch.bfloat16).shape == (0, 5)


@pytest.mark.parametrize("offset", [-64, 2, 4096, 4096 - 4 * 3])
def test_a_tensor_that_does_not_fit_is_refused(pair: Pair, offset: int) -> None:
    with pytest.raises(ConfigError, match="does not fit into a shared segment of 4096 bytes"):
        pair[0].tensor(offset, [4], torch.float32)


def test_memory_is_given_back_with_the_last_tensor_of_it() -> None:
    before = mappings(), descriptors()
    a, b = connect_two()
    assert a is not None
    assert b is not None
    kept = a.tensor(0, [4], torch.float32)
    a.close()
    b.close()
    assert mappings() == before[0] + 1
    kept.fill_(1.0)  # still there
    del kept
    assert (mappings(), descriptors()) == before


def test_the_same_name_may_be_connected_again() -> None:
    store = dist.HashStore()
    for _ in range(2):
        segment = SharedSegment.connect(store, "test", 0, 1, n_bytes=1, timeout_seconds=5)
        assert segment is not None
        assert not segment.memory.any()
        segment.memory.fill_(1)
        segment.close()


# The verdict is the same for all


def cannot(*_: object) -> object:
    raise OSError("out of file descriptors")


def offers_another_token(create: Callable[..., tuple[int, object, dict[str, object]]]) -> object:
    def changed(*args: object) -> object:
        fd, mapping, offer = create(*args)
        return fd, mapping, {**offer, "token": bytes(32).hex()}

    return changed


@pytest.mark.parametrize(
    ("what", "replacement", "why"),
    [
        ("_create", cannot, "rank 0 could not make shared memory: out of file descriptors"),
        ("_open", cannot, "rank 1: out of file descriptors"),
        ("_create", offers_another_token(shared_memory._create), "rank 1: .*holds another token"),
        ("available", lambda: False, "rank 0 could not make .*needs Linux"),
    ],
)
def test_where_one_cannot_share_none_does(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
    replacement: object,
    why: str,
) -> None:
    before = mappings(), descriptors()
    monkeypatch.setattr(shared_memory, what, replacement)
    with caplog.at_level(logging.INFO, "scaledtrain"):
        assert connect_two() == [None, None]
    assert len(caplog.records) == 2
    for record in caplog.records:
        assert re.search(why, record.getMessage())
    caplog.clear()
    assert (mappings(), descriptors()) == before


def test_another_size_is_another_memory(caplog: pytest.LogCaptureFixture) -> None:
    store = dist.HashStore()

    def one(rank: int) -> SharedSegment | None:
        return SharedSegment.connect(
            store, "test", rank, 2, n_bytes=4096 * (rank + 1), timeout_seconds=10
        )

    with caplog.at_level(logging.INFO, "scaledtrain"), ThreadPoolExecutor(2) as threads:
        assert list(threads.map(one, range(2))) == [None, None]
    assert "is not the memory that was meant" in caplog.text


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(RendezvousError, match=r"rank 0 waited 0.2 s .* with rank 1, which did not"):
        SharedSegment.connect(dist.HashStore(), "test", 0, 2, n_bytes=1, timeout_seconds=0.2)
    assert mappings() == 0


# Semaphores


def test_every_post_is_taken_once(pair: Pair) -> None:
    a, b = pair
    assert not b.semaphore(0).try_wait()
    a.semaphore(0).post()
    a.semaphore(0).post()
    assert not b.semaphore(1).try_wait()
    assert b.semaphore(0).try_wait()
    assert b.semaphore(0).wait(1.0)
    assert not b.semaphore(0).try_wait()


def test_a_wait_ends_after_its_time(pair: Pair) -> None:
    start = time.monotonic()
    assert not pair[0].semaphore(0).wait(0.05)
    assert 0.04 < time.monotonic() - start < 1.0


def test_it_works_with_the_clock_of_older_c_libraries(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = semaphore._LIBRARY
    assert library is not None
    timed_wait = semaphore.ctypes.CDLL(None).sem_timedwait
    timed_wait.argtypes = [
        semaphore.ctypes.c_void_p,
        semaphore.ctypes.POINTER(semaphore._TimeSpec),
    ]
    older = library._replace(timed_wait=timed_wait, clock=time.CLOCK_REALTIME)
    one = pair[0].semaphore(0)
    monkeypatch.setattr(one, "_library", older)
    assert not one.wait(0.02)
    one.post()
    assert one.wait(5.0)


def test_a_waiting_thread_lets_others_run_and_is_woken(pair: Pair) -> None:
    a, b = pair
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(a.wait, a.semaphore(1), 1, "a test", 30)
        time.sleep(0.02)
        b.semaphore(1).post()
        waiting.result(5)


def test_a_signal_interrupts_the_main_thread(pair: Pair) -> None:
    def interrupt() -> None:
        time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    start = time.monotonic()
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        pair[0].wait(pair[0].semaphore(0), 1, "a test", 30)
    thread.join()
    assert time.monotonic() - start < 5


# Waiting for a rank


def test_a_wait_that_is_too_long_says_who_waits_for_whom_and_what_to_do(pair: Pair) -> None:
    with pytest.raises(WaitTimeoutError) as raised:
        pair[0].wait(pair[0].semaphore(0), 1, "all_reduce", 0.15)
    message = str(raised.value)
    assert message.startswith(f"rank 0 waited in all_reduce for rank 1 (pid {os.getpid()}) for 0.")
    assert "is alive" in message
    assert "raise timeout_seconds (now 0.15)" in message


def test_a_rank_that_left_is_not_waited_for(pair: Pair) -> None:
    a, b = pair
    b.semaphore(0).post()
    b.close()
    a.wait(a.semaphore(0), 1, "pull", 30)  # posted before it left
    with pytest.raises(
        PeerLostError, match="rank 0 waited in pull for rank 1 .*it closed its side"
    ):
        a.wait(a.semaphore(0), 1, "pull", 30)


def test_a_rank_that_failed_is_not_waited_for(pair: Pair) -> None:
    a, b = pair
    b.leave(failed=True)
    with pytest.raises(PeerLostError, match="gave up after an error of its own"):
        a.wait(a.semaphore(0), 1, "pull", 30)


def test_closing_ends_the_waits_of_other_threads(pair: Pair) -> None:
    a, _ = pair
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(a.wait, a.semaphore(0), 1, "pull", 30)
        time.sleep(0.02)
        a.close()
        with pytest.raises(PeerLostError, match="closed the segment"):
            waiting.result(5)


# Processes


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_killed_process_is_dead_at_once_even_if_nobody_has_noticed(
    other: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, pidfd: bool
) -> None:
    if not pidfd:
        monkeypatch.setattr(os, "pidfd_open", cannot)
    process = Process(other.pid)
    assert process.alive()
    other.kill()
    deadline = time.monotonic() + 5
    while process.alive():
        assert time.monotonic() < deadline
    assert os.path.exists(f"/proc/{other.pid}")  # a zombie: nobody has waited for it
    process.close()
    assert not process.alive()


def test_a_process_that_was_never_there_is_dead() -> None:
    assert not Process(2**22 + 1).alive()


def test_a_semaphore_keeps_its_memory(pair: Pair) -> None:
    a, _ = pair
    semaphore: Semaphore = a.semaphore(0)
    a.close()
    semaphore.post()
    assert semaphore.try_wait()


def test_a_wire_through_shared_memory_needs_no_client_of_the_store_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each TCPStore client looks addresses up in DNS, at both ends; a lost answer costs 5 s.
    store, cloned = dist.HashStore(), []
    monkeypatch.setattr(dist.PrefixStore, "clone", cloned.append)

    def one(end: int) -> float:
        job = Job(dist.PrefixStore("job", store), end, 2, True, torch.device("cpu"), 10.0)
        like = [torch.zeros(1)], [torch.zeros(1)]
        wire = open_wire(job, "wire", end, like, (1, 1), (0, 1))
        wire.send([end], [torch.tensor([1.0 + end])])
        message = wire.receive(10.0)
        assert message.tensors is not None
        value = message.tensors[0].item()
        wire.release()
        wire.close()
        return value

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(one, range(2))) == [2.0, 1.0]  # 1 + 1 from end 1, 1 + 0 from end 0
    assert cloned == []
