"""Which operators' results are kept when a block keeps only what is dear to compute again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

__all__ = ["DEAR", "MakeContexts", "contexts_of"]

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


def contexts_of(operators: Iterable[Any] = DEAR) -> MakeContexts:
    """Contexts in which the results of these operators are kept, and all others computed again.

    What draws random numbers runs again in any case: numbers have to be drawn again for what comes
    after it.
    """
    return partial(create_selective_checkpoint_contexts, partial(_decide, frozenset(operators)))


def _decide(
    kept: frozenset[Any],
    context: SelectiveCheckpointContext,
    operator: Any,
    *args: Any,
    **kwargs: Any,
) -> CheckpointPolicy:
    if operator in kept and not _draws(operator, args, kwargs):
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
