"""What stands for the output of a block that has run together with the blocks after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from scaledtrain.errors import ConfigError

__all__ = ["Placeholder", "UsedElsewhereError"]


class UsedElsewhereError(ConfigError):
    """What a block returns is used for something else than the next block."""


class Placeholder(Tensor):
    """Has the shape, format and device of a tensor, and no memory; whatever computes with it fails.

    Args:
        like: the tensor.
        told: in the error.

    Raises:
        UsedElsewhereError: an operator is given it.
    """

    told: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, like: Tensor, told: str) -> Placeholder:
        """Make one."""
        made: Placeholder = torch.Tensor._make_wrapper_subclass(
            cls,
            like.size(),
            strides=like.stride(),
            dtype=like.dtype,
            device=like.device,
            requires_grad=like.requires_grad,
        )
        made.told = told
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> NoReturn:
        """Refuse."""
        raise UsedElsewhereError(
            next(v for v in tree_leaves((args, kwargs)) if type(v) is cls).told
        )

    # These do not come by `__torch_dispatch__`.
    def register_hook(self, hook: Callable[..., Any]) -> NoReturn:
        """Refuse."""
        raise UsedElsewhereError(self.told)

    def retain_grad(self) -> NoReturn:
        """Refuse."""
        raise UsedElsewhereError(self.told)

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        raise UsedElsewhereError(self.told)
