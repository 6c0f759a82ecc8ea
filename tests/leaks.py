"""What code under test may leave behind: nothing."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")

# Set by pytest, and by torch, scikit-learn and Accelerate when they are first imported.
VARIABLES_OF_OTHERS = {
    "PYTEST_CURRENT_TEST",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "TORCHINDUCTOR_CACHE_DIR",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
}

# Python starts these once, on first use, and ends them itself.
HELPER_PROCESSES = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")

# Children of this process that the tests themselves keep until the last has ended.
kept_processes: set[int] = set()


class Leak(AssertionError):
    """Something was left behind."""


@contextmanager
def nothing_left_behind(grace_seconds: float = 3.0) -> Iterator[None]:
    """Raise `Leak` if the block leaves anything behind; say nothing if the block itself raises.

    Watched are child processes, threads, files in /dev/shm, environment variables and
    torch.distributed. What ends by itself within `grace_seconds` is no leak. Processes,
    variables and process groups that leaked are cleaned away, so that one fault is told once.
    """
    old_processes, old_threads, old_files = _processes(), _threads(), _shared_files()
    old_environment = _environment()
    yield
    leaks = [
        *_variables_changed_since(old_environment),
        *_process_group(),
        *_remaining(_processes, old_processes, _describe_process, grace_seconds),
        *_remaining(_threads, old_threads, _describe_thread, grace_seconds),
        *_remaining(_shared_files, old_files, _describe_shared_file, grace_seconds),
    ]
    if leaks:
        raise Leak("left behind: " + "; ".join(leaks))


def _remaining(
    things: Callable[[], set[Hashable]],
    before: set[Hashable],
    describe: Callable[[Hashable], str],
    grace_seconds: float,
) -> list[str]:
    """Describe what is there now, was not before, and does not go away; "" means no leak."""
    new = things() - before
    if not new:
        return []
    gc.collect()  # iterators caught in a cycle own processes and threads
    deadline = time.monotonic() + grace_seconds
    while True:
        new &= things()
        descriptions = sorted(filter(None, map(describe, new)))
        if not descriptions:
            return []
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    if things is _processes:
        for pid in new:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return descriptions


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in VARIABLES_OF_OTHERS}


def _variables_changed_since(before: dict[str, str]) -> list[str]:
    now = _environment()
    if now == before:
        return []
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    leaks = [
        f"environment variable {name} ({before.get(name)!r} became {now.get(name)!r})"
        for name in changed
    ]
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    return leaks


def _process_group() -> list[str]:
    distributed = sys.modules.get("torch.distributed")
    if not distributed or not distributed.is_available() or not distributed.is_initialized():
        return []
    distributed.destroy_process_group()
    return ["torch.distributed, still initialised"]


def _processes() -> set[int]:
    pids: set[int] = set()
    try:
        for task in os.listdir("/proc/self/task"):
            with (
                suppress(ProcessLookupError),
                open(f"/proc/self/task/{task}/children", "rb") as file,
            ):
                pids.update(map(int, file.read().split()))
    except FileNotFoundError:  # not Linux
        return {child.pid for child in active_children() if child.pid}
    return pids - kept_processes


def _describe_process(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "" if Path("/proc/self").exists() else f"process {pid}"
    if state == "Z" or any(helper in command for helper in HELPER_PROCESSES):
        return ""  # Z: it has ended, and waits to be noticed
    return f"process {pid} ({command.replace(bytes(1), b' ').decode(errors='replace').strip()})"


def _threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def _describe_thread(thread: threading.Thread) -> str:
    # A dummy stands for a thread that Python did not start, as autograd's; the others are tqdm's,
    # and fsspec's, which it starts once, on first use.
    if isinstance(thread, threading._DummyThread) or type(thread).__name__ == "TMonitor":
        return ""
    if thread.name == "fsspecIO":
        return ""
    return f"thread {thread.name} ({type(thread).__qualname__})"


def _shared_files() -> set[str]:
    with suppress(FileNotFoundError):
        return set(os.listdir(SHARED_MEMORY))
    return set()


def _describe_shared_file(name: str) -> str:
    return "" if _belongs_to_another_process(SHARED_MEMORY / name) else f"file /dev/shm/{name}"


def _belongs_to_another_process(file: Path) -> bool:
    """Whether someone else's program, that happens to run at the same time, uses the file.

    By its inode: a semaphore has been mapped under another name than that it has since.
    """
    try:
        found = file.stat()
    except FileNotFoundError:
        return True
    if found.st_uid != os.getuid():
        return True
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with suppress(OSError):
            maps = (process / "maps").read_text(errors="replace")
            if any(_is_of(line, found.st_ino) for line in maps.splitlines()):
                return True
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    opened = descriptor.stat()
                    if (opened.st_dev, opened.st_ino) == (found.st_dev, found.st_ino):
                        return True
    return False


def _is_of(line: str, inode: int) -> bool:
    """Whether a line of /proc/PID/maps is of that file in /dev/shm."""
    fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, name
    return len(fields) == 6 and fields[4] == str(inode) and fields[5].startswith(f"{SHARED_MEMORY}")
