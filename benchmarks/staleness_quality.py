"""How much test quality staleness costs, and what the corrections give back.

python -m benchmarks.staleness_quality                  everything; results/ and README.md
python -m benchmarks.staleness_quality --workers 8      one number of workers (or --only asgd,dana)
python -m benchmarks.staleness_quality --quick          does it run? One seed, nothing is stored
python -m benchmarks.staleness_quality --table          write README.md's table and picture anew
python -m benchmarks.staleness_quality --check          fail if README.md is not up to date

The workers are virtual: a loop in one process over the pure `scaledtrain.server.Server`, with a
heap of the times at which workers finish instead of a clock. So a run is a function of its rule,
learning rate, number of workers and seed, whatever the machine does.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command_line import add_count, add_some, carry_out, command_line
from benchmarks.harness import Report, provenance
from scaledtrain import Replica
from scaledtrain.data import digits
from scaledtrain.models import MLP
from scaledtrain.server import (
    AdaptiveDelayCompensated,
    Admission,
    Asynchronous,
    Correction,
    Dana,
    DelayAdaptive,
    DelayCompensated,
    GapAware,
    Server,
    StalenessAware,
    Synchronous,
    Uncorrected,
)

HIDDEN = 32
BATCH_SIZE = 32
GRADIENTS = 1350  # 30 epochs of 45 batches
GAMMA_SHAPE = 100.0  # of the workers' compute times, mean 1: they vary by a tenth
SEEDS = 10
WORKERS = (8, 16, 32)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Learning rate / (1 - momentum): how far one gradient moves the parameters in the end."""
PACKAGES = ("torch", "scikit-learn", "numpy")
SETTINGS = {
    "model": f"MLP 64-{HIDDEN}-10",
    "batch_size": BATCH_SIZE,
    "gradients": GRADIENTS,
    "gamma_shape": GAMMA_SHAPE,
}

# --- The rules --------------------------------------------------------------------------------

_UNCORRECTED, _ASYNCHRONOUS = Uncorrected(), Asynchronous()


@dataclass(frozen=True)
class Rule:
    """What is done about staleness.

    Args:
        title: in tables.
        admission: how many gradients make an update.
        correction: of stale gradients.
        optimizer_momentum: of SGD on the server.
        momentum: what the learning rate is divided by 1 minus of; DANA has one of its own.
        alone: a reference: one worker, whose gradients are never stale.
    """

    title: str
    correction: Correction = _UNCORRECTED
    admission: Admission = _ASYNCHRONOUS
    optimizer_momentum: float = 0.0
    momentum: float = 0.0
    alone: bool = False

    def learning_rate(self, rate: float) -> float:
        return rate * (1.0 - self.momentum)


RULES: Mapping[str, Rule] = {
    "sgd": Rule("one worker", alone=True),
    "sync": Rule("synchronous", admission=Synchronous()),
    "asgd": Rule("ASGD"),
    "staleness_aware": Rule("staleness-aware", StalenessAware()),
    "delay_adaptive": Rule("delay-adaptive", DelayAdaptive()),
    "dc_asgd": Rule("DC-ASGD-c", DelayCompensated(lambda0=0.04)),
    "dc_asgd_adaptive": Rule("DC-ASGD-a", AdaptiveDelayCompensated(lambda0=2.0)),
    "sgd_momentum": Rule("one worker, momentum", optimizer_momentum=0.9, momentum=0.9, alone=True),
    "asgd_momentum": Rule("ASGD, momentum", optimizer_momentum=0.9, momentum=0.9),
    "gap_aware": Rule("gap-aware, momentum", GapAware(), optimizer_momentum=0.9, momentum=0.9),
    "dana": Rule("DANA, momentum", Dana(momentum=0.9), momentum=0.9),
}


# --- Virtual workers --------------------------------------------------------------------------


class Simulated(NamedTuple):
    staleness: Counter[int]
    """Staleness -> pushes that had it."""
    is_finite: bool
    """False: a gradient was not, and the run was given up."""


def simulate(
    server: Server,
    compute: Callable[[Sequence[Tensor]], list[Tensor]],
    seconds: Callable[[], float],
    n_gradients: int,
) -> Simulated:
    """Let all workers of a server pull, compute and push until so many gradients have been pushed.

    The earliest to finish comes first, of several the lowest number. A worker begins again as soon
    as the admission policy lets it.

    Args:
        server: new; it is changed.
        compute: parameters -> gradient of the next batch; called when a worker begins.
        seconds: how long that takes in virtual time; called when a worker begins.
        n_gradients: pushes by all workers together.
    """
    under_way: dict[int, tuple[list[Tensor], int]] = {}
    finishing: list[tuple[float, int]] = []
    idle = set(range(server.n_workers))
    staleness: Counter[int] = Counter()
    now = 0.0
    for _ in range(n_gradients):
        for worker in sorted(idle):
            if server.may_go_on(worker):
                idle.remove(worker)
                under_way[worker] = compute(server.pull(worker)), server.version
                heapq.heappush(finishing, (now + seconds(), worker))
        now, worker = heapq.heappop(finishing)
        pushed = server.push(worker, *under_way.pop(worker))
        if pushed.fault is not None:
            return Simulated(staleness, False)
        staleness[pushed.staleness] += 1
        idle.add(worker)
    return Simulated(staleness, True)


def batches(n_samples: int, seed: int) -> Iterator[Tensor]:
    """Indices of batch after batch, epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n_samples, generator=generator).split(BATCH_SIZE)


# --- One run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training, as it ended."""

    rule: str
    workers: int
    rate: float
    """Learning rate / (1 - momentum)."""
    learning_rate: float
    seed: int
    test_error: float
    """Share of the test images that are taken for another digit."""
    test_loss: float | None
    """None if it was not finite."""
    peak_loss: float | None
    """The largest of the batches' losses on the way; None if one was not finite."""
    staleness_mean: float
    staleness_max: int

    @property
    def diverged(self) -> bool:
        """It is of no use, and not for being slow, as the loss had been above that of guessing."""
        went_up = self.peak_loss is None or self.peak_loss > 1.15 * math.log(10)
        return self.test_error > 0.5 and went_up


@cache
def data(split: Any) -> tuple[Tensor, Tensor]:
    inputs, targets = digits(split).tensors
    return inputs, targets


def train(rule_name: str, workers: int, rate: float, seed: int, n_gradients: int) -> Run:
    """Train once."""
    rule = RULES[rule_name]
    lr = rule.learning_rate(rate)
    torch.manual_seed(seed)
    model = MLP(64, [HIDDEN], 10)
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=rule.optimizer_momentum)
    replica = Replica(model, optimizer)
    server = Server(replica.parameters, replica.updater, workers, rule.admission, rule.correction)
    inputs, targets = data("train")
    order = batches(len(inputs), seed)
    losses: list[float] = []

    def compute(parameters: Sequence[Tensor]) -> list[Tensor]:
        set_parameters(parameters)
        batch = next(order)
        loss = F.cross_entropy(model(inputs[batch]), targets[batch])
        losses.append(loss.item())
        return list(torch.autograd.grad(loss, replica.parameters))

    @torch.no_grad()
    def set_parameters(parameters: Sequence[Tensor]) -> None:
        torch._foreach_copy_(replica.parameters, list(parameters))

    times = random.Random(seed)
    simulated = simulate(
        server, compute, lambda: times.gammavariate(GAMMA_SHAPE, 1 / GAMMA_SHAPE), n_gradients
    )
    set_parameters(server.parameters)
    with torch.no_grad():
        inputs, targets = data("test")
        outputs = model(inputs)
        wrong = (outputs.argmax(1) != targets).double().mean().item()
        loss = F.cross_entropy(outputs, targets).item()
    is_finite = simulated.is_finite and math.isfinite(loss)
    seen = simulated.staleness
    return Run(
        rule=rule_name,
        workers=workers,
        rate=rate,
        learning_rate=lr,
        seed=seed,
        test_error=wrong if is_finite else 0.9,
        test_loss=loss if is_finite else None,
        peak_loss=max(losses) if all(map(math.isfinite, losses)) else None,
        staleness_mean=sum(s * n for s, n in seen.items()) / max(1, seen.total()),
        staleness_max=max(seen, default=0),
    )


# --- What is shown ----------------------------------------------------------------------------


class Cell(NamedTuple):
    """A rule at one learning rate."""

    mean: float
    """Test error over the seeds that did not diverge; nan if all did."""
    standard_error: float
    """Of the mean; 0 for a single seed."""
    seeds: int
    diverged: int

    @property
    def text(self) -> str:
        if self.diverged == self.seeds:
            return "diverged"
        shown = f"{100 * self.mean:.1f} ± {100 * self.standard_error:.1f}"
        return shown + (f" ({self.diverged} diverged)" if self.diverged else "")


def cell(runs: Sequence[Run], rule: str, workers: int, rate: float) -> Cell | None:
    """None if it was not run."""
    chosen = [r for r in runs if (r.rule, r.workers, r.rate) == (rule, workers, rate)]
    if not chosen:
        return None
    errors = [r.test_error for r in chosen if not r.diverged]
    return Cell(
        mean=statistics.fmean(errors) if errors else math.nan,
        standard_error=statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else 0.0,
        seeds=len(chosen),
        diverged=len(chosen) - len(errors),
    )


def best_rate(runs: Sequence[Run], rule: str, workers: int) -> float | None:
    """Of the learning rates at which no seed diverged, the one of the least mean error."""
    cells = [(rate, cell(runs, rule, workers, rate)) for rate in RATES]
    safe = [(c.mean, rate) for rate, c in cells if c is not None and not c.diverged]
    return min(safe)[1] if safe else None


def rows(runs: Sequence[Run], workers: int) -> list[tuple[str, int]]:
    """(rule, its number of workers) of each row of a table that was run."""
    present = {(r.rule, r.workers) for r in runs}
    wanted = [(name, 1 if rule.alone else workers) for name, rule in RULES.items()]
    return [row for row in wanted if row in present]


def render(runs: Sequence[Run], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    parts = [provenance(where)]
    for workers in sorted({r.workers for r in runs if not RULES[r.rule].alone}):
        parts.append(_table(runs, workers))
    counts = Counter((r.rule, r.workers, r.rate) for r in runs)
    seeds = " to ".join(map(str, dict.fromkeys([min(counts.values()), max(counts.values())])))
    parts.append(
        f"Test error in percent: mean over {seeds} seeds ± its standard error, without the runs "
        "that diverged; the best of each rule in bold. A run has diverged if it ends with more "
        "than half of the test images wrong, and the loss of a batch had been 15 % above that of "
        "guessing; one that ends there without is only slow."
    )
    return "\n\n".join(parts) + "\n"


def _table(runs: Sequence[Run], workers: int) -> str:
    stale = [r for r in runs if r.workers == workers and r.rule != "sync"]
    mean = statistics.fmean(r.staleness_mean for r in stale) if stale else 0.0
    most = max((r.staleness_max for r in stale), default=0)
    heads = "".join(f" {rate:g} |" for rate in RATES)
    lines = [
        f"**{workers} workers: staleness {mean:.1f} on average, at most {most}**",
        "",
        f"| learning rate / (1 − momentum) |{heads}",
        "|---|" + "--:|" * len(RATES),
    ]
    for rule, n in rows(runs, workers):
        best = best_rate(runs, rule, n)
        texts = []
        for rate in RATES:
            found = cell(runs, rule, n, rate)
            text = found.text if found else ""
            texts.append(f"**{text}**" if rate == best else text)
        lines.append(f"| {RULES[rule].title} | {' | '.join(texts)} |")
    return "\n".join(lines)


_COLOURS = {
    "sgd": "0.55",
    "sync": "#000000",
    "asgd": "#D55E00",
    "staleness_aware": "#0072B2",
    "delay_adaptive": "#E69F00",
    "dc_asgd": "#CC79A7",
    "dc_asgd_adaptive": "#009E73",
    "sgd_momentum": "0.55",
    "asgd_momentum": "#D55E00",
    "gap_aware": "#0072B2",
    "dana": "#009E73",
}


def draw(runs: Sequence[Run], path: Path) -> None:
    """Error against learning rate: a column for each number of workers, a row for each momentum."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = sorted({r.workers for r in runs if not RULES[r.rule].alone})
    figure = Figure(figsize=(2 + 4 * max(1, len(columns)), 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, max(1, len(columns)), sharex=True, sharey=True, squeeze=False)
    for (row, momentum), (column, workers) in itertools.product(
        enumerate((0.0, 0.9)), enumerate(columns)
    ):
        panel = axes[row][column]
        shown = [(r, n) for r, n in rows(runs, workers) if RULES[r].momentum == momentum]
        for rule, n in shown:
            found = [(rate, cell(runs, rule, n, rate)) for rate in RATES]
            points = [(rate, c) for rate, c in found if c is not None and not c.diverged]
            panel.errorbar(
                [rate for rate, _ in points],
                [100 * c.mean for _, c in points],
                yerr=[100 * c.standard_error for _, c in points],
                color=_COLOURS[rule],
                linestyle="--" if RULES[rule].alone else "-",
                marker="o",
                markersize=4,
                linewidth=1.5,
                label=RULES[rule].title,
            )
        kind = "momentum 0.9" if momentum else "no momentum"
        panel.set_title(f"{workers} workers, {kind}", loc="left", fontsize=11)
        panel.set(xscale="log", yscale="log", ylim=(1.5, 60))
        panel.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
        panel.minorticks_off()
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
        if row == 1:
            panel.set_xlabel("learning rate / (1 − momentum)")
        if column == 0:
            panel.set_ylabel("test error, %")
        if workers == columns[-1] and shown:
            panel.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.suptitle(
        f"Test error after {GRADIENTS} gradients. A line ends where one of the runs diverged",
        fontsize=11.5,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=110)


REPORT = Report("staleness_quality", Run, render, draw)


# --- The command ------------------------------------------------------------------------------


def plan(
    rules: Sequence[str], workers: Sequence[int], seeds: Sequence[int]
) -> list[tuple[str, int, float, int]]:
    """(rule, workers, rate, seed) of each run, seed by seed: cut short, it has whole seeds."""
    return [
        (rule, n, rate, seed)
        for seed in seeds
        for rule in rules
        for n in ((1,) if RULES[rule].alone else workers)
        for rate in RATES
    ]


def runs(
    rules: Sequence[str], workers: Sequence[int], seeds: int, before: Sequence[Run], is_quick: bool
) -> Iterator[Run]:
    """Train what is not stored yet."""
    todo = plan(rules, workers, range(1 if is_quick else seeds))
    stored = {(r.rule, r.workers, r.rate, r.seed) for r in before}
    for number, each in enumerate(todo, start=1):
        if each not in stored:
            yield train(*each, 90 if is_quick else GRADIENTS)
        if number % 100 == 0 or number == len(todo):
            print(f"{number}/{len(todo)} runs", flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("staleness_quality", __doc__, "one seed, few gradients")
    add_some(parser, "only", list(RULES))
    add_some(parser, "workers", {str(n): n for n in WORKERS})
    add_count(parser, "seeds", SEEDS, "how many")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(1)
    measure = partial(runs, options.only, options.workers, options.seeds)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure)


if __name__ == "__main__":
    sys.exit(main())
