"""What it costs to watch a run: the same training with a watch and without, block by block.

Layers are looked into in every step, to see what a measured step takes; usually it is one of 100.

python -m benchmarks.watch             the GPT, 1 and 2 ranks; results/watch/ and README.md
python -m benchmarks.watch --ranks 1   a part; goes into the same folder
python -m benchmarks.watch --quick     does it run? A tiny model, nothing is stored
python -m benchmarks.watch --table     write README.md's table anew from the newest results
python -m benchmarks.watch --check     fail if README.md is not what --table would write
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    Measurement,
    Report,
    check_losses,
    next_round,
    provenance,
    python_module,
    ratios,
    rotated,
    run_group,
    times,
)
from benchmarks.overhead import WORKLOADS, fused_adamw
from scaledtrain import Callback, LayerWatch, Trainer, Watch, connect

PACKAGES = ("torch", "numpy")
LIMIT = 1.01  # on / off
WATCHES: Mapping[str, Watch | None] = {
    "off": None,
    "hangs": Watch(step_seconds=600.0, step_times=20.0),
    "ranks": Watch(ranks_every=2),
    "numbers": Watch(on_nonfinite="skip", on_spike="skip"),
    "on": Watch(
        step_seconds=600.0, step_times=20.0, ranks_every=2, on_nonfinite="skip", on_spike="skip"
    ),
}
LAYERS = "layers, every step"
LAYERS_EVERY = 100  # steps, as layers=usual has it
SETTINGS = {
    "threads_per_rank": 1,
    "cores_per_rank": 1,
    "pinned": True,
    "optimizer": "AdamW, lr 1e-3",
    "workload": WORKLOADS["gpt"].title,
    "watches": {name: str(watch) for name, watch in WATCHES.items()},
}


class BlockTimes(Callback):
    """When each step ended, and what the last loss was."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, trainer: Trainer) -> None:
        """Look at the clock."""
        self.ends.append(time.perf_counter())


def work(workload_name: str, number: int, is_quick: bool, folder: Path) -> None:
    """One rank: a trainer for each contender, all in this process, which train in turn.

    So what else the machine does meets all of them alike. A block is timed from the end of its
    first step to the end of its last.
    """
    workload = WORKLOADS[workload_name]
    steps, blocks = (3, 2) if is_quick else (4, 5)
    generator = torch.Generator().manual_seed(0)
    batches = [workload.batch(generator) for _ in range(workload.n_batches)]
    with connect() as link:
        trainers: dict[str, tuple[Trainer, BlockTimes]] = {}
        for name, watch in [*WATCHES.items(), (LAYERS, None)]:
            torch.manual_seed(0)
            clock = BlockTimes()
            layers = [LayerWatch(every_steps=1)] if name == LAYERS else []
            trainers[name] = (
                Trainer(
                    workload.model(),
                    workload.loss_fn,
                    fused_adamw,
                    callbacks=[*layers, clock],
                    watch=watch,
                    run_dir=folder / f"run-{name}",
                    log_every=2,
                    console=False,
                    link=link,
                ),
                clock,
            )
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for block in range(1 + blocks):  # the first warms up
            for name, (trainer, clock) in rotated(list(trainers.items()), number + block):
                clock.ends.clear()
                trainer.fit(batches, max_steps=(block + 1) * (steps + 1))
                if block:
                    seconds[name].append(clock.ends[-1] - clock.ends[0])
        report = {
            name: {
                "block_seconds": seconds[name],
                "loss": trainer.evaluate(batches[: link.group.size])["loss"],
                "steps_per_block": steps,
            }
            for name, (trainer, _) in trainers.items()
        }
        for trainer, _ in trainers.values():
            trainer.close()
        (folder / f"rank{link.group.rank}.json").write_text(json.dumps(report), encoding="utf-8")
        if dist.is_initialized():
            dist.barrier()


def measure(case: tuple[str, int], number: int, is_quick: bool) -> list[Measurement]:
    """One round: a job of fresh processes. The times are those of rank 0."""
    name, ranks = case
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--quick"] if is_quick else []
        command = python_module("benchmarks.watch", "--work", name, str(number), folder, *flags)
        run_group(command, ranks, timeout_seconds=900.0)
        reports = [
            json.loads((Path(folder) / f"rank{rank}.json").read_text("utf-8"))
            for rank in range(ranks)
        ]
    return [
        Measurement(
            workload=name,
            ranks=ranks,
            contender=who,
            round=number,
            steps_per_block=line["steps_per_block"],
            block_seconds=line["block_seconds"],
            losses=[report[who]["loss"] for report in reports],
            load_average=load_average,
        )
        for who, line in reports[0].items()
    ]


def render(measurements: Sequence[Measurement], where: Mapping[str, Any]) -> str:
    """The table, in Markdown.

    Raises:
        BenchmarkError: contenders did not compute the same.
    """
    check_losses(measurements)
    cases = sorted({m.case for m in measurements})
    heads = "".join(f" {w}, {n} rank{'s' if n > 1 else ''}: ms a step | / off |" for w, n in cases)
    lines = [f"| watched |{heads}", "|---|" + "--:|--:|" * len(cases)]
    measured = {m.contender for m in measurements}
    for who in [*WATCHES, *({LAYERS} & measured)]:
        cells = ""
        for case in cases:
            spent, ratio = times(measurements, case, who), ratios(measurements, case, who, "off")
            cells += f" {spent.median * 1e3:.1f} |" if spent else " |"
            of_off = f" {ratio.median:.4f} ({ratio.low:.4f} to {ratio.high:.4f})" if ratio else ""
            cells += f"{of_off} |"
        lines.append(f"| {who} |{cells}")
    for case in cases:
        on, layers = (ratios(measurements, case, who, "off") for who in ("on", LAYERS))
        if on is not None:
            lines.append(_verdict(case, "on / off", on.median))
        if layers is not None:
            amortised = 1 + (layers.median - 1) / LAYERS_EVERY
            lines.append(_verdict(case, f"layers every {LAYERS_EVERY} steps / off", amortised))
    text = "\n".join(lines)
    return f"{provenance(where)}\n\n{text}\n\nMedians; lowest and highest round in brackets.\n"


def _verdict(case: tuple[str, int], what: str, ratio: float) -> str:
    verdict = "pass" if ratio <= LIMIT else "**MISSED**"
    return f"\n{case[0]}, {case[1]}: {what} ≤ {LIMIT}: {ratio:.4f} {verdict}"


REPORT = Report("watch", Measurement, render)


def _rounds(
    ranks: Sequence[int], rounds: int, before: Sequence[Measurement], is_quick: bool
) -> Iterator[Measurement]:
    cases = [("tiny" if is_quick else "gpt", n) for n in ranks]
    rounds = 1 if is_quick else rounds
    for number, case in itertools.product(range(rounds), cases):
        for m in measure(case, number + next_round(before, case), is_quick):
            print(
                f"round {number + 1}/{rounds}  {m.case}  {m.contender:8} {m.seconds * 1e3:.2f} ms"
            )
            yield m


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("watch", __doc__, "a few steps of a tiny model", rounds=5)
    add_some(parser, "ranks", {"1": 1, "2": 2})
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.work:
        workload, number, folder = options.work
        work(workload, int(number), options.quick, Path(folder))
        return 0
    measure = partial(_rounds, options.ranks, options.rounds)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure)


if __name__ == "__main__":
    sys.exit(main())
