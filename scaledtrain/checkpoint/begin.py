"""What a Trainer does about checkpoints when it is made: go on from one, get ready for others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scaledtrain.checkpoint.policy import Checkpointing
from scaledtrain.checkpoint.resume import CHECKPOINTS, find, load
from scaledtrain.checkpoint.saver import Saver
from scaledtrain.errors import ConfigError

if TYPE_CHECKING:
    from scaledtrain.trainer import Trainer

__all__ = ["resume_and_save"]


def resume_and_save(
    trainer: Trainer,
    options: Checkpointing | None,
    resume: str | Path | None,
    run_dir: str | Path | None,
) -> Saver | None:
    """Go on from a checkpoint, and get ready to write others. Collective.

    Args:
        trainer: with all its parts.
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
            is_resumed=resume is not None,
            state=trainer.state_dict,
            evaluation=lambda: trainer.evaluation,
            owner=owner,
            agree=layout.agree,
            facts={
                "model": type(trainer.model).__name__,
                "strategy": str(strategy),
                "precision": str(trainer.precision),
                "config": config_of(trainer.model),
            },
        )
    saved = None if resume is None else find(resume, folder, link)
    if saved is not None:
        trainer.load_state_dict(load(saved, owner))
        trainer.metrics.say(f"resumed at step {saved.step} from {saved.path}")
        if saver is not None:
            saver.resumed(saved)
    return saver
