"""On one GPU: what a step costs beside bare loops, and whether budgets of bytes hold.

python -m benchmarks.gpu                  both; results/ and README.md
python -m benchmarks.gpu --only budget    some of tiny, gpt, budget
python -m benchmarks.gpu --quick          does it run? Small models, on a CPU too; stores nothing
python -m benchmarks.gpu --table          write README.md's table anew
python -m benchmarks.gpu --check          fail if README.md is not up to date

A tiny model, whose steps are as long as it takes to launch them, and a GPT, in each precision; and
the chain of recompute.py with its policies. The contenders of a round take turns in one process,
each with a new model. The memory is the allocator's: what was allocated at most, above what was
before there was a model.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import precision, recompute
from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    BenchmarkError,
    Report,
    Spread,
    check_losses,
    next_round,
    provenance,
    ratios,
    rotated,
)
from benchmarks.overhead import WORKLOADS, CheckedLoss, Task, TimedBatches, Workload, told
from benchmarks.overhead import quick as fewer_steps
from scaledtrain.errors import ConfigError
from scaledtrain.models import GPT
from scaledtrain.recompute import MemoryBudget, checkpoint_activations
from scaledtrain.recompute.live_bytes import LiveBytes

PACKAGES = ("torch", "accelerate", "lightning", "numpy")


def _gpt_batch(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    text = torch.randint(256, (16, length + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


CASES = {
    "tiny": replace(WORKLOADS["tiny"], blocks=4),
    "gpt": Workload(
        title="GPT (85 M parameters: 12 layers of 768, sequence 512, batch 16)",
        model=partial(GPT, 256, 512, n_layers=12, n_heads=12, d_model=768),
        loss_fn=WORKLOADS["gpt"].loss_fn,
        batch=partial(_gpt_batch, 512),
        n_batches=4,
        warmup_steps=5,
        steps_per_block=10,
        blocks=2,
        log_every=10,
        checked_step=3,
    ),
}
QUICK = {
    "tiny": fewer_steps(CASES["tiny"]),
    "gpt": replace(
        fewer_steps(CASES["gpt"]),
        model=partial(GPT, 256, 32, n_layers=1, n_heads=2, d_model=32),
        batch=partial(_gpt_batch, 32),
    ),
}
BUDGET = "budget"
SHARES = (4, 10, 20)  # of what everything needs, one part in so many
REPEATS = 5  # steps of a policy in a round
SETTINGS = {
    "optimizer": "AdamW, lr 1e-3; fused where it does not say otherwise",
    "workloads": {
        **told(CASES),
        BUDGET: "48 blocks, d_model 512, 8 heads, 8 sequences of 512, float32",
    },
}


@dataclass(frozen=True)
class Run(precision.Run):
    """A contender in a round; `precision.Run.peak_bytes` are the allocator's."""

    live_bytes: int = 0
    """Of activations alive at once, at most, where a policy is measured."""
    budget: int | None = None
    """Of ours, in bytes."""
    told: str = ""
    """What the planner said."""


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    """Seconds, when everything that was asked of the GPU is done."""
    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def warm_up() -> None:
    """Have cuBLAS take the memory that it works in, and keeps."""
    layer = nn.Linear(8, 8, device=device())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast(device(), dtype, enabled=dtype != torch.float32):
            layer(torch.ones(8, 8, device=device())).sum().backward()


class Allocated:
    """What the allocator gave at most, since this was made, above what it had given then."""

    def __init__(self) -> None:
        gc.collect()
        if device() == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._before = self._given()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before if device() == "cuda" else 0

    @staticmethod
    def _given() -> int:
        return torch.cuda.memory_allocated() if device() == "cuda" else 0


# --- Steps ------------------------------------------------------------------------------------


def takes_part(contender: str, case: str) -> bool:
    """In launching steps precisions differ little: of the tiny model two are enough."""
    return case == "gpt" or contender in ("fp32", "ours_fp32", "autocast_bf16", "ours_bf16-mixed")


def measure(name: str, contender: str, number: int, is_quick: bool) -> Run:
    """Train as one contender."""
    workload = (QUICK if is_quick else CASES)[name]
    generator = torch.Generator().manual_seed(0)
    batches = [workload.batch(generator) for _ in range(workload.n_batches)]
    load_average = os.getloadavg()[0]
    torch.manual_seed(0)
    allocated = Allocated()
    timed = TimedBatches([(x.to(device()), y.to(device())) for x, y in batches], workload, now=now)
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            workload=workload,
            rank=0,
            ranks=1,
            model=workload.model().to(device()),
            loss_fn=CheckedLoss(workload.loss_fn, workload.checked_step),
            batches=timed,
            all_batches=timed,
            folder=Path(folder) / "written",
            device=device(),
        )
        precision.CONTENDERS[contender](task)
    if len(timed.block_seconds) != workload.blocks or task.loss_fn.value is None:
        raise BenchmarkError(f"{contender} did not make the {workload.steps} steps")
    return Run(
        workload=name,
        ranks=1,
        contender=contender,
        round=number,
        steps_per_block=workload.steps_per_block,
        block_seconds=timed.block_seconds,
        losses=[task.loss_fn.value.item()],
        load_average=load_average,
        peak_bytes=allocated.peak(),
    )


# --- Budgets ----------------------------------------------------------------------------------


def chain(is_quick: bool) -> tuple[recompute.Stack, Tensor]:
    """A GPT whose blocks are checkpointed, and its input."""
    depth, width, length = (8, 64, 32) if is_quick else (48, 512, 512)
    model = GPT(256, length, n_layers=depth, n_heads=8, d_model=width)
    head = nn.Sequential(model.norm, model.head)
    stack = recompute.Stack(model.token_embedding, list(model.blocks), head)
    return stack.to(device()), torch.randint(0, 256, (8, length), device=device())


def policies(number: int, is_quick: bool) -> Iterator[Run]:
    """All of a round: fixed ones, then ours with the bytes of each, and with parts of all."""
    torch.manual_seed(0)
    model, x = chain(is_quick)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    live: dict[str, int] = {}
    torchs = {name: run for name, run in recompute.FIXED.items() if "DeepSpeed" not in name}
    fixed = {recompute.NONE: recompute.one_by_one, **torchs}
    for name, run in rotated(list(fixed.items()), number):
        model.run = run
        measured = _policy(name, number, model, x, is_quick)
        live[name] = measured.live_bytes
        yield measured
    model.run = recompute.one_by_one
    budgets = {
        f"ours, bytes of {name}": MemoryBudget(n_bytes)
        for name, n_bytes in live.items()
        if name != recompute.NONE
    }
    for share in SHARES:
        n_bytes = live[recompute.NONE] // share
        budgets[f"ours, 1/{share}"] = MemoryBudget(n_bytes)
        if device() == "cuda":
            budgets[f"ours, 1/{share}, host"] = MemoryBudget(n_bytes, offload="host")
    for name, budget in rotated(list(budgets.items()), number):
        sample = partial(recompute.loss_of, x)
        try:
            executor = checkpoint_activations(model, budget, sample)
        except ConfigError as error:
            print(f"{name}: {error}", flush=True)
            continue
        measured = _policy(name, number, model, x, is_quick)
        executor.remove()
        yield replace(measured, budget=budget.n_bytes, told=executor.told)


def _policy(name: str, number: int, model: recompute.Stack, x: Tensor, is_quick: bool) -> Run:
    def step() -> None:
        recompute.loss_of(x, model).backward()  # type: ignore[no-untyped-call]

    step()
    load_average = os.getloadavg()[0]
    allocated, blocks = Allocated(), []
    for _ in range(1 if is_quick else REPEATS):
        start = now()
        step()
        blocks.append(now() - start)
    peak = allocated.peak()
    with LiveBytes() as counted:
        step()
    return Run(BUDGET, 1, name, number, 1, blocks, [], load_average, peak, counted.peak)


# --- What is shown ----------------------------------------------------------------------------


def render(runs: Sequence[Run], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown.

    Raises:
        BenchmarkError: contenders did not compute about the same.
    """
    steps = [r for r in runs if r.workload != BUDGET]
    check_losses(steps, relative=0.02)  # of bfloat16 after a few updates
    lines = [f"{where['settings']['device']}; {provenance(where)}"]
    for name, workload in CASES.items():
        if own := [r for r in steps if r.workload == name]:
            lines += precision.table(own, (name, 1), workload.title)
    if budgets := [r for r in runs if r.workload == BUDGET]:
        lines += ["", *_budget_table(budgets, where["settings"]["workloads"][BUDGET])]
    return "\n".join(lines) + "\n"


def _budget_table(runs: Sequence[Run], what: str) -> list[str]:
    everything = _most(runs, recompute.NONE, lambda r: r.live_bytes)
    lines = [
        f"**Activations of a GPT** ({what}), {everything / 2**20:.0f} MiB if everything is kept",
        "",
        "| | MiB | times less | the allocator's peak, MiB | more time |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(r.contender for r in runs):
        live = _most(runs, name, lambda r: r.live_bytes)
        given = _most(runs, name, lambda r: r.peak_bytes)
        ratio = ratios(runs, (BUDGET, 1), name, recompute.NONE)
        cells = [f"{live / 2**20:.0f}", f"{everything / live:.1f}", f"{given / 2**20:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {_more(ratio)} |")
    kept = [r for r in runs if r.budget is not None]
    over = sum(r.live_bytes > (r.budget or 0) for r in kept)
    lines += ["", f"Of {len(kept)} runs with a budget {over} needed more bytes than that."]
    return lines


def _most(runs: Sequence[Run], name: str, of: Callable[[Run], int]) -> int:
    return max(of(r) for r in runs if r.contender == name)


def _more(ratio: Spread | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.median - 1:+.0%} ({ratio.low - 1:+.0%} to {ratio.high - 1:+.0%})"


REPORT = Report("gpu", Run, render)


# --- The command ------------------------------------------------------------------------------


def _rounds(
    names: Sequence[str], rounds: int, before: Sequence[Run], is_quick: bool
) -> Iterator[Run]:
    warm_up()
    rounds = 1 if is_quick else rounds
    first = max(next_round(before, (name, 1)) for name in names)
    for number in range(first, first + rounds):
        for run in _round(names, number, is_quick):
            print(
                f"round {number - first + 1}/{rounds}  {run.workload:6}  {run.contender:32} "
                f"{run.seconds * 1e3:10.3f} ms  {run.peak_bytes / 2**20:8.0f} MiB",
                flush=True,
            )
            yield run


def _round(names: Sequence[str], number: int, is_quick: bool) -> Iterator[Run]:
    for name in names:
        if name == BUDGET:
            yield from policies(number, is_quick)
            continue
        able = [c for c in precision.CONTENDERS if takes_part(c, name)]
        for contender in rotated(able, number):
            yield measure(name, contender, number, is_quick)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("gpu", __doc__, "small models, on a CPU too", rounds=3)
    add_some(parser, "only", [*CASES, BUDGET])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if not (torch.cuda.is_available() or options.quick or options.table or options.check):
        print("there is no CUDA device, so nothing is measured; --quick also runs on a CPU")
        return 0
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    settings = {**SETTINGS, "device": name}
    measure_all = partial(_rounds, options.only, options.rounds)
    return carry_out(options, REPORT, PACKAGES, settings, measure_all)


if __name__ == "__main__":
    sys.exit(main())
