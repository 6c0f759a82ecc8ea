"""How many steps and samples a batch size takes to a target loss, and how the optimizer matters.

A model is trained from settings tuned for a small reference batch, brought to each batch size by
a rule: linear or square-root scaling of SGD (digits) or AdamW (GPT), LARS, LAMB with square-root
scaling. It is evaluated on the same samples at steps that are 5% apart, until the loss is there.
Larger batches take fewer steps, down to a least number; smaller ones fewer samples. Through the
two goes McCandlish's curve (S / S_min - 1) (E / E_min - 1) = 1, whose E_min / S_min is the critical
batch size. By the theory it is the mean, over the steps, of the gradient noise scale, which is
measured on the way (at steps that are 25% apart).
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.command_line import add_count, add_some, carry_out, command_line
from benchmarks.harness import Report, provenance
from scaledtrain.errors import ConfigError
from scaledtrain.models import GPT, MLP, next_token_loss
from scaledtrain.optim import (
    LAMB,
    LARS,
    LearningRateScaling,
    decay_groups,
    gradient_noise,
    norms_and_biases,
)
from scaledtrain.tasks import Task, digits, stdlib_text

PACKAGES = ["torch", "numpy", "scikit-learn"]
BATCHES = [4, 16, 64, 256, 1024]
REFERENCE = 16
GROUPS = 16  # of samples whose gradients are compared for the noise scale
SETTINGS = {"reference_batch": REFERENCE, "batches": BATCHES, "noise_groups": GROUPS}

LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """What is trained, to which loss, and for how many steps and samples at most."""

    title: str
    task: Callable[[], Task]
    model: Callable[[], nn.Module]
    loss_fn: LossFn
    target: float
    max_steps: int
    max_samples: int
    n_evaluated: int
    """Samples to train on that the loss and the noise scale are of."""
    rules: Mapping[str, tuple[str, Callable[[nn.Module], Optimizer]]]
    """How settings follow the batch, and an optimizer with those for the reference batch."""


def _plain(make: Callable[..., Optimizer], model: nn.Module) -> Optimizer:
    return make(model.parameters())


def _lars(lr: float, others_lr: float, model: nn.Module) -> Optimizer:
    """With a learning rate of their own for norms and biases, which are not adapted."""
    groups = decay_groups(model.named_parameters(), norms_and_biases(model))
    groups[-1]["lr"] = others_lr
    return LARS(groups, lr, momentum_correction=True)


SGD = partial(_plain, partial(torch.optim.SGD, lr=0.02, momentum=0.9))
ADAMW = partial(_plain, partial(torch.optim.AdamW, lr=1e-3, betas=(0.99, 0.999)))
LAMB_OF_ADAM = partial(_plain, partial(LAMB, lr=5e-3, betas=(0.99, 0.999)))
WORKLOADS = {
    "digits": Workload(
        "digits, MLP 64-32-10, to a loss of 0.2",
        partial(digits, as_images=False),
        partial(MLP, in_features=64, hidden=[32], out_features=10),
        F.cross_entropy,
        0.2,
        max_steps=3_000,
        max_samples=300_000,
        n_evaluated=1024,
        rules={
            "linear": ("linear", SGD),
            "sqrt": ("sqrt", SGD),
            "LARS": ("sqrt", partial(_lars, 2.0, 0.02)),
            "LAMB": ("sqrt", LAMB_OF_ADAM),
        },
    ),
    "gpt": Workload(
        "byte-level GPT, 2 layers of 32, sequences of 32, to a loss of 2.8",
        partial(stdlib_text, sequence_length=32, max_train_bytes=500_000, max_test_bytes=20_000),
        partial(GPT, vocab_size=256, sequence_length=32, n_layers=2, n_heads=2, d_model=32),
        next_token_loss,
        2.8,
        max_steps=4_000,
        max_samples=100_000,
        n_evaluated=256,
        rules={
            "linear": ("linear", ADAMW),
            "sqrt": ("sqrt", ADAMW),
            "LARS": ("sqrt", partial(_lars, 2.0, 0.02)),
            "LAMB": ("sqrt", LAMB_OF_ADAM),
        },
    ),
}
RULES = list(WORKLOADS["digits"].rules)


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
    noise_scale: float | None = None
    """S over the squared norm, each the mean over all steps."""


def train(name: str, rule: str, batch: int, seed: int, max_samples: int | None = None) -> Trained:
    """Train until the loss is there."""
    workload = WORKLOADS[name]
    scaling, make = workload.rules[rule]
    torch.manual_seed(seed)
    model = workload.model()
    optimizer = make(model)
    try:
        LearningRateScaling(scaling, REFERENCE).apply(optimizer, batch)  # type: ignore[arg-type]
    except ConfigError:
        return Trained(name, rule, batch, seed, None, "the rule ends before")
    run = _Run(name, model)
    steps = min(workload.max_steps, (max_samples or workload.max_samples) // batch)
    evaluate_at = measure_at = 1
    for step, (inputs, targets) in zip(range(steps), _batches(name, batch, seed), strict=False):
        if step == measure_at:
            run.measure(step)
            measure_at = math.ceil(1.25 * step)
        if step == evaluate_at:
            loss = run.loss()
            if not math.isfinite(loss):
                return Trained(name, rule, batch, seed, None, "diverged")
            if loss <= workload.target:
                return Trained(name, rule, batch, seed, step, "", run.noise_scale)
            evaluate_at = math.ceil(1.05 * step)
        optimizer.zero_grad()
        workload.loss_fn(model(inputs), targets).backward()
        optimizer.step()
    return Trained(name, rule, batch, seed, None, "not reached")


class _Run:
    """Looks at a model that is being trained, on samples that stay the same."""

    def __init__(self, name: str, model: nn.Module) -> None:
        workload = WORKLOADS[name]
        self._loss_fn, self._model = workload.loss_fn, model
        inputs, targets = _samples(name)
        self._inputs, self._targets = (
            inputs[: workload.n_evaluated],
            targets[: workload.n_evaluated],
        )
        self._sum, self._until = 0.0, 0

    def loss(self) -> float:
        with torch.no_grad():
            return self._loss_fn(self._model(self._inputs), self._targets).item()

    def measure(self, step: int) -> None:
        """Compare gradients of groups of samples; the scale counts for all steps since the last."""
        size = len(self._targets) // GROUPS
        parameters, groups = list(self._model.parameters()), []
        for inputs, targets in zip(
            self._inputs.split(size), self._targets.split(size), strict=True
        ):
            loss = self._loss_fn(self._model(inputs), targets)
            gradients = torch.autograd.grad(loss, parameters)
            groups.append(torch.cat([gradient.flatten() for gradient in gradients]))
        each = torch.stack(groups)
        combined = float(each.mean(0).square().sum())
        noise = gradient_noise([size] * GROUPS, each.square().sum(1).tolist(), combined)
        if not noise.no_scale:
            self._sum += (step - self._until) * noise.scale
            self._until = step

    @property
    def noise_scale(self) -> float | None:
        """The mean over the steps so far; None: there is no estimate."""
        return self._sum / self._until if self._until else None


@cache
def _samples(name: str) -> tuple[Tensor, Tensor]:
    """All that there are to train on, in an order that stays the same."""
    samples: Any = WORKLOADS[name].task().train
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    inputs, targets = samples[order.tolist()]
    return inputs, targets


def _batches(name: str, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end; each epoch in another order, without what is left of it."""
    inputs, targets = _samples(name)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(targets), generator=generator)
        for chosen in order.split(batch):
            if len(chosen) == batch:
                yield inputs[chosen], targets[chosen]


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
        lines.append(
            f"| | {' | '.join(f'batch {b}' for b in batches)} | critical batch | noise scale |"
        )
        lines.append(f"|---|{'--:|' * (len(batches) + 2)}")
        for rule in RULES:
            some = [r for r in own if r.rule == rule]
            if not some:
                continue
            cells = [_cell([r for r in some if r.batch == b], b) for b in batches]
            fit = critical_batch(_points(some))
            cells.append("" if fit is None else f"{fit[1] / fit[0]:.0f}")
            scales = [r.noise_scale for r in some if r.noise_scale is not None]
            cells.append(f"{statistics.median(scales):.0f}" if scales else "")
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

    figure = Figure(figsize=(5.0 * len({r.workload for r in runs}), 4.5), layout="constrained")
    shown = [name for name in WORKLOADS if any(r.workload == name for r in runs)]
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
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


def runs(
    names: Sequence[str], seeds: int, jobs: int, before: Sequence[Trained], is_quick: bool
) -> Iterator[Trained]:
    """Seed by seed, every workload, rule and batch size; nothing is timed, so some at once."""
    batches = BATCHES
    if is_quick:
        names, seeds, jobs, batches = ["digits"], 1, 1, BATCHES[2:]
    todo = [
        (name, rule, batch, seed)
        for seed, name, rule, batch in itertools.product(range(seeds), names, RULES, batches)
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        for run in pool.map(train, *zip(*todo, strict=True)):
            told = f"{run.workload:7} {run.rule:7} {run.batch:5} seed {run.seed}"
            print(f"{told}  {run.steps} {run.why}", flush=True)
            yield run


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    measure = partial(runs, options.only, options.seeds, options.jobs)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("large_batch", __doc__, "digits, one seed, few samples")
    add_count(parser, "seeds", 5, "of each batch and rule")
    add_count(parser, "jobs", 1, "at once, each on a core")
    add_some(parser, "only", list(WORKLOADS))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
