"""Run a function in several processes, as torchrun would, and collect what they return.

Each heads a session of its own, so that one kill takes everything that a rank has started. On Linux
they are forked from processes that have imported torch. Fresh ones are plain subprocesses: the
environment is right before any import, and nothing that is needed before the function is unpickled
imports torch.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fork_server import ForkedProcess, ForkServer
from tests.leaks import nothing_left_behind

POLL_SECONDS = 0.01
SETTLE_SECONDS = 0.05
FRESH = sys.platform != "linux"  # elsewhere not all that torch uses survives a fork
HASH_SEEDS = 2  # ranks that are neighbours iterate over a set in different orders, as fresh ones do

Process = subprocess.Popen[bytes] | ForkedProcess


class RankFailed(RuntimeError):
    """A rank ended without an exception, or (as a cause) the traceback of its exception."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_seconds: float = 60.0,
    killed: Collection[int] = (),
    fresh: bool = FRESH,
) -> list[Any]:
    """Call `function(*args)` in `world_size` processes; return what they returned, by rank.

    Each process finds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT
    in its environment, computes with one thread and treats warnings as the calling test does. It
    may leave nothing behind, a process group included.

    Args:
        function: defined at the top of a module.
        world_size: number of processes.
        args: the same for all ranks; like the returned values, anything that pickles.
        timeout_seconds: for all of it, starting included.
        killed: ranks that the test kills; their value is None.
        fresh: start them anew, which takes about 6 s of a core for each that trains with torch.

    Raises:
        Exception: what a rank raised, the first in time, its traceback as the cause.
        RankFailed: a rank was killed, or ended without returning.
        TimeoutError: some ranks had not finished; says which, and where they were.
    """
    processes: list[Process] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_task(folder, function, args)
        port = free_port()
        try:
            for rank in range(world_size):
                environment = {
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                processes.append(_start(rank, environment, folder, fresh))
            _wait(processes, folder, timeout_seconds, killed)
        finally:
            for process in processes:
                end_rank(process)
        files = [folder / f"value-{r}" for r in range(world_size)]
        return [
            None if r in killed else pickle.loads(file.read_bytes()) for r, file in enumerate(files)
        ]


def start_rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, folder: Path, *args: Any
) -> Process:
    """Start one of several ranks by itself, so that it may die and come back; use `end_rank`, too.

    Args:
        function: as for `run_ranks`; what it returns is lost.
        rank: of the process.
        world_size: of the job.
        port: where its ranks meet.
        folder: of this process alone; it is made.
        args: of the function.
    """
    folder.mkdir()
    _write_task(folder, function, args)
    environment = {
        "SCALEDTRAIN_RANK": str(rank),
        "SCALEDTRAIN_WORLD_SIZE": str(world_size),
        "SCALEDTRAIN_MASTER_ADDR": "127.0.0.1",
        "SCALEDTRAIN_MASTER_PORT": str(port),
    }
    return _start(rank, environment, folder, FRESH)


def end_rank(process: Process) -> None:
    """Kill a rank, with all that it has started."""
    with suppress(ProcessLookupError, PermissionError):  # macOS: the latter for the dead
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def free_port() -> int:
    """Return a port on which nobody listens, outside the range of outgoing connections."""
    for _ in range(100):
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as candidate, suppress(OSError):
            candidate.bind(("", port))
            return port
    raise OSError("no free port found between 20000 and 32000")


def drop_connections(port: int) -> None:
    """Shut down all of this process's connections to a port of this host, as a bad network does."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as own:
            is_tcp = own.family in (socket.AF_INET, socket.AF_INET6)
            if is_tcp and own.getpeername()[1] == port:
                own.shutdown(socket.SHUT_RDWR)


def _write_task(folder: Path, function: Callable[..., Any], args: Sequence[Any]) -> None:
    if "<" in function.__qualname__ or function.__module__ == "__main__":
        raise ValueError(
            f"run_ranks cannot import {function.__module__}.{function.__qualname__} in another "
            "process. Define it at the top of a module."
        )
    (folder / "task").write_bytes(pickle.dumps((function, args)))
    (folder / "warnings").write_bytes(pickle.dumps(warnings.filters))


def _start(rank: int, environment: Mapping[str, str], folder: Path, fresh: bool) -> Process:
    environment = {**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1", **environment}
    if not fresh:
        return fork_server(rank % HASH_SEEDS).fork(environment, str(folder))
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from tests.ranks import main; main(sys.argv[1])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,  # never written: its end tells the child that this process died
        start_new_session=True,
        env=environment,
    )


_servers: dict[int, ForkServer] = {}


def fork_server(number: int) -> ForkServer:
    """One of those that this process has; it is started first, if it has to be."""
    if number not in _servers or not _servers[number].is_alive():
        _servers[number] = ForkServer()
    return _servers[number]


def _wait(
    processes: Sequence[Process],
    folder: Path,
    timeout_seconds: float,
    killed: Collection[int],
) -> None:
    deadline = time.monotonic() + timeout_seconds

    def exit_codes() -> list[int | None]:
        codes = [process.poll() for process in processes]
        return [0 if r in killed and c == -signal.SIGKILL else c for r, c in enumerate(codes)]

    while True:
        codes = exit_codes()
        if _has_failed(codes, folder):
            time.sleep(SETTLE_SECONDS)
            _raise_first_failure(exit_codes(), folder)
        unfinished = [rank for rank, code in enumerate(codes) if code is None]
        if not unfinished:
            return
        if time.monotonic() > deadline:
            for rank in unfinished:
                with suppress(ProcessLookupError):
                    processes[rank].send_signal(signal.SIGUSR1)
            time.sleep(10 * SETTLE_SECONDS)
            raise TimeoutError(
                f"of {len(processes)} ranks, {unfinished} had not finished after "
                f"{timeout_seconds:g} s\n" + "\n".join(_stacks(rank, folder) for rank in unfinished)
            )
        time.sleep(POLL_SECONDS)


def _has_failed(codes: Sequence[int | None], folder: Path) -> bool:
    return any(code not in (None, 0) for code in codes) or any(folder.glob("error-*"))


def _raise_first_failure(codes: Sequence[int | None], folder: Path) -> None:
    for rank, code in enumerate(codes):  # a silent death is a cause; its peers' errors come of it
        if code not in (None, 0) and not (folder / f"error-{rank}").exists():
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise RankFailed(f"rank {rank} of {len(codes)} ended without returning: {how}")
    errors = [pickle.loads(file.read_bytes()) for file in folder.glob("error-*")]
    _, rank, error, text = min(errors, key=lambda report: report[0])
    raise error from RankFailed(f"in rank {rank} of {len(codes)}:\n{text}")


def _stacks(rank: int, folder: Path) -> str:
    file = folder / f"stacks-{rank}"
    text = file.read_text() if file.exists() else ""
    return f"rank {rank} was at:\n{text or '  (not yet in Python)'}"


def main(task: str) -> None:
    """Be a rank: do the task in that folder."""
    folder = Path(task)
    rank = os.environ["RANK"]
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with (folder / f"stacks-{rank}").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        try:
            function, args = pickle.loads((folder / "task").read_bytes())
            _copy_warning_filters(folder)
            with nothing_left_behind():
                value = function(*args)
            _report(folder / f"value-{rank}", pickle.dumps(value))
        except BaseException as error:
            text = traceback.format_exc()
            report = (time.monotonic(), int(rank), _picklable(error), text)
            _report(folder / f"error-{rank}", pickle.dumps(report))
            sys.stderr.flush()
            os._exit(1)
        faulthandler.unregister(signal.SIGUSR1)


def _die_with_parent() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _copy_warning_filters(folder: Path) -> None:
    filters = pickle.loads((folder / "warnings").read_bytes())
    warnings.resetwarnings()
    for action, message, category, module, line in reversed(filters):
        patterns = (getattr(pattern, "pattern", "") for pattern in (message, module))
        warnings.filterwarnings(action, next(patterns), category, next(patterns), line)


def _picklable(error: BaseException) -> Exception:
    if isinstance(error, Exception):  # no SystemExit: it would end the tests
        with suppress(Exception):
            return pickle.loads(pickle.dumps(error))
    return RankFailed(f"{type(error).__qualname__}: {error}")


def _report(file: Path, content: bytes) -> None:
    unfinished = file.with_name(f"writing-{file.name}")
    unfinished.write_bytes(content)
    unfinished.replace(file)
