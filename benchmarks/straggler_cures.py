"""Which cure fits which kind of straggler: rates on a virtual cluster.

python -m benchmarks.straggler_cures            everything; results/ and README.md
python -m benchmarks.straggler_cures --quick    does it run? One straggler, nothing is stored
python -m benchmarks.straggler_cures --table    write README.md's table anew
python -m benchmarks.straggler_cures --check    fail if README.md is not up to date

Eight workers compute for a second per step on an even share of the samples, except where they are
slowed; communication costs nothing. It is a simulation, so that rows are the same on every host.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.command_line import carry_out, command_line
from benchmarks.harness import Report, provenance
from benchmarks.unequal_workers import rate_of
from scaledtrain import DropCompute, LocalSGD, ParameterServer, Trainer, simulate
from scaledtrain.balance import Auto
from scaledtrain.comm.protocols import Link
from scaledtrain.server import BackupWorkers
from scaledtrain.sim import (
    Cluster,
    ComputeModel,
    Constant,
    Gamma,
    SlowWorkers,
    Speeds,
    StepTimes,
    Topology,
    Wire,
)

WORKERS = 8
LOCAL_BATCH = 16
SECONDS = 240.0
WARMUP_SECONDS = 60.0  # not counted; the balance is found in it
SLOW = 4.0
PACKAGES = ("torch", "numpy")
SETTINGS = {
    "workers": WORKERS,
    "local_batch_size": LOCAL_BATCH,
    "virtual_seconds": SECONDS,
    "warmup_seconds": WARMUP_SECONDS,
    "slow": SLOW,
}
HOST = Topology(ranks_per_host=WORKERS, hosts=1, port=Wire(0.0, float("inf")))


@dataclass(frozen=True)
class Bursts(StepTimes):
    """Now and then a worker is slow for a while: another job has its host.

    Lengths of bursts, and of the times between, are exponentially distributed.

    Args:
        steps: mean length of a burst, in steps of that worker.
        between: mean length of the time between two, in steps.
        factor: how many times longer a step then takes.
    """

    steps: int = 10
    between: int = 70
    factor: float = SLOW

    def draws(self, worker: int, seed: int) -> Iterator[float]:
        """Seconds of each step."""
        generator = random.Random(f"{seed} {worker}")
        while True:
            for mean, seconds in ((self.between, 1.0), (self.steps, self.factor)):
                for _ in range(1 + int(generator.expovariate(1 / mean))):
                    yield seconds


STRAGGLERS: Mapping[str, tuple[ComputeModel, Speeds | None]] = {
    "persistent: one of 8 is 4x slower": (Constant(1.0), SlowWorkers({WORKERS - 1: SLOW})),
    "random: each step, gamma of shape 4": (Gamma(1.0, shape=4.0), None),
    "bursty: 4x for about 10 of 80 steps": (Bursts(), None),
}
CURES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "auto balance": lambda: {"balance": Auto(every=10, measured=5)},
    "DropCompute": lambda: {
        "drop_compute": DropCompute(1.25),
        "gradient_accumulation_steps": LOCAL_BATCH // 2,
    },
    "1 backup worker": lambda: {"strategy": ParameterServer(BackupWorkers(WORKERS - 1))},
    "asynchronous": lambda: {"strategy": ParameterServer()},
    "local SGD, H = 16": lambda: {"strategy": LocalSGD(16)},
}


def together(straggler: str) -> float:
    """The sum of the workers' rates, in samples per virtual second: none waits for another."""
    compute, speeds = STRAGGLERS[straggler]
    steps = 0.0
    for worker in range(WORKERS):
        pace = Cluster(compute, HOST, speeds).pace(worker, seed=0)
        seconds = 0.0
        while True:
            pace.begin_step()
            took = pace.seconds(0.0, 1.0)
            if seconds + took > SECONDS:
                break
            seconds += took
            steps += seconds > WARMUP_SECONDS
    return LOCAL_BATCH * steps / (SECONDS - WARMUP_SECONDS)


@dataclass(frozen=True)
class Use:
    """How much of what the workers compute went into the parameters."""

    straggler: str
    cure: str
    share: float
    """Of the sum of the workers' rates."""


def used(cure: str, straggler: str, folder: Path) -> float:
    """Samples per virtual second that went into the parameters, after the warm-up."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(4096, 2, generator=generator), torch.randn(4096, 1))
    compute, speeds = STRAGGLERS[straggler]

    def program(link: Link) -> int:
        options = CURES[cure]()
        batch = LOCAL_BATCH // options.get("gradient_accumulation_steps", 1)
        with Trainer(
            nn.Linear(2, 1),
            nn.functional.mse_loss,
            partial(torch.optim.SGD, lr=0.01),
            run_dir=folder,
            log_every=4,
            console=False,
            link=link,
            **options,
        ) as trainer:
            loader = DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)
            trainer.fit(loader, max_seconds=SECONDS)
            return trainer.strategy.gradients_per_step

    ran = simulate(program, Cluster(compute, HOST, speeds), WORKERS)
    of_ranks = [
        [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
        for name in (f"metrics-rank{rank}.jsonl" for rank in range(WORKERS))
    ]
    if "strategy" in CURES[cure]() and isinstance(CURES[cure]()["strategy"], ParameterServer):
        # Not all that is pushed is used: the server's updates count.
        counted = [record for record in of_ranks[0] if record["seconds"] >= WARMUP_SECONDS]
        steps = counted[-1]["step"] - counted[0]["step"]
        seconds = counted[-1]["seconds"] - counted[0]["seconds"]
        return float(steps * (ran.results[0] or 0) * LOCAL_BATCH / seconds)
    return sum(rate_of(records, WARMUP_SECONDS) for records in of_ranks)


def measure(before: Sequence[Use], is_quick: bool) -> Iterator[Use]:
    """Every cure of every straggler."""
    for straggler in list(STRAGGLERS)[: 1 if is_quick else None]:
        for cure in CURES:
            with tempfile.TemporaryDirectory() as folder:
                share = used(cure, straggler, Path(folder)) / together(straggler)
            print(f"{straggler}: {cure} {share:.0%}", flush=True)
            yield Use(straggler, cure, share)


def render(uses: Sequence[Use], where: Mapping[str, Any]) -> str:
    """The table, in Markdown."""
    shares = {(use.straggler, use.cure): f"{100 * use.share:.0f} %" for use in uses}
    lines = ["| | " + " | ".join(CURES) + " |", "|---|" + "--:|" * len(CURES)]
    for straggler in dict.fromkeys(use.straggler for use in uses):
        row = [shares.get((straggler, cure), "") for cure in CURES]
        lines.append(f"| {straggler} | {' | '.join(row)} |")
    return "\n\n".join([provenance(where), "\n".join(lines)]) + "\n"


REPORT = Report("straggler_cures", Use, render)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = command_line("straggler_cures", __doc__, "one straggler")
    options = parser.parse_args(arguments)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure)


if __name__ == "__main__":
    sys.exit(main())
