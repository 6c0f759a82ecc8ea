"""What a Trainer does about checkpoints when it is made: go on from one, get ready for others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from scaledtrain.checkpoint.folder import SavedStep
from scaledtrain.checkpoint.policy import Checkpointing
from scaledtrain.checkpoint.resume import CHECKPOINTS, find, goes_on_in, load
from scaledtrain.checkpoint.saver import Saver
from scaledtrain.errors import ConfigError, ScaledTrainError

if TYPE_CHECKING:
    from scaledtrain.trainer import Trainer

__all__ = ["resume_and_save"]


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
        ConfigError: there is no folder, or the checkpoint is of another kind of run.
        CheckpointError: it is damaged.
    """
    link, layout, strategy = trainer.link, trainer.layout, trainer.strategy
    if link.returned:  # to a job that has gone on: the server has the state
        return None
    if options is None and resume is None:
        return None
    from scaledtrain.checkpoint.export import config_of
    from scaledtrain.checkpoint.part import Owner  # with DCP, which takes a second to import

    folder = None if run_dir is None else Path(run_dir) / CHECKPOINTS
    if options is not None and options.folder is not None:
        folder = Path(options.folder)
    owner = Owner(
        link.group.rank,
        link.group.size,
        layout.link.group.rank,
        layout.pieces.size,
        layout.stage_ranks,
        dict(trainer.model.named_parameters()),
        strategy.replicas_equal,
        layout.whole,
        layout.counted_elsewhere(),
    )
    saver = None
    if options is not None:
        if folder is None:
            raise ConfigError("checkpointing needs a folder: set run_dir, or checkpointing.folder")
        saver = Saver(
            options,
            folder,
            link,
            strategy,
            goes_on=resume is not None and goes_on_in(resume, folder),
            state=trainer.state_dict,
            evaluation=lambda: trainer.evaluation,
            owner=owner,
            agree=layout.agree,
            facts={
                "model": type(model).__name__,
                "strategy": str(strategy),
                "precision": str(trainer.precision),
                "config": config_of(model),
            },
        )
    saved = None if resume is None else find(resume, folder, link)
    if saved is not None:
        _load(trainer, saved, load(saved, owner))
        trainer.metrics.say(f"resumed at step {saved.step} from {saved.path}")
    elif resume is not None:
        trainer.metrics.forget_after(0)  # of a run that ended before it was saved
    if saver is not None and resume is not None:
        saver.resumed(saved)
    return saver


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
