"""Processes forked from one that has imported torch: start and end cost 0.04 s of a core, not 6.

A forked process differs from a fresh one in what its imports did before it had its environment, in
that it shares the server's hash seed (for which there are several servers), and in that it ends as
those of multiprocessing do: what is registered for the end runs, but modules are not taken apart.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tests import leaks

# Only what starts no thread.
PRELOADED = (
    "pytest",
    "scaledtrain.train",
    "scaledtrain.compare",
    "scaledtrain.replay",
    # What these import when they need it:
    "scaledtrain.checkpoint.export",
    "scaledtrain.checkpoint.pieces",
    "scaledtrain.parallel.shards",
    "tensorboard.summary.writer.record_writer",
    "torch._dynamo",
    "torch.distributed.pipelining",
    "torch.profiler",
)
MESSAGE_BYTES = 200_000


class ForkServer:
    """A process that forks others when asked to; it ends with this one.

    Args:
        preloaded: modules that it imports first.
    """

    def __init__(self, preloaded: Sequence[str] = PRELOADED) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from tests.fork_server import serve; "
            f"serve({theirs.fileno()}, {tuple(preloaded)!r})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._numbers = count()
        leaks.kept_processes.add(self._process.pid)
        atexit.register(self.close)

    def fork(
        self,
        environment: Mapping[str, str],
        task: str,
        module: str = "tests.ranks",
        folder: Path | None = None,
        output: Sequence[int] = (1, 2),
    ) -> ForkedProcess:
        """Fork a process that calls `main(task)` of a module; it heads a session of its own.

        Args:
            environment: of the process.
            task: the argument.
            module: whose function it is.
            folder: where it runs; None: where this process does.
            output: descriptors that it has as standard output and standard error.
        """
        end, stdin = os.pipe()
        try:
            request = ("fork", dict(environment), module, task, str(folder or os.getcwd()))
            return ForkedProcess(self, self.ask(request, (end, *output)), os.fdopen(stdin, "wb"))
        except BaseException:
            os.close(stdin)  # which ends a process whose number has not arrived
            raise
        finally:
            os.close(end)

    def ask(self, request: tuple[Any, ...], descriptors: Sequence[int] = ()) -> Any:
        """Send a request and wait for its answer."""
        number = next(self._numbers)
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._socket, [pickle.dumps((number, request))], descriptors)
            while answer := self._socket.recv(MESSAGE_BYTES):
                answered, value = pickle.loads(answer)
                if answered == number:  # a test that times out leaves an answer behind
                    return value
        self._process.wait()
        raise ConnectionError("the fork server has ended; what it told is in the captured stderr")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


class ForkedProcess:
    """What a test needs of `subprocess.Popen`, for a child of the fork server."""

    def __init__(self, server: ForkServer, pid: int, stdin: BinaryIO) -> None:
        self.pid = pid
        self.stdin = stdin
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        deadline = time.monotonic() + timeout if timeout is not None else 0.0
        while timeout is not None and self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout)
            time.sleep(0.01)
        return self._wait(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self._code is None:
            self._code = self._server.ask(("wait", self.pid, options))
        return self._code


def serve(descriptor: int, preloaded: Sequence[str]) -> None:
    """Fork and wait as told, until the other end is closed."""
    connection = socket.socket(fileno=descriptor)
    for module in preloaded:
        importlib.import_module(module)
    if Path("/proc/self/task").exists() and len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError(
            f"one of {preloaded} started a thread, which no forked process would have"
        )
    gc.collect()
    gc.freeze()  # else each collection in a forked process would touch, so copy, all of this
    codes: dict[int, int] = {}
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
        if not message:
            return
        number, (verb, *arguments) = pickle.loads(message)
        if verb == "wait":
            answer = _exit_code(codes, *arguments)
        else:
            answer = os.fork()
            if answer == 0:
                connection.close()
                _run(descriptors, *arguments)
            codes.pop(answer, None)
            _wait_for_session(answer)
            for inherited in descriptors:
                os.close(inherited)
        with suppress(BrokenPipeError):
            connection.send(pickle.dumps((number, answer)))


def _exit_code(codes: dict[int, int], pid: int, options: int) -> int | None:
    """Of a child that has ended; `codes` are those already known."""
    if pid not in codes:
        ended, status = os.waitpid(pid, options)
        if ended:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes.get(pid)


def _wait_for_session(pid: int) -> None:
    """Wait until a kill of the child's group reaches it."""
    while os.getsid(pid) == os.getsid(0):
        time.sleep(0.0005)


def _run(
    descriptors: Sequence[int], environment: dict[str, str], module: str, task: str, folder: str
) -> NoReturn:
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # Python's own generator does so by itself
    code: object = None
    try:
        importlib.import_module(module).main(task)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python would free each object first, which copies the pages of all modules.
    os._exit(code if isinstance(code, int) else int(code is not None))
