"""What a run shows: on terminals of different widths, and in a log."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from scaledtrain import Trainer, console
from scaledtrain.console import Console


@contextmanager
def terminal(columns: int) -> Iterator[tuple[int, list[str]]]:
    """A terminal so wide to write to, and a list that has what was written, once it is closed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    said: list[bytes] = []

    def listen() -> None:
        try:
            while data := os.read(ours, 65536):
                said.append(data)
        except OSError:  # EIO: nobody has it open any more
            return

    listener = threading.Thread(target=listen)
    listener.start()
    text: list[str] = []
    try:
        yield theirs, text
    finally:
        os.close(theirs)
        listener.join()
        os.close(ours)
        text.append(b"".join(said).decode())


def pieces(text: str) -> tuple[list[str], list[str]]:
    """The bars that were drawn over each other, and the lines that stayed."""
    written = [piece for piece in re.split(r"[\r\n]+", text) if piece.strip()]
    return [p for p in written if "|" in p], [p for p in written if "|" not in p]


@pytest.mark.parametrize("columns", [80, 40])
def test_a_bar_fits_the_terminal_and_other_lines_stand_above_it(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # no thread that outlives the test
    with terminal(columns) as (screen, said), os.fdopen(os.dup(screen), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        shown = Console(enabled=True)
        shown.say("a model")
        shown.start(0, 500, None)
        for step in range(1, 501):
            shown.advance(step)
            shown.show(step, f"loss {1 / step:.4f}", "12345 samples/s  staleness 1.5")
        logging.getLogger("scaledtrain.watch").warning("rank 3 is slow")
        shown.evaluated(500, 2.5, {"loss": 0.25, "accuracy": 0.5})
        shown.close()
        monkeypatch.undo()
    bars, lines = pieces(said[0])
    assert max(len(bar) for bar in bars) == columns - 1
    assert "\x1b" not in said[0]
    assert lines == [
        "a model",
        "rank 3 is slow",
        "step 500  2.5 s  evaluation: loss 0.2500  accuracy 0.5000",
    ]
    assert re.match(r"100%\|\S+\| 500/500 loss 0.0020 00:00 left", bars[-1])
    assert ("12345 samples/s  staleness 1.5" in bars[-1]) == (columns == 80)
    assert said[0].endswith("\r")  # the bar is gone
    assert (
        not logging.getLogger().handlers or logging.lastResort not in logging.getLogger().handlers
    )


def test_a_bar_of_a_run_that_goes_on_or_ends_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    monkeypatch.setattr("tqdm.std.time", lambda: now)  # a bar is drawn 10 times a second at most
    with terminal(80) as (screen, said), os.fdopen(os.dup(screen), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        shown = Console(enabled=True)
        shown.start(400, 500, None)
        shown.start(7, None, 20.0)
        now = 115.0
        shown.show(8, "loss 1.0000", "9 samples/s")
        shown.advance(8)
        shown.close()
        monkeypatch.undo()
    bars, lines = pieces(said[0])
    assert " 80%|" in bars[0]
    assert "400/500 ? left" in bars[0]  # nothing was done yet: its rate is not known
    assert " 75%|" in bars[-1]  # 15 of 20 seconds
    assert "step 8 loss 1.0000 " in bars[-1]
    assert lines == []


def test_a_log_gets_a_line_at_times_with_the_last_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    shown = Console(enabled=True)
    shown.start(100, 500, None)
    for step in range(101, 501):  # 1 step a second
        now += 1.0
        shown.advance(step)
        shown.show(step, f"loss {step / 100:.2f}", "32 samples/s")
        if step % 2 == 0:
            shown.evaluated(step, now, {"loss": 0.5})
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "step 105/500  loss 1.05  32 samples/s  06:35 left  evaluation at step 104: loss 0.5000"
    )
    # Every 5 s until 100 s, 20 lines; from then on 5 % of the time apart, so that 400 s are reached
    # after about 20 ln(400 / 100) = 28 more.
    assert 44 <= len(lines) <= 50
    assert "evaluation at step" in lines[-1]


def test_a_short_run_says_in_a_log_only_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(2, 1)
    sgd = partial(torch.optim.SGD, lr=0.1)
    data = [(torch.ones(2, 2), torch.ones(2, 1))] * 3
    for is_shown in (False, True):
        with Trainer(model, nn.functional.mse_loss, sgd, console=is_shown, log_every=1) as trainer:
            trainer.fit(data, max_epochs=1, eval=data)
        said = capsys.readouterr()
        assert said.out == ""
        # A short run says nothing but what it is.
        assert len(said.err.splitlines()) == is_shown
    assert said.err.startswith("scaledtrain: Linear, 3 trainable parameters")


def test_two_ranks_have_one_bar_on_a_narrow_terminal(tmp_path: Path) -> None:
    options = ["workers=2", "max_steps=300", "log_every=10", "eval_every=300", "strategy=async"]
    with terminal(60) as (screen, said):
        ran = subprocess.run(
            [sys.executable, "-m", "scaledtrain.train", *options, f"run_dir={tmp_path}"],
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=screen,
            env={**os.environ, "NO_COLOR": "1", "TERM": "xterm"},
            timeout=100,
        )
    assert ran.returncode == 0, said
    bars, lines = pieces(said[0])
    assert bars
    assert max(map(len, bars)) < 60
    assert all(bar.count("%|") == 1 for bar in bars)
    assert "\x1b" not in said[0]
    starts = [
        "scaledtrain: ",
        "step 300 ",
        "ended at step 300",
        "last evaluation",
        "config, result",
    ]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
