"""What a person sees while a run goes on: a progress bar, or a line at times without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

__all__ = ["Console"]

_LINE_SECONDS = 5.0  # the least between two lines; later 1 / 20 of the time since the run began
# What matters most comes first: tqdm cuts off what the terminal is too narrow for.
_OF_STEPS = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {desc}{remaining} left{postfix}"
_OF_SECONDS = "{percentage:3.0f}%|{bar}| {desc}{remaining} left{postfix}"
_OPEN = "{desc}{elapsed}{postfix}"


class Console:
    """Progress on stderr, by one rank only.

    On a terminal it is a bar; what is logged meanwhile is written above it. Elsewhere it is a line,
    at most one in 5 seconds and later fewer, with the last evaluation in it.

    Args:
        enabled: write at all.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: tqdm[Any] | None = None
        self._open = ExitStack()

    def start(self, step: int, total: int | None, max_seconds: float | None) -> None:
        """A run begins, or goes on.

        Args:
            step: at which it is.
            total: the step at which it will end, if known.
            max_seconds: that it may take from here on; None: without such a limit.
        """
        self.close()
        self._first, self._total, self._max_seconds = step, total, max_seconds
        self._begin = time.monotonic()
        self._next_line = self._begin + _LINE_SECONDS
        self._evaluation = ""
        if not (self._enabled and sys.stderr.isatty()):
            return
        form = _OF_STEPS if total else _OF_SECONDS if max_seconds else _OPEN
        self._bar = tqdm(
            total=total or max_seconds,
            initial=step if total or not max_seconds else 0,
            bar_format=form,
            dynamic_ncols=True,
            leave=False,
        )
        self._open.callback(self._bar.close)
        self._open.enter_context(logging_redirect_tqdm())

    def advance(self, step: int) -> None:
        """Move the bar to this step."""
        if self._bar is None:
            return
        done: float = step
        if self._total is None and self._max_seconds is not None:
            done = min(time.monotonic() - self._begin, self._max_seconds)
        self._bar.update(done - self._bar.n)

    def show(self, step: int, loss: str, text: str) -> None:
        """Show how the run is going: in the bar, or as a line if the last one was long ago.

        Args:
            step: at which it is.
            loss: at the moment.
            text: what else there is.
        """
        if self._bar is not None:
            where = "" if self._total else f"step {step} "
            self._bar.set_description_str(f"{where}{loss} ", refresh=False)
            self._bar.set_postfix_str(text, refresh=False)
        elif self._is_line_due():
            left = self._seconds_left(step)
            told = [f"step {step}/{self._total}" if self._total else f"step {step}", loss, text]
            told += [] if left is None else [f"{tqdm.format_interval(left)} left"]
            self.say("  ".join([*told, *filter(None, [self._evaluation])]))

    def evaluated(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Show an evaluation: above the bar, or with the next line.

        Args:
            step: at which it was.
            seconds: since the run began.
            values: by name.
        """
        told = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        if self._bar is not None:
            self.say(f"step {step}  {seconds:.1f} s  evaluation: {told}")
        self._evaluation = f"evaluation at step {step}: {told}"

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if self._enabled:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Take the bar away."""
        self._open.close()
        self._bar = None

    def _is_line_due(self) -> bool:
        now = time.monotonic()
        if now < self._next_line:
            return False
        self._next_line = now + max(_LINE_SECONDS, (now - self._begin) / 20)
        return True

    def _seconds_left(self, step: int) -> float | None:
        passed = time.monotonic() - self._begin
        ends = [] if self._max_seconds is None else [self._max_seconds - passed]
        if self._total and step > self._first:
            ends.append(passed * (self._total - step) / (step - self._first))
        return max(0.0, min(ends)) if ends else None
