"""What the folder of a run says about it, and whether it can be made again."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf

import scaledtrain
from scaledtrain.comm.serving.event_log import Event, read_events
from scaledtrain.config import TrainConfig, check
from scaledtrain.environment import cpu
from scaledtrain.errors import ConfigError
from scaledtrain.local_job import threads_for
from scaledtrain.run_dir import CONFIG, EVENTS, RESULT, file_of_rank, metrics_files

__all__ = ["Recorded", "read_run"]


@dataclass(frozen=True)
class Recorded:
    """A run, as it was written down."""

    folder: Path
    config: TrainConfig
    events: Sequence[Event]
    workers: int
    threads: int
    """With which each process computed."""
    sha256: str | None
    """Of the parameters at the end; None: the run did not come to its end."""
    facts: dict[str, Any] | None
    """About the data; None: not known."""
    steps: Sequence[int | None]
    """By rank, the steps that it made, if it was time that ended the run; None: it is not known."""
    notes: Sequence[str]
    """What a reader should know."""


def read_run(folder: Path) -> Recorded:
    """Read all of it.

    Raises:
        ConfigError: it is no run, or one that cannot be replayed.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} is not the folder of a run: it has no config.yaml")
    written = (folder / CONFIG).read_bytes()
    if not (folder / EVENTS).is_file():
        raise ConfigError(
            f"{folder} has no {EVENTS}: only strategies with a server write one. A run without a "
            "server has no order to be replayed: train again with the same config and seed"
        )
    result = _result(folder)
    if result is not None and hashlib.sha256(written).hexdigest() != result["config_sha256"]:
        raise ConfigError(
            f"{folder / 'config.yaml'} was changed after the run; put it back as it was"
        )
    config = check(cast(DictConfig, OmegaConf.load(folder / CONFIG)))
    environment = {} if result is None else result["environment"]
    _refuse(config, environment)
    workers, threads = _size(folder, config, environment)
    events = list(read_events(folder / EVENTS))
    highest = max((event.operation.worker for event in events), default=-1)
    if highest >= workers:
        raise ConfigError(f"{folder / EVENTS} has a worker {highest}, but the run had {workers}")
    return Recorded(
        folder,
        config,
        events,
        workers,
        threads,
        None if result is None else result["parameters_sha256"],
        None if result is None else result["data"],
        [None if result is None else _steps(folder, config, rank) for rank in range(workers)],
        _notes(environment, threads),
    )


def _result(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    for key in ("parameters_sha256", "config_sha256", "environment", "data"):
        if key not in result:
            raise ConfigError(
                f"{path} does not say {key}: the run was made by an older version of scaledtrain; "
                "make it again"
            )
    return result


def _refuse(config: TrainConfig, environment: dict[str, Any]) -> None:
    """What the log does not say must not matter."""
    if math.isfinite(config.drop_compute.threshold_seconds):
        raise ConfigError(
            f"drop_compute.threshold_seconds was {config.drop_compute.threshold_seconds:g}: time "
            "decided which microbatches were computed, and the log does not say which"
        )
    if config.balance.get("every"):
        raise ConfigError(
            "balance was auto: time decided how many samples each worker took, and the log does "
            "not say how many"
        )
    if config.strategy.get("proportional_steps"):
        raise ConfigError(
            "strategy.proportional_steps was true: time decided how many local steps each worker "
            "made, and the log does not say how many"
        )
    if config.checkpointing is not None or config.resume is not None:
        raise ConfigError(
            "the run was saved or resumed: workers then wait for each other, and a log begins "
            "where a run goes on, which a replay does not repeat; make the run without "
            "checkpointing and resume to replay it"
        )
    if config.mesh.ranks_per_replica > 1:
        raise ConfigError(
            f"each replica of the run had {config.mesh.ranks_per_replica} ranks, but a replay has "
            "whole ones; only runs with mesh.pipe=1 and mesh.shard=1 can be replayed"
        )
    if config.engine is not None:
        raise ConfigError(
            "the run had an engine, but a replay has whole replicas, in memory; only runs without "
            "one can be replayed"
        )
    device = environment.get("device", config.device or "cpu")
    if device != "cpu":
        raise ConfigError(
            f"the run was made on {device}, but a replay computes all ranks in one process on the "
            "CPU, which rounds otherwise; runs on CPUs can be replayed"
        )


def _size(folder: Path, config: TrainConfig, environment: dict[str, Any]) -> tuple[int, int]:
    """How many workers there were, and the threads of each."""
    if environment:
        return environment["world_size"], environment["threads"]
    workers = config.workers or len(metrics_files(folder))
    if workers < 1:
        raise ConfigError(f"{folder} does not say how many workers there were")
    return workers, int(os.environ.get("OMP_NUM_THREADS", threads_for(workers)))


def _steps(folder: Path, config: TrainConfig, rank: int) -> int | None:
    path = file_of_rank(folder, "metrics", rank)
    if (config.max_seconds is None and config.target.metric is None) or not path.is_file():
        return None
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return sum(int(record["steps"]) for record in records if record["kind"] == "step")


def _notes(environment: dict[str, Any], threads: int) -> list[str]:
    if not environment:
        return [
            "there is no result.json, which would say with how many threads and which versions the "
            f"run was made; it is replayed with {threads} thread{'s' if threads > 1 else ''}"
        ]
    now = {
        "torch": str(torch.__version__),
        "scaledtrain": scaledtrain.__version__,
        "cpu": cpu(),
    }
    return [
        f"the run was made with {key} {environment[key]}, and this is {value}: bits may differ"
        for key, value in now.items()
        if environment[key] != value
    ]
