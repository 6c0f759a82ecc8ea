"""The simulation command: what a training run would do on a cluster that is not there.

```
python -m scaledtrain.simulate strategy=async cluster=volunteers workers=1000
python -m scaledtrain.simulate strategy=diloco cluster=sites_4x1g workers=64 gradients=none
```
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from torch import nn

from scaledtrain.build import settle
from scaledtrain.comm.protocols import Link
from scaledtrain.command_line import read_command_line
from scaledtrain.config import TrainConfig, check
from scaledtrain.drop_compute import DropCompute
from scaledtrain.errors import ConfigError
from scaledtrain.fit_loop import FitResult
from scaledtrain.launching import guarded
from scaledtrain.run_dir import make_run_dir
from scaledtrain.schedule import Slowdown
from scaledtrain.schema import Node, make, parse
from scaledtrain.short_run import refuse_fast_dev_run
from scaledtrain.sim import Cluster, simulate, simulate_times
from scaledtrain.sim.times import Times
from scaledtrain.train import report_result, run_settled

__all__ = ["SimulateConfig", "main", "run_times", "run_training"]

_PROG = "scaledtrain simulate"
_SIMULATION = "simulation.yaml"
_WHERE_IT_RUNS = {"device": "cpu", "transport": "auto"}


@dataclass(frozen=True)
class SimulateConfig:
    """What is simulated; the rest is a `TrainConfig`."""

    cluster: Node
    gradients: Literal["real", "none"]
    cluster_seed: int
    parameter_bytes: int | None


def main() -> None:
    """Simulate what the command line says."""
    guarded(_main)


def _main() -> None:
    composed = read_command_line(sys.argv[1:], "simulate", _PROG)
    if composed is None:
        return
    training, simulated, written = _divide(composed)
    workers = training.workers
    if workers is None:
        raise ConfigError("workers is null; say how many there are: workers=100")
    cluster = make(simulated.cluster)
    if not isinstance(cluster, Cluster):
        raise ConfigError(
            f"cluster names {simulated.cluster['_target_']!r}, which returned a "
            f"{type(cluster).__name__}; it must return a scaledtrain.sim.Cluster"
        )
    began = time.monotonic()
    if simulated.gradients == "none":
        times = run_times(training, simulated, cluster, workers)
        print(_table(times))
        seconds = times.seconds
    else:
        run_dir = make_run_dir(training)
        (run_dir / _SIMULATION).write_text(written, encoding="utf-8")
        try:
            result, seconds = run_training(training, simulated, cluster, workers, run_dir)
        except BaseException:
            with suppress(OSError):  # nothing else was written: leave no folder without a run
                if [path.name for path in run_dir.iterdir()] == [_SIMULATION]:
                    (run_dir / _SIMULATION).unlink()
                    run_dir.rmdir()
            raise
        report_result(result, run_dir)
    took = time.monotonic() - began
    print(f"{workers} workers, {seconds:.1f} virtual seconds, simulated in {took:.1f} s")


def _divide(composed: DictConfig) -> tuple[TrainConfig, SimulateConfig, str]:
    """What of a config is training, what simulation, and the latter as it is written."""
    keys = list(SimulateConfig.__dataclass_fields__)
    own: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, keys), resolve=True)
    for key in keys:
        del composed[key]
    training = check(composed)
    refuse_fast_dev_run(training.fast_dev_run, "simulate")
    for key, expected in _WHERE_IT_RUNS.items():
        if getattr(training, key) not in (None, expected):
            raise ConfigError(
                f"{key} is {getattr(training, key)!r}, but a simulation runs in this process, on "
                "its CPU; leave it out"
            )
    simulated: SimulateConfig = parse("", own, SimulateConfig)
    if simulated.gradients == "real" and simulated.parameter_bytes is not None:
        raise ConfigError(
            f"parameter_bytes is {simulated.parameter_bytes}, but with gradients it is the model "
            "that says how large its parameters are; leave it out, or set gradients=none"
        )
    return replace(training, device="cpu"), simulated, OmegaConf.to_yaml(OmegaConf.create(own))


def run_training(
    training: TrainConfig,
    simulated: SimulateConfig,
    cluster: Cluster,
    workers: int,
    run_dir: Path,
) -> tuple[FitResult, float]:
    """Train on every simulated rank, with real gradients.

    Returns:
        Rank 0's result, and the virtual seconds that all took.
    """
    training.mesh.check(workers)
    if training.mesh.ranks_per_replica > 1:
        raise ConfigError(
            f"mesh makes {training.mesh.ranks_per_replica} ranks for each replica, but a simulated "
            "rank is a whole one; set mesh.pipe and mesh.shard to 1"
        )
    if training.engine is not None:
        raise ConfigError(
            "engine is given, but a simulated rank has a whole replica, in memory; leave it out"
        )
    config, task = settle(training)

    def program(link: Link) -> FitResult:
        return run_settled(config, task, link, run_dir)

    result = simulate(program, cluster, workers, seed=simulated.cluster_seed)
    first = result.results[0]
    if first is None:
        raise ConfigError(
            "rank 0 died and did not come back, so the run has no result; let the cluster's "
            "failures leave it out"
        )
    return first, result.seconds


def run_times(
    training: TrainConfig, simulated: SimulateConfig, cluster: Cluster, workers: int
) -> Times:
    """Simulate the times alone.

    Raises:
        ConfigError: what is asked for needs gradients.
    """
    if training.max_steps is None:
        raise ConfigError("max_steps is null; without gradients a run ends by its number of steps")
    if training.slowdown != Slowdown({}) or training.drop_compute != DropCompute():
        raise ConfigError(
            "slowdown and drop_compute act on microbatches, which there are none of without "
            "gradients; leave them out: cluster.speeds and cluster.compute say how long steps take"
        )
    if not make(training.balance).is_even:
        raise ConfigError(
            "balance shares out samples, which there are none of without gradients; leave it out"
        )
    parameters: nn.Module | int
    if simulated.parameter_bytes is not None:
        parameters = simulated.parameter_bytes
    else:
        config, _ = settle(training)
        parameters = make(config.model)
    return simulate_times(
        lambda: make(training.strategy),
        cluster,
        workers,
        max_steps=training.max_steps,
        parameters=parameters,
        seed=simulated.cluster_seed,
    )


def _table(times: Times) -> str:
    lines = [
        ("virtual seconds", f"{times.seconds:.2f}"),
        ("steps of all workers", f"{times.steps}"),
        ("steps per second", f"{times.steps_per_second:.2f}"),
        *[
            (f"time in {phase}", f"{100 * times.share(phase):.1f} %")
            for phase in ("compute", "communication", "waiting")
        ],
    ]
    sent = [worker.bytes_sent for worker in times.workers if worker is not None]
    if times.steps:
        lines.append(("bytes sent per step", f"{sum(sent) / times.steps:.3g}"))
    if staleness := times.staleness:
        lines.append(("staleness", f"{_mean(staleness):.2f} mean, {max(staleness)} at most"))
    if lost := times.workers.count(None):
        lines.append(("workers lost", f"{lost}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _mean(counts: Mapping[int, int]) -> float:
    return sum(value * n for value, n in counts.items()) / Counter(counts).total()
