"""How much a training loop adds to a step: scaledtrain, hand-written loops, other libraries.

python -m benchmarks.overhead                 everything, 5 rounds; results/overhead/ and README.md
python -m benchmarks.overhead --only tiny     one workload (or some contenders: --only ours,careful)
python -m benchmarks.overhead --allreduce     shared memory beside gloo, by size
python -m benchmarks.overhead --quick         does it run? A few steps of the tiny model
python -m benchmarks.overhead --table         write README.md's table anew from the newest results
python -m benchmarks.overhead --check         fail if README.md is not what --table would write
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    BenchmarkError,
    Measurement,
    Report,
    check_losses,
    differences,
    next_round,
    provenance,
    python_module,
    ratios,
    rotated,
    run_group,
    times,
)
from scaledtrain import Trainer, connect
from scaledtrain.models import GPT, GPT_10M, MLP, next_token_loss

PACKAGES = ("torch", "accelerate", "lightning", "tensorboard", "tqdm", "numpy")
Batch = tuple[Tensor, Tensor]
fused_adamw = partial(torch.optim.AdamW, lr=1e-3, fused=True)


@dataclass(frozen=True)
class Workload:
    """What is trained, and how much of it is timed."""

    title: str
    model: Callable[[], nn.Module]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batch: Callable[[torch.Generator], Batch]
    n_batches: int
    warmup_steps: int
    steps_per_block: int
    blocks: int
    log_every: int
    checked_step: int
    """The one whose loss is compared; counted from 1."""

    @property
    def steps(self) -> int:
        """One more than are timed: the last block ends when its successor's batch is asked for."""
        return self.warmup_steps + self.steps_per_block * self.blocks + 1


def _tiny_batch(generator: torch.Generator) -> Batch:
    x = torch.randn(32, 64, generator=generator)
    return x, torch.randint(10, (32,), generator=generator)


def _gpt_batch(generator: torch.Generator) -> Batch:
    text = torch.randint(GPT_10M["vocab_size"], (8, 129), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


# A block of the GPT is as long as the interval between two records, so every block pays for one.
WORKLOADS = {
    "tiny": Workload(
        title="tiny MLP (64-128-10, batch 32)",
        model=partial(MLP, 64, [128], 10),
        loss_fn=nn.functional.cross_entropy,
        batch=_tiny_batch,
        n_batches=256,
        warmup_steps=300,
        steps_per_block=200,
        blocks=8,
        log_every=50,
        checked_step=50,
    ),
    "gpt": Workload(
        title="GPT (10.8 M parameters, sequence 128, batch 8)",
        model=partial(GPT, **GPT_10M),
        loss_fn=next_token_loss,
        batch=_gpt_batch,
        n_batches=32,
        warmup_steps=2,
        steps_per_block=2,
        blocks=4,
        log_every=2,
        checked_step=5,
    ),
}


def told(workloads: Mapping[str, Workload]) -> dict[str, str]:
    """What is trained, in words, for the settings that are stored."""
    return {
        name: f"{w.title}; {w.blocks} blocks of {w.steps_per_block} steps after {w.warmup_steps}"
        for name, w in workloads.items()
    }


SETTINGS = {
    "threads_per_rank": 1,
    "cores_per_rank": 1,
    "pinned": True,
    "terminal": True,
    "optimizer": "AdamW, lr 1e-3",
    "workloads": told(WORKLOADS),
}


def quick(workload: Workload) -> Workload:
    """As little as shows that it runs."""
    short = replace(workload, warmup_steps=1, steps_per_block=2, blocks=1, checked_step=2)
    return short if workload.n_batches < 64 else replace(short, steps_per_block=20, blocks=2)


class TimedBatches:
    """The loader of every contender: ready batches in memory, and a look at the clock per block.

    Args:
        batches: gone through again and again.
        workload: how many steps there are.
        batches_per_step: more than 1 for a loop that takes its own share of all ranks' batches.
        now: the clock, in seconds; where a device computes it waits for that.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        workload: Workload,
        batches_per_step: int = 1,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._batches = batches
        self._workload = workload
        self._per_step = batches_per_step
        self._now = now
        self.clock: list[float] = []

    def __len__(self) -> int:
        return self._workload.steps * self._per_step

    def __iter__(self) -> Iterator[Batch]:
        workload, per_step = self._workload, self._per_step
        source = itertools.cycle(self._batches)
        yield from itertools.islice(source, workload.warmup_steps * per_step)
        for _ in range(workload.blocks):
            self.clock.append(self._now())
            yield from itertools.islice(source, workload.steps_per_block * per_step)
        self.clock.append(self._now())
        yield from itertools.islice(source, per_step)

    @property
    def block_seconds(self) -> list[float]:
        return [end - start for start, end in itertools.pairwise(self.clock)]


class CheckedLoss:
    """The loss function of every contender; remembers one step's loss."""

    def __init__(self, loss_fn: Callable[[Tensor, Tensor], Tensor], step: int) -> None:
        self._loss_fn = loss_fn
        self._remaining = step
        self.value: Tensor | None = None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = self._loss_fn(outputs, targets)
        self._remaining -= 1
        if self._remaining == 0:
            self.value = loss.detach().clone()
        return loss


@dataclass(frozen=True)
class Task:
    """What a contender is given on one rank."""

    workload: Workload
    rank: int
    ranks: int
    model: nn.Module
    loss_fn: CheckedLoss
    batches: TimedBatches
    """This rank's."""
    all_batches: TimedBatches
    """Those of all ranks, in turn; only one of the two is used."""
    folder: Path
    """For what a contender writes."""
    device: str = "cpu"
    """Where the model and the batches are."""


def _distributed(task: Task, **options: Any) -> nn.Module:
    if task.ranks == 1:
        return task.model
    dist.init_process_group("gloo")
    return DistributedDataParallel(task.model, **options)


def plain(task: Task) -> None:
    model = _distributed(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, (inputs, targets) in enumerate(task.batches, start=1):
        optimizer.zero_grad()
        loss = task.loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        if step % task.workload.log_every == 0 and task.rank == 0:
            print(f"step {step} loss {loss.item():.4f}")


def careful(task: Task) -> None:
    model = _distributed(task, gradient_as_bucket_view=True, static_graph=True)
    optimizer = fused_adamw(model.parameters())
    loss_fn = task.loss_fn
    for inputs, targets in task.batches:
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def ours(task: Task, transport: Any = "auto") -> None:
    with connect(transport=transport) as link:
        expected = {"auto": "local" if task.ranks == 1 else "shared_memory"}
        if link.transport != expected.get(transport, transport):
            raise BenchmarkError(f"the ranks met over {link.transport}")
        with Trainer(
            task.model,
            task.loss_fn,
            fused_adamw,
            run_dir=task.folder,
            log_every=task.workload.log_every,
            link=link,
        ) as trainer:
            trainer.fit(task.all_batches, max_steps=task.workload.steps)


def fabric(task: Task) -> None:
    from lightning.fabric import Fabric

    strategy = "ddp" if task.ranks > 1 else "auto"
    runner = Fabric(accelerator="cpu", devices=task.ranks, strategy=strategy)
    runner.launch()
    model, optimizer = runner.setup(task.model, fused_adamw(task.model.parameters()))
    for step, (inputs, targets) in enumerate(task.batches, start=1):
        optimizer.zero_grad()
        loss = task.loss_fn(model(inputs), targets)
        runner.backward(loss)
        optimizer.step()
        if step % task.workload.log_every == 0:
            runner.print(f"step {step} loss {loss.item():.4f}")


def accelerate(task: Task) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(task.model, fused_adamw(task.model.parameters()))
    for step, (inputs, targets) in enumerate(task.batches, start=1):
        optimizer.zero_grad()
        loss = task.loss_fn(model(inputs), targets)
        accelerator.backward(loss)
        optimizer.step()
        if step % task.workload.log_every == 0:
            accelerator.print(f"step {step} loss {loss.item():.4f}")


def lightning(task: Task, bare: bool = False) -> None:
    from lightning.pytorch import LightningModule
    from lightning.pytorch import Trainer as LightningTrainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def training_step(self, batch: Batch, index: int) -> Tensor:
            inputs, targets = batch
            loss = task.loss_fn(self.model(inputs), targets)
            if not bare:
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return fused_adamw(self.parameters())

    off = ("progress_bar", "checkpointing", "model_summary")
    options: dict[str, Any] = {f"enable_{name}": False for name in off} if bare else {}
    trainer = LightningTrainer(
        accelerator="cpu",
        devices=task.ranks,
        strategy="ddp" if task.ranks > 1 else "auto",
        max_epochs=-1,
        max_steps=task.workload.steps,
        log_every_n_steps=task.workload.log_every,
        logger=not bare,
        default_root_dir=task.folder,
        **options,
    )
    trainer.fit(Module(), task.batches)


CONTENDERS: Mapping[str, Callable[[Task], None]] = {
    "plain": plain,
    "careful": careful,
    "ours": ours,
    "ours_gloo": partial(ours, transport="torch"),
    "fabric": fabric,
    "accelerate": accelerate,
    "lightning": lightning,
    "lightning_bare": partial(lightning, bare=True),
}


def takes_part(contender: str, case: tuple[str, int]) -> bool:
    """Whether a contender has something to show: gloo needs two, the GPT hides what a bar costs."""
    workload, ranks = case
    return {"ours_gloo": ranks > 1, "lightning_bare": workload == "tiny"}.get(contender, True)


def work(contender: str, workload_name: str, is_quick: bool, folder: Path) -> None:
    """One rank of a fresh job: train as one contender, write down the times."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    workload = WORKLOADS[workload_name]
    if is_quick:
        workload = quick(workload)
    generator = torch.Generator().manual_seed(0)
    everything = [workload.batch(generator) for _ in range(workload.n_batches)]
    torch.manual_seed(0)
    task = Task(
        workload=workload,
        rank=rank,
        ranks=ranks,
        model=workload.model(),
        loss_fn=CheckedLoss(workload.loss_fn, workload.checked_step),
        batches=TimedBatches(everything[rank::ranks], workload),
        all_batches=TimedBatches(everything, workload, batches_per_step=ranks),
        folder=folder / "written",
    )
    CONTENDERS[contender](task)
    timed = task.batches if task.batches.clock else task.all_batches
    if len(timed.block_seconds) != workload.blocks or task.loss_fn.value is None:
        raise BenchmarkError(f"{contender} did not make the {workload.steps} steps")
    report = {"block_seconds": timed.block_seconds, "loss": task.loss_fn.value.item()}
    (folder / f"rank{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
    # A module in DDP keeps gloo's threads alive, and some then abort the interpreter at its end.
    os._exit(0)


def measure(contender: str, case: tuple[str, int], number: int, is_quick: bool) -> Measurement:
    """Run one contender in fresh processes. The times are those of rank 0, which also reports."""
    name, ranks = case
    workload = quick(WORKLOADS[name]) if is_quick else WORKLOADS[name]
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--quick"] if is_quick else []
        run_group(
            python_module("benchmarks.overhead", "--work", contender, name, folder, *flags), ranks
        )
        reports = [
            json.loads((Path(folder) / f"rank{rank}.json").read_text("utf-8"))
            for rank in range(ranks)
        ]
    return Measurement(
        workload=name,
        ranks=ranks,
        contender=contender,
        round=number,
        steps_per_block=workload.steps_per_block,
        block_seconds=reports[0]["block_seconds"],
        losses=[report["loss"] for report in reports],
        load_average=load_average,
    )


# --- The all-reduce by itself -----------------------------------------------------------------

SIZES = [1024 * 4**k for k in range(9)]  # 1 KiB to 64 MiB
TRANSPORTS = ("shared_memory", "gloo")


def reduce_case(n_bytes: int) -> tuple[str, int]:
    return f"all_reduce {n_bytes}", 2


def work_all_reduce(is_quick: bool, folder: Path) -> None:
    """One rank: reduce by turns with both transports, the same tensors, block by block."""
    with connect(transport="shared_memory") as link:
        rank = link.group.rank

        def shared_memory(tensor: Tensor) -> None:
            link.group.all_reduce([tensor], "sum").wait()

        calls = dict(zip(TRANSPORTS, (shared_memory, dist.all_reduce), strict=True))
        report = []
        for n_bytes in SIZES[:3] if is_quick else SIZES:
            # About 0.1 s of gloo in a block. Zeros stay finite however often they are added up.
            repeats = 2 if is_quick else min(200, max(3, 2 * 2**20 // n_bytes))
            tensors = {name: torch.zeros(n_bytes // 4) for name in calls}
            for name, call in calls.items():
                known = torch.arange(n_bytes // 4, dtype=torch.float32) + rank
                expected = 2 * known - 2 * rank + 1
                call(known)
                if not torch.equal(known, expected):
                    raise BenchmarkError(f"{name} gave a wrong sum of {n_bytes} bytes")
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for block in range(3 if is_quick else 8):
                for name, call in rotated(list(calls.items()), block):
                    tensor = tensors[name]
                    start = time.perf_counter()
                    for _ in range(repeats):
                        call(tensor)
                    seconds[name].append(time.perf_counter() - start)
            for name in calls:
                report.append(
                    {
                        "n_bytes": n_bytes,
                        "contender": name,
                        "steps_per_block": repeats,
                        "block_seconds": seconds[name][1:],  # the first warms up
                    }
                )
        (folder / f"rank{rank}.json").write_text(json.dumps(report), encoding="utf-8")


def measure_all_reduce(number: int, is_quick: bool) -> list[Measurement]:
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--quick"] if is_quick else []
        run_group(python_module("benchmarks.overhead", "--work-all-reduce", folder, *flags), 2)
        report = json.loads((Path(folder) / "rank0.json").read_text("utf-8"))
    measurements = []
    for line in report:
        workload, ranks = reduce_case(line.pop("n_bytes"))
        measurements.append(
            Measurement(workload, ranks, round=number, losses=[], load_average=load_average, **line)
        )
    return measurements


# --- What is shown ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """What a result has to reach: a ratio of times, or a difference in milliseconds."""

    case: tuple[str, int]
    first: str
    second: str
    limit: float
    sign: str
    is_difference: bool = False

    def line(self, measurements: Sequence[Measurement]) -> str:
        """A row of the table: what, how much, and whether it holds."""
        compare = differences if self.is_difference else ratios
        spread = compare(measurements, self.case, self.first, self.second)
        unit, scale = (" ms", 1e3) if self.is_difference else ("", 1.0)
        operation = "−" if self.is_difference else "/"
        what = (
            f"{self.case[0]}, {_ranks(self.case[1])}: {self.first} {operation} {self.second} "
            f"{self.sign} {self.limit:g}{unit}"
        )
        if spread is None:
            return f"| {what} | not measured | |"
        value, low, high = (x * scale for x in (spread.median, spread.low, spread.high))
        holds = {"≤": operator.le, "≥": operator.ge}[self.sign](value, self.limit)
        verdict = "pass" if holds else "**MISSED**"
        return f"| {what} | {value:.4f}{unit} ({low:.4f} to {high:.4f}) | {verdict} |"


BARS = (
    Bar(("tiny", 1), "ours", "careful", 0.03, "≤", is_difference=True),
    Bar(("tiny", 1), "ours", "careful", 1.15, "≤"),
    Bar(("tiny", 2), "careful", "ours", 2.0, "≥"),
    Bar(("tiny", 2), "plain", "ours", 2.0, "≥"),
    Bar(("gpt", 1), "ours", "careful", 1.01, "≤"),
    Bar(("gpt", 2), "ours", "careful", 1.01, "≤"),
    Bar(("gpt", 2), "careful", "ours", 1.0, "≥"),
    Bar(("gpt", 2), "plain", "ours", 1.0, "≥"),
)


def render(measurements: Sequence[Measurement], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown.

    Raises:
        BenchmarkError: contenders did not compute the same.
    """
    check_losses(measurements)
    parts = [provenance(where)]
    present = {m.case for m in measurements}
    for name, workload in WORKLOADS.items():
        ranks = [n for n in (1, 2) if (name, n) in present]
        if ranks:
            parts.append(_workload_table(measurements, name, workload, ranks))
    if any(bar.case in present for bar in BARS):
        rows = "\n".join(bar.line(measurements) for bar in BARS)
        parts.append(f"What it has to reach:\n\n| | measured | |\n|---|---|---|\n{rows}")
    if any(reduce_case(size) in present for size in SIZES):
        parts.append(_reduce_table(measurements))
    return "\n\n".join(parts) + "\n"


def _ranks(n: int) -> str:
    return f"{n} rank{'s' if n > 1 else ''}"


def _workload_table(
    measurements: Sequence[Measurement], name: str, workload: Workload, ranks: Sequence[int]
) -> str:
    heads = "".join(f" {_ranks(n)}: ms a step | ratio to careful |" for n in ranks)
    lines = [f"**{workload.title}**", "", f"| |{heads}", "|---|" + "--:|--:|" * len(ranks)]
    digits = 3 if name == "tiny" else 1
    counts = []
    for contender in CONTENDERS:
        cells = ""
        for n in ranks:
            spent = times(measurements, (name, n), contender)
            counts += [spent.rounds] if spent else []
            ratio = ratios(measurements, (name, n), contender, "careful")
            cells += f" {spent.median * 1e3:.{digits}f} |" if spent else " |"
            cells += (
                f" {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) |" if ratio else " |"
            )
        if cells.strip(" |"):
            lines.append(f"| {contender} |{cells}")
    lines += ["", f"Medians over {_range(counts)} rounds; in brackets the lowest and the highest."]
    return "\n".join(lines)


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _reduce_table(measurements: Sequence[Measurement]) -> str:
    lines = [
        "**All-reduce of float32 between 2 ranks**",
        "",
        "| bytes | shared memory, µs | gloo, µs | gloo / shared memory |",
        "|--:|--:|--:|--:|",
    ]
    for size in SIZES:
        case = reduce_case(size)
        shared, gloo = (times(measurements, case, name) for name in TRANSPORTS)
        ratio = ratios(measurements, case, "gloo", "shared_memory")
        if shared and gloo and ratio:
            lines.append(
                f"| {_size(size)} | {shared.median * 1e6:.1f} | {gloo.median * 1e6:.1f} | "
                f"{ratio.median:.1f} ({ratio.low:.1f} to {ratio.high:.1f}) |"
            )
    return "\n".join(lines)


def _size(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MiB" if n_bytes >= 2**20 else f"{n_bytes >> 10} KiB"


REPORT = Report("overhead", Measurement, render)


# --- The command ------------------------------------------------------------------------------


def _rounds(
    cases: Sequence[tuple[str, int]],
    contenders: Sequence[str],
    rounds: int,
    before: Sequence[Measurement],
    is_quick: bool,
) -> Iterator[Measurement]:
    rounds, found = 1 if is_quick else rounds, [*before]
    first = {
        case: next_round(before, case if case[0] in WORKLOADS else reduce_case(SIZES[0]))
        for case in cases
    }
    for number in range(rounds):
        for case in cases:
            if case[0] == "all_reduce":
                measured: Iterable[Measurement]
                measured = measure_all_reduce(number + first[case], is_quick)
            else:
                able = [c for c in contenders if takes_part(c, case)]
                order = rotated(able, number + first[case])
                measured = (measure(c, case, number + first[case], is_quick) for c in order)
            for m in measured:
                print(
                    f"round {number + 1}/{rounds}  {m.workload}, {_ranks(m.ranks)}  "
                    f"{m.contender:14} {m.seconds * 1e3:10.4f} ms",
                    flush=True,
                )
                found.append(m)
                check_losses(found)
                yield m


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("overhead", __doc__, "a few steps of one workload", rounds=5)
    add_some(parser, "ranks", {"1": 1, "2": 2})
    add_some(parser, "only", [*WORKLOADS, *CONTENDERS])
    parser.add_argument("--allreduce", action="store_true", help="only the all-reduce by itself")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--work-all-reduce", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.work:
        contender, workload, folder = options.work
        work(contender, workload, options.quick, Path(folder))
        return 0
    if options.work_all_reduce:
        work_all_reduce(options.quick, Path(options.work_all_reduce))
        return 0
    workloads = [w for w in WORKLOADS if w in options.only] or list(WORKLOADS)
    if options.quick:
        workloads = workloads[:1]
    contenders = [c for c in CONTENDERS if c in options.only] or list(CONTENDERS)
    cases = [(w, n) for w in workloads for n in options.ranks]
    if options.allreduce:
        cases = [("all_reduce", 2)]
    measure = partial(_rounds, cases, contenders, options.rounds)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure)


if __name__ == "__main__":
    sys.exit(main())
