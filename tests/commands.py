"""Commands of the library in processes forked from one that has imported them."""

from __future__ import annotations

import importlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.ranks import fork_server


class Command:
    """A command under way; what a test needs of `subprocess.Popen`.

    Args:
        module: whose ``main`` it is.
        arguments: of the command line.
        folder: where it runs.
        environment: all of it.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        pipes = [os.pipe() for _ in range(2)]
        task = json.dumps([module, *arguments])
        writers = [writer for _, writer in pipes]
        self._told = {reader: b"" for reader, _ in pipes}
        try:
            self._process = fork_server(0).fork(environment, task, __name__, folder, writers)
        finally:
            for writer in writers:
                os.close(writer)
        self.pid = self._process.pid
        self.poll = self._process.poll
        self.send_signal = self._process.send_signal

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def communicate(self, timeout: float = 60.0) -> tuple[str, str]:
        """What it wrote, when it and all that have its outputs have ended."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for reader in self._told:
                selector.register(reader, selectors.EVENT_READ)
            while selector.get_map():
                found = selector.select(max(deadline - time.monotonic(), 0.0))
                if not found:
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
                for key, _ in found:
                    if piece := os.read(key.fd, 65_536):
                        self._told[key.fd] += piece
                    else:
                        selector.unregister(key.fd)
        self._process.wait(max(deadline - time.monotonic(), 1.0))
        self._process.stdin.close()
        for reader in self._told:
            os.close(reader)
        out, told = (text.decode() for text in self._told.values())
        return out, told


def main(task: str) -> None:
    """Be the command."""
    module, *arguments = json.loads(task)
    sys.argv = [module, *arguments]
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    importlib.import_module(module).main()
