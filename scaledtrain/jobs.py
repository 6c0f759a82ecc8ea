"""Several trainings on this host, each in processes of its own, some of them at once."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from scaledtrain.errors import ConfigError
from scaledtrain.launching import INTERRUPTED, PREEMPTED, TERMINATED, is_launched
from scaledtrain.local_job import SAVE_SECONDS, threads_for, worker_command
from scaledtrain.run_dir import has_run

__all__ = [
    "Job",
    "Place",
    "arguments_for",
    "hold_folder",
    "last_lines",
    "places_for",
    "run_jobs",
    "was_interrupted",
]

_logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 20.0  # for jobs of an earlier command that are ending
_LINES = 6

Place = Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """A process that runs ``module.main()``.

    Args:
        name: of the job, for those who wait for it.
        module: its ``main`` is `scaledtrain.launching.guarded`.
        arguments: of its command line.
        log: file that what it prints is added to; None: it prints where this process does.
        environment: variables of its own.
    """

    name: str
    module: str
    arguments: Sequence[str]
    log: Path | None = None
    environment: Mapping[str, str] | None = None


def places_for(at_once: int | None, ranks: int, device: str | None) -> list[Place]:
    """Environments of jobs that run at the same time: each has its share of cores, and its GPUs.

    One at a time has all, and divides it itself.

    Args:
        at_once: how many jobs; None: as many as GPUs are enough for, one without GPUs.
        ranks: processes of each job.
        device: as in the config; one with a number is left to the config.

    Raises:
        ConfigError: ``at_once`` is below 1, or a launcher started this process.
    """
    if is_launched():
        raise ConfigError(
            "this command starts its trainings itself, but a launcher (torchrun, srun) started it; "
            "start it plainly, and set workers=n for trainings of n processes"
        )
    gpus = _gpus(device)
    if at_once is None:
        at_once = max(1, len(gpus) // ranks)
    if at_once < 1:
        raise ConfigError(f"at_once is {at_once}; it is how many trainings run at a time, >= 1")
    if at_once == 1:
        return [{}]
    places: list[Place] = []
    for place in range(at_once):
        own = {"OMP_NUM_THREADS": str(threads_for(at_once * ranks))}
        if gpus:
            mine = [gpus[(place * ranks + rank) % len(gpus)] for rank in range(ranks)]
            own["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
        places.append(own | {k: v for k, v in os.environ.items() if k == "OMP_NUM_THREADS"})
    return places


def _gpus(device: str | None) -> list[str]:
    """Names of the GPUs that jobs may be given."""
    if device not in (None, "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [name.strip() for name in visible.split(",") if name.strip()]


def run_jobs(
    jobs: Iterable[Job],
    places: Sequence[Place],
    ended: Callable[[Job, int], None],
    keep_open: Sequence[int] = (),
) -> None:
    """Run jobs until there are no more. Whatever ends this process ends them.

    Args:
        jobs: the next one is asked for when a place is free, so a generator may look at what ended.
        places: as `places_for` makes them; so many run at once.
        ended: called with each job that ended, and its exit code (minus the signal that killed it).
        keep_open: file descriptors that jobs are to hold, too.
    """
    signal.set_wakeup_fd(-1)  # this process ends when its jobs have, which takes what it takes
    waiting, free = iter(jobs), list(places)
    running: dict[int, tuple[Job, Place, subprocess.Popen[bytes]]] = {}
    try:
        while True:
            while free and (job := next(waiting, None)) is not None:
                place = free.pop(0)
                process = _start(job, place, keep_open)
                running[process.pid] = job, place, process
            if not running:
                return
            time.sleep(_POLL_SECONDS)
            for pid, (job, place, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[pid]
                    free.append(place)
                    ended(job, code)
    finally:
        _end([process for _, _, process in running.values()])


def _start(job: Job, place: Place, keep_open: Sequence[int]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **place, **(job.environment or {})}
    command = worker_command(job.module, job.arguments)
    if job.log is None:
        return subprocess.Popen(command, env=environment, pass_fds=keep_open)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            command,
            env=environment,
            pass_fds=keep_open,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask them to end, which may take saving; then end them."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + SAVE_SECONDS
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def arguments_for(run_dir: Path) -> list[str]:
    """Where a run goes; and, if one was begun there, that it goes on or begins anew."""
    path = str(run_dir.resolve()).replace("'", r"\'")
    is_begun = has_run(run_dir)
    return [f"run_dir='{path}'", *(["resume=auto"] if is_begun else [])]


def was_interrupted(code: int) -> bool:
    """Whether somebody ended the job, so that it is to be run again."""
    asked = (INTERRUPTED, PREEMPTED, TERMINATED, -signal.SIGINT, -signal.SIGTERM)
    return code in asked


def last_lines(log: Path) -> str:
    """What a job said at the end, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    said = [line for line in lines if line.strip()][-_LINES:]
    return "\n".join(f"    {line}" for line in said) or "    (it said nothing)"


@contextmanager
def hold_folder(folder: Path, patience_seconds: float = _PATIENCE_SECONDS) -> Iterator[int]:
    """Make a folder, and keep other commands out of it; gives the lock's file descriptor.

    It is held until this process and those that have the descriptor have ended, however they end.

    Raises:
        ConfigError: the folder cannot be made, or another command has been at work in it for as
            long as this one has waited.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made: {error}; set run_dir to one that can"
        ) from error
    deadline = time.monotonic() + patience_seconds
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"another command, or a training that it started, is at work in {folder}; "
                        "wait for it, end it, or give this one another run_dir"
                    ) from None
            except OSError as error:  # a file system without locks
                _logger.warning("%s: %s; see that no other command is at work there", folder, error)
                break
            time.sleep(_POLL_SECONDS)
        yield file
    finally:
        os.close(file)
