"""A model as a chain of parts that are called one after another: where it can be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scaledtrain.errors import ConfigError
from scaledtrain.parallel.pipeline.trace import TracedPart, model_arguments, trace_parts
from scaledtrain.precision import Conversion
from scaledtrain.recompute.blocks import has_hooks, hooks_of
from scaledtrain.schedule import call_model

__all__ = ["ModelParts", "NamesParts", "call_parts", "check_parts", "find_parts", "spread"]


@runtime_checkable
class NamesParts(Protocol):
    """A model that says where it can be cut.

    Example:
        >>> class Autoencoder(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.encoder = nn.Linear(8, 2)
        ...         self.decoder = nn.Linear(2, 8)
        ...
        ...     def forward(self, x: Tensor) -> Tensor:
        ...         return self.decoder(self.encoder(x))
        ...
        ...     def pipeline_parts(self) -> list[nn.Module]:
        ...         return [self.encoder, self.decoder]
        >>> find_parts(Autoencoder()).names
        ('encoder', 'decoder')
    """

    def pipeline_parts(self) -> Sequence[nn.Module]:
        """Modules that, called one after another, do what ``forward`` does.

        The first is given what the model is given. What one returns is given to the next: a tensor,
        or the tensors of a tuple as so many arguments. They are submodules of the model, or new
        modules that hold submodules, or parameters by the names that the model has for them.
        """


@dataclass(frozen=True)
class ModelParts:
    """Parts of a model, in the order in which they run.

    Args:
        model: the whole.
        modules: the parts.
        names: of the parts, each once: where they begin in the model.
    """

    model: nn.Module
    modules: tuple[nn.Module, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.modules)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's ``forward`` returns, by way of its parts."""
        return call_parts(self.modules, args, kwargs)


def call_parts(
    modules: Iterable[Callable[..., Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call parts one after another, the first with these arguments; what the last returns."""
    output: Any = None
    for module in modules:
        output = module(*args, **kwargs)
        args, kwargs = spread(output), {}
    return output


def spread(output: Any) -> tuple[Any, ...]:
    """A part's output as arguments of the next part."""
    return output if isinstance(output, tuple) else (output,)


def find_parts(
    model: nn.Module,
    inputs: Any = None,
    *,
    own_loss: bool = False,
    blocks: Sequence[str] | None = None,
) -> ModelParts:
    """Find where a model can be cut into stages.

    It is asked (`NamesParts`); or it is an ``nn.Sequential``, nested ones included; or it is traced
    with ``torch.export``, as ``torch.distributed.pipelining.pipeline`` does it, and cut at its
    blocks. Of an ``nn.Sequential`` modules without parameters belong to the part before them.

    A traced model is a graph of operators: the model's Python code runs once for training and once
    for evaluation, and what it decides there holds for all batches of the same kinds of tensors;
    sizes may differ where the code allows it. Hooks are not called; those that bring a model's
    inputs into its format of 16 bits (`scaledtrain.precision.Conversion`) are the caller's matter.

    Args:
        model: on any device. It keeps its parameters, which the parts share.
        inputs: a microbatch, for tracing: what the model is called with, as the one argument. With
            ``own_loss`` a whole batch: a mapping of keyword arguments, or a tuple of arguments.
        own_loss: the model computes its loss: ``model(**batch).loss``. Of a traced model it is what
            the last part returns, and labels go from part to part.
        blocks: names of the submodules at which a traced model is cut; None: they are found, by
            `scaledtrain.recompute.blocks.find_blocks`.

    Returns:
        The parts, one after another, with their names.

    Raises:
        ConfigError: there is no chain of two parts or more; it says what was tried.

    Example:
        >>> model = nn.Sequential(
        ...     nn.Flatten(), nn.Sequential(nn.Linear(4, 9), nn.ReLU()), nn.Linear(9, 2)
        ... )
        >>> parts = find_parts(model)
        >>> parts.names
        ('0', '2')
        >>> x = torch.randn(3, 2, 2)
        >>> torch.equal(parts(x), model(x))
        True
    """
    if blocks is None and isinstance(model, NamesParts):
        modules = tuple(model.pipeline_parts())
    elif blocks is None and isinstance(model, nn.Sequential) and _is_plain(model):
        modules = tuple(_of_sequential(model))
    elif inputs is not None:
        modules = tuple(trace_parts(model, inputs, own_loss, blocks))
    else:
        raise ConfigError(
            f"{type(model).__name__} cannot be cut into stages: it has no pipeline_parts() "
            "(scaledtrain.parallel.pipeline.NamesParts), is no nn.Sequential, and no inputs were "
            "given to trace it with; write the method, or give a microbatch"
        )
    if model in modules or len(modules) < 2:
        raise ConfigError(
            f"{type(model).__name__} has only one part, so that it cannot be cut; give it "
            "pipeline_parts() with more of them"
        )
    if not all(map(Conversion.has_put, hooks_of(model))):
        raise ConfigError(
            f"{type(model).__name__} has hooks, which would not be called, since only its parts "
            "are; register them on submodules, or after the model has been cut"
        )
    return ModelParts(model, modules, tuple(_named(model, modules)))


def _is_plain(module: nn.Sequential) -> bool:
    return type(module).forward is nn.Sequential.forward


def _flat(module: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for child in module:
        if isinstance(child, nn.Sequential) and _is_plain(child) and not has_hooks(child):
            yield from _flat(child)
        else:
            yield child


class _Run(nn.Sequential):
    """Modules of one part, of which the first takes what the last one before it returned."""

    def forward(self, *inputs: Any) -> Any:
        output: Any = inputs[0] if len(inputs) == 1 else inputs
        for module in self:
            output = module(output)
        return output


def _of_sequential(model: nn.Sequential) -> Iterator[nn.Module]:
    """A part for each module that has parameters.

    To cut anywhere else changes no stage's load by much, and a module that works in place cannot
    begin a stage.
    """
    run: list[nn.Module] = []
    begun = False
    for module in _flat(model):
        has_parameters = next(module.parameters(), None) is not None
        if has_parameters and begun:
            yield _Run(*run)
            run = []
        begun = begun or has_parameters
        run.append(module)
    if run:
        yield _Run(*run)


def _named(model: nn.Module, parts: Sequence[nn.Module]) -> Iterator[str]:
    """Where each part begins in the model: its first submodule, or tensor."""
    modules: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            modules.setdefault(id(module), []).append(name)
    tensors = {id(p): name for name, p in model.named_parameters()}
    given: set[str] = set()
    for part in parts:
        found = [part.name] if isinstance(part, TracedPart) else []
        found += [name for m in part.modules() for name in modules.get(id(m), [])]
        found += [tensors[id(p)] for p in part.parameters() if id(p) in tensors]
        found += [type(part).__name__]
        free = (name for name in found if name not in given)
        name = next(free, f"{found[0]} #{len(given)}")
        given.add(name)
        yield name


def check_parts(parts: ModelParts, inputs: Any, own_loss: bool = False) -> None:
    """Compare what the parts compute with what the model does, bit for bit, in evaluation.

    Args:
        parts: of the model.
        inputs: as those of `find_parts`.
        own_loss: see `find_parts`.

    Raises:
        ConfigError: they compute something else.
    """
    modes = {
        module: module.training for m in (parts.model, *parts.modules) for module in m.modules()
    }
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            args, kwargs = model_arguments(inputs, own_loss)
            expected, found = parts.model(*args, **kwargs), parts(*args, **kwargs)
            if own_loss:
                expected = call_model(lambda *_, **__: expected, inputs, None)[1]
                found = call_model(lambda *_, **__: found, inputs, None)[1]
    finally:
        for module, mode in modes.items():
            module.training = mode
    pairs = zip(tree_leaves(expected), tree_leaves(found), strict=False)
    alike = all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
    if not alike or len(tree_leaves(expected)) != len(tree_leaves(found)):
        raise ConfigError(
            f"the parts {', '.join(parts.names)}, called one after another, do not return what "
            f"{type(parts.model).__name__} returns; let pipeline_parts() have all that its forward "
            "does"
        )
