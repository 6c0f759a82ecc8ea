"""Weights out of a checkpoint for others to use."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scaledtrain.checkpoint.folder import MANIFEST, Manifest, SavedStep, saved_steps
from scaledtrain.checkpoint.part import CheckpointReader, read_tensors
from scaledtrain.checkpoint.resume import CHECKPOINTS
from scaledtrain.checkpoint.tensor_file import write_tensors
from scaledtrain.checkpoint.tree import restore, tensor_names
from scaledtrain.disk import replace_file, sync_folder
from scaledtrain.errors import CheckpointError, ConfigError
from scaledtrain.run_dir import CONFIG

__all__ = ["checkpoints_at", "config_of", "export", "model_state", "newest_intact", "run_of"]

_logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"  # as Hugging Face has it


def config_of(model: nn.Module) -> Any:
    """The config of a Hugging Face model, as JSON has it; None of another model."""
    to_text = getattr(getattr(model, "config", None), "to_json_string", None)
    if to_text is None:
        return None
    config = json.loads(to_text())
    return {**config, "architectures": config.get("architectures") or [type(model).__name__]}


def model_state(reader: CheckpointReader) -> dict[str, Tensor]:
    """Parameters and buffers of a checkpoint's model; where replicas differ, their mean.

    Buffers are the first rank's: the mean of a count is none.
    """
    ranks, pieces = reader.manifest.ranks, reader.manifest.pieces
    first, *others = (
        _model_of(reader, ranks[begin : begin + pieces]) for begin in range(0, len(ranks), pieces)
    )
    state = {}
    for name, value in first.items():
        values = [value, *(other[name] for other in others)]
        if value.is_floating_point() and not all(torch.equal(value, v) for v in values):
            value = torch.stack([v.double() for v in values]).mean(0).to(value.dtype)
        state[name] = value
    return state


def _model_of(reader: CheckpointReader, ranks: Sequence[int]) -> dict[str, Tensor]:
    """Of a replica that these ranks had together; where they had stages, each has some names."""
    state: dict[str, Tensor] = {}
    for rank in ranks if reader.manifest.stages > 1 else ranks[:1]:
        skeleton = reader.skeleton(rank)
        try:
            model = next(value for key, value in skeleton["dict"] if key == "model")
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise CheckpointError(f"the state of rank {rank} has no model") from error
        state |= restore(model, read_tensors(reader, tensor_names(model)))
    return state


def newest_intact(path: Path) -> Path:
    """A checkpoint, or the newest intact one of a run or of a folder of checkpoints.

    Raises:
        ConfigError: there is none.
        CheckpointError: all are damaged.
    """
    there = checkpoints_at(path)
    for saved in reversed(there):
        damage = saved.damage()
        if damage is None:
            return saved.path
        _logger.warning("checkpoint %s is skipped: %s", saved.path, damage)
    raise CheckpointError(f"every checkpoint at {path} is damaged")


def checkpoints_at(path: Path) -> list[SavedStep]:
    """The checkpoints that are meant, the oldest first.

    Raises:
        ConfigError: there is none.
    """
    if (path / MANIFEST).exists():
        return [SavedStep(Manifest.read(path).step, path)]
    there = saved_steps(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path)
    if not there:
        raise ConfigError(f"{path} has no checkpoint; give the folder of a run that was saved")
    return there


def run_of(checkpoint: Path, given: Path) -> Path:
    """The folder of the run that a checkpoint is of, which may have been what was given."""
    return given if (given / CONFIG).is_file() else checkpoint.absolute().parent.parent


def export(checkpoint: str | Path, to: str | Path) -> list[Path]:
    """Write a checkpoint's weights as one safetensors file, as ``save_pretrained`` would.

    Args:
        checkpoint: the folder of one step.
        to: a folder, made if need be: it gets ``model.safetensors``, and ``config.json`` if the
            model is one of Hugging Face's, whose ``from_pretrained`` then loads the folder.

    Returns:
        The files.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: there are such files already.
    """
    reader, folder = CheckpointReader(checkpoint), Path(to)
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = folder / WEIGHTS, folder / "config.json"
    for path in (weights, config):
        if path.exists():
            raise ConfigError(f"{path} is there already; remove it, or export to another folder")
    state = model_state(reader)
    tensors = [(name, tensor.contiguous()) for name, tensor in state.items()]
    about = reader.manifest.facts.get("config")
    if about is not None:
        replace_file(config, json.dumps(about, indent=2).encode())
    unfinished = folder / f".{WEIGHTS}"
    unfinished.unlink(missing_ok=True)
    write_tensors(unfinished, tensors, {"format": "pt"})
    unfinished.rename(weights)
    sync_folder(folder)
    return [weights] if about is None else [weights, config]
