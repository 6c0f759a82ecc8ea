"""What layouts cost: pipelines against their schedule's ideal, shards against bare loops.

python -m benchmarks.layouts                       everything; results/layouts/ and README.md
python -m benchmarks.layouts --only 1F1B,shard     some of the cases
python -m benchmarks.layouts --quick               does it run? A few steps, nothing is stored
python -m benchmarks.layouts --table               write README.md's table anew
python -m benchmarks.layouts --check               fail if README.md is not up to date

A pipeline of p equal ranks whose schedule idles for a share i of the time cannot take less than
T / (p (1 - i)) for what one rank does in T. T is measured on all of the cores at once, each with a
whole model, since cores that all compute are slower than one alone. All run in the same round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    Measurement,
    Report,
    Spread,
    next_round,
    provenance,
    python_module,
    ratios,
    rotated,
    run_group,
    times,
)
from benchmarks.overhead import Batch, TimedBatches, Workload
from scaledtrain import Mesh, Trainer, connect
from scaledtrain.models import GPT, next_token_loss
from scaledtrain.parallel import DeepSpeed, FullyShard, Pipeline
from scaledtrain.parallel.pipeline import pipeline_order, simulate

PACKAGES = ("torch", "deepspeed", "numpy")
VOCABULARY, LENGTH, SAMPLES = 256, 64, 4  # of a microbatch
MODEL = {"n_layers": 8, "n_heads": 4, "d_model": 192, "tied_embedding": False}
SETTINGS = {
    "threads_per_rank": 1,
    "cores_per_rank": 1,
    "pinned": True,
    "optimizer": "AdamW, lr 1e-3",
    "model": {"vocab_size": VOCABULARY, "length": LENGTH, **MODEL},
    "microbatch_size": SAMPLES,
}
SCHEDULES = {
    "1F1B": "Schedule1F1B",
    "Interleaved1F1B": "ScheduleInterleaved1F1B",
    "ZBVZeroBubble": "ScheduleZBVZeroBubble",
}
adamw = partial(torch.optim.AdamW, lr=1e-3, fused=True)


def model() -> GPT:
    """Eight blocks; small ends, so that stages can be equal."""
    torch.manual_seed(0)
    return GPT(VOCABULARY, LENGTH, **MODEL)


@dataclass(frozen=True)
class Case:
    """What is trained in which layout."""

    schedule: str | None
    """None: shards."""
    microbatches: int

    @property
    def name(self) -> str:
        """In results."""
        return f"{self.schedule or 'shard'} m={self.microbatches}"

    @property
    def ideal_share(self) -> float:
        """Time of the schedule without waiting for messages, relative to one rank's whole time."""
        assert self.schedule is not None
        order = pipeline_order(self.schedule, 2, self.microbatches)
        v = order.n_stages // 2
        planned = simulate(order, {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0})
        return planned.seconds / (3.0 * 2 * v * self.microbatches)

    def workload(self, is_quick: bool) -> Workload:
        """Blocks of one step each."""

        def batch(generator: torch.Generator) -> Batch:
            shape = (self.microbatches * SAMPLES, LENGTH + 1)
            text = torch.randint(VOCABULARY, shape, generator=generator)
            return text[:, :-1].contiguous(), text[:, 1:].contiguous()

        first, n = (1, 1) if is_quick else (3, 15)
        return Workload(self.name, model, next_token_loss, batch, 2, first, 1, n, 1000, 1)


CASES = {
    case.name: case
    for case in (*itertools.starmap(Case, itertools.product(SCHEDULES, (4, 8, 16))), Case(None, 2))
}


@dataclass(frozen=True)
class Task:
    """What a contender is given on one rank."""

    case: Case
    batches: TimedBatches
    steps: int


def whole(task: Task) -> None:
    """Each rank for itself: gradient accumulation over the same microbatches."""
    net = model()
    optimizer = adamw(net.parameters())
    for inputs, targets in task.batches:
        pairs = zip(inputs.split(SAMPLES), targets.split(SAMPLES), strict=True)
        for x, y in pairs:
            (next_token_loss(net(x), y) / task.case.microbatches).backward()
        optimizer.step()
        optimizer.zero_grad()


def bare_pipeline(task: Task) -> None:
    """The loop that torch.distributed.pipelining's documentation has."""
    from torch.distributed import pipelining

    assert task.case.schedule is not None
    dist.init_process_group("gloo")
    rank, n_stages = dist.get_rank(), 2 if task.case.schedule == "1F1B" else 4
    parts = list(model().pipeline_parts())  # an embedding, eight blocks, a head
    cuts = [0, 5, 10] if n_stages == 2 else [0, 3, 5, 7, 10]
    places = {2: [[0], [1]], 4: [[0, 2], [1, 3]]}[n_stages]
    if task.case.schedule.startswith("ZBV"):
        places = [[0, 3], [1, 2]]
    stages = [
        pipelining.PipelineStage(
            nn.Sequential(*parts[cuts[i] : cuts[i + 1]]), i, n_stages, torch.device("cpu")
        )
        for i in places[rank]
    ]
    make = getattr(pipelining.schedules, SCHEDULES[task.case.schedule])
    schedule = make(
        stages[0] if n_stages == 2 else stages, task.case.microbatches, loss_fn=next_token_loss
    )
    optimizer = adamw([p for stage in stages for p in stage.submod.parameters()])
    has_first, has_last = 0 in places[rank], n_stages - 1 in places[rank]
    for inputs, targets in task.batches:
        given = (inputs,) if has_first else ()
        schedule.step(*given, **({"target": targets, "losses": []} if has_last else {}))
        optimizer.step()
        optimizer.zero_grad()


def deepspeed_pipeline(task: Task) -> None:
    """DeepSpeed's engine, whose schedule is 1F1B, with the same cut."""
    os.environ["DS_SKIP_CUDA_CHECK"] = "1"
    import deepspeed

    deepspeed.init_distributed("gloo")
    parts = list(model().pipeline_parts())
    module = deepspeed.pipe.PipelineModule(
        parts, num_stages=2, loss_fn=next_token_loss, partition_method="parameters"
    )
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_accumulation_steps": task.case.microbatches,
        "gradient_clipping": 0.0,  # as nobody else does here; its own default is 1
        "steps_per_print": 10**9,
    }
    optimizer = adamw(module.parameters())
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    for inputs, targets in task.batches:
        engine.train_batch(zip(inputs.split(SAMPLES), targets.split(SAMPLES), strict=True))


def ours(task: Task, **options: Any) -> None:
    """Trainer, with all that it does in a step."""
    with (
        connect(transport="torch") as link,
        Trainer(model(), next_token_loss, adamw, console=False, link=link, **options) as trainer,
    ):
        trainer.fit(task.batches, max_steps=task.steps)


def our_pipeline(task: Task) -> None:
    """With the cut that torch's loop has."""
    assert task.case.schedule is not None
    split = [5, 5] if task.case.schedule == "1F1B" else [3, 2, 2, 3]
    pipeline = Pipeline(task.case.schedule, task.case.microbatches, split=split)
    ours(task, mesh=Mesh(pipe=2), pipeline=pipeline)


def bare_shards(task: Task) -> None:
    """The loop that fully_shard's documentation has."""
    dist.init_process_group("gloo")
    net = model()
    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)
    optimizer = adamw(net.parameters())
    for inputs, targets in task.batches:
        next_token_loss(net(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def bare_zero(task: Task) -> None:
    """DeepSpeed's own loop, stage 2."""
    os.environ["DS_SKIP_CUDA_CHECK"] = "1"
    import deepspeed

    deepspeed.init_distributed("gloo")
    net = model()
    config = {
        "train_micro_batch_size_per_gpu": 2 * SAMPLES,
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = adamw(net.parameters())
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    for inputs, targets in task.batches:
        engine.backward(next_token_loss(engine(inputs), targets))
        engine.step()


SHARDS: Mapping[str, Callable[[Task], None]] = {
    "fully_shard": bare_shards,
    "ours": lambda task: ours(task, mesh=Mesh(shard=2), engine=FullyShard()),
    "deepspeed": bare_zero,
    "ours, deepspeed": lambda task: ours(task, mesh=Mesh(shard=2), engine=DeepSpeed(zero_stage=2)),
}
PIPELINES: Mapping[str, Callable[[Task], None]] = {
    "whole model": whole,
    "torch": bare_pipeline,
    "deepspeed": deepspeed_pipeline,
    "ours": our_pipeline,
}


def contenders(case: Case) -> Mapping[str, Callable[[Task], None]]:
    """By name."""
    if case.schedule is None:
        return SHARDS
    has_all = case.schedule == "1F1B"
    return {n: c for n, c in PIPELINES.items() if has_all or n != "deepspeed"}


def _work(contender: str, name: str, is_quick: bool, folder: Path) -> None:
    case, rank = CASES[name], int(os.environ.get("RANK", "0"))
    workload = case.workload(is_quick)
    generator = torch.Generator().manual_seed(0)
    batches = [workload.batch(generator) for _ in range(workload.n_batches)]
    # The Trainer takes each rank's share of the loader by itself, where there are shares.
    shares = 2 if case.schedule is None and contender.startswith("ours") else 1
    timed = TimedBatches(batches, workload, shares)
    contenders(case)[contender](Task(case, timed, workload.steps))
    (folder / f"rank{rank}.json").write_text(json.dumps(timed.block_seconds), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)  # gloo's threads may abort the interpreter at its end


def measure(contender: str, case: Case, number: int, is_quick: bool) -> Measurement:
    """Run one contender in fresh processes; the times are those of rank 0.

    Of ranks that have nothing to do with each other they are the means of all.
    """
    load_average = os.getloadavg()[0]
    flags = ["--quick"] if is_quick else []
    with tempfile.TemporaryDirectory() as folder:
        work = ["--work", contender, case.name, folder, *flags]
        run_group(python_module("benchmarks.layouts", *work), 2)
        paths = [Path(folder) / f"rank{rank}.json" for rank in range(2)]
        of_ranks = [json.loads(path.read_text("utf-8")) for path in paths]
    seconds = of_ranks[0]
    if contender == "whole model":
        seconds = [sum(block) / len(block) for block in zip(*of_ranks, strict=True)]
    return Measurement(case.name, 2, contender, number, 1, seconds, [], load_average)


# --- What is shown ----------------------------------------------------------------------------


def share_of_ideal(measurements: Sequence[Measurement], case: Case, who: str) -> Spread | None:
    """The schedule's ideal time over the measured one."""
    ratio = ratios(measurements, (case.name, 2), "whole model", who)
    if ratio is None:
        return None
    ideal = case.ideal_share
    return Spread(ratio.median * ideal, ratio.low * ideal, ratio.high * ideal, ratio.rounds)


def _cell(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})"


def _bar(what: str, spread: Spread | None, holds: Callable[[float], bool]) -> str:
    if spread is None:
        return f"| {what} | not measured | |"
    return f"| {what} | {_cell(spread)} | {'pass' if holds(spread.median) else '**MISSED**'} |"


def render(measurements: Sequence[Measurement], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    lines = [
        "| | whole model, ms | torch: share of ideal | DeepSpeed | ours |",
        "|---|--:|--:|--:|--:|",
    ]
    bars = []
    for case in CASES.values():
        if case.schedule is None:
            continue
        alone = times(measurements, (case.name, 2), "whole model")
        shares = {who: share_of_ideal(measurements, case, who) for who in contenders(case)}
        own = shares["ours"]
        took = f"{alone.median * 1e3:.0f}" if alone else ""
        cells = [_cell(shares.get(who)) for who in ("torch", "deepspeed", "ours")]
        lines.append(f"| {case.name} | {took} | {' | '.join(cells)} |")
        for who in contenders(case):
            if who in ("torch", "deepspeed"):
                against = ratios(measurements, (case.name, 2), who, "ours")
                bars.append(_bar(f"{case.name}: {who} / ours ≥ 1", against, lambda x: x >= 1.0))
        if case.schedule == "1F1B":
            bars.append(_bar(f"{case.name}: share of ideal ≥ 0.95", own, lambda x: x >= 0.95))
    shard = ("shard m=2", 2)
    for who, bare in (("ours", "fully_shard"), ("ours, deepspeed", "deepspeed")):
        spread = ratios(measurements, shard, who, bare)
        bars.append(_bar(f"2 shards: {who} / {bare} ≤ 1.02", spread, lambda x: x <= 1.02))
    table = "\n".join(["What it has to reach:\n", "| | measured | |", "|---|---|---|", *bars])
    return "\n\n".join([provenance(where), "\n".join(lines), table]) + "\n"


REPORT = Report("layouts", Measurement, render)


# --- The command ------------------------------------------------------------------------------


def rounds(
    cases: Sequence[Case], count: int, before: Sequence[Measurement], is_quick: bool
) -> Iterator[Measurement]:
    """Case after case, again and again; a later command adds rounds."""
    count = 1 if is_quick else count
    for number in range(count):
        for case in cases:
            turn = number + (next_round(before, (case.name, 2)) if before else 0)
            for contender in rotated(list(contenders(case)), turn):
                found = measure(contender, case, turn, is_quick)
                print(
                    f"round {number + 1}/{count}  {case.name:22} {contender:16} "
                    f"{found.seconds * 1e3:9.1f} ms",
                    flush=True,
                )
                yield found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("layouts", __doc__, "one step each, of few microbatches", rounds=3)
    add_some(parser, "only", [*SCHEDULES, "shard"])
    add_some(parser, "microbatches", {"4": 4, "8": 8, "16": 16})
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.work:
        contender, case, folder = options.work
        _work(contender, case, options.quick, Path(folder))
        return 0
    wanted = (*options.microbatches[: 1 if options.quick else None], 2)
    cases = [
        case
        for case in CASES.values()
        if (case.schedule or "shard") in options.only and case.microbatches in wanted
    ]
    return carry_out(options, REPORT, PACKAGES, SETTINGS, partial(rounds, cases, options.rounds))


if __name__ == "__main__":
    sys.exit(main())
