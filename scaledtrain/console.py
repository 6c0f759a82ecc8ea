"""What a person sees while a run goes on: a progress bar, or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

__all__ = ["Console"]

_LINE_SECONDS = 5.0  # at most one plain line in this time


class Console:
    """Progress on stderr, by one rank only.

    Args:
        total: steps that the run will make, if known.
        enabled: write at all.
    """

    def __init__(self, total: int | None, enabled: bool) -> None:
        self._enabled = enabled
        self._total = total
        self._next_line = time.monotonic() + _LINE_SECONDS
        self._bar: tqdm[Any] | None = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="step", dynamic_ncols=True, leave=False)

    def advance(self, step: int) -> None:
        """Move the bar to this step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, text: str) -> None:
        """Show how the run is going: beside the bar, or as a line from time to time."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        elif self._enabled and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            self.say(f"step {step}/{self._total or '?'}  {text}")

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
