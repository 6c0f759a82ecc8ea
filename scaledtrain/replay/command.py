"""The replay command: makes an asynchronous run again, and lets a person step through it.

```
python -m scaledtrain.replay runs/mine
python -m scaledtrain.replay runs/mine events=[100,120]
```
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from omegaconf import OmegaConf

from scaledtrain.command_line import only_run, read_command_line, runs_and_settings
from scaledtrain.errors import ConfigError, ReplayError
from scaledtrain.launching import guarded, tell
from scaledtrain.replay.rerun import replay
from scaledtrain.replay.results import Push, Replayed
from scaledtrain.schema import parse

__all__ = ["HEADER", "Prompt", "ReplayConfig", "Table", "main", "row"]

_PROG = "scaledtrain replay"
_WIDTHS = (7, 10, 6, 6, 8, 5, 4, 10, 10, 9, 9)
_TITLES = (
    "event", "seconds", "worker", "step", "version", "stale", "used", "|gradient|", "|update|",
    "loss", "after",
)  # fmt: skip


@dataclass(frozen=True)
class ReplayConfig:
    """What is shown; ``configs/replay.yaml`` says what the key means."""

    events: Sequence[int] | None

    def __post_init__(self) -> None:
        if self.events is None:
            return
        if len(self.events) not in (1, 2) or not 1 <= self.events[0] <= self.events[-1]:
            raise ConfigError(
                f"events is {list(self.events)}; it is the first and the last one that are shown, "
                "counted from 1: events=[100,120]"
            )


def main() -> None:
    """Replay what the command line says."""
    guarded(_main)


def _main() -> None:
    runs, settings = runs_and_settings(sys.argv[1:])
    composed: Any = read_command_line(settings, "replay", _PROG)
    if composed is None:
        return
    config = parse("", OmegaConf.to_container(composed, resolve=True), ReplayConfig)
    run = only_run(runs, _PROG)
    on_push: Callable[[Push], bool] | None = None
    if config.events is not None:
        on_push = Table(config.events[0], config.events[-1], sys.stdout)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        on_push = Prompt(sys.stdin, sys.stdout)
    began = time.monotonic()
    replayed = replay(run, on_push)
    for note in replayed.notes:
        tell(f"note: {note}")
    print(verdict(replayed))
    print(f"replayed in {time.monotonic() - began:.1f} s")


def verdict(replayed: Replayed) -> str:
    """What came out.

    Raises:
        ReplayError: other parameters than those of the run.
    """
    told = (
        f"{replayed.events} events of {replayed.workers} workers: {replayed.pushes} pushes, "
        f"{replayed.accepted} of them accepted"
    )
    if replayed.equal is None:
        ended = replayed.recorded_sha256 is not None or replayed.sha256 is not None
        why = "this was not its end" if ended else "the run did not come to its end"
        return f"{told}; {why}, so there are no final parameters to compare"
    if not replayed.equal:
        raise ReplayError(
            f"{told}; every event agrees, but the parameters at the end are not those of the run "
            f"(SHA-256 {replayed.sha256}, not {replayed.recorded_sha256}). Was it made with this "
            "code, on this type of CPU? Did something decide that the log does not say, see "
            "scaledtrain.replay.replay?"
        )
    return f"{told}; the parameters at the end are equal to those of the run, bit for bit"


def row(push: Push) -> str:
    """A push as a line below `HEADER`."""
    return _line(
        (
            str(push.number),
            f"{push.seconds:.4f}",
            str(push.worker),
            str(push.step),
            str(push.version),
            str(push.staleness),
            "yes" if push.accepted else "no",
            f"{push.gradient_norm:.4g}",
            f"{push.update_norm:.4g}",
            f"{push.loss_before:.5f}",
            f"{push.loss_after:.5f}",
        )
    )


def _line(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


HEADER = _line(_TITLES)
"""Above the rows."""


class Table:
    """Shows the pushes from one event to another, and ends the replay there.

    Args:
        first: event.
        last: event.
        output: where to.
    """

    def __init__(self, first: int, last: int, output: TextIO) -> None:
        self._first = first
        self._last = last
        self._output = output
        self._begun = False

    def __call__(self, push: Push) -> bool:
        """Show it, if it is one of them."""
        if self._first <= push.number <= self._last:
            if not self._begun:
                self._begun = True
                self._output.write(f"{HEADER}\n")
            self._output.write(f"{row(push)}\n")
        if push.number >= self._last and not self._begun:
            self._output.write(f"no event from {self._first} to {self._last} is a push\n")
        return push.number < self._last


class Prompt:
    """Shows a push, and asks how far to go on.

    Args:
        questions: where the answers come from, a line each.
        output: where to.
    """

    def __init__(self, questions: TextIO, output: TextIO) -> None:
        self._input = questions
        self._output = output
        self._wanted: Callable[[Push], bool] = lambda push: True
        output.write("Enter: next push; 120: that event; w 3: of worker 3; c: to the end; q: end\n")
        output.write(f"{HEADER}\n")

    def __call__(self, push: Push) -> bool:
        """Show it, if that is where the last answer leads."""
        if not self._wanted(push):
            return True
        self._output.write(f"{row(push)}\n")
        while True:
            self._output.write("> ")
            self._output.flush()
            answer = self._input.readline()
            if not answer or answer.strip() == "q":
                return False
            if self._understood(answer.split(), push.number):
                return True

    def _understood(self, words: Sequence[str], number: int) -> bool:
        match words:
            case []:
                self._wanted = lambda push: True
            case ["c"]:
                self._wanted = lambda push: False
            case [event] if event.isdecimal() and int(event) > number:
                self._wanted = lambda push: push.number >= int(event)
            case [event] if event.isdecimal():
                self._output.write("that has happened already; begin again to see it\n")
                return False
            case ["w", worker] if worker.isdecimal():
                self._wanted = lambda push: push.worker == int(worker)
            case _:
                self._output.write("Enter, the number of an event, w and a worker, c, or q\n")
                return False
        return True
