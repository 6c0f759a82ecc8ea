"""How much memory activation checkpointing saves, and what time it costs: policies and budgets.

python -m benchmarks.recompute                  everything; results/ and README.md
python -m benchmarks.recompute --only mlp       some of gpt, mlp, convnet, deepest
python -m benchmarks.recompute --quick          does it run? Small chains, stores nothing
python -m benchmarks.recompute --table          write README.md's table anew
python -m benchmarks.recompute --check          fail if README.md is not up to date

Every contender trains the same chain of blocks; bytes are those of activations that are alive at
once, counted in the same way for all, and time is that of a step against keeping everything, in the
same process and round. Beside every fixed policy stands ours with a budget of just its bytes. At
the end, how deep a GPT fits into a fixed number of bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    ROOT,
    Report,
    Spread,
    provenance,
    python_module,
    rotated,
)
from scaledtrain.errors import ConfigError
from scaledtrain.models.gpt import GPT
from scaledtrain.recompute import MemoryBudget, checkpoint_activations
from scaledtrain.recompute.live_bytes import LiveBytes

Blocks = Sequence[nn.Module]
Run = Callable[[Blocks, Tensor], Tensor]

REPEATS = 3  # steps of a contender in a round
SHARES = (10, 15, 30)  # of what everything needs, one part in so many
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
    NONE: one_by_one,
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
    """Of each step."""
    budget: int | None = None
    """Of ours, in bytes."""
    told: str = ""
    """What the planner said."""
    depth: int | None = None
    """Blocks, where contenders have different ones."""


def loss_of(x: Tensor, called: Callable[[Tensor], Tensor]) -> Tensor:
    return called(x).float().square().mean()


def measure(model: Stack, x: Tensor, repeats: int) -> tuple[int, list[float]]:
    """Bytes, in a step of its own; seconds of others. Gradients are there before."""

    def step() -> None:
        loss_of(x, model).backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as counted:
        step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return counted.peak, seconds


def measure_round(chain: str, number: int, is_quick: bool) -> Iterator[Point]:
    """All contenders of one chain, one after another, the fixed ones first."""
    make, depth = CHAINS[chain]
    torch.manual_seed(0)
    model, x = make(8 if is_quick else depth)
    repeats = 1 if is_quick else REPEATS
    peaks: dict[str, int] = {}
    for name, run in rotated(list(FIXED.items()), number):
        model.run = run
        peaks[name], seconds = measure(model, x, repeats)
        yield Point(chain, name, number, peaks[name], seconds)
    model.run = one_by_one
    budgets = {
        f"ours, bytes of {name}": MemoryBudget(peak) for name, peak in peaks.items() if name != NONE
    }
    for share in SHARES:
        n_bytes = peaks[NONE] // share
        budgets[f"ours, 1/{share}"] = MemoryBudget(n_bytes)
        budgets[f"ours, 1/{share}, disk"] = MemoryBudget(n_bytes, offload="disk")
    for name, budget in rotated(list(budgets.items()), number):
        yield with_budget(chain, name, number, model, x, budget, repeats)
    peak, seconds = measure(model, x, repeats)
    yield Point(chain, NONE, number, peak, seconds)


def with_budget(
    chain: str,
    name: str,
    number: int,
    model: Stack,
    x: Tensor,
    budget: MemoryBudget,
    repeats: int,
) -> Point:
    """Ours; without seconds if nothing fits."""
    depth = len(model.blocks)
    budget = replace(budget, blocks=_names(model))
    try:
        executor = checkpoint_activations(model, budget, partial(loss_of, x))
    except ConfigError as error:
        return Point(chain, name, number, 0, [], budget.n_bytes, str(error), depth)
    peak, seconds = measure(model, x, repeats)
    executor.remove()
    return Point(chain, name, number, peak, seconds, budget.n_bytes, executor.told, depth)


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
            peak, seconds = measure(model, x, 1)
            yield Point(DEEPEST, name, number, peak, seconds, n_bytes, depth=depth)
    for name, offload in (("ours", None), ("ours, disk", "disk")):
        model, x = gpt(8 if is_quick else OUR_DEPTH, 16)
        budget = MemoryBudget(n_bytes, offload=offload)
        yield with_budget(DEEPEST, name, number, model, x, budget, 1)


def deepest(run: Run, size: int, n_bytes: int) -> int:
    """The most blocks, in whole groups: bytes grow by as many with each further group."""
    peaks = []
    for groups in (2, 4):
        model, x = gpt(groups * size, 16)
        model.run = run
        with LiveBytes() as counted:
            loss_of(x, model).backward()
        peaks.append(counted.peak)
    by_group = (peaks[1] - peaks[0]) / 2
    return max(0, size * (2 + int((n_bytes - peaks[0]) / by_group)))


def a_round(chain: str, number: int, is_quick: bool) -> Iterator[Point]:
    """Of one chain, or of the deepest one."""
    if chain == DEEPEST:
        return deepest_round(number, is_quick)
    return measure_round(chain, number, is_quick)


def _names(model: Stack) -> list[str]:
    return [f"blocks.{index}" for index in range(len(model.blocks))]


# --- What is shown ----------------------------------------------------------------------------


def extra(points: Sequence[Point], chain: str, name: str) -> Spread | None:
    """Time over that of keeping everything, less 1, by round."""
    values = []
    for number in sorted({p.round for p in points if p.chain == chain}):
        own = _seconds(points, chain, name, number)
        base = _seconds(points, chain, NONE, number)
        if own and base:
            values.append(statistics.median(own) / statistics.median(base) - 1.0)
    return Spread.of(values)


def _seconds(points: Sequence[Point], chain: str, name: str, number: int) -> list[float]:
    of_chain = [p for p in points if (p.chain, p.contender, p.round) == (chain, name, number)]
    return [second for point in of_chain for second in point.seconds]


def _peak(points: Sequence[Point], chain: str, name: str) -> int:
    return max((p.peak_bytes for p in points if (p.chain, p.contender) == (chain, name)), default=0)


def render(points: Sequence[Point], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    parts = [provenance(where)]
    for chain in CHAINS:
        if any(p.chain == chain for p in points):
            parts.append(_table(points, chain, where["settings"]["chains"][chain]))
    if any(p.chain == DEEPEST for p in points):
        parts.append(_deepest_table(points, where["settings"]["chains"][DEEPEST]))
    kept = [p for p in points if p.contender.startswith("ours") and p.seconds]
    if kept:
        over = sum(p.peak_bytes > (p.budget or 0) for p in kept)
        parts.append(f"Of {len(kept)} runs with a budget {over} needed more bytes than that.")
    return "\n\n".join(parts) + "\n"


def _table(points: Sequence[Point], chain: str, what: str) -> str:
    everything = _peak(points, chain, NONE)
    lines = [
        f"**{chain}** ({what}), {everything / 2**20:.0f} MiB if everything is kept",
        "",
        "| | times less bytes | more time | ours, with its bytes: more time |",
        "|---|--:|--:|--:|",
    ]
    for name in FIXED:
        peak = _peak(points, chain, name)
        if name != NONE and peak:
            beside = _shown(extra(points, chain, f"ours, bytes of {name}"))
            own = _shown(extra(points, chain, name))
            lines.append(f"| {name} | {everything / peak:.1f} | {own} | {beside} |")
    for name in (f"ours, 1/{share}{where}" for share in SHARES for where in ("", ", disk")):
        if any(p.contender == name and p.chain == chain for p in points):
            peak = _peak(points, chain, name)
            less = f"{everything / peak:.1f}" if peak else "does not fit"
            lines.append(f"| {name} | {less} | {_shown(extra(points, chain, name))} | |")
    return "\n".join(lines)


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


def _shown(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.median:+.0%} ({spread.low:+.0%} to {spread.high:+.0%})"


REPORT = Report("recompute", Point, render)

# --- The command ------------------------------------------------------------------------------


def rounds(
    chains: Sequence[str], count: int, before: Sequence[Point], is_quick: bool
) -> Iterator[Point]:
    """Chain after chain, again and again, each in a fresh process unless it is quick."""
    for number in range(1 if is_quick else count):
        for chain in chains:
            for point in a_round(chain, 0, True) if is_quick else in_a_process(chain, number):
                print(f"round {number + 1}  {chain:8} {point.contender:40} {point.peak_bytes}")
                yield point


def in_a_process(chain: str, number: int) -> Iterator[Point]:
    """One round in a fresh one."""
    command = python_module("benchmarks.recompute", "--work", chain, str(number))
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for line in ran.stdout.splitlines():
        if line.startswith("{"):
            yield Point(**json.loads(line))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("recompute", __doc__, "8 blocks", rounds=3)
    add_some(parser, "only", [*CHAINS, DEEPEST])
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.work:
        torch.set_num_threads(THREADS)
        for point in a_round(options.work[0], int(options.work[1]), False):
            print(json.dumps(asdict(point)), flush=True)
        return 0
    measure_all = partial(rounds, options.only, options.rounds)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure_all)


if __name__ == "__main__":
    sys.exit(main())
