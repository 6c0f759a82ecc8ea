"""Worker processes that read an input; what they read comes in the order of the input."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch

from scaledtrain.data.convert.source import Batch, Source
from scaledtrain.errors import DataError, ScaledTrainError, WaitTimeoutError

__all__ = ["read_parts"]

APART_BYTES = 65_536  # an array that is larger is sent as it is, not as a part of a pickle
PIPE_BYTES = 2**20
END_SECONDS = 5.0  # for a worker that was asked to end

Read = Generator[tuple[int, Batch | None], None, None]


def read_parts(source: Source, first: int, workers: int, timeout_seconds: float) -> Read:
    """Read the parts of a source from ``first`` on.

    Worker i of n reads parts i, i + n, ...; each runs ahead of this process by one batch, which
    bounds the memory. So what comes, and in which order, is the same for any number of workers.

    Args:
        source: what to read.
        first: part.
        workers: processes; 1: read in this one.
        timeout_seconds: for a worker's next batch.

    Yields:
        (part, batch) for all its batches, then (part, None).

    Raises:
        WaitTimeoutError: a worker took longer.
        DataError: a worker was killed, or something that is not of this library went wrong in it.
    """
    workers = min(workers, source.parts - first)
    if workers > 1:
        yield from _read_by_workers(source, first, workers, timeout_seconds)
        return
    for part in range(first, source.parts):
        for batch in source.read(part):
            yield part, batch
        yield part, None


def _read_by_workers(source: Source, first: int, workers: int, timeout_seconds: float) -> Read:
    context = multiprocessing.get_context()
    forked = context.get_start_method() == "fork"
    pipes: list[Connection[Any, Any]] = []
    processes: list[BaseProcess] = []
    try:
        for rank in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            with suppress(AttributeError, OSError):  # Linux alone, and a user has a limit
                fcntl.fcntl(sender.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            pipes.append(receiver)
            parts = range(first + rank, source.parts, workers)
            inherited = pipes if forked else []
            process = context.Process(
                target=_work, args=(source, parts, sender, inherited), daemon=True
            )
            process.start()
            processes.append(process)
            sender.close()
        for part in range(first, source.parts):
            rank = (part - first) % workers
            batch: Batch | None = {}
            while batch is not None:
                batch = _receive(pipes[rank], processes[rank], rank, part, timeout_seconds)
                yield part, batch
    finally:
        _end(processes)
        for pipe in pipes:
            pipe.close()


def _receive(
    pipe: Connection[Any, Any], process: BaseProcess, rank: int, part: int, timeout_seconds: float
) -> Batch | None:
    if not pipe.poll(timeout_seconds):
        raise WaitTimeoutError(
            f"the writer waits for worker {rank}, which reads part {part} of the input, for "
            f"{timeout_seconds:g} s; if that can take so long, give a longer timeout_seconds"
        )
    try:
        head, sizes = pipe.recv()
        buffers = [np.empty(size, np.uint8).data for size in sizes]
        for buffer in buffers:
            pipe.recv_bytes_into(buffer)
    except (EOFError, OSError) as error:
        process.join(END_SECONDS)
        code = process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise DataError(
            f"worker {rank} was lost ({how}) while it read part {part} of the input; out of "
            "memory? The whole shards before it can be read: go on behind them with resume=True"
        ) from error
    received = pickle.loads(head, buffers=buffers)  # from a process of ours, not from a file
    if isinstance(received, Exception):
        raise received
    batch: Batch | None = received
    return batch


def _send(pipe: Connection[Any, Any], content: Batch | Exception | None) -> None:
    buffers: list[memoryview] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < APART_BYTES:
            return True
        buffers.append(raw)
        return False

    head = pickle.dumps(content, 5, buffer_callback=in_band)
    pipe.send((head, [buffer.nbytes for buffer in buffers]))
    for buffer in buffers:
        pipe.send_bytes(buffer)


def _work(
    source: Source,
    parts: Iterable[int],
    pipe: Connection[Any, Any],
    inherited: Sequence[Connection[Any, Any]],
) -> None:
    """A worker's main: read parts, until the last or until nobody wants them any more."""
    for other in inherited:  # or a pipe would not break when the writer dies
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the writer's, which ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # several workers share the cores; and OpenMP survives no fork
    part = None
    with suppress(BrokenPipeError, ConnectionResetError):
        try:
            for part in parts:
                for batch in source.read(part):
                    _send(pipe, batch)
                _send(pipe, None)
        except (BrokenPipeError, ConnectionResetError):
            raise
        except ScaledTrainError as error:
            _send(pipe, error)
        except Exception as error:
            told = "".join(traceback.format_exception(error)).rstrip()
            _send(pipe, DataError(f"part {part} of the input cannot be read:\n{told}"))


def _end_with_parent() -> None:
    """End this process when its parent dies, whatever it is doing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(END_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
