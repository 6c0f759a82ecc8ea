"""That one job at a time is at work in a folder of checkpoints."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import torch

from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError

__all__ = ["RunLock"]

_logger = logging.getLogger(__name__)

_FILE = "lock"
_PATIENCE_SECONDS = 10.0  # for a job that is ending, whose next start this one may be
_POLL_SECONDS = 0.1


class RunLock:
    """Holds a folder for this job; rank 0 does, and the others hear of it. Collective.

    It is a lock of the operating system on a file, in which stands who has it. It ends with its
    process, however that ends, so that one which is left behind holds nothing. Nothing keeps a
    process from itself, whose first release frees the folder.

    Args:
        folder: it is made if it is not there.
        link: to the other ranks.

    Raises:
        ConfigError: another job holds it, or the folder cannot be made.
    """

    def __init__(self, folder: Path, link: Link) -> None:
        self._file = -1
        error: ConfigError | None = None
        if link.group.rank == 0:
            try:
                self._file = _acquire(folder)
            except ConfigError as found:
                error = found
        failed = torch.tensor([int(error is not None)], device=link.device)
        link.group.broadcast([failed])
        if failed.item():
            raise error or ConfigError(f"rank 0 cannot work in {folder}; its own error says why")

    def release(self) -> None:
        """Let others have the folder."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _acquire(folder: Path) -> int:
    path = folder / _FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(
            f"the folder of the checkpoints cannot be made: {error}; set checkpointing.folder to "
            "one that can"
        ) from error
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                holder = os.read(file, 1000).decode(errors="replace").strip()
                os.close(file)
                raise ConfigError(
                    f"another job is at work in {folder} ({holder}), and two would write over each "
                    "other's checkpoints; wait for it, end it, or give this one another run_dir"
                ) from None
        except OSError as error:  # a file system without locks
            _logger.warning("%s cannot be locked (%s): see that no other job uses it", path, error)
            break
        time.sleep(_POLL_SECONDS)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
    with suppress(OSError):  # the disk is full: it is held, though nobody can read by whom
        os.ftruncate(file, 0)
        os.write(file, json.dumps(own).encode())
    return file
