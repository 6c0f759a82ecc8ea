"""How a command starts, and how it ends whatever happens.

`guarded` runs an entry point so that an error is told once, by the rank it happened on, and every
process ends within seconds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from scaledtrain.errors import ClusterError, ConfigError, RendezvousError, ScaledTrainError
from scaledtrain.ranks import RankInfo
from scaledtrain.rendezvous import life_of

__all__ = ["Interrupted", "guarded", "is_launched", "tell", "workers_to_start"]

FAILED, MISUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143  # exit codes
STUCK = 70  # ended by the watchdog, to be started again
PREEMPTED = 75  # saved after a signal: to be started again (EX_TEMPFAIL of sysexits.h)

_RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # ranks that never met have no life of their own
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_UNWIND_SECONDS = 3.0  # for a rank that was asked to end, before it is ended
_ROOT_CAUSE_SECONDS = 1.5  # for the rank that failed first to say so
_STORE_SECONDS = 2.0  # for the job's store to answer


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a message about what it interrupted."""


def guarded(main: Callable[[], None]) -> None:
    """Run ``main``; what ends it is told once for the whole job, and this process ends.

    * An error of this library: one line, with the rank. Any other: its traceback.
    * Ranks that fail because another one did say nothing.
    * Ctrl-C: one line. SIGTERM: nothing.

    Exit codes: 0, 1 after an error, 2 if it is in the config, 70 if the watchdog ended a run, 75 if
    a signal ended one that was saved first, 130 after Ctrl-C, 143 after SIGTERM.
    A rank of a job with several ranks does not wait for the others, nor for its own threads.
    """
    _end_with_launcher()
    with _StopSignals() as signals:
        try:
            main()
            return
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            caught: BaseException = error  # bound to the end: its frames hold rank 0's store
        ended_by = _root(caught)
        if _is_consequence(ended_by):
            try:
                time.sleep(_ROOT_CAUSE_SECONDS)
            except (KeyboardInterrupt, SystemExit) as error:
                ended_by = error
        signals.done()
        if isinstance(ended_by, SystemExit):
            _leave(ended_by.code)
        _tell(ended_by)
        _leave(_exit_code(ended_by))


def _end_with_launcher() -> None:
    """Ask for SIGTERM when the torchrun that started this process is killed: nobody else ends it.

    The run is then saved as after any SIGTERM, if it is one that is.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def workers_to_start(workers: int | None) -> int:
    """How many processes this one is to start instead of working itself; 0: it works itself.

    Args:
        workers: how many the config asks for, if it does.

    Raises:
        ConfigError: a launcher started this process in a job of another size.
    """
    if workers is None:
        return 0
    if workers < 1:
        raise ConfigError(f"workers is {workers}; it is the number of processes, >= 1")
    if not is_launched():
        return workers if workers > 1 else 0
    size = RankInfo.from_environment().size
    if size != workers:
        raise ConfigError(
            f"workers is {workers}, but a launcher (torchrun, srun) started this process as one of "
            f"{size}; set workers={size} (or null), or let the launcher start {workers}"
        )
    return 0


def is_launched() -> bool:
    """Whether a launcher (torchrun, srun, ours) started this process as one of several."""
    env = os.environ
    # A step of one task is what an interactive shell under Slurm runs in.
    by_slurm = env.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    by_one = "SCALEDTRAIN_RANK" in env
    return by_one or ("RANK" in env and "WORLD_SIZE" in env) or by_slurm


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return MISUSED if isinstance(error, ConfigError) else FAILED


def _root(error: BaseException) -> BaseException:
    """What happened, where an error only says that something happened elsewhere in this process."""
    while type(error) is ClusterError and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_consequence(error: BaseException) -> bool:
    """Whether an error most likely follows from another rank's."""
    if isinstance(error, RendezvousError):
        return False
    return isinstance(error, (ClusterError, dist.DistError))


def _tell(error: BaseException) -> None:
    """Show an error, unless another rank of the job did."""
    try:
        info = RankInfo.from_environment()
    except (ScaledTrainError, ValueError, KeyError):  # which may be what the error is about
        info = RankInfo()
    first = _is_first(info) if info.size > 1 else True
    if first is None:  # nobody can be asked
        # A config is wrong on every rank alike; a peer that died has told why.
        is_theirs = info.rank != 0 and isinstance(error, ConfigError)
        first = not (is_theirs or _is_consequence(error))
    if first:
        tell(_describe(error, info))
    if info.rank == 0 and info.size > 1 and not info.has_agent:
        time.sleep(_ROOT_CAUSE_SECONDS)  # this process has the store that the others ask


def _is_first(info: RankInfo) -> bool | None:
    """Whether no rank of the job has told an error yet; None if the job's store does not answer."""
    answers: list[bool] = []

    def ask() -> None:
        address = (info.master_address, info.master_port)
        with suppress(OSError, RuntimeError):
            socket.create_connection(address, _STORE_SECONDS).close()  # or torch writes warnings
            store = dist.TCPStore(*address, wait_for_workers=False)
            told = f"scaledtrain/{life_of(store)}/told/{os.environ.get(_RESTARTS, '0')}"
            first = store.compare_set(told, "", str(info.rank))
            answers.append(int(first) == info.rank)

    # In a thread, since there is no limit to the wait if another program listens on that port.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_STORE_SECONDS)
    return answers[0] if answers else None


def _describe(error: BaseException, info: RankInfo) -> str:
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    where = f"error on rank {info.rank}" if info.size > 1 else "error"
    if isinstance(error, ScaledTrainError):
        return f"{where}: {error}"
    return f"{where}:\n{''.join(traceback.format_exception(error)).rstrip()}"


def tell(text: str) -> None:
    """Write a line for people to read; nobody need be there to read it."""
    with suppress(OSError, ValueError):  # nobody listens any more
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _leave(code: object) -> NoReturn:
    """End this process: at once if it is one of several, since its threads may wait for others."""
    if isinstance(code, str):
        tell(code)
    number = code if isinstance(code, int) else 0 if code is None else FAILED
    if not is_launched():
        sys.exit(number)
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(number)


class _StopSignals:
    """Ctrl-C raises KeyboardInterrupt, SIGTERM SystemExit; a main thread that is stuck is ended.

    Python runs signal handlers between two instructions of the main thread, so never while that
    waits inside a collective. A second thread learns of the signal at once.
    """

    def __enter__(self) -> _StopSignals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._stop) for number in _STOP_SIGNALS}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def done(self) -> None:
        """The main thread ends by itself, and signals disturb it no more."""
        self._done.set()
        self._ignore()

    def _ignore(self) -> None:
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._ignore()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(TERMINATED)

    def _watch(self) -> None:
        while caught := self._reader.recv(1):
            if caught[0] in _STOP_SIGNALS and not self._done.wait(_UNWIND_SECONDS):
                if caught[0] == signal.SIGINT:
                    _tell(KeyboardInterrupt())
                os._exit(128 + caught[0])
