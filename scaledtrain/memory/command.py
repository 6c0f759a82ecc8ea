"""The memory command: what a training would take, for every policy and precision.

```
python -m scaledtrain.memory experiment=stdlib_gpt memory=1GiB
```
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from scaledtrain.build import batch_sizes, make_of, settle
from scaledtrain.command_line import read_command_line
from scaledtrain.config import TrainConfig, check
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.errors import ConfigError
from scaledtrain.launching import guarded
from scaledtrain.memory.budget import SmallestBudget
from scaledtrain.memory.estimator import MemoryEstimator
from scaledtrain.memory.figures import MemoryEstimate
from scaledtrain.memory.table import Cell, Report, to_text
from scaledtrain.precision import Precision, PrecisionName
from scaledtrain.recompute import CheckpointEvery, CheckpointPolicy, CheckpointSqrt, Selective
from scaledtrain.recompute.budget import MemoryBudget
from scaledtrain.schema import class_name, make, parse
from scaledtrain.tasks import Task

__all__ = ["MemoryConfig", "main", "make_estimator", "report"]

_PROG = "scaledtrain memory"
_SAMPLES = 2  # that are read, to see what a batch is like

PolicyName = Literal["none", "selective", "full", "sqrt", "every_k", "memory_budget"]

_POLICIES: dict[PolicyName, CheckpointPolicy | None] = {
    "none": None,
    "selective": Selective(),
    "full": CheckpointEvery(1),
    "sqrt": CheckpointSqrt(),
    "every_k": CheckpointEvery(2),
    "memory_budget": SmallestBudget(),
}


@dataclass(frozen=True)
class MemoryConfig:
    """What is told; the rest is a `TrainConfig`. ``configs/memory.yaml`` says what keys mean."""

    memory: str | None
    output: Literal["table", "json"]
    precisions: Sequence[PrecisionName]
    policies: Sequence[PolicyName]

    def __post_init__(self) -> None:
        for name in ("precisions", "policies"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is [], so there is nothing to tell; leave it out")

    @property
    def memory_bytes(self) -> int | None:
        """The limit, in bytes."""
        if self.memory is None:
            return None
        try:
            return MemoryBudget(self.memory).n_bytes
        except ConfigError as error:
            raise ConfigError(
                f"memory is {self.memory!r}; give bytes, or with a unit: 512MiB, 24GiB"
            ) from error


def main() -> None:
    """Tell what the command line asks for."""
    guarded(_main)


def _main() -> None:
    arguments = ["output=json" if word == "--json" else word for word in sys.argv[1:]]
    composed = read_command_line(arguments, "memory", _PROG)
    if composed is None:
        return
    training, asked = _divide(composed)
    found = report(training, asked, sys.stderr.isatty())
    print(json.dumps(asdict(found), indent=2) if asked.output == "json" else to_text(found))


def _divide(composed: DictConfig) -> tuple[TrainConfig, MemoryConfig]:
    keys = list(MemoryConfig.__dataclass_fields__)
    own: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, keys), resolve=True)
    for key in keys:
        del composed[key]
    asked: MemoryConfig = parse("", own, MemoryConfig)
    return check(composed), asked


def report(training: TrainConfig, asked: MemoryConfig, progress: bool = False) -> Report:
    """Estimate everything that is asked for.

    Args:
        training: as for a run.
        asked: what to tell of it.
        progress: show it on stderr.

    Raises:
        ConfigError: the config's parts do not fit each other.
    """
    workers = 1 if training.workers is None else training.workers
    training.mesh.check(workers)
    limit = asked.memory_bytes
    size = batch_sizes(training).local(
        training.mesh.replicas(workers) * training.mesh.shard,
        training.gradient_accumulation_steps,
        training.elastic,
    )
    training, task = settle(training)
    device = training.device or ("cuda" if torch.cuda.is_available() else "cpu")
    estimator = make_estimator(training, task, workers, device)
    policies = _policies(training, asked.policies)
    cells: list[Cell] = []
    precisions = _precisions(training, asked.precisions)
    main = training.precision if training.precision in precisions else precisions[0]
    all_ways = [(p, name) for p in precisions for name in policies]
    for precision, name in tqdm(all_ways, leave=False, disable=not progress, unit="estimate"):
        policy = policies[name]
        estimate: MemoryEstimate | None = None
        largest, why_not = None, None
        try:
            estimate = estimator.estimate(precision, policy, size)
            if limit is not None and precision == main:
                largest = estimator.largest_batch(limit, precision, policy)
        except ConfigError as error:
            if name == "none":  # then it is not the policy
                raise
            why_not = str(error)
        cells.append(Cell(str(precision), name, estimate, largest, why_not))
    return Report(
        model=class_name(training.model),
        optimizer=class_name(training.optimizer),
        strategy=class_name(training.strategy),
        workers=workers,
        mesh_shard=training.mesh.shard,
        mesh_pipe=training.mesh.pipe,
        device=device,
        memory=limit,
        chosen=(str(main), _chosen(training)),
        compiled=training.compile is not None,
        shards=int(training.strategy.get("shards", 1)),
        cells=cells,
    )


def make_estimator(training: TrainConfig, task: Task, workers: int, device: str) -> MemoryEstimator:
    """What tells how much memory the training of a config takes.

    Args:
        training: as `scaledtrain.build.settle` returned it, as the task.
        task: its data.
        workers: ranks.
        device: whose kernels are meant.
    """
    batches = ReplicaLoader(task.train_loader(_SAMPLES), seed=training.seed).epoch(0)
    (batch,) = next(batches).microbatches
    batches.close()
    chosen = training.activation_checkpointing
    microbatches = training.gradient_accumulation_steps
    if training.elastic:
        data_ranks = training.mesh.replicas(workers) * training.mesh.shard
        microbatches = math.ceil(batch_sizes(training).batches_per_step / data_ranks)
    return MemoryEstimator(
        _model_without_memory(training),
        task.loss_fn,
        batch,
        partial(make_of, "optimizer", training.optimizer),
        microbatches=microbatches,
        strategy=lambda: make(training.strategy),
        workers=workers,
        mesh=training.mesh,
        engine=None if training.engine is None else make(training.engine),
        pipeline=training.pipeline,
        blocks=None if chosen is None else chosen.get("blocks"),
        device=device,
    )


def _model_without_memory(training: TrainConfig) -> nn.Module:
    name = training.model["_target_"]
    try:
        with torch.device("meta"):
            model = make(training.model)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error).lower():
            raise
        raise ConfigError(
            f"model {name} cannot be made without memory, since it looks at values of its "
            f"tensors while it is made ({error}); make it on a machine that has the memory, and "
            "call scaledtrain.estimate_memory(model, ...)"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model names {name!r}, which returned a {type(model).__name__}; it must return a "
            "torch.nn.Module"
        )
    return model


def _precisions(training: TrainConfig, names: Sequence[PrecisionName]) -> list[Precision]:
    chosen = training.precision
    return [chosen if name == chosen.name else Precision(name) for name in names]


def _policies(
    training: TrainConfig, names: Sequence[PolicyName]
) -> dict[str, CheckpointPolicy | None]:
    policies: dict[str, CheckpointPolicy | None] = {name: _POLICIES[name] for name in names}
    if training.activation_checkpointing is not None:
        policies[_chosen(training)] = make(training.activation_checkpointing)
    return policies


def _chosen(training: TrainConfig) -> str:
    """Name of the policy that the config has."""
    node = training.activation_checkpointing
    if node is None:
        return "none"
    name = class_name(node)
    if name == "CheckpointEvery":
        return "full" if node.get("k", 1) == 1 else "every_k"
    return {
        "CheckpointSqrt": "sqrt",
        "Selective": "selective",
        "MemoryBudget": "memory_budget",
    }.get(name, name)
