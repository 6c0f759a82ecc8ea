"""What LARS and LAMB take for a step, beside torch's SGD and AdamW.

All contenders update the same tensors with the same gradients, in one process on one thread, one
after another in each round. A ratio is taken within each round, then the median over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import Report, Spread, provenance, rotated
from scaledtrain.models import GPT, GPT_10M, ConvNet
from scaledtrain.optim import LAMB, LARS

PACKAGES = ["torch"]
STEPS = 5  # in a round, of which the median counts
SETTINGS = {"steps_per_round": STEPS, "threads": 1}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: GPT(**GPT_10M),
    "convnet": lambda: nn.ModuleList(ConvNet(3, 10, width=128) for _ in range(4)),
}
DECAY = 0.01
CONTENDERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, foreach=True),
    "SGD, decay": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=DECAY, foreach=True),
    "LARS": partial(LARS, lr=1e-3),
    "LARS, decay": partial(LARS, lr=1e-3, weight_decay=DECAY),
    "AdamW": partial(torch.optim.AdamW, lr=1e-5, weight_decay=DECAY, foreach=True),
    "LAMB": partial(LAMB, lr=1e-5, weight_decay=DECAY),
}
AGAINST = {"LARS": "SGD", "LARS, decay": "SGD, decay", "LAMB": "AdamW"}
BAR = 1.5


@dataclass(frozen=True)
class Timed:
    """One contender in one round."""

    model: str
    contender: str
    round: int
    seconds: float
    """Of a step: the median of the round's."""
    load_average: float


def measure(model: str, rounds: int, steps: int = STEPS) -> Iterator[Timed]:
    """All contenders on one model's tensors."""
    torch.set_num_threads(1)
    optimizers = {}
    for name, make in CONTENDERS.items():
        torch.manual_seed(0)
        parameters = list(MODELS[model]().parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizers[name] = make(parameters)
        optimizers[name].step()  # makes its state
    for number in range(rounds):
        for name in rotated(list(optimizers), number):
            seconds = []
            for _ in range(steps):
                start = time.perf_counter()
                optimizers[name].step()
                seconds.append(time.perf_counter() - start)
            yield Timed(model, name, number, statistics.median(seconds), os.getloadavg()[0])


def ratios(records: Sequence[Timed], model: str, above: str, below: str) -> Spread | None:
    """Time of one over that of another, within each round."""
    found = {(r.contender, r.round): r.seconds for r in records if r.model == model}
    rounds = sorted({r.round for r in records if r.model == model})
    both = [(found.get((above, n)), found.get((below, n))) for n in rounds]
    return Spread.of([a / b for a, b in both if a is not None and b is not None])


def render(records: Sequence[Timed], where: Mapping[str, Any]) -> str:
    """The table, in Markdown."""
    lines = [provenance(where)]
    for model in MODELS:
        own = [r for r in records if r.model == model]
        if not own:
            continue
        n = sum(p.numel() for p in MODELS[model]().parameters())
        lines += ["", f"**{model}, {n / 1e6:.1f} million parameters**", ""]
        lines += ["| | ms a step | over | ratio | at most 1.5 |", "|---|--:|---|--:|---|"]
        for name in CONTENDERS:
            times = [r.seconds for r in own if r.contender == name]
            if not times:
                continue
            cells = [f"{statistics.median(times) * 1e3:.2f}", "", "", ""]
            ratio = ratios(own, model, name, AGAINST[name]) if name in AGAINST else None
            if ratio is not None:
                low, high = ratio.low, ratio.high
                cells[1:] = [
                    AGAINST[name],
                    f"{ratio.median:.2f} ({low:.2f} to {high:.2f})",
                    "pass" if ratio.median <= BAR else "**MISSED**",
                ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


REPORT = Report("optimizers", Timed, render)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("optimizers", __doc__, "one round", rounds=15)
    add_some(parser, "only", list(MODELS))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)

    def measure_all(before: Sequence[Timed], is_quick: bool) -> Iterator[Timed]:
        for model in options.only:
            yield from measure(model, 1, 2) if is_quick else measure(model, options.rounds)

    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure_all)


if __name__ == "__main__":
    sys.exit(main())
