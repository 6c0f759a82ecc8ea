"""Starts the processes of a job on this host, and sees to it that they end together.

A rank that ends with an error ends the job. One that is killed does not: the others know whether
they can go on without it, and end by themselves if they cannot.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType

import torch.distributed as dist

from scaledtrain.launching import FAILED, INTERRUPTED, MISUSED, PREEMPTED, STUCK, TERMINATED, tell

__all__ = ["SAVE_SECONDS", "UNWIND_SECONDS", "start_workers", "threads_for", "worker_command"]

_POLL_SECONDS = 0.05
_LEAVE_SECONDS = 300.0  # for the other ranks, when rank 0 has ended without an error
UNWIND_SECONDS = 5.0  # for ranks that were asked to end, before they are ended
SAVE_SECONDS = 600.0  # the same, if they save the run first

_Ranks = Sequence["subprocess.Popen[bytes]"]


def start_workers(
    module: str,
    arguments: Sequence[str],
    workers: int,
    unwind_seconds: float = UNWIND_SECONDS,
) -> None:
    """Run ``module.main()`` in new processes on this host.

    Args:
        module: what each process imports; its ``main`` is `guarded`.
        arguments: of the command line, for each.
        workers: how many.
        unwind_seconds: that they have to end by themselves, when they are asked to.

    Raises:
        SystemExit: the job failed, or a signal came; all have ended then.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"OMP_NUM_THREADS": str(threads_for(workers)), **os.environ}
    signal.set_wakeup_fd(-1)  # this process ends when its workers have, which takes what it takes
    ranks: list[subprocess.Popen[bytes]] = []
    with _Stop() as stop:
        try:
            for rank in range(workers):
                command = worker_command(module, arguments)
                own = _environment(rank, workers, store.port)
                ranks.append(subprocess.Popen(command, env={**environment, **own}))
            _wait(ranks, store, stop)
        finally:
            codes = _end(ranks, stop, unwind_seconds)
    if code := _exit_code(codes, stop.number):
        raise SystemExit(code)
    for rank, status in codes.items():
        if status < 0:
            tell(f"rank {rank} was lost ({_how(status)}); the others went on to the end")


def worker_command(module: str, arguments: Sequence[str]) -> list[str]:
    """The command line of a process that runs ``module.main()`` and ends with this one.

    Until it guards itself, Ctrl-C ends it without a traceback of its imports. And it is asked to
    end when this process is killed (1: PR_SET_PDEATHSIG), its imports included.
    """
    code = (
        "import ctypes, os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "if sys.platform == 'linux':\n"
        "    ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
        f"    if os.getppid() != {os.getpid()}: os._exit({TERMINATED})\n"
        f"from scaledtrain.local_job import _work; _work({module!r})"
    )
    return [sys.executable, "-u", "-c", code, *arguments]


def threads_for(workers: int) -> int:
    """With how many threads each of so many processes on this host computes, if nobody says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // workers)


def _environment(rank: int, workers: int, port: int) -> dict[str, str]:
    """Our own variables, and those that torchrun would set, for code that reads them."""
    common = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    own = {f"SCALEDTRAIN_{name}": value for name, value in common.items()}
    return {
        **common,
        **own,
        "LOCAL_WORLD_SIZE": str(workers),
        "SCALEDTRAIN_USE_AGENT_STORE": "True",
    }


class _Stop:
    """Takes note of Ctrl-C, SIGTERM and SIGUSR1."""

    number: int | None = None

    def __enter__(self) -> _Stop:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._old = {n: signal.signal(n, self._note) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number


def _work(module: str) -> None:
    """A worker's main, in its own process."""
    sys.argv[0] = module
    importlib.import_module(module).main()


def _wait(ranks: _Ranks, store: dist.Store, stop: _Stop) -> None:
    """Return when the job is over, or has to end."""
    deadline = float("inf")
    while stop.number is None and time.monotonic() < deadline:
        codes = [rank.poll() for rank in ranks]
        if None not in codes or any(code not in (None, PREEMPTED) and code > 0 for code in codes):
            return
        killed = any(code is not None and code < 0 for code in codes)
        if killed and not store.check(["scaledtrain/0/met"]):
            return  # the others would wait for it
        if (codes[0] is not None or PREEMPTED in codes) and deadline == float("inf"):
            deadline = time.monotonic() + _LEAVE_SECONDS
        time.sleep(_POLL_SECONDS)


def _end(ranks: _Ranks, stop: _Stop, unwind_seconds: float) -> dict[int, int]:
    """End those that still run; returns the exit codes."""
    for rank in ranks:
        with suppress(ProcessLookupError):
            if rank.poll() is None:
                rank.send_signal(stop.number or signal.SIGTERM)
    deadline = time.monotonic() + (unwind_seconds if stop.number else UNWIND_SECONDS)
    for rank in ranks:
        try:
            rank.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
    return {number: rank.returncode for number, rank in enumerate(ranks)}


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _exit_code(codes: Mapping[int, int], signal_number: int | None) -> int:
    """Of the job, which may have come to its end before the signal that asked it to did."""
    if signal_number is not None and any(codes.values()) and PREEMPTED not in codes.values():
        return 128 + signal_number
    if codes[0] != 0 or any(code > 0 for code in codes.values()):
        return _summary(codes)
    return 0


def _summary(codes: Mapping[int, int]) -> int:
    """The job's exit code; says what no rank could say."""
    for code in (INTERRUPTED, MISUSED, FAILED, STUCK, PREEMPTED):
        if code in codes.values():
            return code
    for rank, code in codes.items():
        if code not in (TERMINATED, -signal.SIGTERM):
            advice = "; out of memory? The system's log says" if code == -signal.SIGKILL else ""
            tell(f"error on rank {rank}: it ended ({_how(code)}), so the others were ended{advice}")
            return FAILED
    return TERMINATED
