"""Which blocks of a model are taken to cost the same."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from scaledtrain.recompute.chain import Block

__all__ = ["Kind", "are_alike", "kind_of"]

Kind = tuple[type, Hashable, Hashable, Hashable, Hashable]
"""A block's class, and what else its costs depend on."""

_NOISE = 1.25  # times that differ by less are taken for one
_NUMBERS = ("idx", "index", "number")  # endings of attributes that only number a block


def kind_of(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
    """Equal for blocks that cost the same."""
    inside = [(type(m).__name__, m.extra_repr(), _plain_of(m)) for m in block.modules()]
    held = [(p.shape, p.dtype, p.requires_grad) for p in block.parameters()]
    return type(block), tuple(inside), tuple(held), _shape(args), _shape(kwargs)


def _plain_of(module: nn.Module) -> Hashable:
    values = ((k, v) for k, v in vars(module).items() if not k.endswith(_NUMBERS))
    return tuple((k, v) for k, v in values if isinstance(v, (bool, int, float, str)))


def are_alike(one: Block, other: Block) -> bool:
    """Whether they have the same bytes, and times that differ by no more than noise.

    Many equal blocks are planned fast, many that differ by a hair are not.
    """

    def told(block: Block) -> tuple[float, tuple[int, ...]]:
        way = block.ways[0]
        of_way = (way.kept_bytes, way.forward_bytes, way.backward_bytes)
        seconds = way.forward_seconds + way.backward_seconds
        return seconds, (block.output_bytes, block.forward_bytes, *of_way)

    (seconds, n_bytes), (other_seconds, other_bytes) = told(one), told(other)
    least, most = sorted((seconds, other_seconds))
    return n_bytes == other_bytes and most <= _NOISE * least


def _shape(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_shape, value))
    if isinstance(value, dict):
        return tuple((key, _shape(inside)) for key, inside in value.items())
    return repr(value)
