"""Which operators' results are kept when a block keeps only what is dear to compute again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    """Contexts in which the results of these operators are kept, and all others computed again."""
    return partial(create_selective_checkpoint_contexts, partial(_decide, frozenset(operators)))


def _decide(
    kept: frozenset[Any],
    context: SelectiveCheckpointContext,
    operator: Any,
    *args: Any,
    **kwargs: Any,
) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE
