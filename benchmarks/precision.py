"""Lower precision: the time of a step, and the memory of training.

python -m benchmarks.precision                everything, 5 rounds; results/precision/ and README.md
python -m benchmarks.precision --only fp32,ours_bf16-mixed      some contenders
python -m benchmarks.precision --quick        does it run? A few steps, nothing is stored
python -m benchmarks.precision --table        write README.md's table anew
python -m benchmarks.precision --check        fail if README.md is not what --table would write
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    BenchmarkError,
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
from benchmarks.overhead import (
    WORKLOADS,
    CheckedLoss,
    Task,
    TimedBatches,
    Workload,
    fused_adamw,
    told,
)
from benchmarks.overhead import quick as fewer_steps
from scaledtrain import Precision, Trainer, connect
from scaledtrain.models import GPT, MLP

PACKAGES = ("torch", "accelerate", "lightning", "numpy", "matplotlib")


def _small_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 64, generator=generator), torch.randint(10, (4,), generator=generator)


CASES = {
    "gpt": replace(WORKLOADS["gpt"], steps_per_block=2, blocks=3),
    "deep": Workload(
        title="MLP of 32 layers, 32.6 M parameters, batch 4: next to no activations",
        model=partial(MLP, 64, [1024] * 32, 10),
        loss_fn=F.cross_entropy,
        batch=_small_batch,
        n_batches=4,
        warmup_steps=1,
        steps_per_block=1,
        blocks=2,
        log_every=2,
        checked_step=1,
    ),
}
SETTINGS = {
    "threads_per_rank": 1,
    "cores_per_rank": 1,
    "pinned": True,
    "optimizer": "AdamW, lr 1e-3; fused where it does not say otherwise",
    "workloads": told(CASES),
}
QUICK = replace(
    fewer_steps(CASES["gpt"]),
    model=partial(GPT, 256, 128, n_layers=1, n_heads=2, d_model=32),
    n_batches=2,
)
MATMUL = ("matmul", 1)
SIZES = [(1024, 384, 384), (1024, 384, 1536), (1024, 1536, 384)]
"""The products of a block of the GPT with 8 x 128 tokens: rows, in, out."""


@dataclass(frozen=True)
class Run(Measurement):
    """A measurement, and what it took."""

    peak_bytes: int = 0
    """Of the process's memory, above what it had before there was a model."""


# --- Contenders -------------------------------------------------------------------------------


def hand_written(
    task: Task,
    dtype: torch.dtype | None = None,
    make_optimizer: Callable[..., torch.optim.Optimizer] = fused_adamw,
) -> None:
    """The loop that a careful user writes, with autocast if there is a dtype, and a scaler."""
    model, optimizer = task.model, make_optimizer(task.model.parameters())
    scaler = torch.amp.GradScaler(task.device, enabled=dtype is torch.float16)
    for inputs, targets in task.batches:
        with torch.autocast(task.device, dtype, enabled=dtype is not None):
            loss = task.loss_fn(model(inputs), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)


def bare_bf16(task: Task) -> None:
    """Everything in bfloat16, as torch does it: updates to the nearest."""
    model = task.model.bfloat16()
    optimizer = fused_adamw(model.parameters())
    for inputs, targets in task.batches:
        narrow = inputs.bfloat16() if inputs.is_floating_point() else inputs
        task.loss_fn(model(narrow).float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def ours(task: Task, precision: Precision) -> None:
    with (
        connect(device=task.device) as link,
        Trainer(
            task.model,
            task.loss_fn,
            fused_adamw,
            precision=precision,
            run_dir=task.folder,
            log_every=task.workload.log_every,
            link=link,
        ) as trainer,
    ):
        trainer.fit(task.all_batches, max_steps=task.workload.steps)


def accelerate(task: Task) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=task.device == "cpu", mixed_precision="bf16")
    model, optimizer = accelerator.prepare(task.model, fused_adamw(task.model.parameters()))
    for inputs, targets in task.batches:
        optimizer.zero_grad()
        with accelerator.autocast():
            loss = task.loss_fn(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()


def fabric(task: Task, precision: Any) -> None:
    from lightning.fabric import Fabric

    runner = Fabric(accelerator=task.device, devices=1, precision=precision)
    runner.launch()
    model, optimizer = runner.setup(task.model, fused_adamw(task.model.parameters()))
    for inputs, targets in task.batches:
        optimizer.zero_grad()
        with runner.autocast():
            loss = task.loss_fn(model(inputs), targets)
        runner.backward(loss)
        optimizer.step()


CONTENDERS: Mapping[str, Callable[[Task], None]] = {
    "fp32": hand_written,
    "ours_fp32": partial(ours, precision=Precision("fp32")),
    "autocast_bf16": partial(
        hand_written, dtype=torch.bfloat16, make_optimizer=partial(torch.optim.AdamW, lr=1e-3)
    ),
    "autocast_bf16_fused": partial(hand_written, dtype=torch.bfloat16),
    "accelerate_bf16": accelerate,
    "fabric_bf16-mixed": partial(fabric, precision="bf16-mixed"),
    "ours_bf16-mixed": partial(ours, precision=Precision("bf16-mixed")),
    "autocast_fp16_fused": partial(hand_written, dtype=torch.float16),
    "ours_fp16-mixed": partial(ours, precision=Precision("fp16-mixed")),
    "bare_bf16": bare_bf16,
    "fabric_bf16-true": partial(fabric, precision="bf16-true"),
    "ours_bf16-true_nearest": partial(ours, precision=Precision("bf16-true", "nearest")),
    "ours_bf16-true_stochastic": partial(ours, precision=Precision("bf16-true", "stochastic")),
    "ours_bf16-true_kahan": partial(ours, precision=Precision("bf16-true", "kahan")),
    "ours_bf16-true_master": partial(ours, precision=Precision("bf16-true", "master")),
}
IMPORTS = {"accelerate": "accelerate", "fabric": "lightning.fabric"}
MATMULS = {"matmul_fp32": torch.float32, "matmul_bf16": torch.bfloat16}


def work(contender: str, name: str, is_quick: bool, folder: Path) -> None:
    """In a fresh process: train as one contender, write down times and memory."""
    workload = QUICK if is_quick else CASES[name]
    if module := IMPORTS.get(contender.partition("_")[0]):
        importlib.import_module(module)
    generator = torch.Generator().manual_seed(0)
    batches = [workload.batch(generator) for _ in range(workload.n_batches)]
    _warm_up()
    torch.manual_seed(0)
    before = _resident_bytes()
    timed = TimedBatches(batches, workload)
    task = Task(
        workload=workload,
        rank=0,
        ranks=1,
        model=workload.model(),
        loss_fn=CheckedLoss(workload.loss_fn, workload.checked_step),
        batches=timed,
        all_batches=timed,
        folder=folder / "written",
    )
    CONTENDERS[contender](task)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if len(timed.block_seconds) != workload.blocks or task.loss_fn.value is None:
        raise BenchmarkError(f"{contender} did not make the {workload.steps} steps")
    report = {
        "steps_per_block": workload.steps_per_block,
        "block_seconds": timed.block_seconds,
        "losses": [task.loss_fn.value.item()],
        "peak_bytes": peak,
    }
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _warm_up() -> None:
    """Load what torch and a run's folder load at their first use, so that it is not counted.

    The process's allocator stays as it is: ours sets it when it trains, and peers do not.
    """
    batch = torch.ones(1, 1)
    with (
        mock.patch.dict(os.environ, GLIBC_TUNABLES=os.environ.get("GLIBC_TUNABLES", "")),
        tempfile.TemporaryDirectory() as folder,
        torch.autocast("cpu", torch.bfloat16),
        Trainer(
            torch.nn.Linear(1, 1), F.mse_loss, fused_adamw, run_dir=folder, console=False
        ) as trainer,
    ):
        trainer.fit([(batch, batch)], max_steps=1)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * resource.getpagesize()


def work_matmul(contender: str, is_quick: bool, folder: Path) -> None:
    """In a fresh process: the products of the GPT's blocks, by themselves."""
    pairs = [
        (torch.randn(m, k, dtype=MATMULS[contender]), torch.randn(k, n, dtype=MATMULS[contender]))
        for m, k, n in SIZES
    ]
    blocks = []
    for _ in range(3 if is_quick else 8):
        start = time.perf_counter()
        for _ in range(5):
            for a, b in pairs:
                a @ b
        blocks.append(time.perf_counter() - start)
    report = {"steps_per_block": 5, "block_seconds": blocks[1:], "losses": [], "peak_bytes": 0}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def measure(contender: str, name: str, number: int, is_quick: bool) -> Run:
    """One contender in a fresh process."""
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--quick"] if is_quick else []
        command = python_module("benchmarks.precision", "--work", contender, name, folder, *flags)
        run_group(command, 1)
        report = json.loads((Path(folder) / "report.json").read_text("utf-8"))
    return Run(name, 1, contender, number, load_average=load_average, **report)


# --- What is shown ----------------------------------------------------------------------------


def render(runs: Sequence[Run], where: Mapping[str, Any]) -> str:
    """The table, in Markdown.

    Raises:
        BenchmarkError: contenders did not compute about the same.
    """
    check_losses(runs, relative=0.02)  # of bfloat16 after a few updates
    lines = [provenance(where)]
    for name, workload in CASES.items():
        case = (name, 1)
        if any(r.case == case for r in runs):
            lines += table([r for r in runs if r.case == case], case, workload.title)
    matmul = ratios(runs, MATMUL, "matmul_fp32", "matmul_bf16")
    if matmul:
        lines += [
            "",
            f"The products of the GPT's blocks alone are {matmul.median:.2f} ({matmul.low:.2f} to "
            f"{matmul.high:.2f}) times as fast in bfloat16 on this machine.",
        ]
    return "\n".join(lines) + "\n"


def table(runs: Sequence[Run], case: tuple[str, int], title: str) -> list[str]:
    """One workload's, line by line."""
    lines = [
        "",
        f"**{title}**",
        "",
        "| | ms a step | times as fast as fp32 | ours / best peer | peak memory, MiB |",
        "|---|--:|--:|--:|--:|",
    ]
    for contender in CONTENDERS:
        spent = times(runs, case, contender)
        if spent is None:
            continue
        faster = ratios(runs, case, "fp32", contender)
        peaks = [r.peak_bytes for r in runs if r.contender == contender]
        cells = [
            f"{spent.median * 1e3:.3g}",
            f"{faster.median:.2f} ({faster.low:.2f} to {faster.high:.2f})" if faster else "",
            _against_peers(runs, case, contender),
            f"{statistics.median(peaks) / 2**20:.0f}",
        ]
        lines.append(f"| {contender} | {' | '.join(cells)} |")
    return lines


PEERS = {
    "ours_fp32": ["fp32"],
    "ours_bf16-mixed": [
        "autocast_bf16",
        "autocast_bf16_fused",
        "accelerate_bf16",
        "fabric_bf16-mixed",
    ],
    "ours_fp16-mixed": ["autocast_fp16_fused"],
    "ours_bf16-true_nearest": ["bare_bf16", "fabric_bf16-true"],
}


def _against_peers(runs: Sequence[Run], case: tuple[str, int], contender: str) -> str:
    """Time over that of the fastest peer that computes in the same formats."""
    measured = [(times(runs, case, peer), peer) for peer in PEERS.get(contender, [])]
    known = [(spread.median, peer) for spread, peer in measured if spread is not None]
    if not known:
        return ""
    best = min(known)[1]
    ratio = ratios(runs, case, contender, best)
    if ratio is None:
        return ""
    return f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), {best}"


REPORT = Report("precision", Run, render)


# --- The command ------------------------------------------------------------------------------


Job = tuple[str, str]
"""Workload and contender."""


def _rounds(
    jobs: Sequence[Job], rounds: int, before: Sequence[Run], is_quick: bool
) -> Iterator[Run]:
    rounds, found = 1 if is_quick else rounds, [*before]
    first = max(next_round(before, (name, 1)) for name, _ in jobs)
    for number in range(first, first + rounds):
        for name, contender in rotated(jobs, number):
            measured = measure(contender, name, number, is_quick)
            print(
                f"round {number - first + 1}/{rounds}  {name:6}  {contender:28} "
                f"{measured.seconds * 1e3:10.2f} ms  {measured.peak_bytes / 2**20:6.0f} MiB",
                flush=True,
            )
            found.append(measured)
            check_losses(found, relative=0.02)
            yield measured


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("precision", __doc__, "a few steps", rounds=5)
    add_some(parser, "only", [*CASES, *CONTENDERS, *MATMULS])
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.work:
        contender, name, folder = options.work
        if contender in MATMULS:
            work_matmul(contender, options.quick, Path(folder))
        else:
            work(contender, name, options.quick, Path(folder))
        return 0
    cases = [name for name in CASES if name in options.only] or list(CASES)
    contenders = [name for name in CONTENDERS if name in options.only] or list(CONTENDERS)
    if options.quick:
        cases = cases[:1]  # of which only the name matters
    jobs = [(name, contender) for name in cases for contender in contenders]
    jobs += [(MATMUL[0], name) for name in MATMULS if name in options.only]
    return carry_out(options, REPORT, PACKAGES, SETTINGS, partial(_rounds, jobs, options.rounds))


if __name__ == "__main__":
    sys.exit(main())
