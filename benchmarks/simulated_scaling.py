"""How far each strategy scales on clusters that are not there, and how soon it reaches a loss.

python -m benchmarks.simulated_scaling                    everything; results/ and README.md
python -m benchmarks.simulated_scaling --parts target     some of efficiency, target, size
python -m benchmarks.simulated_scaling --workers 8,64     efficiency with some numbers of workers
python -m benchmarks.simulated_scaling --quick            does it run? Stores nothing
python -m benchmarks.simulated_scaling --table            write README.md's tables anew
python -m benchmarks.simulated_scaling --check            fail if README.md is not up to date

Everything is simulated, so the virtual times are the same on every machine; only how long the
simulation itself takes is measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import ROOT, Report, provenance, python_module
from scaledtrain import (
    Callback,
    DiLoCo,
    LocalSGD,
    ParameterServer,
    StopAtTarget,
    Strategy,
    Sync,
    Trainer,
)
from scaledtrain.comm.protocols import Link
from scaledtrain.command_line import config_folder
from scaledtrain.data import digits
from scaledtrain.errors import NonFiniteLossError
from scaledtrain.models import MLP
from scaledtrain.schema import Node, make, parse
from scaledtrain.server import (
    BackupWorkers,
    DelayAdaptive,
    Rennala,
    Ringmaster,
    SoftSync,
    StaleSynchronous,
)
from scaledtrain.sim import Cluster, Gamma, SquareRootSpeeds, Topology, Wire, simulate
from scaledtrain.sim.times import SizedReplica, simulate_times
from scaledtrain.strategies import EASGD, AsyncLocalSGD, Gossip, PushSum

PERIOD = 8  # steps between two meetings of strategies that have such
SHARDS = 16
STRATEGIES: Mapping[str, Callable[[int], Strategy]] = {
    "sync": lambda n: Sync(),
    "local_sgd": lambda n: LocalSGD(sync_every=PERIOD),
    "diloco": lambda n: DiLoCo(sync_every=PERIOD),
    "async": lambda n: ParameterServer(),
    "async_overlap": lambda n: ParameterServer(overlap=True),
    "async_shards": lambda n: ParameterServer(shards=min(n, SHARDS)),
    "softsync": lambda n: ParameterServer(SoftSync(c=max(1, n // 2))),
    "ssp": lambda n: ParameterServer(StaleSynchronous(staleness_bound=4)),
    "backup": lambda n: ParameterServer(BackupWorkers(k=n - n // 16)),
    "rennala": lambda n: ParameterServer(Rennala(batch=n)),
    "ringmaster": lambda n: ParameterServer(Ringmaster(delay_threshold=2 * n)),
    "delay_adaptive": lambda n: ParameterServer(correction=DelayAdaptive()),
    "async_local_sgd": lambda n: AsyncLocalSGD(sync_every=PERIOD),
    "easgd": lambda n: EASGD(sync_every=PERIOD),
    "gossip": lambda n: Gossip(),
    "push_sum": lambda n: PushSum(),
}

# --- Efficiency -------------------------------------------------------------------------------

SIZES = (1, 8, 64, 512, 4096)
PARAMETER_BYTES = 10_000_000
PRESETS: Mapping[str, tuple[str, ...]] = {
    "hosts_16x100g": ("topology.hosts=null",),
    "sites_4x1g": (),
    "volunteers": ("failures=null",),  # a strategy for which all must be there would end at once
}
# Without values a correction does nothing; push-sum weighs by values.
NOT_TIMED = frozenset({"delay_adaptive", "push_sum"})


def steps_of(workers: int) -> int:
    """That each makes, about; the first half is not counted."""
    return max(2 * PERIOD, min(64, 8192 // workers))


# --- Time to a loss ---------------------------------------------------------------------------

TARGET = 0.15
RACERS = 16
BATCH_SIZE = 32
RATES = (0.1, 0.3, 1.0, 3.0)
MAX_GRADIENTS = 4_000  # of all workers, by what they can compute at most
FASTEST = "fastest worker alone"
HOST = Topology(
    ranks_per_host=RACERS, hosts=1, port=Wire(latency_seconds=1e-4, gigabits_per_second=10.0)
)
UNEQUAL = Cluster(Gamma(1.0, shape=100.0), HOST, SquareRootSpeeds())

# --- How large a simulation may be ------------------------------------------------------------

HIDDEN = 32


@dataclass(frozen=True)
class Size:
    """ASGD of so many workers, and what simulating it may take."""

    workers: int
    steps: int
    """Of each worker, on average."""
    gradients: str
    """``"real"`` ones of the digits MLP, or ``"none"``: times alone, of a model as large."""
    seconds: float
    """Of one core, at most."""
    gibibytes: float | None
    """Of memory, at most; None: no bar."""


LARGE = (Size(4096, 50, "real", 300.0, 4.0), Size(100_000, 100, "none", 120.0, None))


def cluster_config(name: str) -> DictConfig:
    """Of a file in configs/cluster, with what is changed in it."""
    loaded = OmegaConf.load(config_folder() / "cluster" / f"{name}.yaml")
    return cast(DictConfig, OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(PRESETS[name]))))


PACKAGES = ("torch", "scikit-learn", "numpy")
SETTINGS = {
    "parameter_bytes": PARAMETER_BYTES,
    "sync_every": PERIOD,
    "shards": SHARDS,
    "target_loss": TARGET,
    "model": f"MLP 64-{HIDDEN}-10",
    "batch_size": BATCH_SIZE,
    "learning_rates": RATES,
    "clusters": {name: OmegaConf.to_container(cluster_config(name)) for name in PRESETS},
}


@dataclass(frozen=True)
class Outcome:
    """One simulated run."""

    part: str
    """``"efficiency"``, ``"target"`` or ``"size"``."""
    cluster: str
    strategy: str
    workers: int
    learning_rate: float | None
    value: float | None
    """The efficiency; the virtual seconds to the target, None if it was not reached; the virtual
    seconds of the run."""
    cpu_seconds: float
    """Of one core that the simulation took: it has one thread."""
    peak_bytes: int
    """Of memory, of the process so far."""


def outcome(
    part: str,
    cluster: str,
    strategy: str,
    workers: int,
    learning_rate: float | None,
    run: Callable[[], float | None],
) -> Outcome:
    """Simulate, and note what it took."""
    begin = time.process_time()
    value = run()
    seconds = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Outcome(part, cluster, strategy, workers, learning_rate, value, seconds, peak)


def preset(name: str) -> Cluster:
    """A cluster from configs/cluster, for any number of workers."""
    made = make(parse("cluster", OmegaConf.to_container(cluster_config(name)), Node))
    assert isinstance(made, Cluster)
    return made


def own_rates(cluster: Cluster, workers: int, steps: int) -> float:
    """Steps per second of all workers, each by itself: the same draws as the run has."""
    total = 0.0
    for worker in range(workers):
        pace, seconds = cluster.pace(worker, seed=0), 0.0
        for _ in range(steps):
            pace.begin_step()
            seconds += pace.seconds(0.0, 1.0)
        total += steps / seconds
    return total


def efficiency(make_strategy: Callable[[int], Strategy], cluster: Cluster, workers: int) -> float:
    """Gradients that are used per second, over what all workers compute by themselves."""

    def program(link: Link) -> float | None:
        return _used_per_second(link, make_strategy(workers))

    rates = simulate(program, cluster, workers, own_generators=False).results
    known = [rate for rate in rates if rate is not None]
    return statistics.fmean(known) / own_rates(cluster, workers, steps_of(workers))


def _used_per_second(link: Link, strategy: Strategy) -> float | None:
    """What one worker sees of the used gradients of all; None if it makes too few steps."""
    shapes = [torch.empty(PARAMETER_BYTES // 4, device="meta")]
    strategy.attach(SizedReplica(shapes, ["parameters"]), link)
    clock, pace = link.clock, link.pace(0)
    assert pace is not None
    n = link.group.size
    last = steps_of(n) * n // strategy.gradients_per_step
    strategy.start(last)
    seen: list[tuple[float, int]] = []
    while strategy.before_forward() and strategy.step < last:
        pace.begin_step()
        abandon = strategy.abandons if strategy.may_abandon else None
        if not clock.sleep_until(clock.now() + pace.seconds(0.0, 1.0), abandon):
            continue
        strategy.reduce_gradients()
        strategy.apply_gradients()
        strategy.after_step()
        seen.append((clock.now(), strategy.step))
    strategy.settle()
    counted = [(t, step) for t, step in seen if last // 2 <= step]
    if len(counted) < 2:
        return None
    (begin, before), (end, after) = counted[0], counted[-1]
    return (after - before) * strategy.gradients_per_step / (end - begin)


# --- Time to a loss ---------------------------------------------------------------------------


class WhenReached(Callback):
    """The virtual second at which an evaluation first found the target; gives up what diverges."""

    def __init__(self) -> None:
        self.seconds: float | None = None

    def on_evaluation(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        if self.seconds is None and values["loss"] <= TARGET:
            self.seconds = trainer.metrics.seconds
        if values["loss"] > 2.0 * math.log(10.0):  # twice that of guessing
            trainer.stop()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """So many, in an order of their own in each pass over the data."""
    inputs, targets = digits("train").tensors
    generator, made = torch.Generator().manual_seed(0), []
    while len(made) < count:
        rows = torch.randperm(len(inputs), generator=generator).split(BATCH_SIZE)
        made += [(inputs[row], targets[row]) for row in rows if len(row) == BATCH_SIZE]
    return made[:count]


def seconds_to_target(
    make_strategy: Callable[[int], Strategy], workers: int, learning_rate: float
) -> float | None:
    """Virtual; None if the loss diverged, or was not reached in time."""
    data = batches(40 * RACERS)
    test = torch.utils.data.DataLoader(digits("test"), batch_size=len(digits("test")))
    fastest = sum(1.0 / UNEQUAL.speeds.factor(i, 0) for i in range(RACERS))  # type: ignore[union-attr]
    limit = MAX_GRADIENTS / fastest

    def program(link: Link) -> float | None:
        torch.manual_seed(0)
        reached = WhenReached()
        trainer = Trainer(
            MLP(64, [HIDDEN], 10),
            F.cross_entropy,
            partial(torch.optim.SGD, lr=learning_rate),
            strategy=make_strategy(workers),
            callbacks=[reached, StopAtTarget("loss", at_most=TARGET)],
            log_every=10,
            console=False,
            link=link,
        )
        per_step = trainer.strategy.gradients_per_step
        every = max(1, 16 // per_step) if trainer.strategy.lockstep.size == 1 else 4
        trainer.fit(data, max_seconds=limit, eval=test, eval_every=every)
        return reached.seconds

    try:
        return simulate(program, UNEQUAL, workers).results[0]
    except NonFiniteLossError:
        return None


# --- How large a simulation may be ------------------------------------------------------------


def asgd_of_many(size: Size) -> float:
    """Simulate it; its virtual seconds."""
    cluster = Cluster(Gamma(1.0), preset("hosts_16x100g").topology)
    if size.gradients == "none":
        with torch.device("meta"):
            model = MLP(64, [HIDDEN], 10)
        return simulate_times(
            ParameterServer,
            cluster,
            size.workers,
            max_steps=size.workers * size.steps,
            parameters=model,
        ).seconds
    data = batches(size.workers)

    def program(link: Link) -> int:
        torch.manual_seed(0)
        trainer = Trainer(
            MLP(64, [HIDDEN], 10),
            F.cross_entropy,
            partial(torch.optim.SGD, lr=0.001),
            strategy=ParameterServer(),
            console=False,
            link=link,
        )
        return trainer.fit(data, max_steps=size.workers * size.steps).step

    return simulate(program, cluster, size.workers).seconds


def in_a_process(size: Size) -> Outcome:
    """`large` in a fresh one, so that nobody else's memory counts."""
    command = python_module("benchmarks.simulated_scaling", "--large", str(size.workers))
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return Outcome(**json.loads(ran.stdout.splitlines()[-1]))


def large(workers: int) -> Outcome:
    """That simulation of `LARGE`."""
    size = next(size for size in LARGE if size.workers == workers)
    return outcome("size", "hosts_16x100g", "async", workers, None, lambda: asgd_of_many(size))


def run(
    parts: Sequence[str], sizes: Sequence[int], before: Sequence[Outcome], is_quick: bool
) -> Iterator[Outcome]:
    """All simulations, one after another."""
    for made in _outcomes(parts, SIZES[:2] if is_quick else sizes, is_quick):
        print(
            f"{made.part:10} {made.cluster:14} {made.strategy:16} {made.workers:5} "
            f"{made.learning_rate or '':>5} {made.value} in {made.cpu_seconds:.1f} s",
            flush=True,
        )
        yield made


def _outcomes(parts: Sequence[str], sizes: Sequence[int], is_quick: bool) -> Iterator[Outcome]:
    if "target" in parts:
        for name in (FASTEST, "sync") if is_quick else (FASTEST, *STRATEGIES):
            for learning_rate in RATES[2:3] if is_quick else RATES:
                workers, make_strategy = (1, STRATEGIES["sync"])
                if name != FASTEST:
                    workers, make_strategy = RACERS, STRATEGIES[name]
                simulated = partial(seconds_to_target, make_strategy, workers, learning_rate)
                yield outcome("target", "unequal", name, workers, learning_rate, simulated)
    if "efficiency" in parts:
        for workers in sizes:
            for cluster in PRESETS:
                for name in [name for name in STRATEGIES if name not in NOT_TIMED]:
                    simulated = partial(efficiency, STRATEGIES[name], preset(cluster), workers)
                    yield outcome("efficiency", cluster, name, workers, None, simulated)
    if "size" in parts and not is_quick:
        yield from map(in_a_process, LARGE)


# --- What is shown ----------------------------------------------------------------------------


def best(outcomes: Sequence[Outcome], strategy: str) -> Outcome | None:
    """Of all learning rates, the one that reached the target first; None if none did."""
    reached = [
        o for o in outcomes if o.part == "target" and o.strategy == strategy and o.value is not None
    ]
    return min(reached, key=lambda o: o.value or math.inf) if reached else None


def render(outcomes: Sequence[Outcome], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    parts = [provenance(where)]
    for cluster in PRESETS:
        if any(o.cluster == cluster and o.part == "efficiency" for o in outcomes):
            parts.append(_efficiencies(outcomes, cluster))
    if any(o.part == "target" for o in outcomes):
        parts.append(_times(outcomes))
    measured = {o.workers: o for o in outcomes if o.part == "size"}
    rows = [row for size in LARGE if size.workers in measured for row in _bars(size, measured)]
    if rows:
        head = "| ASGD of | what it may take | measured | |\n|---|--:|--:|---|"
        parts.append("\n".join(["What it has to reach, on one core:", "", head, *rows]))
    return "\n\n".join(parts) + "\n"


def _bars(size: Size, measured: Mapping[int, Outcome]) -> Iterator[str]:
    gradients = {"real": "real gradients", "none": "no gradients"}[size.gradients]
    case = f"{size.workers:,} workers x {size.steps} steps, {gradients}"
    one = measured[size.workers]
    peak = one.peak_bytes / 2**30
    yield _bar(
        case, f"{size.seconds:.0f} s", f"{one.cpu_seconds:.0f} s", one.cpu_seconds <= size.seconds
    )
    if size.gibibytes is not None:
        yield _bar(case, f"{size.gibibytes:g} GiB", f"{peak:.2f} GiB", peak <= size.gibibytes)


def _bar(case: str, most: str, shown: str, passed: bool) -> str:
    return f"| {case} | {most} | {shown} | {'pass' if passed else '**MISSED**'} |"


def _efficiencies(outcomes: Sequence[Outcome], cluster: str) -> str:
    found = {
        (o.strategy, o.workers): o.value
        for o in outcomes
        if o.part == "efficiency" and o.cluster == cluster
    }
    sizes = sorted({workers for _, workers in found})
    lines = [
        f"**{cluster}**: efficiency with so many workers",
        "",
        f"| | {' | '.join(f'{n:,}' for n in sizes)} |",
        "|---|" + "--:|" * len(sizes),
    ]
    for name in STRATEGIES:
        if any((name, n) in found for n in sizes):
            values = [found.get((name, n)) for n in sizes]
            cells = " | ".join("" if v is None else f"{v:.2f}" for v in values)
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def _times(outcomes: Sequence[Outcome]) -> str:
    alone = best(outcomes, FASTEST)
    lines = [
        f"**{RACERS} unequal workers**: virtual seconds to a test loss of {TARGET:g}",
        "",
        "| | seconds | times as soon as the fastest worker alone | at learning rate |",
        "|---|--:|--:|--:|",
    ]
    for name in (FASTEST, *STRATEGIES):
        if not any(o.strategy == name and o.part == "target" for o in outcomes):
            continue
        found = best(outcomes, name)
        if found is None or found.value is None:
            lines.append(f"| {name} | never | | |")
        else:
            gain = f"{alone.value / found.value:.2f}" if alone and alone.value else ""
            lines.append(f"| {name} | {found.value:.0f} | {gain} | {found.learning_rate:g} |")
    return "\n".join(lines)


_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "0.4")
_STYLES = ("-", "--")


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Efficiency against workers, a panel for each cluster."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(PRESETS), sharex=True, sharey=True, squeeze=False)[0]
    names = [name for name in STRATEGIES if name not in NOT_TIMED]
    for panel, cluster in zip(axes, PRESETS, strict=True):
        for place, name in enumerate(names):
            points = sorted(
                (o.workers, o.value)
                for o in outcomes
                if (o.part, o.cluster, o.strategy) == ("efficiency", cluster, name)
                and o.value is not None
            )
            panel.plot(
                [workers for workers, _ in points],
                [value for _, value in points],
                color=_COLOURS[place % len(_COLOURS)],
                linestyle=_STYLES[place // len(_COLOURS)],
                marker="o",
                markersize=3.5,
                label=name,
            )
        panel.set_title(cluster, loc="left", fontsize=11)
        panel.set(xscale="log", xlabel="workers", ylim=(0, 1.12))
        panel.set_xticks(SIZES, [f"{n:,}" for n in SIZES])
        panel.minorticks_off()
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("efficiency")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)


REPORT = Report("simulated_scaling", Outcome, render, draw)

# --- The command ------------------------------------------------------------------------------

PARTS = ("target", "efficiency", "size")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("simulated_scaling", __doc__, "a little of it")
    add_some(parser, "parts", PARTS)
    add_some(parser, "workers", {str(n): n for n in SIZES})
    parser.add_argument("--large", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(1)
    if options.large:
        print(json.dumps(asdict(large(options.large))))
        return 0
    measure = partial(run, options.parts, options.workers)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure)


if __name__ == "__main__":
    logging.getLogger("scaledtrain").setLevel(logging.CRITICAL)  # of runs that diverge
    sys.exit(main())
