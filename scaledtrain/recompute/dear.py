"""Which operators' results are kept when a block keeps only what is dear to compute again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)
from torch.utils.hooks import RemovableHandle

from scaledtrain.errors import ConfigError

__all__ = ["DEAR", "Inside", "MakeContexts", "contexts_of"]

_aten = torch.ops.aten
DEAR: tuple[Any, ...] = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_attention_math.default,
)
"""Matrix products, convolutions and attention: their time grows faster than their bytes."""

MakeContexts = Callable[[], tuple[Any, Any]]
"""For ``torch.utils.checkpoint.checkpoint(context_fn=...)``."""


class Inside:
    """Knows whether modules of some names are being called.

    Args:
        names: endings of the names that submodules have in their block: ``"attention"`` is the
            module ``attention``, and ``inner.attention``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._depth = 0

    def __bool__(self) -> bool:
        """Whether one of them is."""
        return self._depth > 0

    def watch(self, blocks: Iterable[nn.Module]) -> list[RemovableHandle]:
        """Notice calls in these blocks, until the handles are removed.

        Raises:
            ConfigError: no block has a module of one of the names.
        """
        named = [item for block in blocks for item in block.named_modules() if item[0]]
        found: dict[nn.Module, None] = {}
        for ending in self._names:
            own = [m for name, m in named if f".{name}".endswith(f".{ending}")]
            if not own:
                raise ConfigError(
                    f"modules has {ending!r}, but no module in the blocks has a name that ends so; "
                    f"they have {', '.join(dict.fromkeys(name for name, _ in named)) or 'none'}"
                )
            found |= dict.fromkeys(own)
        handles = []
        for module in found:
            handles.append(module.register_forward_pre_hook(self._enter))
            # Also where a second pass ends early, with an exception of torch's own.
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        return handles

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1


def contexts_of(operators: Iterable[Any] = DEAR, inside: Inside | None = None) -> MakeContexts:
    """Contexts in which the results of these operators are kept, and all others computed again.

    What draws random numbers runs again in any case: numbers have to be drawn again for what comes
    after it.

    Args:
        operators: in ``torch.ops.aten``.
        inside: modules in which they are kept; None: everywhere.
    """
    decide = partial(_decide, frozenset(operators), inside)
    return partial(create_selective_checkpoint_contexts, decide)


def _decide(
    kept: frozenset[Any],
    inside: Inside | None,
    context: SelectiveCheckpointContext,
    operator: Any,
    *args: Any,
    **kwargs: Any,
) -> CheckpointPolicy:
    is_meant = operator in kept and (inside is None or bool(inside))
    if is_meant and not _draws(operator, args, kwargs):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _draws(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether it draws random numbers; attention does with dropout alone."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    names = [argument.name for argument in operator._schema.arguments]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    return bool(kwargs.get("dropout_p", args[place] if place < len(args) else 0.0))
