"""Runs to find bugs with: a few steps of everything, or a few batches again and again."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from scaledtrain.checkpoint import Checkpointing
from scaledtrain.checkpoint.folder import saved_steps
from scaledtrain.checkpoint.resume import CHECKPOINTS
from scaledtrain.comm.protocols import Link
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.errors import ConfigError
from scaledtrain.seeding import kept_generators, seed_everything

__all__ = ["ShortRun", "refuse_fast_dev_run"]


class ShortRun:
    """What ``fast_dev_run`` and ``overfit_batches`` of a Trainer make of a run.

    Args:
        fast_dev_run: steps that each replica makes; True: one, False: as many as it should.
        overfit_batches: to train and to evaluate on; 0: all.

    Raises:
        ConfigError: a number below 0, or a share.
    """

    def __init__(self, fast_dev_run: bool | int, overfit_batches: int) -> None:
        words = {"fast_dev_run": fast_dev_run, "overfit_batches": overfit_batches}
        for name, value in words.items():
            if not isinstance(value, int) or value < 0:
                off = "False" if name == "fast_dev_run" else "0"
                raise ConfigError(
                    f"{name} is {value!r}; it is a number of batches, >= 1, or {off} for a usual "
                    "run"
                )
        self.steps = int(fast_dev_run)
        self.batches = int(overfit_batches)
        self._remove: weakref.finalize[Any, Any] | None = None

    def keep_nothing(
        self,
        link: Link,
        run_dir: str | Path | None,
        checkpointing: Checkpointing | None,
        resume: str | Path | None,
    ) -> tuple[None, Checkpointing, str | Path | None]:
        """Folder, checkpoints and begin of a run of which nothing stays. Collective.

        It is saved once, at its end, as a run is; into a folder that is then removed. On several
        hosts that is one beside ``run_dir``, or above it, which all see.

        Args:
            link: to the other ranks.
            run_dir: of the run as it should be.
            checkpointing: of it; whether it is written while training goes on stays so.
            resume: ``"auto"`` looks into that run's folder, and is None if nothing is there.
        """
        own = None if run_dir is None else Path(run_dir) / CHECKPOINTS
        if checkpointing is not None and checkpointing.folder is not None:
            own = Path(checkpointing.folder)
        there = own is not None and bool(saved_steps(own))
        base = Path(tempfile.gettempdir())
        if run_dir is not None:  # of its parents one that is there, so that none is made
            base = next(p for p in Path(run_dir).absolute().parents if p.is_dir())
        words = torch.tensor([secrets.randbits(62), int(there)], device=link.device)
        link.group.broadcast([words])  # the others' view of the disk may lag
        word, is_there = words.tolist()
        if resume == "auto":
            resume = own if is_there else None
        folder = base / f".scaledtrain-fast-dev-run-{word:x}"
        if link.group.rank == 0:
            self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        is_apart = checkpointing is not None and checkpointing.asynchronous
        options = Checkpointing(
            folder=str(folder), keep_last=1, asynchronous=is_apart, on_failure="end"
        )
        return None, options, resume

    def data(
        self, train: Iterable[Any], eval: Iterable[Any] | None, seed: int, sharing: int
    ) -> tuple[Iterable[Any], Iterable[Any] | None]:
        """What to train and to evaluate on.

        Args:
            train: all there is, as for the next.
            eval: None: nothing.
            seed: of the order in which the first batches are the first.
            sharing: ranks that share an evaluation.
        """
        if self.batches:
            train = eval = first_batches(train, self.batches, seed)
        elif self.steps and eval is not None:
            eval = first_batches(eval, self.steps * sharing, seed)
        return train, eval

    def told(self, train: Iterable[Any], batches_per_step: int) -> list[str]:
        """What is to be said of such a run.

        Args:
            train: as `data` returned it.
            batches_per_step: of all replicas together.

        Raises:
            ConfigError: there is none of the batches for some of the replicas.
        """
        lines = []
        if self.steps:
            lines.append(
                f"fast_dev_run: {self.steps} step{'s' if self.steps > 1 else ''} on each replica, "
                "an evaluation and a checkpoint that is removed; no files, and nothing is kept"
            )
        if self.batches and isinstance(train, list):
            if len(train) < batches_per_step:
                raise ConfigError(
                    f"overfit_batches leaves {len(train)} batches, but a step takes "
                    f"{batches_per_step}, of all replicas together; give it {batches_per_step} or "
                    "more"
                )
            lines.append(
                f"overfit_batches: trains and evaluates on the same {len(train)} batches, in the "
                "same order, so that its figures say nothing about other data"
            )
        return lines

    def close(self) -> None:
        """Remove what was written."""
        if self._remove is not None:
            self._remove()


def first_batches(loader: Iterable[Any], n: int, seed: int) -> list[Any]:
    """The first batches of a loader's first epoch, read once: the same on every rank.

    Args:
        loader: any.
        n: how many; fewer if it has fewer.
        seed: of their order, and of what is drawn while they are read.

    Example:
        >>> first_batches([torch.zeros(2), torch.ones(2), torch.ones(3)], 2, seed=0)
        [tensor([0., 0.]), tensor([1., 1.])]
    """
    found: list[Any] = []
    with kept_generators():
        seed_everything(seed)
        with closing(ReplicaLoader(loader, seed=seed).epoch(0)) as steps:
            for step in steps:
                found += step.microbatches
                if len(found) >= n:
                    break
    return found[:n]


def refuse_fast_dev_run(fast_dev_run: bool | int, command: str) -> None:
    """Raise ConfigError if a command that is about what runs leave is asked for one that does not.

    Args:
        fast_dev_run: of its config.
        command: its name.
    """
    if fast_dev_run:
        raise ConfigError(
            f"fast_dev_run is {fast_dev_run!r}, of which nothing is kept, but {command} is about "
            "what runs leave; leave it out, and set max_steps to a few"
        )
