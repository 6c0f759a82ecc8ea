"""A model as a program: what ``torch.export`` makes of it, for those who do not have its code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scaledtrain.disk import sync_folder
from scaledtrain.errors import ConfigError

__all__ = ["PROGRAM", "export_program"]

PROGRAM = "model.pt2"


def export_program(model: nn.Module, batch: Any, to: str | Path) -> Path:
    """Write a model in eval mode as a program, for batches of any number of samples.

    The program is read again, and compared with the model on the batch and on one sample of it.

    Args:
        model: whole, with the weights that are wanted.
        batch: an example, as a loader gives it: inputs, ``(inputs, targets)`` or a dict for the
            model, from which ``labels`` are left out. The first dim of its tensors is that of the
            samples.
        to: a folder, made if need be.

    Returns:
        The file, ``model.pt2``: ``torch.export.load(file).module()`` runs it.

    Raises:
        ConfigError: the model cannot be exported, or the program computes something else; the
            message says why. Or there is such a file already.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> model, x = nn.Linear(2, 1), torch.ones(4, 2)
        >>> with TemporaryDirectory() as folder:
        ...     program = torch.export.load(export_program(model, x, folder)).module()
        >>> torch.equal(program(torch.ones(7, 2)), model(torch.ones(7, 2)))
        True
    """
    file = Path(to) / PROGRAM
    if file.exists():
        raise ConfigError(f"{file} is there already; remove it, or export to another folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    args, kwargs = _arguments(batch)
    samples = _samples((args, kwargs))
    if samples == 1:  # or torch.export would take 1 as a constant
        args, kwargs = _map((args, kwargs), lambda x: x.repeat(2, *[1] * (x.dim() - 1)))
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    unfinished = file.with_name(f".{PROGRAM}")
    try:
        with torch.no_grad():
            torch.export.save(_program(model, args, kwargs), unfinished)
            loaded = torch.export.load(unfinished).module()
            one = _map((args, kwargs), lambda x: x[:1])
            for inputs in ((args, kwargs), one):
                _compare(model, loaded, *inputs)
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(file)
        sync_folder(file.parent)
    finally:
        unfinished.unlink(missing_ok=True)
        for module, mode in training:
            module.training = mode
    return file


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name != "labels"}
    return (batch[0] if isinstance(batch, (tuple, list)) else batch,), {}


def _map(inputs: Any, function: Any) -> Any:
    """Of all tensors that have samples."""
    return pytree.tree_map(
        lambda x: function(x) if isinstance(x, Tensor) and x.dim() else x, inputs
    )


def _samples(inputs: Any) -> int:
    sizes = {len(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()}
    if len(sizes) != 1:
        raise ConfigError(
            f"the example has tensors whose first dims are {sorted(sizes) or 'not there'}; give a "
            "batch whose tensors all have its samples in their first dim"
        )
    return sizes.pop()


def _program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    shapes = _map((args, kwargs), lambda x: {0: batch})
    shapes = pytree.tree_map(lambda x: x if x is batch else None, shapes)
    try:
        return torch.export.export(
            model, args, kwargs, dynamic_shapes=shapes[1] or shapes[0], strict=False
        )
    except Exception as error:  # of many kinds, also from the model itself
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"{type(model).__name__} cannot be exported as a program: {' '.join(lines[:3])} "
            f"({type(error).__name__}). A program has one way for all inputs: let forward not "
            "branch on the values of tensors, nor on the number of samples, and call only torch; "
            "the weights alone can be exported in any case"
        ) from error


def _compare(model: nn.Module, program: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    expected = pytree.tree_leaves(model(*args, **kwargs))
    found = pytree.tree_leaves(program(*args, **kwargs))
    try:
        torch.testing.assert_close(found, expected, equal_nan=True)
    except AssertionError as error:
        raise ConfigError(
            f"the program that torch.export made of {type(model).__name__} computes something "
            f"else, so it is not kept: {str(error).splitlines()[0]}. Does forward draw at random, "
            "or depend on more than its inputs?"
        ) from error
