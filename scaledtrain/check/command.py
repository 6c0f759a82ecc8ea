"""The check command: climbs the ladder with the model and data of a config.

```
python -m scaledtrain.check experiment=digits_mlp
python -m scaledtrain.check experiment=stdlib_gpt check.only=[overfit,resume]
```
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from scaledtrain.build import batch_sizes, build_settled, make_of, settle
from scaledtrain.callbacks import Callback
from scaledtrain.check.ladder import climb, summary
from scaledtrain.check.subject import Plan, Subject
from scaledtrain.checkpoint import Checkpointing
from scaledtrain.checkpoint.weights import load_weights
from scaledtrain.comm.protocols import Link
from scaledtrain.command_line import read_command_line
from scaledtrain.config import TrainConfig, check
from scaledtrain.disk import replace_file
from scaledtrain.drop_compute import DropCompute
from scaledtrain.errors import ConfigError
from scaledtrain.launching import guarded
from scaledtrain.memory.command import make_estimator
from scaledtrain.memory.figures import MemoryEstimate
from scaledtrain.mesh import Mesh
from scaledtrain.optim.scaling import zero_gamma
from scaledtrain.parallel import Pipeline
from scaledtrain.parallel.engine import check_engine
from scaledtrain.precision import Precision
from scaledtrain.schedule import Slowdown
from scaledtrain.schema import Node, make, parse
from scaledtrain.tasks import Task
from scaledtrain.trainer import Trainer

__all__ = ["CheckConfig", "main", "subject_of"]

_PROG = "scaledtrain check"


@dataclass(frozen=True)
class CheckConfig:
    """What is asked; the rest is a `TrainConfig`. ``configs/check.yaml`` says what keys mean."""

    only: Sequence[str] | None
    json: str | None
    frozen: Sequence[str]
    samples: int
    steps: int


def main() -> None:
    """Check what the command line names."""
    guarded(_main)


def _main() -> None:
    composed = read_command_line(sys.argv[1:], "check", _PROG)
    if composed is None:
        return
    training, asked = _divide(composed)
    subject = subject_of(training, asked)
    path = None if asked.json is None else _writable(asked.json)
    verdicts = climb(subject, asked.only, partial(print, flush=True))
    print(summary(verdicts))
    if path is not None:
        told = [_plain(asdict(verdict)) for verdict in verdicts]
        replace_file(path, f"{json.dumps(told, indent=2)}\n".encode())
    if any(verdict.status == "failed" for verdict in verdicts):
        sys.exit(1)


def _writable(file: str) -> Path:
    """See that it is, before minutes of checks."""
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(
            f"check.json is {file!r}, which cannot be written: {error}; name another file"
        ) from error
    return path


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinite numbers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _divide(composed: DictConfig) -> tuple[TrainConfig, CheckConfig]:
    own: Any = OmegaConf.to_container(composed.check, resolve=True)
    del composed["check"]
    asked: CheckConfig = parse("check", own, CheckConfig)
    return check(composed), asked


def subject_of(training: TrainConfig, asked: CheckConfig) -> Subject:
    """What a config names, as the rungs see it: on one rank, with nothing kept.

    Args:
        training: as for a run.
        asked: what the rungs may take.

    Raises:
        ConfigError: the config's parts do not fit each other.
    """
    workers = training.workers or 1
    training.mesh.check(workers)
    check_engine(None if training.engine is None else make(training.engine), training.mesh)
    replicas = training.mesh.replicas(workers)
    size = batch_sizes(training).local(
        replicas * training.mesh.shard, training.gradient_accumulation_steps, training.elastic
    )
    training, task = settle(training)
    device = training.device or ("cuda" if torch.cuda.is_available() else "cpu")
    alone = _alone(training, size)
    return Subject(
        partial(_model, training),
        task.loss_fn,
        task.train_loader(size),
        partial(make_of, "optimizer", training.optimizer),
        partial(_trainer, alone, task),
        partial(_estimate, training, task, workers, device, size),
        torch.device(device),
        training.precision,
        Plan(
            training.max_steps,
            training.max_epochs,
            training.max_seconds,
            replicas * training.mesh.shard,
            training.gradient_accumulation_steps,
        ),
        training.seed,
        asked.samples,
        asked.steps,
        asked.frozen,
        is_trained=training.init_from is not None,
    )


def _alone(training: TrainConfig, size: int) -> TrainConfig:
    """The training of one of its ranks by itself."""
    return replace(
        training,
        data=Node({**training.data, "local_batch_size": size, "global_batch_size": None}),
        mesh=Mesh(),
        engine=None,
        pipeline=Pipeline(),
        workers=None,
        elastic=False,
        balance=Node(_target_="scaledtrain.balance.Even"),
        batch=training.batch if training.lr_scaling.rule == "adascale" else None,
        checkpointing=None,
        resume=None,
        watch=None,
        run_dir=None,
        fast_dev_run=False,
        overfit_batches=0,
        slowdown=Slowdown({}),
        drop_compute=DropCompute(),
        log_every=1,
        console=False,
        trace=False,
    )


def _model(training: TrainConfig) -> nn.Module:
    model: nn.Module = make(training.model)
    if training.zero_gamma:
        zero_gamma(model)
    if training.init_from is not None:
        load_weights(model, training.init_from)
    return model


def _trainer(
    training: TrainConfig,
    task: Task,
    link: Link,
    *,
    callbacks: Sequence[Callback] = (),
    precision: Precision | None = None,
    checkpointing: Checkpointing | None = None,
    resume: str | Path | None = None,
) -> tuple[Trainer, Iterable[Any]]:
    config = replace(
        training,
        precision=precision or training.precision,
        checkpointing=checkpointing,
        resume=None if resume is None else str(resume),
    )
    trainer, loader, _ = build_settled(config, task, link, None, callbacks)
    return trainer, loader


def _estimate(
    training: TrainConfig, task: Task, workers: int, device: str, size: int
) -> MemoryEstimate:
    node = training.activation_checkpointing
    policy = None if node is None else make(node)
    estimator = make_estimator(training, task, workers, device)
    return estimator.estimate(training.precision, policy, size)
