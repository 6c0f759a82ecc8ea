"""How much memory activation checkpointing saves, and what time it costs: policies and budgets.

python -m benchmarks.recompute                  everything; results/ and README.md
python -m benchmarks.recompute --only mlp       some of gpt, mlp, convnet, deepest
python -m benchmarks.recompute --quick          does it run? Small chains, stores nothing
python -m benchmarks.recompute --table          write README.md's table anew
python -m benchmarks.recompute --check          fail if README.md is not up to date

Every contender trains the same chain of blocks; bytes are those of activations that are alive at
once, counted in the same way for all. A fixed policy, ours with a budget of just its bytes, and
keeping everything take turns step by step, so that time is compared with what ran a moment before.
At the end, how deep a GPT fits into a fixed number of bytes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    ROOT,
    BenchmarkError,
    Report,
    Spread,
    provenance,
    python_module,
    rotated,
)
from scaledtrain.allocator import keep_freed_memory
from scaledtrain.errors import ConfigError
from scaledtrain.models.gpt import GPT
from scaledtrain.recompute import Executor, MemoryBudget, checkpoint_activations
from scaledtrain.recompute.live_bytes import LiveBytes

Blocks = Sequence[nn.Module]
Run = Callable[[Blocks, Tensor], Tensor]

REPEATS = 6  # steps of a contender in a round: each has each place in as many
SHARES = (10, 15, 30)  # of what everything needs, one part in so many
OFFERED = list(itertools.product(SHARES, (None, "disk")))
TIMES = (("gpt", 10, 0.25), ("mlp", 10, 0.25), ("gpt", 30, 0.45))
"""Of a chain, with one part in so many of its bytes: what time it may take more."""
OURS = "ours, bytes of "
PACKAGES = ("torch", "deepspeed", "numpy")
THREADS = 2
DEEPEST = "deepest"
DEEPEST_BYTES = 256 * 2**20
OUR_DEPTH = 1000


class Stack(nn.Module):
    """A chain with something before and after it; who runs the blocks is a contender's matter."""

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.run: Run = one_by_one

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(list(self.blocks), self.stem(x))
        out: Tensor = self.head(x)
        return out


class Convolutions(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inner(x))


class Layers(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


def gpt(depth: int, sequences: int = 8) -> tuple[Stack, Tensor]:
    model = GPT(256, sequence_length=128, n_layers=depth, n_heads=4, d_model=128)
    head = nn.Sequential(model.norm, model.head)
    stack = Stack(model.token_embedding, list(model.blocks), head)
    return stack, torch.randint(0, 256, (sequences, 128))


def mlp(depth: int) -> tuple[Stack, Tensor]:
    blocks = [Layers(512) for _ in range(depth)]
    return Stack(nn.Identity(), blocks, nn.Linear(512, 10)), torch.randn(1024, 512)


def convnet(depth: int) -> tuple[Stack, Tensor]:
    stem = nn.Conv2d(3, 32, 3, padding=1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    blocks = [Convolutions(32) for _ in range(depth)]
    return Stack(stem, blocks, head), torch.randn(16, 3, 32, 32)


CHAINS: Mapping[str, tuple[Callable[[int], tuple[Stack, Tensor]], int]] = {
    "gpt": (gpt, 64),
    "mlp": (mlp, 64),
    "convnet": (convnet, 32),
}
SETTINGS = {
    "threads": THREADS,
    "repeats": REPEATS,
    "chains": {
        "gpt": "64 blocks, d_model 128, 4 heads, 8 sequences of 128",
        "mlp": "64 residual blocks of LayerNorm, Linear 1024, GELU, Linear 512, batch 1024",
        "convnet": "32 residual blocks of two 3x3 convolutions, 32 channels, 16 images of 32 x 32",
        "deepest": "d_model 128, 4 heads, 16 sequences of 128",
    },
}


def shown_share(share: int, offload: str | None) -> str:
    """Ours with one part in so many of the bytes."""
    return f"ours, 1/{share}" if offload is None else f"ours, 1/{share}, {offload}"


# --- Contenders -------------------------------------------------------------------------------


def one_by_one(blocks: Blocks, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def in_groups(k: int, blocks: Blocks, x: Tensor) -> Tensor:
    """As torch.utils.checkpoint's documentation has it."""
    for start in range(0, len(blocks), k):
        x = checkpoint(one_by_one, blocks[start : start + k], x, use_reentrant=False)
    return x


def nested(k: int, inner: int, blocks: Blocks, x: Tensor) -> Tensor:
    """Groups, inside of which smaller groups are checkpointed."""
    for start in range(0, len(blocks), k):
        group = partial(in_groups, inner, blocks[start : start + k])
        x = checkpoint(group, x, use_reentrant=False)
    return x


def selective(blocks: Blocks, x: Tensor) -> Tensor:
    """torch's selective checkpointing, with matrix products, convolutions and attention kept."""
    aten = torch.ops.aten
    kept = [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
    ]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return x


def deepspeed_every_block(blocks: Blocks, x: Tensor) -> Tensor:
    from deepspeed.runtime.activation_checkpointing.checkpointing import non_reentrant_checkpoint

    for block in blocks:
        x = non_reentrant_checkpoint(block, x)
    return x


NONE = "none"
FIXED: Mapping[str, Run] = {
    "torch, every block": partial(in_groups, 1),
    "torch, every 2": partial(in_groups, 2),
    "torch, every 4": partial(in_groups, 4),
    "torch, sqrt": partial(in_groups, 8),
    "torch, nested 8 / 2": partial(nested, 8, 2),
    "torch, selective": selective,
    "DeepSpeed, every block": deepspeed_every_block,
}


@dataclass(frozen=True)
class Point:
    """One contender in one round."""

    chain: str
    contender: str
    round: int
    peak_bytes: int
    """Activations alive at once, at most."""
    seconds: list[float]
    """Of each step; none if nothing fits, or none was timed."""
    plain_seconds: list[float] = field(default_factory=list)
    """Of the steps between them, in which everything was kept."""
    budget: int | None = None
    """Of ours, in bytes."""
    planned_bytes: int = 0
    planned_more: float = 0.0
    """Time, as a part of that of keeping everything."""
    told: str = ""
    """What the planner said."""
    depth: int | None = None
    """Blocks, where contenders have different ones."""

    @property
    def more(self) -> float:
        """Time, as a part of that of keeping everything in the same turn."""
        return by_turn(self.seconds, self.plain_seconds) - 1.0


def by_turn(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of what took turns."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def loss_of(x: Tensor, called: Callable[[Tensor], Tensor]) -> Tensor:
    return called(x).float().square().mean()


def peak_of(model: Stack, x: Tensor) -> int:
    """Bytes of activations in a step."""
    with LiveBytes() as counted:
        loss_of(x, model).backward()
    return counted.peak


def by_turns(models: Sequence[Stack], x: Tensor, repeats: int) -> list[list[float]]:
    """Seconds of steps of each, in turns, so that none has another moment to itself."""
    seconds: list[list[float]] = [[] for _ in models]
    for number in range(repeats):
        order = rotated(range(len(models)), number // 2)
        for index in order if number % 2 == 0 else reversed(order):
            start = time.perf_counter()
            loss_of(x, models[index]).backward()
            seconds[index].append(time.perf_counter() - start)
    return seconds


def with_gradients(model: Stack) -> Stack:
    """The model, with gradients that a step adds to."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def measure_round(chain: str, number: int, is_quick: bool) -> Iterator[Point]:
    """All contenders of one chain; each with ours beside it, and keeping everything."""
    make, depth = CHAINS[chain]
    torch.manual_seed(0)
    model, x = make(8 if is_quick else depth)
    plain, fixed, own = (with_gradients(m) for m in (model, *map(copy.deepcopy, [model] * 2)))
    repeats = 1 if is_quick else REPEATS
    everything = peak_of(plain, x)
    yield Point(chain, NONE, number, everything, [])
    for name, run in rotated(list(FIXED.items()), number):
        fixed.run = run
        peak = peak_of(fixed, x)
        beside, executor = with_budget(chain, f"{OURS}{name}", number, own, x, MemoryBudget(peak))
        models = [plain, fixed] if executor is None else [plain, fixed, own]
        seconds = by_turns(models, x, repeats)
        if executor is not None:
            executor.remove()
            beside = replace(beside, seconds=seconds[2], plain_seconds=seconds[0])
        yield Point(chain, name, number, peak, seconds[1], seconds[0])
        yield beside
    for share, offload in rotated(OFFERED, number):
        name = shown_share(share, offload)
        budget = MemoryBudget(everything // share, offload=offload)
        point, executor = with_budget(chain, name, number, own, x, budget)
        if executor is not None:
            seconds = by_turns([plain, own], x, repeats)
            executor.remove()
            point = replace(point, seconds=seconds[1], plain_seconds=seconds[0])
        yield point


def with_budget(
    chain: str, name: str, number: int, model: Stack, x: Tensor, budget: MemoryBudget
) -> tuple[Point, Executor | None]:
    """What there is to say of the model but its seconds, and what to remove; None: nothing fits."""
    names = [f"blocks.{index}" for index in range(len(model.blocks))]
    try:
        executor = checkpoint_activations(model, replace(budget, blocks=names), partial(loss_of, x))
    except ConfigError as error:
        return Point(chain, name, number, 0, [], budget=budget.n_bytes, told=str(error)), None
    planned = executor.planned
    assert planned is not None
    point = Point(
        chain,
        name,
        number,
        peak_of(model, x),
        [],
        budget=budget.n_bytes,
        planned_bytes=planned.predicted.peak_bytes,
        planned_more=planned.predicted_more,
        told=executor.told,
    )
    return point, executor


def deepest_round(number: int, is_quick: bool) -> Iterator[Point]:
    """How many blocks fit, of a GPT in groups of k, and a budget for more of them."""
    n_bytes = DEEPEST_BYTES // (16 if is_quick else 1)
    for name, run, size in (
        (NONE, one_by_one, 1),
        ("torch, every block", partial(in_groups, 1), 1),
        *((f"torch, every {k}", partial(in_groups, k), k) for k in (6, 8, 10)),
    ):
        depth = deepest(run, size, n_bytes)
        if depth:
            model, x = gpt(depth, 16)
            model.run = run
            peak, [seconds] = peak_of(with_gradients(model), x), by_turns([model], x, 1)
            yield Point(DEEPEST, name, number, peak, seconds, budget=n_bytes, depth=depth)
    for offload in (None, "disk"):
        model, x = gpt(8 if is_quick else OUR_DEPTH, 16)
        budget = MemoryBudget(n_bytes, offload=offload)
        name = "ours" if offload is None else "ours, disk"
        point, executor = with_budget(DEEPEST, name, number, with_gradients(model), x, budget)
        seconds = [] if executor is None else by_turns([model], x, 1)[0]
        if executor is not None:
            executor.remove()
        yield replace(point, seconds=seconds, depth=len(model.blocks))
        del model, executor  # before there is another one


def deepest(run: Run, size: int, n_bytes: int) -> int:
    """The most blocks, in whole groups: bytes grow by as many with each further group."""
    peaks = []
    for groups in (2, 4):
        model, x = gpt(groups * size, 16)
        model.run = run
        peaks.append(peak_of(with_gradients(model), x))
    by_group = (peaks[1] - peaks[0]) / 2
    return max(0, size * (2 + int((n_bytes - peaks[0]) / by_group)))


def a_round(chain: str, number: int, is_quick: bool) -> Iterator[Point]:
    """Of one chain, or of the deepest one."""
    if chain == DEEPEST:
        return deepest_round(number, is_quick)
    return measure_round(chain, number, is_quick)


# --- What is shown ----------------------------------------------------------------------------


def more_time(points: Sequence[Point], chain: str, name: str) -> Spread | None:
    """Over that of keeping everything, less 1, by round."""
    return Spread.of([p.more for p in _of(points, chain, name) if p.seconds and p.plain_seconds])


def slower(points: Sequence[Point], chain: str, name: str) -> Spread | None:
    """Time of ours with the bytes of a fixed policy over that of the policy, by round."""
    fixed = {p.round: p.seconds for p in _of(points, chain, name)}
    own = {p.round: p.seconds for p in _of(points, chain, f"{OURS}{name}") if p.seconds}
    both = [(own[r], fixed[r]) for r in own if r in fixed]
    return Spread.of([by_turn(a, b) for a, b in both])


def _of(points: Sequence[Point], chain: str, name: str) -> list[Point]:
    return [p for p in points if (p.chain, p.contender) == (chain, name)]


def _peak(points: Sequence[Point], chain: str, name: str) -> int:
    return max((p.peak_bytes for p in _of(points, chain, name)), default=0)


def render(points: Sequence[Point], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    chains = [chain for chain in CHAINS if any(p.chain == chain for p in points)]
    parts = [provenance(where)]
    for chain in chains:
        parts += [_table(points, chain, where["settings"]["chains"][chain]), _ours(points, chain)]
    if any(p.chain == DEEPEST for p in points):
        parts.append(_deepest_table(points, where["settings"]["chains"][DEEPEST]))
    parts.append(_bars(points, chains))
    return "\n\n".join(parts) + "\n"


def _table(points: Sequence[Point], chain: str, what: str) -> str:
    everything = _peak(points, chain, NONE)
    lines = [
        f"**{chain}** ({what}), {everything / 2**20:.0f} MiB if everything is kept",
        "",
        "| | times less bytes | more time | ours, with its bytes: more time | ours / it |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in FIXED:
        peak = _peak(points, chain, name)
        if peak:
            own = _shown(more_time(points, chain, name))
            beside = _shown(more_time(points, chain, f"{OURS}{name}"))
            ratio = _ratio(slower(points, chain, name))
            lines.append(f"| {name} | {everything / peak:.1f} | {own} | {beside} | {ratio} |")
    return "\n".join(lines)


def _ours(points: Sequence[Point], chain: str) -> str:
    """What was planned beside what came of it."""
    everything = _peak(points, chain, NONE)
    lines = [
        "| | times less bytes | MiB: budget | planned | measured | more time: planned | measured |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in (*(f"{OURS}{n}" for n in FIXED), *(shown_share(*s) for s in OFFERED)):
        own = _of(points, chain, name)
        if not own:
            continue
        mib = [max(p.budget or 0 for p in own) / 2**20]
        fitting = [p for p in own if p.seconds]
        if not fitting:
            lines.append(f"| {name} | does not fit | {mib[0]:.1f} | | | | |")
            continue
        mib += [max(p.planned_bytes for p in fitting) / 2**20, _peak(fitting, chain, name) / 2**20]
        cells = [f"{everything / _peak(fitting, chain, name):.1f}", *(f"{x:.1f}" for x in mib)]
        planned = _shown(Spread.of([p.planned_more for p in fitting]))
        lines.append(
            f"| {name} | {' | '.join(cells)} | {planned} | "
            f"{_shown(more_time(points, chain, name))} |"
        )
    return "\n".join(lines)


def _bars(points: Sequence[Point], chains: Sequence[str]) -> str:
    lines = ["What it has to reach:", "", "| | measured | |", "|---|---|---|"]
    for chain in chains:
        for name in FIXED:
            lines.append(
                _bar(
                    f"{chain}: ours / {name}, in as many bytes ≤ 1", slower(points, chain, name), 1
                )
            )
    for chain, share, bar in TIMES:
        if chain in chains:
            for offload in (None, "disk"):
                found = more_time(points, chain, shown_share(share, offload))
                name = f"{chain}: {shown_share(share, offload)}: more time ≤ {bar:.0%}"
                lines.append(_bar(name, found, bar, _shown))
    own = [
        p for p in points if p.budget is not None and p.contender.startswith("ours") and p.seconds
    ]
    if own:
        over = sum(p.peak_bytes > (p.budget or 0) for p in own)
        lines.append(
            f"| runs that exceed their budget, of {len(own)}: 0 | {over} | {_passes(not over)} |"
        )
        wrong = max(abs(p.planned_bytes / p.peak_bytes - 1.0) for p in own)
        lines.append(
            f"| planned bytes beside measured ones, at most 5% apart | {wrong:.1%} | "
            f"{_passes(wrong <= 0.05)} |"
        )
    fits = [p.depth or 0 for p in own if p.chain == DEEPEST]
    if any(p.chain == DEEPEST for p in points):
        lines.append(
            f"| blocks of a GPT in {DEEPEST_BYTES // 2**20} MiB ≥ {OUR_DEPTH:,} | "
            f"{max(fits, default=0):,} | {_passes(max(fits, default=0) >= OUR_DEPTH)} |"
        )
    return "\n".join(lines)


def _bar(
    what: str,
    found: Spread | None,
    most: float,
    shown: Callable[[Spread | None], str] | None = None,
) -> str:
    if found is None:
        return f"| {what} | not measured, or nothing fits | **MISSED** |"
    return f"| {what} | {(shown or _ratio)(found)} | {_passes(found.median <= most)} |"


def _passes(does: bool) -> str:
    return "pass" if does else "**MISSED**"


def _deepest_table(points: Sequence[Point], what: str) -> str:
    lines = [
        f"**The deepest GPT** ({what}) whose activations fit into {DEEPEST_BYTES // 2**20} MiB",
        "",
        "| | blocks | MiB | milliseconds a block |",
        "|---|--:|--:|--:|",
    ]
    found = [p for p in points if p.chain == DEEPEST]
    for name in dict.fromkeys(p.contender for p in found):
        own = [p for p in found if p.contender == name]
        depth = own[0].depth or 1
        peak = max(p.peak_bytes for p in own) / 2**20
        times = Spread.of([second / depth * 1e3 for p in own for second in p.seconds])
        shown = "does not fit" if times is None else f"{times.median:.0f}"
        lines.append(f"| {name} | {depth} | {peak:.1f} | {shown} |")
    return "\n".join(lines)


def _ratio(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _shown(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.median:+.0%} ({spread.low:+.0%} to {spread.high:+.0%})"


REPORT = Report("recompute", Point, render)

# --- The command ------------------------------------------------------------------------------


def rounds(
    chains: Sequence[str], count: int, before: Sequence[Point], is_quick: bool
) -> Iterator[Point]:
    """Chain after chain, again and again, each in a fresh process unless it is quick.

    A later command adds rounds.
    """
    stored = {chain: {p.round for p in before if p.chain == chain} for chain in chains}
    for turn in range(1 if is_quick else count):
        for chain in chains:
            number = max(stored[chain], default=-1) + 1 + turn
            for point in a_round(chain, number, True) if is_quick else in_a_process(chain, number):
                print(f"round {number + 1}  {chain:8} {point.contender:40} {point.peak_bytes}")
                yield point


def in_a_process(chain: str, number: int) -> Iterator[Point]:
    """One round in a fresh one."""
    command = python_module("benchmarks.recompute", "--work", chain, str(number))
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield Point(**json.loads(line))
    if process.returncode:
        raise BenchmarkError(f"{shlex.join(command)} ended with status {process.returncode}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("recompute", __doc__, "8 blocks", rounds=3)
    add_some(parser, "only", [*CHAINS, DEEPEST])
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.work:
        torch.set_num_threads(THREADS)
        keep_freed_memory()  # for all: else each step's time hangs on what is where in the heap
        for point in a_round(options.work[0], int(options.work[1]), False):
            print(json.dumps(asdict(point)), flush=True)
        return 0
    measure_all = partial(rounds, options.only, options.rounds)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure_all)


if __name__ == "__main__":
    sys.exit(main())
