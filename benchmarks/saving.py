"""How long training waits for a checkpoint, and how fast one goes to the disk.

python -m benchmarks.saving                          everything; results/ and README.md
python -m benchmarks.saving --only asynchronous      one of asynchronous, synchronous
python -m benchmarks.saving --quick                  does it run? A small model, stores nothing
python -m benchmarks.saving --table                  write README.md's table anew
python -m benchmarks.saving --check                  fail if README.md is not up to date
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    Report,
    Spread,
    provenance,
    python_module,
    run_group,
)
from scaledtrain import Callback, Checkpointing, Trainer

MIB = 2**20
WIDTH, LAYERS = 2048, 24  # 100,663,296 parameters
SAVINGS = 6
CASES = ("asynchronous", "synchronous")
PACKAGES = ("torch", "safetensors", "numpy")
SETTINGS = {"width": WIDTH, "layers": LAYERS, "savings": SAVINGS, "threads": 1}


@dataclass(frozen=True)
class Saving:
    """One contender in one round."""

    case: str
    contender: str
    """``"ours"``, or what it is held against: ``"copy"``, ``"write"``."""
    round: int
    n_bytes: int
    seconds: list[float]
    """Of each saving, in order; the first one's memory and files are new."""
    load_average: float
    """Of the machine over the last minute, when this began."""


# --- In a fresh process -----------------------------------------------------------------------


class Beside(Callback):
    """Before each saving: wait until the last one is over, and time what it is held against."""

    def __init__(self, compared: Callable[[], None]) -> None:
        self._compared = compared
        self.seconds: list[float] = []

    def on_step_end(self, trainer: Trainer) -> None:
        assert trainer._saver is not None
        writer = trainer._saver._writer
        while writer._saving is not None:  # as the steps of a longer training do
            writer.progress()
            time.sleep(0.01)
        self.seconds.append(timed(self._compared))


def timed(call: Callable[[], None]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def work(case: str, width: int, layers: int, folder: Path) -> None:
    """Train a model whose steps take no time, and save it at each of them."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    parameters = [p.detach() for p in model.parameters()]
    memory = [p.clone() for p in parameters]

    def copy() -> None:
        for to, parameter in zip(memory, parameters, strict=True):
            to.copy_(parameter)

    def write() -> None:
        path = folder / "written"
        with path.open("wb", buffering=0) as file:
            for parameter in parameters:
                rest = memoryview(parameter.numpy()).cast("B")
                while rest:
                    rest = rest[file.write(rest[: 4 * MIB]) :]
            os.fsync(file.fileno())

    is_asynchronous = case == "asynchronous"
    beside = Beside(copy if is_asynchronous else write)
    ours: list[float] = []
    with Trainer(
        model,
        nn.functional.mse_loss,
        partial(torch.optim.SGD, lr=1e-3),
        callbacks=[beside],
        checkpointing=Checkpointing(every_steps=1, keep_last=1, asynchronous=is_asynchronous),
        run_dir=folder,
        console=False,
    ) as trainer:
        assert trainer._saver is not None
        save = trainer._saver.after_step
        trainer._saver.after_step = lambda: ours.append(timed(save))  # type: ignore[method-assign]
        trainer.fit([(torch.ones(1, width), torch.zeros(1, width))], max_steps=SAVINGS)
    n_bytes = sum(p.nbytes for p in parameters)
    told = {"n_bytes": n_bytes, "seconds": {"ours": ours, against(case): beside.seconds}}
    (folder / "seconds.json").write_text(json.dumps(told), encoding="utf-8")


def against(case: str) -> str:
    """What saving is held against."""
    return "copy" if case == "asynchronous" else "write"


# --- Measuring --------------------------------------------------------------------------------


def measure(case: str, number: int, is_quick: bool) -> list[Saving]:
    """One round of a case, in a fresh process."""
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        sizes = ("64", "4") if is_quick else (str(WIDTH), str(LAYERS))
        run_group(
            python_module("benchmarks.saving", "--work", case, *sizes, folder), 1, pinned=False
        )
        told = json.loads((Path(folder) / "seconds.json").read_text("utf-8"))
    return [
        Saving(case, who, number, told["n_bytes"], seconds, load_average)
        for who, seconds in told["seconds"].items()
    ]


# --- What is shown ----------------------------------------------------------------------------


def ratio(savings: Sequence[Saving], case: str, above: str, below: str) -> Spread | None:
    """Median time of one over that of the other, within each round; without the first saving."""
    by_round: dict[int, dict[str, float]] = {}
    for s in savings:
        if s.case == case:
            by_round.setdefault(s.round, {})[s.contender] = statistics.median(s.seconds[1:])
    return Spread.of([r[above] / r[below] for r in by_round.values() if len(r) == 2])


BARS = (
    ("asynchronous", "time that training waits / time of one copy of the memory", 1.2, False),
    ("synchronous", "rate of saving / rate of writing one file", 0.8, True),
)


def _bar(savings: Sequence[Saving], case: str, text: str, limit: float, is_least: bool) -> str:
    what = f"{case}: {text} {'≥' if is_least else '≤'} {limit:g}"
    above, below = (against(case), "ours") if is_least else ("ours", against(case))
    spread = ratio(savings, case, above, below)
    if spread is None:
        return f"| {what} | not measured | |"
    holds = spread.median >= limit if is_least else spread.median <= limit
    measured = f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"
    return f"| {what} | {measured} | {'pass' if holds else '**MISSED**'} |"


def render(savings: Sequence[Saving], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    lines = ["| | MB | ms | MB/s | ms of the first |", "|---|--:|--:|--:|--:|"]
    for case in CASES:
        for who in ("ours", against(case)):
            rounds = [s for s in savings if (s.case, s.contender) == (case, who)]
            if rounds:
                seconds = statistics.median(statistics.median(s.seconds[1:]) for s in rounds)
                first = statistics.median(s.seconds[0] for s in rounds)
                megabytes = rounds[0].n_bytes / 1e6
                rate = megabytes / seconds
                cells = f"{megabytes:.0f} | {seconds * 1e3:.0f} | {rate:.0f} | {first * 1e3:.0f}"
                lines.append(f"| {case}: *{who}* | {cells} |")
    rows = "\n".join(_bar(savings, *bar) for bar in BARS)
    parts = [provenance(where), "\n".join(lines)]
    parts.append(f"What it has to reach:\n\n| | measured | |\n|---|---|---|\n{rows}")
    return "\n\n".join(parts) + "\n"


REPORT = Report("saving", Saving, render)


# --- The command ------------------------------------------------------------------------------


def rounds(
    cases: Sequence[str], count: int, before: Sequence[Saving], is_quick: bool
) -> Iterator[Saving]:
    """Case after case, again and again; a later command adds rounds."""
    first = {c: max((s.round for s in before if s.case == c), default=-1) + 1 for c in cases}
    count = 1 if is_quick else count
    for number in range(count):
        for case in cases:
            for saving in measure(case, number + first[case], is_quick):
                seconds = "  ".join(f"{s * 1e3:.0f}" for s in saving.seconds)
                print(f"round {number + 1}/{count}  {case:13} {saving.contender:6} {seconds} ms")
                yield saving


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("saving", __doc__, "a small model", rounds=5)
    add_some(parser, "only", CASES)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.work:
        torch.set_num_threads(1)
        case, width, layers, folder = options.work
        work(case, int(width), int(layers), Path(folder))
        return 0
    measure_all = partial(rounds, options.only, options.rounds)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure_all)


if __name__ == "__main__":
    sys.exit(main())
