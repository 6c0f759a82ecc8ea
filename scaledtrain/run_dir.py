"""The folder of a run: how its files are called, and how it is made."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from scaledtrain.errors import ConfigError

if TYPE_CHECKING:
    from scaledtrain.config import TrainConfig
    from scaledtrain.connection import Connection

__all__ = [
    "CONFIG",
    "EVENTS",
    "RESULT",
    "choose_run_dir",
    "file_of_rank",
    "has_run",
    "make_run_dir",
    "metrics_files",
]

CONFIG = "config.yaml"
"""Complete: the run can be made again from it."""
RESULT = "result.json"
"""How the run ended; of one that did not there is none."""
EVENTS = "events.bin"
"""What its server did, in order; of a strategy without a server there is none."""


def file_of_rank(run_dir: Path, what: str, rank: int) -> Path:
    """Where a rank writes its lines of ``"metrics"``, or of its ``"trace"``."""
    return run_dir / f"{what}-rank{rank}.jsonl"


def metrics_files(run_dir: Path) -> dict[int, Path]:
    """The metrics of each rank that wrote some, in the order of ranks."""
    found = {
        int(match[1]): path
        for path in run_dir.glob("metrics-rank*.jsonl")
        if (match := re.fullmatch(r"metrics-rank(\d+)\.jsonl", path.name))
    }
    return dict(sorted(found.items()))


def has_run(run_dir: Path) -> bool:
    """Whether a run has begun in this folder."""
    return bool(metrics_files(run_dir))


def choose_run_dir(config: TrainConfig, link: Connection) -> Path:
    """The folder of this run, the same on every rank; it exists when this returns."""
    path = ""
    if link.group.rank == 0:
        path = str(make_run_dir(config).resolve())
        if link.store is not None:
            link.store.set("run_dir", path)
    elif link.store is not None:
        path = link.store.get("run_dir").decode()
    return Path(path)


def make_run_dir(config: TrainConfig) -> Path:
    """Make the folder of a run: the one that is asked for, or a new one.

    Raises:
        ConfigError: it holds a run already, or cannot be made.
    """
    try:
        return _make_run_dir(config)
    except OSError as error:
        raise ConfigError(
            f"the folder of the run cannot be made: {error}; set run_dir to one that can"
        ) from error


def _make_run_dir(config: TrainConfig) -> Path:
    if config.run_dir is not None:
        path = Path(config.run_dir)
        if config.resume is None and has_run(path):
            raise ConfigError(
                f"run_dir {path} holds a run already, and two runs in one folder cannot be told "
                "apart; go on with it (resume=auto), give another run_dir, or remove it"
            )
        path.mkdir(parents=True, exist_ok=True)
        return path
    stem = f"{config.name or 'train'}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        path = Path("runs", stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another run began in the same second
            continue
        return path
    raise AssertionError
