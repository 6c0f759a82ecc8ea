"""Blocks that run again but for some dear functions, whose results are kept, or offloaded.

torch's selective checkpointing sees every operator, on Python's side of the dispatcher, which takes
as long as it saves where operators are short. Here are seen the functions that a model calls, and
of those that are kept nothing is computed twice: what they save for their backward pass is either
an argument, which is there when the block has run again, or their own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from scaledtrain.recompute.dear import MakeContexts
from scaledtrain.recompute.live_bytes import storage_key
from scaledtrain.recompute.offload import Read, Store, held

__all__ = ["ATTENTION", "PRODUCTS", "keep_results"]

Function = Callable[..., Any]
Source = tuple[Tensor, Read | None]

ATTENTION: frozenset[Function] = frozenset({F.scaled_dot_product_attention})
"""Its time grows with the square of the sequence's length, its result does not."""

PRODUCTS: frozenset[Function] = ATTENTION | {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    torch.matmul,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
}
"""Matrix products, convolutions and attention: their time grows faster than their bytes."""


def keep_results(functions: frozenset[Function], store: Store | None = None) -> MakeContexts:
    """Contexts of a checkpoint in which what these functions return is not computed again.

    Gradients have the bits that they have without it. A call with dropout inside is computed again,
    since random numbers have to be drawn again for what comes after it. What is kept is what some
    backward pass has needed before: not the result of a block's last product, which is only added
    to something, and nothing the first time.

    Args:
        functions: that return one tensor, and draw no random numbers without ``dropout_p``.
        store: where what is kept waits; None: it stays where it is.
    """
    needs = _Needs()

    def contexts() -> tuple[_Pass, _Pass]:
        calls: list[_Call] = []

        def first(number: int, function: Function, arguments: list[Any], names: Any) -> Tensor:
            calls.append(_Call(number, arguments, store, needs))
            return calls[number].first(function, arguments, names)

        def second(number: int, function: Function, arguments: list[Any], names: Any) -> Tensor:
            return calls[number].second(function, arguments, names)

        return _Pass(functions, first), _Pass(functions, second, partial(needs.learn, calls))

    return contexts


class _Needs:
    """Which results have been needed when a block had run again; calls are alike by their keys."""

    def __init__(self) -> None:
        self._needed: set[Hashable] = set()

    def learn(self, calls: Iterable[_Call]) -> None:
        """A block has run again."""
        self._needed.update(call.key for call in calls if call.is_needed)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._needed


class _Call:
    """One call of a function.

    Args:
        number: of the calls in its block.
        arguments: all of them, in an order.
        store: where what is kept goes to.
        needs: of calls that were alike.

    Attributes:
        key: calls are alike that have the same.
        is_needed: the backward pass has needed its result, or will.
    """

    def __init__(
        self, number: int, arguments: Sequence[Any], store: Store | None, needs: _Needs
    ) -> None:
        self.key: Hashable = number
        self.is_needed = False
        self._needs = needs
        self._store = store
        self._computed = [i for i, value in enumerate(arguments) if _is_computed(value)]
        self._packed: list[_Packed] = []
        self._result: Read | None = None

    def _tap(self, arguments: list[Any]) -> None:
        """Let the checkpoint know those arguments that the second pass computes."""
        for place in self._computed:
            arguments[place] = _Tap.apply(arguments[place])  # type: ignore[no-untyped-call]

    def first(self, function: Function, arguments: list[Any], names: Sequence[str]) -> Tensor:
        """Call it, and keep what its backward pass needs."""
        self._tap(arguments)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _Packed.unpack):
            result = _call(function, arguments, names)
        # Whatever the size of a batch is, the same is kept of it.
        weights = tuple(value.shape for value in arguments[1:] if _is_weight(value))
        self.key = self.key, function, result.dtype, weights
        if self.key in self._needs:
            self._result = _kept(result, self._store)
        sources: list[Source] = [(result, self._result)]
        for place, value in enumerate(arguments):
            if isinstance(value, Tensor):
                read = _FromTap(value.grad_fn) if place in self._computed else None
                sources.append((value, read))
        for packed in self._packed:
            self.is_needed |= packed.settle(sources, self._store)
        self._packed = []
        return result

    def _pack(self, tensor: Tensor) -> _Packed:
        self._packed.append(_Packed(tensor))
        return self._packed[-1]

    def second(self, function: Function, arguments: list[Any], names: Sequence[str]) -> Tensor:
        """What it returned."""
        self._tap(arguments)
        self.is_needed = True
        if self._result is not None:
            return self._result().detach().requires_grad_()
        with torch.no_grad():
            return _call(function, arguments, names).requires_grad_()


class _Packed:
    """A tensor that a kept function needs for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor
        self._read: Read | None = None
        self._shape, self._stride, self._offset = tensor.shape, tensor.stride(), 0

    def settle(self, sources: Sequence[Source], store: Store | None) -> bool:
        """The call is over: is this an argument, the result, or the function's own?

        Args:
            sources: the result and arguments, and who reads them later; None: they are there, as
                parameters are.
            store: for what is its own.

        Returns:
            Whether it is the result.
        """
        tensor, self._tensor = self._tensor, None
        assert tensor is not None
        of_storage = [s for s in sources if storage_key(s[0]) == storage_key(tensor)]
        same = [s for s in of_storage if s[0].storage_offset() == tensor.storage_offset()]
        source, read = (*same, *of_storage, (None, None))[0]
        if source is not None and read is not None:
            self._offset = int(tensor.storage_offset() - source.storage_offset())
            self._read = read
        else:
            self._read = _kept(tensor, store if source is None else None)
        return source is sources[0][0]

    def unpack(self) -> Tensor:
        """In the backward pass."""
        assert self._read is not None
        source = self._read().detach()
        offset = source.storage_offset() + self._offset
        return source.as_strided(self._shape, self._stride, offset)


class _FromTap:
    """An argument, from the node that has handed it to the checkpoint."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._found: Tensor | None = None  # a checkpoint gives what it has computed once

    def __call__(self) -> Tensor:
        if self._found is None:
            (self._found,) = self._node.saved_tensors
        assert self._found is not None
        return self._found


class _Tap(torch.autograd.Function):
    """Changes nothing, and has the checkpoint see its input."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_leaf


def _is_computed(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf


def _call(function: Function, arguments: Sequence[Any], names: Sequence[str]) -> Tensor:
    """With the last of the arguments by name."""
    positional = len(arguments) - len(names)
    named = dict(zip(names, arguments[positional:], strict=True))
    result: Tensor = function(*arguments[:positional], **named)
    return result


def _kept(tensor: Tensor, store: Store | None) -> Read:
    return held(tensor) if store is None else store.put(tensor)


class _Pass(TorchFunctionMode):
    """What is called in a block's first or second pass."""

    def __init__(
        self,
        functions: frozenset[Function],
        meet: Callable[..., Tensor],
        end: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self._functions = functions
        self._meet = meet
        self._end = end
        self._met = 0

    def __enter__(self) -> Any:
        self._met = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._end()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._functions and torch.is_grad_enabled() and not _drops(func, args, kwargs):
            arguments = [*args, *kwargs.values()]
            if any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
                self._met += 1
                return self._meet(self._met - 1, func, arguments, list(kwargs))
        return func(*args, **kwargs)


def _drops(function: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether attention draws random numbers."""
    p = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
    return function in ATTENTION and bool(p)
