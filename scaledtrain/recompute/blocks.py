"""The blocks of a model, and what happens where they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scaledtrain.errors import ConfigError

__all__ = [
    "Call",
    "Compiled",
    "Divert",
    "Interception",
    "check_arguments",
    "find_blocks",
    "first_tensor",
    "has_hooks",
    "hooks_of",
    "is_compiled",
    "is_diverted",
    "named_blocks",
    "same_arguments",
]

_PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device)

Call = Callable[..., Any]
Divert = Callable[[int, Call, tuple[Any, ...], dict[str, Any]], Any]


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's chain: the ``nn.Sequential`` or ``nn.ModuleList`` with most modules of one kind.

    Args:
        model: any; it may be the ``nn.Sequential`` itself.

    Raises:
        ConfigError: it has none of at least two modules.

    Example:
        >>> layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        >>> model = nn.Sequential(nn.Embedding(9, 4), layers)
        >>> [type(block).__name__ for block in find_blocks(model)]
        ['Linear', 'Linear', 'Linear']
    """
    lists = [m for m in model.modules() if isinstance(m, (nn.Sequential, nn.ModuleList))]
    lists = [m for m in lists if len(m) >= 2]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no nn.Sequential or nn.ModuleList of two modules or more, "
            "so that its blocks are not known; name them: blocks=[...]"
        )
    return list(max(lists, key=_most_alike))


def _most_alike(modules: nn.Sequential | nn.ModuleList) -> tuple[int, int]:
    """How many of the modules are of the kind that there are most of, and their parameters."""
    kinds = [type(child) for child in modules]
    most = max(set(kinds), key=kinds.count)
    return kinds.count(most), sum(p.numel() for p in modules.parameters())


def named_blocks(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Submodules by name, in the order in which they are called.

    Args:
        model: that has them.
        names: as in ``model.named_modules()``; an ``nn.ModuleList`` stands for its modules.

    Raises:
        ConfigError: there is no such submodule.

    Example:
        >>> lists = nn.ModuleDict({"deep": nn.ModuleList([nn.Tanh(), nn.ReLU()])})
        >>> named_blocks(lists, ["deep"]) == named_blocks(lists, ["deep.0", "deep.1"])
        True
    """
    if isinstance(names, str) or not names:
        raise ConfigError(
            f"blocks is {names!r}; it is a list of names of submodules, or left out to find them"
        )
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ConfigError(
                f"blocks has {name!r}, which {type(model).__name__} has not; it has "
                f"{', '.join(list(modules)[1:21])}"
            )
    found: list[nn.Module] = []
    for name in names:
        named = modules[name]
        found += named if isinstance(named, nn.ModuleList) else [named]
    return found


def first_tensor(output: Any) -> Tensor:
    """What goes on to the next block: the output, or the first of a tuple.

    Raises:
        ConfigError: it is neither.
    """
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise ConfigError(
            f"a block returned a {type(output).__name__}; blocks whose activations are to be "
            "computed again return a tensor, or a tuple that begins with one"
        )
    return first


def check_arguments(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse what a second call of the block could find changed.

    Raises:
        ConfigError: there is no tensor in the first place, or something that is neither a tensor
            nor a plain value.
    """
    name = type(block).__name__
    if not (args and isinstance(args[0], Tensor)):
        raise ConfigError(
            f"{name} was called without a tensor as its first positional argument, which has to be "
            "the output of the block before it"
        )
    for value in tree_leaves((args, dict(kwargs))):
        if value is not None and not isinstance(value, _PLAIN):
            raise ConfigError(
                f"{name} is given a {type(value).__name__}, which may change when it is used, so "
                "that the block cannot be computed again with it; leave it out in training (a "
                "cache of keys and values: model.config.use_cache = False)"
            )


def has_hooks(block: nn.Module) -> bool:
    """Whether something happens where the block is called, beside its ``forward``."""
    return bool(hooks_of(block))


def hooks_of(block: nn.Module) -> list[Call]:
    """What happens there."""
    return [
        *block._forward_hooks.values(),
        *block._forward_pre_hooks.values(),
        *block._backward_hooks.values(),
        *block._backward_pre_hooks.values(),
    ]


def same_arguments(one: Any, other: Any) -> bool:
    """The same tensors, and equal values."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same_arguments, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            same_arguments(one[key], other[key]) for key in one
        )
    return bool(one is other or one == other)


class _Replaced:
    """Blocks with something in the place of their ``forward``, until it is removed.

    Args:
        blocks: the modules; nothing else about them changes.
        forward_of: gives, of an index and a block, what is called from now on.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], forward_of: Callable[[int, nn.Module], Call]
    ) -> None:
        if len(set(blocks)) < len(blocks):
            raise ConfigError(
                "a block comes twice in the chain; name the blocks that come once: blocks=[...]"
            )
        if any(isinstance(block.forward, _Diverted) for block in blocks):
            raise ConfigError(
                "the model's activations are computed again already; remove() the handle of "
                "checkpoint_activations, or close the Trainer, that has it first"
            )
        self._blocks = list(blocks)
        self._before = [vars(block).get("forward") for block in blocks]
        for index, block in enumerate(blocks):
            block.forward = forward_of(index, block)

    def remove(self) -> None:
        """Let them be as they were."""
        for block, before in zip(self._blocks, self._before, strict=True):
            if before is None:
                vars(block).pop("forward", None)
            else:
                block.forward = before
        self._blocks, self._before = [], []


class Interception(_Replaced):
    """Calls of the blocks' ``forward`` go somewhere else, until it is removed.

    Args:
        blocks: the modules.
        call: called as ``call(index, forward, args, kwargs)`` with the ``forward`` that was.
    """

    def __init__(self, blocks: Sequence[nn.Module], call: Divert) -> None:
        super().__init__(blocks, lambda index, block: _Diverted(block, index, block.forward, call))


class Compiled(_Replaced):
    """Blocks whose ``forward`` is compiled, each by itself, until it is removed.

    Args:
        blocks: the modules. Equal ones are compiled once.
        backend: for ``torch.compile``.
    """

    def __init__(self, blocks: Sequence[nn.Module], backend: str) -> None:
        super().__init__(blocks, lambda _, block: torch.compile(block.forward, backend=backend))


def is_compiled(block: nn.Module) -> bool:
    """Whether what is called is a graph, of whose functions and operators nobody sees anything."""
    return hasattr(block.forward, "_torchdynamo_orig_callable")


def is_diverted(block: nn.Module) -> bool:
    """Whether calls of its ``forward`` go somewhere else, so that hooks may see other calls."""
    return isinstance(vars(block).get("forward"), _Diverted)


class _Diverted:
    """What stands in a block's place of ``forward``; a copy of the block has its own again."""

    def __init__(self, block: nn.Module, index: int, forward: Call, call: Divert) -> None:
        self._block = block
        self._index = index
        self._forward = forward
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._index, self._forward, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        return _own_forward(memo[id(self._block)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self._block,)


def _own_forward(block: nn.Module) -> Call:
    return MethodType(type(block).forward, block)
