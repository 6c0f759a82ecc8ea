"""A model that does not say what its parts are, traced and cut at its blocks.

``torch.export`` makes a graph of it, as ``torch.distributed.pipelining.pipeline`` does; that one
fixes the sizes of the batch, sends what a later stage needs past the stages between, and copies
parameters that two stages share. Here sizes stay free, parts make a chain, and tied parameters are
one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from scaledtrain.errors import ConfigError
from scaledtrain.parallel.pipeline.split_graph import Piece, split
from scaledtrain.recompute.blocks import find_blocks, named_blocks
from scaledtrain.schedule import call_model

__all__ = ["TracedPart", "model_arguments", "trace_parts"]


def trace_parts(
    model: nn.Module, inputs: Any, own_loss: bool, blocks: Sequence[str] | None
) -> list[nn.Module]:
    """Parts of a model: what is before its blocks, each block, and what is after them.

    Args:
        model: whose parameters the parts share.
        inputs: as those of `scaledtrain.parallel.pipeline.find_parts`, also for the rest.
        own_loss: the last part returns the model's loss.
        blocks: names of the blocks; None: they are found.

    Raises:
        ConfigError: it has no blocks, cannot be traced, or does not call its blocks one after
            another.
    """
    try:
        chain = find_blocks(model) if blocks is None else named_blocks(model, blocks)
    except ConfigError as error:
        raise ConfigError(
            f"{type(model).__name__} cannot be cut into stages: it has no pipeline_parts() "
            "(scaledtrain.parallel.pipeline.NamesParts), is no nn.Sequential, and is not traced, "
            f"since it is not known where to cut it: {error}"
        ) from error
    names = {module: name for name, module in model.named_modules()}
    block_names = [names[block] for block in chain]
    arguments = pytree.tree_map_only(Tensor, _at_least_two, model_arguments(inputs, own_loss))
    modes = {module: module.training for module in model.modules()}
    pieces = []
    try:
        for training in (True, False):
            exported = _export(model.train(training), arguments, own_loss)
            pieces.append(split(exported, _tensors(model), block_names))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [TracedPart(*pair) for pair in zip(*pieces, strict=True)]


class TracedPart(nn.Module):
    """Operators of a part of a model, in training and in evaluation.

    Args:
        training: what it does in training.
        evaluation: what it does in evaluation.
    """

    def __init__(self, training: Piece, evaluation: Piece) -> None:
        super().__init__()
        self.name = training.name
        self.is_block = training.is_block
        self._graphs = nn.ModuleList([training.graph, evaluation.graph])
        self._unpack = training.unpack, evaluation.unpack
        self._pack = training.pack, evaluation.pack

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operators."""
        mode = 0 if self.training else 1
        return self._pack[mode](self._graphs[mode](*self._unpack[mode](args, kwargs)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TracedPart:
        """Move what it holds, and what its operators make, to another device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        for graph in self._graphs:
            assert isinstance(graph, fx.GraphModule)
            for node in graph.graph.nodes:
                node.args = map_aggregate(node.args, lambda a: _moved(a, device))
                node.kwargs = map_aggregate(node.kwargs, lambda a: _moved(a, device))
            graph.recompile()
        return self


def _moved(argument: Any, device: torch.device) -> Any:
    return device if isinstance(argument, torch.device) else argument


def _at_least_two(tensor: Tensor) -> Tensor:
    """A single sample twice: a size of one would be fixed."""
    return torch.cat([tensor, tensor]) if tensor.dim() and len(tensor) == 1 else tensor


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names, the first one first."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def model_arguments(inputs: Any, own_loss: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """With which a model is called, as `scaledtrain.schedule.call_model` does it."""
    if not own_loss:
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(sorted(inputs.items()))
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


class _Called(nn.Module):
    """A model with all its arguments in one, and nothing but the loss if it computes one."""

    def __init__(self, model: nn.Module, own_loss: bool) -> None:
        super().__init__()
        self.model = model
        self._own_loss = own_loss

    def forward(self, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, kwargs = arguments
        if self._own_loss:
            return call_model(lambda *_, **__: self.model(*args, **kwargs), (), None)[1]
        return self.model(*args, **kwargs)


def _export(
    model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], own_loss: bool
) -> torch.export.ExportedProgram:
    free = torch.export.Dim.AUTO
    sizes = pytree.tree_map(
        lambda t: dict.fromkeys(range(t.dim()), free) if isinstance(t, Tensor) else None, arguments
    )
    try:
        return torch.export.export(_Called(model, own_loss), (arguments,), dynamic_shapes=(sizes,))
    except ConfigError:
        raise
    except Exception as error:  # of any kind: it is the model's code that runs
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{type(model).__name__} has no pipeline_parts(), is no nn.Sequential, and "
            f"torch.export cannot trace it ({type(error).__name__}: {reason}). Usual reasons: "
            "Python code that looks at values of tensors, and operators that torch does not know. "
            "Give the model pipeline_parts() (scaledtrain.parallel.pipeline.NamesParts)"
        ) from error
