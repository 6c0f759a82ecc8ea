"""What a Trainer does about checkpoints when it is made: go on from one, get ready for others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scaledtrain.checkpoint.folder import Manifest, SavedStep
from scaledtrain.checkpoint.lock import RunLock
from scaledtrain.checkpoint.policy import Checkpointing
from scaledtrain.checkpoint.recall import recall
from scaledtrain.checkpoint.resume import CHECKPOINTS, SPLIT, candidates, find, goes_on_in, load
from scaledtrain.checkpoint.saver import Saver
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import CheckpointError, ConfigError, ScaledTrainError
from scaledtrain.mesh import Mesh
from scaledtrain.schema import did_you_mean

if TYPE_CHECKING:
    from scaledtrain.checkpoint.part import Owner
    from scaledtrain.trainer import Trainer

__all__ = ["parts_before", "resume_and_save"]

_logger = logging.getLogger(__name__)


def resume_and_save(
    trainer: Trainer,
    model: nn.Module,
    options: Checkpointing | None,
    resume: str | Path | None,
    run_dir: str | Path | None,
) -> Saver | None:
    """Go on from a checkpoint, and get ready to write others. Collective.

    Args:
        trainer: with all its parts.
        model: as it was given to the trainer, which may have a piece of it.
        options: when to save; None: never.
        resume: ``"auto"``, or the folder of a checkpoint or of a run; None: begin anew.
        run_dir: where checkpoints go, unless ``options`` has a folder.

    Returns:
        What saves; None: nothing does.

    Raises:
        ConfigError: there is no folder, another job is at work in it, or the checkpoint is of
            another kind of run.
        CheckpointError: it is damaged.
    """
    link, layout, strategy = trainer.link, trainer.layout, trainer.strategy
    _check(trainer, options, resume)
    if options is None and resume is None:
        return None
    if link.returned:  # to a job that has gone on: the server has the state
        _logger.warning(
            "rank %d came back to its job: it goes on from the server's state, and checkpoints are "
            "of the other ranks; one that is resumed gives it the first one's place in the data",
            link.group.rank,
        )
        return None
    from scaledtrain.checkpoint.export import config_of
    from scaledtrain.checkpoint.part import Owner  # with DCP, which takes a second to import

    folder = _folder(options, run_dir)
    named = trainer.model.named_parameters()
    owner = Owner(
        link.group.rank,
        link.group.size,
        layout.link.group.rank,
        layout.pieces.size,
        layout.stage_ranks,
        {name: p for name, p in named if name not in layout.saved_elsewhere},
        strategy.replicas_equal,
        layout.whole,
        layout.counted_elsewhere(),
    )
    facts: dict[str, Any] = {
        "model": type(model).__name__,
        "strategy": str(strategy),
        "precision": str(trainer.precision),
    }
    if layout.parts:
        facts[SPLIT] = list(layout.parts)
    if options is None:
        _resume(trainer, resume, folder, owner, None, facts)
        return None
    if folder is None:
        raise ConfigError("checkpointing needs a folder: set run_dir, or checkpointing.folder")
    lock = RunLock(folder, link)
    try:
        saver = Saver(
            options,
            folder,
            link,
            strategy,
            goes_on=resume is not None and goes_on_in(resume, folder),
            is_newest=resume == "auto",
            state=trainer.state_dict,
            evaluation=lambda: trainer.evaluation,
            owner=owner,
            agree=layout.agree,
            facts={**facts, "config": config_of(model)},
            lock=lock,
        )
        _resume(trainer, resume, folder, owner, saver, facts)
    except BaseException:
        lock.release()
        raise
    return saver


def parts_before(
    link: Link,
    mesh: Mesh | None,
    options: Checkpointing | None,
    resume: str | Path | None,
    run_dir: str | Path | None,
) -> Sequence[int] | None:
    """How many parts each stage had in the run that is gone on from. Collective.

    Args:
        link: to all ranks.
        mesh: of this run.
        options: see `resume_and_save`, as for the rest.
        resume: what is wrong with it is told later.
        run_dir: where checkpoints go.

    Returns:
        What the newest checkpoint says that can be read; None: there is none, or it had no stages,
        or this run has none.
    """
    if mesh is None or mesh.pipe == 1:
        return None
    if not isinstance(resume, str | Path) or link.returned:
        return None
    counts = torch.zeros(0, dtype=torch.int64)
    if link.group.rank == 0:
        counts = torch.tensor(_split_of(resume, _folder(options, run_dir)), dtype=torch.int64)
    length = torch.tensor([len(counts)])
    link.group.broadcast([length])
    if not length.item():
        return None
    if link.group.rank > 0:
        counts = torch.zeros(int(length), dtype=torch.int64)
    link.group.broadcast([counts])
    found: list[int] = counts.tolist()
    return found


def _split_of(resume: str | Path, folder: Path | None) -> list[int]:
    with suppress(OSError):  # which `find` tells on all ranks
        for saved in reversed(candidates(resume, folder)):
            with suppress(CheckpointError):
                return [int(n) for n in Manifest.read(saved.path).facts.get(SPLIT, [])]
    return []


def _folder(options: Checkpointing | None, run_dir: str | Path | None) -> Path | None:
    if options is not None and options.folder is not None:
        return Path(options.folder)
    return None if run_dir is None else Path(run_dir) / CHECKPOINTS


def _resume(
    trainer: Trainer,
    resume: str | Path | None,
    folder: Path | None,
    owner: Owner,
    saver: Saver | None,
    facts: Mapping[str, Any],
) -> None:
    """Go on from the newest state that is meant, on the disk or in memory; say which it was."""
    if resume is None:
        return
    saved = find(resume, folder, trainer.link)
    step, source = (0, "") if saved is None else (saved.step, str(saved.path))
    is_here = saved is not None and folder is not None and goes_on_in(saved.path, folder)
    copy = None
    if saver is not None and saver.memory is not None and resume == "auto":
        copy = recall(saver.memory.folder, trainer.link.group, after=step)
    if copy is not None:
        newer = "" if saved is None else f" (the newest checkpoint is of step {step})"
        saved = copy.saved
        step, source = saved.step, f"memory: {copy.told}{newer}"
    if saved is not None:
        _load(trainer, saved, load(saved, owner))
        trainer.metrics.say(f"resumed at step {step} from {source}")
        for line in _differences(Manifest.read(saved.path).facts, facts):
            trainer.metrics.say(line)
    else:
        trainer.metrics.forget_after(0)  # of a run that ended before it was saved
    if saver is not None:
        is_own = is_here or copy is not None
        saver.resumed(step if is_own else None, is_saved=is_here and copy is None)


def _check(trainer: Trainer, options: Checkpointing | None, resume: Any) -> None:
    if resume is not None and not isinstance(resume, str | Path):
        raise ConfigError(
            f"resume is {resume!r}; it is 'auto' (the newest checkpoint of this run, if there is "
            "one), the path of a checkpoint or of a run, or None to begin anew"
        )
    metrics = ["loss", *trainer.eval_metrics]
    if options is not None and options.keep_best and options.best_metric not in metrics:
        best = options.best_metric
        raise ConfigError(
            f"checkpointing.best_metric is {best!r}{did_you_mean(best, metrics)}, but an "
            f"evaluation has: {', '.join(metrics)}"
        )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"its {name} was {then[name]}; from here on it is {value}, so that the run does not end as "
        "it would have"
        for name, value in now.items()
        if then.get(name, value) != value
    ]


def _load(trainer: Trainer, saved: SavedStep, state: dict[str, Any]) -> None:
    try:
        trainer.load_state_dict(state)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ScaledTrainError):
            raise
        raise ConfigError(
            f"{saved.path} does not fit this run, a {type(trainer.model).__name__} under "
            f"{trainer.strategy}: {error!r}; resume with the model, optimizer and strategy that it "
            "was saved with, or begin anew in another run_dir"
        ) from error
