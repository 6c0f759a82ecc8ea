"""Weights of others, or of another run, into a model. No pickle is ever loaded."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scaledtrain.checkpoint.folder import MANIFEST, saved_steps
from scaledtrain.checkpoint.resume import CHECKPOINTS
from scaledtrain.errors import ConfigError

__all__ = ["load_weights"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"  # as Hugging Face has them
_WRAPPERS = ("model.", "module.", "_orig_mod.")  # base models, DDP, torch.compile
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHOWN = 5


def load_weights(model: nn.Module, path: str | Path, *, partial: bool = False) -> None:
    """Give a model the weights of a safetensors file, or of a run; before it is given to a Trainer.

    Names match, too, if one side has a wrapper's prefix: ``model.``, ``module.``, ``_orig_mod.``

    Args:
        model: whole; a Trainer then lays it out as asked.
        path: a file; a folder that ``save_pretrained`` or `export` wrote, in one file or more; or
            the folder of a run or of a checkpoint, whatever its layout was.
        partial: leave what the file lacks as it is, and out what the model lacks.

    Raises:
        ConfigError: there is no such file, it is a pickle, or names or shapes are others than the
            model's.
        CheckpointError: the checkpoint is damaged.
    """
    own = model.state_dict()
    given = _renamed(dict(_weights_at(Path(path))), own, path)
    kept = {}
    by_memory: dict[object, list[str]] = {}
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
            f"has no {_some(unknown)}; take the model that was saved, or, to load what fits, call "
            "load_weights(..., partial=True) before the Trainer is made"
        )
    for name, tensor in kept.items():
        if tensor.shape != own[name].shape:
            raise ConfigError(
                f"{name} is of shape {tuple(tensor.shape)} in {path}, in the model of "
                f"{tuple(own[name].shape)}; make the model with the sizes of the one that was saved"
            )
    model.load_state_dict({**own, **kept})


def _renamed(
    given: Mapping[str, Tensor], own: Collection[str], path: str | Path
) -> dict[str, Tensor]:
    """Under the model's own names, where they differ by the prefix of a wrapper only."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in given.items():
        found = next((each for each in _spellings(name) if each in own), name)
        if found in renamed:
            raise ConfigError(f"{path} has two tensors for {found}, one of them as {name}")
        renamed[found] = tensor
    return renamed


def _spellings(name: str) -> Iterator[str]:
    yield name
    bare = name.replace("_orig_mod.", "")  # of compiled blocks it is inside the name
    while prefix := next((each for each in _WRAPPERS if bare.startswith(each)), None):
        yield bare
        bare = bare.removeprefix(prefix)
    yield bare
    yield from (prefix + bare for prefix in _WRAPPERS)


def _some(names: Collection[str]) -> str:
    if not names:
        return "nothing"
    listed = ", ".join(sorted(names)[:_SHOWN])
    return listed if len(names) <= _SHOWN else f"{listed}, ... ({len(names)} names)"


def _weights_at(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.is_dir() and ((path / MANIFEST).exists() or _is_run(path)):
        # With DCP, which takes a second to import.
        from scaledtrain.checkpoint.export import model_state, newest_intact
        from scaledtrain.checkpoint.part import CheckpointReader

        yield from model_state(CheckpointReader(newest_intact(path))).items()
        return
    for file in _files_at(path):
        _refuse_pickle(file)
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    yield name, opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} is no safetensors file that can be read: {error}") from error


def _is_run(path: Path) -> bool:
    return (path / CHECKPOINTS).is_dir() or bool(saved_steps(path))


def _files_at(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (path / _INDEX).exists():
        if not (path / _WEIGHTS).exists():
            for file in sorted(path.iterdir()):
                _refuse_pickle(file)
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


def _refuse_pickle(file: Path) -> None:
    if file.suffix in _PICKLES:
        raise ConfigError(
            f"{file} is a pickle, which can run code of whoever made it when it is loaded; that is "
            "never done here. Where you trust it make a safetensors file of it, "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), "
            "'model.safetensors'), or let Hugging Face's save_pretrained write the model"
        )
