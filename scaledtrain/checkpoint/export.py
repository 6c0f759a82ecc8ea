"""Weights out of a checkpoint for others to use, and others' weights into a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scaledtrain.checkpoint.part import CheckpointReader, read_tensors
from scaledtrain.checkpoint.tensor_file import write_bytes, write_tensors
from scaledtrain.checkpoint.tree import restore, tensor_names
from scaledtrain.errors import CheckpointError, ConfigError

__all__ = ["config_of", "export", "load_weights", "model_state"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"  # as Hugging Face has them


def config_of(model: nn.Module) -> Any:
    """The config of a Hugging Face model, as JSON has it; None of another model."""
    to_text = getattr(getattr(model, "config", None), "to_json_string", None)
    return json.loads(to_text()) if to_text is not None else None


def model_state(reader: CheckpointReader) -> dict[str, Tensor]:
    """Parameters and buffers of a checkpoint's model; where replicas differ, their mean.

    Buffers are the first rank's: the mean of a count is none.
    """
    first, *others = (_model_of(reader, rank) for rank in _of_replicas(reader))
    state = {}
    for name, value in first.items():
        values = [value, *(other[name] for other in others)]
        if value.is_floating_point() and not all(torch.equal(value, v) for v in values):
            value = torch.stack([v.double() for v in values]).mean(0).to(value.dtype)
        state[name] = value
    return state


def _of_replicas(reader: CheckpointReader) -> Iterator[int]:
    """A rank of each."""
    yield from reader.manifest.ranks[:: reader.manifest.pieces]


def _model_of(reader: CheckpointReader, rank: int) -> dict[str, Tensor]:
    skeleton = reader.skeleton(rank)
    try:
        model = next(value for key, value in skeleton["dict"] if key == "model")
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise CheckpointError(f"the state of rank {rank} has no model") from error
    state: dict[str, Tensor] = restore(model, read_tensors(reader, tensor_names(model)))
    return state


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
    weights, config = folder / _WEIGHTS, folder / "config.json"
    for path in (weights, config):
        if path.exists():
            raise ConfigError(f"{path} is there already; remove it, or export to another folder")
    state = model_state(reader)
    tensors = [(name, tensor.contiguous()) for name, tensor in state.items()]
    unfinished = folder / f".{_WEIGHTS}"
    unfinished.unlink(missing_ok=True)
    write_tensors(unfinished, tensors, {"format": "pt"})
    unfinished.rename(weights)
    about = reader.manifest.facts.get("config")
    if about is None:
        return [weights]
    write_bytes(config, json.dumps(about, indent=2).encode())
    return [weights, config]


def load_weights(model: nn.Module, path: str | Path, *, partial: bool = False) -> None:
    """Give a model the weights of a safetensors file; before it is given to a Trainer.

    Args:
        model: whole; a Trainer then lays it out as asked.
        path: a file, or a folder that ``save_pretrained`` or `export` wrote, in one file or more.
        partial: leave what the file lacks as it is, and out what the model lacks.

    Raises:
        ConfigError: there is no such file, or names or shapes are others than the model's.
    """
    given = dict(_weights_at(Path(path)))
    own = model.state_dict()
    kept = {}
    by_memory: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in own.items():  # of tied weights one is enough
        by_memory.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    for names in by_memory.values():
        there = next((name for name in names if name in given), None)
        if there is not None:
            kept.update({name: given.get(name, given[there]) for name in names})
    lacking, unknown = own.keys() - kept.keys(), given.keys() - own.keys()
    if not partial and (lacking or unknown):
        raise ConfigError(
            f"{path} does not fit {type(model).__name__}: it lacks {_some(lacking)}, and the model "
            f"has no {_some(unknown)}; take the model that was saved, or set partial=True"
        )
    for name, tensor in kept.items():
        if tensor.shape != own[name].shape:
            raise ConfigError(
                f"{name} is of shape {tuple(tensor.shape)} in {path}, in the model of "
                f"{tuple(own[name].shape)}; make the model with the sizes of the one that was saved"
            )
    model.load_state_dict({**own, **kept})


def _some(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "") if listed else "nothing"


def _weights_at(path: Path) -> Iterator[tuple[str, Tensor]]:
    for file in _files_at(path):
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    yield name, opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} is no safetensors file that can be read: {error}") from error


def _files_at(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (path / _INDEX).exists():
        return [path / _WEIGHTS]
    try:
        index: Mapping[str, str] = json.loads((path / _INDEX).read_text())["weight_map"]
        names = sorted(set(index.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path / _INDEX} is damaged: {error!r}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ConfigError(f"{path / _INDEX} names a file elsewhere: {outside[0]!r}")
    return [path / name for name in names]
