"""How many steps and samples a batch size takes to a target loss, and how the optimizer matters.

A model is trained from settings tuned for a small reference batch, brought to each batch size by
a rule: linear or square-root scaling of SGD (digits) or AdamW (GPT), LARS, LAMB with square-root
scaling. Larger batches take fewer steps, down to a least number; smaller ones fewer samples.
Through the two goes McCandlish's curve (S / S_min - 1) (E / E_min - 1) = 1, and E_min / S_min is
the critical batch size, to be compared with the gradient noise scale.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.command_line import add_count, add_some, command_line, shown
from benchmarks.harness import Report, environment, provenance
from scaledtrain.models import GPT, MLP, next_token_loss
from scaledtrain.optim import LAMB, LARS, LearningRateScaling
from scaledtrain.tasks import Task, digits, stdlib_text

PACKAGES = ["torch", "numpy", "scikit-learn"]
BATCHES = [4, 16, 64, 256, 1024]
REFERENCE = 16
SMOOTHING = 0.9  # of the training loss, for what 16 samples are at a time
SETTINGS = {"reference_batch": REFERENCE, "batches": BATCHES, "smoothing": SMOOTHING}


@dataclass(frozen=True)
class Workload:
    """What is trained, to which loss, and for how many samples at most."""

    title: str
    task: Callable[[], Task]
    model: Callable[[], nn.Module]
    target: float
    max_samples: int
    usual: Callable[..., Optimizer]
    """SGD or AdamW, with settings for the reference batch."""


WORKLOADS = {
    "digits": Workload(
        "digits, MLP 64-128-10, to a loss of 0.2",
        digits,
        lambda: MLP(in_features=64, hidden=[128], out_features=10),
        0.2,
        60_000,
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    ),
    "gpt": Workload(
        "char-level GPT, 2 layers of 64, sequences of 64, to a loss of 2.6",
        partial(stdlib_text, sequence_length=64, max_train_bytes=500_000, max_test_bytes=20_000),
        lambda: GPT(vocab_size=256, sequence_length=64, n_layers=2, n_heads=2, d_model=64),
        2.6,
        40_000,
        partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95)),
    ),
}
LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "digits": F.cross_entropy,
    "gpt": next_token_loss,
}
RULES: dict[str, tuple[str, Callable[..., Optimizer] | None]] = {
    "linear": ("linear", None),
    "sqrt": ("sqrt", None),
    "LARS": ("sqrt", partial(LARS, lr=1.0, trust_coefficient=0.02, momentum_correction=True)),
    "LAMB": ("sqrt", partial(LAMB, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)),
}


@dataclass(frozen=True)
class Trained:
    """One run."""

    workload: str
    rule: str
    batch: int
    seed: int
    steps: int | None
    """To the target; None: it was not reached, or the rule does not reach to this batch."""
    why: str
    """Why not."""


def train(name: str, rule: str, batch: int, seed: int, max_samples: int | None = None) -> Trained:
    """Train until a moving average of the training loss, over equally many samples, is there."""
    workload = WORKLOADS[name]
    torch.manual_seed(seed)
    model = workload.model()
    scaling, make = RULES[rule]
    optimizer = (make or workload.usual)(model.parameters())
    try:
        LearningRateScaling(scaling, REFERENCE).apply(optimizer, batch)  # type: ignore[arg-type]
    except ValueError:
        return Trained(name, rule, batch, seed, None, "the rule ends before")
    left = max_samples or workload.max_samples
    average, weight, keep = 0.0, 0.0, SMOOTHING ** (batch / 64)
    for step, (inputs, targets) in enumerate(_batches(workload.task(), batch, left), start=1):
        loss = LOSSES[name](model(inputs), targets)
        if not loss.isfinite():
            return Trained(name, rule, batch, seed, None, "diverged")
        average = keep * average + (1.0 - keep) * loss.item()
        weight = keep * weight + 1.0 - keep
        if average / weight <= workload.target and step * batch >= 256:
            return Trained(name, rule, batch, seed, step, "")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Trained(name, rule, batch, seed, None, "not reached")


def _batches(task: Task, batch: int, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    used = 0
    while used < samples:
        for inputs, targets in task.train_loader(batch):
            if len(targets) < batch:  # an epoch's last one
                continue
            yield inputs, targets
            used += batch
            if used >= samples:
                return


def critical_batch(points: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """S_min and E_min of (S / S_min - 1) (E / E_min - 1) = 1, by least squares in log steps.

    It is S = S_min (1 + B_crit / B) with B_crit = E_min / S_min, for batches of B samples.

    Args:
        points: batch, steps.

    Example:
        >>> s_min, e_min = critical_batch([(b, 100 * (1 + 50 / b)) for b in (10, 50, 250)])
        >>> round(s_min), round(e_min)
        (100, 5000)
    """
    if len(points) < 3:
        return None
    best = None
    for k in range(-40, 241):  # B_crit = 2^(k / 20): 0.25 to 4096
        b_crit = 2.0 ** (k / 20)
        logs = [math.log(steps / (1.0 + b_crit / batch)) for batch, steps in points]
        found = (statistics.pvariance(logs), math.exp(statistics.fmean(logs)), b_crit)
        best = found if best is None else min(best, found)
    assert best is not None
    return best[1], best[1] * best[2]


def render(runs: Sequence[Trained], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    lines = [provenance(where)]
    for name, workload in WORKLOADS.items():
        own = [r for r in runs if r.workload == name]
        if not own:
            continue
        batches = sorted({r.batch for r in own})
        lines += ["", f"**{workload.title}: median steps (samples)**", ""]
        lines.append(f"| | {' | '.join(f'batch {b}' for b in batches)} | critical batch |")
        lines.append(f"|---|{'--:|' * (len(batches) + 1)}")
        for rule in RULES:
            some = [r for r in own if r.rule == rule]
            if not some:
                continue
            cells = [_cell([r for r in some if r.batch == b], b) for b in batches]
            fit = critical_batch(_points(some))
            cells.append("" if fit is None else f"{fit[1] / fit[0]:.0f}")
            lines.append(f"| {rule} | {' | '.join(cells)} |")
        seeds = len({r.seed for r in own})
        lines += ["", f"Medians over {seeds} seeds; settings tuned for batches of {REFERENCE}."]
    return "\n".join(lines) + "\n"


def _points(runs: Sequence[Trained]) -> list[tuple[int, float]]:
    """Batch and median steps where most seeds reached the target."""
    found = []
    for batch in sorted({r.batch for r in runs}):
        steps = [r.steps if r.steps is not None else math.inf for r in runs if r.batch == batch]
        if math.isfinite(statistics.median(steps)):
            found.append((batch, statistics.median(steps)))
    return found


def _cell(runs: Sequence[Trained], batch: int) -> str:
    steps = [r.steps for r in runs if r.steps is not None]
    if not runs:
        return ""
    if 2 * len(steps) <= len(runs):
        return ", ".join(sorted({r.why for r in runs if r.why}))
    middle = statistics.median(steps)
    some = f", {len(steps)} of {len(runs)}" if len(steps) < len(runs) else ""
    return f"{middle:.0f} ({middle * batch:.0f}{some})"


def draw(runs: Sequence[Trained], file: Path) -> None:
    """Samples against steps, on McCandlish's axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), WORKLOADS, strict=True):
        for rule in RULES:
            own = [r for r in runs if (r.workload, r.rule) == (name, rule)]
            points = _points(own)
            if points:
                steps = [s for _, s in points]
                axes.loglog(steps, [b * s for b, s in points], "o-", label=rule)
        axes.set_title(WORKLOADS[name].title, fontsize=9)
        axes.set_xlabel("steps")
        axes.set_ylabel("samples")
        axes.legend()
    figure.savefig(file, dpi=120, metadata={"Software": None})


REPORT = Report("large_batch", Trained, render, draw)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if (status := shown(options, REPORT)) is not None:
        return status
    where = environment(PACKAGES, SETTINGS)
    if options.quick:
        quick = [train("digits", rule, b, 0, 4000) for rule in RULES for b in (16, 64, 256)]
        print(render(quick, where))
        return 0
    folder = REPORT.open(where)
    for seed in range(options.seeds):
        for name in options.only:
            for rule in RULES:
                for batch in BATCHES:
                    run = train(name, rule, batch, seed)
                    print(f"{name:7} {rule:7} {batch:5} seed {seed}  {run.steps} {run.why}")
                    folder.add(run)
    REPORT.write()
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("large_batch", __doc__, "digits, one seed, few samples")
    add_count(parser, "seeds", 5, "of each batch and rule")
    add_some(parser, "only", list(WORKLOADS))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
