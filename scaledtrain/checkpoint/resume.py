"""Which checkpoint a run goes on from, and its state for this rank."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scaledtrain.checkpoint.folder import (
    MANIFEST,
    Manifest,
    SavedStep,
    name_of,
    saved_steps,
)
from scaledtrain.comm.protocols import Link
from scaledtrain.comm.votes import any_rank
from scaledtrain.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from scaledtrain.checkpoint.part import Owner

__all__ = ["CHECKPOINTS", "SPLIT", "candidates", "find", "goes_on_in", "load"]

_logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # in the folder of a run
SPLIT = "pipeline.split"  # among a manifest's facts: parts of each stage


def find(resume: str | Path, folder: Path | None, link: Link) -> SavedStep | None:
    """The checkpoint that is meant, the same on all ranks, which look at its files together.

    Args:
        resume: ``"auto"``: the newest intact one in ``folder``, None if there is none. A path: of a
            checkpoint, of a folder of them, or of a run, which is the newest intact one there.
        folder: of this run's checkpoints.
        link: to the other ranks.

    Raises:
        ConfigError: there is none at that path, or no folder.
        CheckpointError: the one that is meant, or every one that is there, is damaged.
    """
    if resume == "auto":
        if folder is None:
            raise ConfigError(
                "resume is 'auto', which looks into the folder of the run, but there is none; set "
                "run_dir, or checkpointing.folder, or give resume the path of a checkpoint"
            )
        return _newest_intact(folder, link)
    path = Path(resume)
    if (path / MANIFEST).exists():
        return _one(path, link)
    inside = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    there = saved_steps(inside)
    if not there:
        raise ConfigError(
            f"resume is {str(resume)!r}, where there is no checkpoint; give it the folder of a run "
            "that was saved, or one of those in its folder 'checkpoints', or 'auto'"
        )
    found = _newest_intact(inside, link)
    if found is None:
        raise CheckpointError(f"all {len(there)} checkpoints in {inside} are damaged (see the log)")
    return found


def candidates(resume: str | Path, folder: Path | None) -> list[SavedStep]:
    """Checkpoints of which `find` may choose one, the oldest first, as this rank sees them."""
    if resume == "auto":
        return [] if folder is None else saved_steps(folder)
    path = Path(resume)
    if (path / MANIFEST).exists():
        return [SavedStep(0, path)]
    return saved_steps(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path)


def goes_on_in(resume: str | Path, folder: Path) -> bool:
    """Whether what is meant are the checkpoints in this folder, or one of them."""
    path, own = Path(resume).resolve(), folder.resolve()
    return resume == "auto" or own in (path, path / CHECKPOINTS, path.parent)


def _one(path: Path, link: Link) -> SavedStep:
    saved = SavedStep(Manifest.read(path).step, path)
    damage = _damage(saved, link)
    if damage is not None:
        raise CheckpointError(
            f"resume is {str(path)!r}, but it is damaged: {damage}; give another one, or 'auto' "
            "for the newest intact one"
        )
    return saved


def _newest_intact(folder: Path, link: Link) -> SavedStep | None:
    """Rank 0 says which there are: the others' view of the disk may lag."""
    own = saved_steps(folder)
    count = torch.tensor([len(own)], device=link.device)
    link.group.broadcast([count])
    steps = torch.zeros(int(count), dtype=torch.int64, device=link.device)
    if link.group.rank == 0:
        steps.copy_(torch.tensor([saved.step for saved in own], dtype=torch.int64))
    if steps.numel():
        link.group.broadcast([steps])
    for step in reversed(steps.tolist()):
        saved = SavedStep(step, folder / name_of(step))
        damage = _damage(saved, link)
        if damage is None:
            return saved
        _logger.warning("checkpoint %s is skipped: %s", saved.path, damage)
    return None


def _damage(saved: SavedStep, link: Link) -> str | None:
    """Every rank looks at some of the files; what one of them found, or that another one did."""
    own = saved.damage(slice(link.group.rank, None, link.group.size))
    if not any_rank(link.group, own is not None, link.device):
        return None
    return own or "another rank found it damaged, and says how"


def load(saved: SavedStep, owner: Owner) -> dict[str, Any]:
    """The state for this rank.

    Where the ranks are others now, those that have none of their own begin with the first one's;
    generators, and what compressions have not sent yet, of which each rank had its own, are left
    out then.

    Args:
        saved: intact.
        owner: this rank, as it would save.

    Raises:
        ConfigError: there are other pieces now, of replicas whose states differ, or of an engine
            whose ranks save what only they can take over.
    """
    from scaledtrain.checkpoint.part import CheckpointReader, load_rank
    from scaledtrain.checkpoint.pieces import can_gather, gathered, has_all

    reader = CheckpointReader(saved.path)
    manifest, piece = reader.manifest, owner.rank % owner.pieces
    ranks, pieces = len(manifest.ranks), manifest.pieces
    then = f"{ranks // pieces} replicas of {pieces} ranks"
    now = f"{owner.ranks // owner.pieces} of {owner.pieces}"
    first = min(owner.replica, ranks // pieces - 1) * pieces
    state: dict[str, Any] = {}
    is_alike = False
    if (pieces, manifest.stages) == (owner.pieces, owner.stages):
        state = load_rank(reader, first + piece, owner)
        is_alike = pieces == 1 or has_all(state, owner.parameters)
        if is_alike and ranks == owner.ranks:
            return state
    if not is_alike:  # replicas are divided in another way now
        if not owner.is_equal:
            split = manifest.facts.get(SPLIT)
            cut = "" if manifest.stages == 1 else f" and {SPLIT} (it was {split})"
            raise ConfigError(
                f"{saved.path} is of {then}, each with a state of its own, which only replicas "
                f"that are divided alike can take over; here are {now}: set mesh{cut} as it was"
            )
        states = [load_rank(reader, first + piece, owner) for piece in range(pieces)]
        if not can_gather(states):
            raise ConfigError(
                f"{saved.path} is of {then}, whose engine (deepspeed) keeps the optimizer's state "
                f"in a form that only ranks which are divided alike can take over; here are {now}: "
                "set mesh and engine as they were, or begin anew with its weights: init_from="
                f"{saved.path}"
            )
        state = gathered(states, list(owner.parameters))
    del state["generators"]
    strategy = state["strategy"]
    if "compression" in strategy:
        strategy["compression"] = []
    if isinstance(strategy.get("server"), dict):
        strategy["server"].pop("feedback", None)
    if owner.rank == 0 and not owner.is_equal:
        _logger.warning(
            "%s is of %s, each with a state of its own; here are %s: the run goes on from them, "
            "but not as it would have",
            saved.path,
            then,
            now,
        )
    return state
