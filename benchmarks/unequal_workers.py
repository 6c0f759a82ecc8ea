"""How much of the ranks' rates together a job reaches, if some of them compute slower.

python -m benchmarks.unequal_workers                  everything; results/ and README.md
python -m benchmarks.unequal_workers --only even,auto some of even, fixed, auto, async, drop_compute
python -m benchmarks.unequal_workers --quick          does it run? Stores nothing
python -m benchmarks.unequal_workers --table          write README.md's table anew
python -m benchmarks.unequal_workers --check          fail if README.md is not up to date

Real processes, of which two sleep until they have taken 2 and 4 times as long as the others for
their samples. In each round every rank's rate is measured alone, and then those of the contenders.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import Report, provenance, python_module, rotated, run_group
from scaledtrain import DropCompute, ParameterServer, Trainer, connect
from scaledtrain.balance import Auto, Fixed
from scaledtrain.data import digits
from scaledtrain.models import MLP
from scaledtrain.schedule import Slowdown

FACTORS = {2: 2.0, 3: 4.0}
RANKS = 4
LOCAL_BATCH = 32
STEP_SECONDS = 0.16  # of an even share, on a rank that is not slowed: a device that is this slow
MICROBATCHES = 8  # with DropCompute
SECONDS = 14.0
WARMUP_SECONDS = 7.0  # not counted; the balance is found in it
ALONE_SECONDS = 4.0
BAR = 0.95

CONTENDERS: Mapping[str, dict[str, Any]] = {
    "even": {},
    "fixed": {"balance": Fixed([1 / FACTORS.get(rank, 1.0) for rank in range(RANKS)])},
    "auto": {"balance": Auto(every=5, measured=3)},
    "async": {"strategy": ParameterServer},
    # As long as a rank that is not slowed computes.
    "drop_compute": {
        "drop_compute": DropCompute(STEP_SECONDS * (MICROBATCHES - 1) / MICROBATCHES),
        "gradient_accumulation_steps": MICROBATCHES,
    },
}
PACKAGES = ("torch", "numpy")
SETTINGS = {
    "factors": {str(rank): factor for rank, factor in FACTORS.items()},
    "ranks": RANKS,
    "local_batch_size": LOCAL_BATCH,
    "step_seconds": STEP_SECONDS,
    "seconds": SECONDS,
    "warmup_seconds": WARMUP_SECONDS,
}


@dataclass(frozen=True)
class Rate:
    """A contender in one round."""

    contender: str
    round: int
    rate: float
    """Samples per second that gradients were computed with and used, of all ranks."""
    alone: list[float]
    """By rank, its rate alone, in the same round."""
    load_average: float
    """Of the machine over the last minute, when this began."""

    @property
    def share(self) -> float:
        """Of the sum of the ranks' rates."""
        return self.rate / sum(self.alone)


# --- One rank ---------------------------------------------------------------------------------


def work(contender: str, factor_of: int, number: int, seconds: float, folder: Path) -> None:
    """One rank of a fresh job.

    Args:
        contender: its name; of a rank alone, "even".
        factor_of: a rank alone has this one's factor; -1: several have their own.
        number: of the round.
        seconds: to train for.
        folder: of the run.
    """
    options = dict(CONTENDERS[contender])
    batch = LOCAL_BATCH // options.get("gradient_accumulation_steps", 1)
    if "strategy" in options:
        options["strategy"] = options["strategy"]()
    factors = FACTORS if factor_of < 0 else {0: FACTORS.get(factor_of, 1.0)}
    torch.manual_seed(number)
    with (
        connect() as link,
        Trainer(
            MLP(in_features=64, out_features=10, hidden=[128]),
            F.cross_entropy,
            partial(torch.optim.SGD, lr=0.05),
            seed=number,
            slowdown=Slowdown(factors, min_compute_seconds=STEP_SECONDS),
            run_dir=folder,
            log_every=1,
            console=False,
            link=link,
            **options,
        ) as trainer,
    ):
        loader = DataLoader(digits("train"), batch_size=batch, shuffle=True, drop_last=True)
        trainer.fit(loader, max_seconds=seconds)


def rate_of(records: Sequence[Mapping[str, Any]], warmup: float) -> float:
    """Samples per second of one rank, from the first record after the warm-up to the last one.

    Example:
        >>> steps = [{"seconds": t, "samples": 4} for t in (0.5, 1.0, 3.0)]
        >>> rate_of(steps, warmup=0.4)  # 8 in 2.5 s
        3.2
    """
    counted = [record for record in records if record["seconds"] >= warmup]
    if len(counted) < 2:
        return 0.0
    seconds = counted[-1]["seconds"] - counted[0]["seconds"]
    return float(sum(record["samples"] for record in counted[1:]) / seconds)


def measured(contender: str, factor_of: int, number: int, seconds: float, warmup: float) -> float:
    """Samples per second of a job of fresh processes."""
    ranks = RANKS if factor_of < 0 else 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = [contender, str(factor_of), str(number), str(seconds), folder]
        command = python_module("benchmarks.unequal_workers", "--work", *arguments)
        run_group(command, ranks, pinned=False)
        lines = [
            (Path(folder) / f"metrics-rank{rank}.jsonl").read_text("utf-8").splitlines()
            for rank in range(ranks)
        ]
    return sum(rate_of([json.loads(line) for line in of_rank], warmup) for of_rank in lines)


# --- The table --------------------------------------------------------------------------------


def render(rates: Sequence[Rate], where: Mapping[str, Any]) -> str:
    """The table, in Markdown."""
    alone = [statistics.median(column) for column in zip(*(r.alone for r in rates), strict=True)]
    lines = [
        f"Ranks alone: {', '.join(f'{rate:.0f}' for rate in alone)} samples/s, together "
        f"{sum(alone):.0f}.",
        "",
        "| | samples/s | of the sum of the rates |",
        "|---|--:|--:|",
    ]
    for name in CONTENDERS:
        rounds = [r for r in rates if r.contender == name]
        if rounds:
            shares = sorted(100 * r.share for r in rounds)
            lines.append(
                f"| {name} | {statistics.median(r.rate for r in rounds):.0f} | "
                f"{statistics.median(shares):.1f} % ({shares[0]:.1f} to {shares[-1]:.1f}) |"
            )
    auto = [r.share for r in rates if r.contender == "auto"]
    if auto:
        reached = statistics.median(auto)
        verdict = "pass" if reached >= BAR else "**MISSED**"
        lines += ["", f"Bar: auto ≥ {100 * BAR:.0f} %: {100 * reached:.1f} %, {verdict}."]
    count = max((r.round for r in rates), default=-1) + 1
    lines += ["", f"Medians over {count} round{'s' if count != 1 else ''}."]
    return "\n\n".join([provenance(where), "\n".join(lines)]) + "\n"


REPORT = Report("unequal_workers", Rate, render)


# --- The command ------------------------------------------------------------------------------


def rounds(
    contenders: Sequence[str], count: int, before: Sequence[Rate], is_quick: bool
) -> Iterator[Rate]:
    """Each round measures the ranks alone, and begins with another contender."""
    count, scale = (1, 0.5) if is_quick else (count, 1.0)
    first = max((rate.round for rate in before), default=-1) + 1
    for number in range(first, first + count):
        load = os.getloadavg()[0]
        alone = [
            measured("even", rank, number, ALONE_SECONDS * scale, 0.0) for rank in range(RANKS)
        ]
        for name in rotated(contenders, number):
            rate = measured(name, -1, number, SECONDS * scale, WARMUP_SECONDS * scale)
            made = Rate(name, number, rate, alone, load)
            print(
                f"round {number}  {name:12} {rate:7.1f} samples/s  {100 * made.share:5.1f} % of "
                f"{sum(alone):.1f}  load {load:.1f}",
                flush=True,
            )
            yield made


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("unequal_workers", __doc__, "a few seconds each", rounds=3)
    add_some(parser, "only", list(CONTENDERS))
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _options(arguments)
    if options.work:
        torch.set_num_threads(1)
        contender, factor_of, number, seconds, folder = options.work
        work(contender, int(factor_of), int(number), float(seconds), Path(folder))
        return 0
    measure_all = partial(rounds, options.only, options.rounds)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure_all)


if __name__ == "__main__":
    sys.exit(main())
