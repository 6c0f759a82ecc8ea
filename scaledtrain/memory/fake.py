"""Tensors that have shapes, dtypes and sizes, but no memory: whole steps run on them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from scaledtrain.data.cut import count_samples
from scaledtrain.errors import ConfigError

__all__ = ["Fakes", "batch_of", "bytes_of", "copied", "tensors_in"]

AnyModule = TypeVar("AnyModule", bound=nn.Module)

_aten = torch.ops.aten


class Fakes:
    """Inside, every new tensor is fake: operators run as on its device, but compute nothing.

    What reads a value of a tensor that has none (``item()``, ``if loss > 0``) is given 1.

    Attributes:
        n_read: how often that has happened.

    Example:
        >>> with Fakes() as fakes:
        ...     matrix = torch.ones(10**6, 10**6)  # 4 TB
        ...     bytes_of([matrix @ matrix]), (matrix.sum() > 3).item(), fakes.n_read
        (4000000000000, True, 1)
    """

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._answers = _Answers()
        self._entered = ExitStack()

    @property
    def n_read(self) -> int:
        """Values that were asked for, and are made up."""
        return self._answers.n_read

    def __enter__(self) -> Fakes:
        self._entered.enter_context(self._mode)
        self._entered.enter_context(self._answers)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered.close()

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Inside, what cannot be done without values is an error that says so.

        Args:
            what: is done.

        Raises:
            ConfigError: a shape follows from values, or an operator cannot be run on fake tensors.
        """
        try:
            yield
        except (DynamicOutputShapeException, UnsupportedOperatorException) as error:
            raise ConfigError(
                f"the memory of {what} cannot be known without computing: {error} has a result "
                "whose shape follows from values, or is not known to torch's fake tensors; measure "
                "it on a real run (scaledtrain.recompute.apart.peak_bytes)"
            ) from error


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does what fake tensors leave open or get wrong."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_read = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _aten._local_scalar_dense.default:
            return self._read(func, args[0])
        result = func(*args, **(kwargs or {}))
        # torch's shape functions do not know that kernels on CPUs take a 16-bit input with 32-bit
        # weights, as it happens under autocast; their statistics are in the weights' format, the
        # gradient in the input's.
        if func is _aten.native_group_norm.default and args[1] is not None:
            output, *statistics = result
            return (output, *(t.to(args[1].dtype) for t in statistics))
        if func is _aten.native_group_norm_backward.default and result[0] is not None:
            return (result[0].to(args[1].dtype), *result[1:])
        return result

    def _read(self, func: Any, tensor: Tensor) -> bool | int | float:
        try:
            value: bool | int | float = func(tensor)  # of small constants they are known
            return value
        except DataDependentOutputException:
            self.n_read += 1
        if tensor.dtype is torch.bool:
            return True
        return 1.0 if tensor.is_floating_point() else 1


def copied(model: AnyModule, device: torch.device | str) -> AnyModule:
    """A copy whose tensors have the same sizes, and no values, on another device.

    Args:
        model: any; its values are not looked at, so it may be on the meta device.
        device: ``"meta"``; or, inside of `Fakes`, any.
    """
    attributes = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor))
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers(), *attributes):
        empty = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
        )
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def batch_of(size: int, batch: Any, device: torch.device) -> Any:
    """A batch of so many samples like those of another batch; inside of `Fakes`.

    Args:
        size: samples.
        batch: its tensors have a dimension for the samples first.
        device: where it is.
    """
    given = count_samples(batch)

    def resized(tensor: Tensor) -> Tensor:
        shape = tuple(tensor.shape)
        if shape and shape[0] == given:
            shape = (size, *shape[1:])
        return torch.empty(shape, dtype=tensor.dtype, device=device)

    return tree_map_only(Tensor, resized, batch)


def tensors_in(batch: Any) -> list[Tensor]:
    """All tensors of a batch."""
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of the memory of some tensors, each piece once.

    Example:
        >>> t = torch.zeros(10)
        >>> bytes_of([t, t.view(2, 5), torch.zeros(1)])
        44
    """
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
