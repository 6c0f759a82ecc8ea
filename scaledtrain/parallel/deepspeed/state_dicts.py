"""State dicts of a model that ZeRO divides: one module after the other is whole for them."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["loadable", "whole_state"]


def whole_state(model: nn.Module, keeps: Callable[[str], bool]) -> dict[str, Any]:
    """A copy of a model's state dict on the host, made of one module after the other. Collective.

    Args:
        model: that an engine has.
        keeps: whether this rank is to have what has that name.
    """
    kept: set[str] = set()
    left_out: set[str] = set()

    def copying(save: Callable[..., None]) -> Callable[..., None]:
        def save_copies(destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            own: dict[str, Any] = {}
            save(own, prefix, keep_vars)
            for name, value in own.items():
                is_kept = keeps(name)
                (kept if is_kept else left_out).add(name)
                destination[name] = _copy(value) if is_kept else _without_memory(value)

        return save_copies

    hooks = ("_state_dict_pre_hooks", "_state_dict_hooks")
    with _whole_in(model, "_save_to_state_dict", hooks, wrap=copying):
        found = dict(model.state_dict())
    # What hooks made of values that are not here has none either.
    return {name: found[name] for name in found if name in kept} if left_out else found


def _copy(value: Any) -> Any:
    """On the host."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _without_memory(value: Any) -> Any:
    """In the place of a tensor, for hooks that look for it."""
    if not isinstance(value, Tensor):
        return value
    return torch.zeros((), dtype=value.dtype).expand(value.shape)


def loadable(model: nn.Module, writer: int) -> AbstractContextManager[None]:
    """Inside, ``load_state_dict`` finds parameters whole, those of one module after the other.

    Args:
        model: that an engine has.
        writer: what is written on which of the ranks counts.
    """
    return _whole_in(model, "_load_from_state_dict", ("_load_state_dict_post_hooks",), writer)


@contextmanager
def _whole_in(
    model: nn.Module,
    method: str,
    hooks: Iterable[str],
    writer: int | None = None,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Iterator[None]:
    """Inside, a module's own parameters are whole while that method of it, or a hook, runs.

    Args:
        model: that an engine has.
        method: of modules; they may override it.
        hooks: names of the modules' attributes that have them.
        writer: what is written on which of the ranks counts; None: nothing is.
        wrap: makes what is run of the method.
    """
    with ExitStack() as undo:
        for module in model.modules():
            places = [(vars(module), method, wrap(getattr(module, method)))]
            for name in hooks:
                registered = vars(module)[name]
                places += [(registered, key, hook) for key, hook in registered.items()]
            for place, key, function in places:
                if key in place:
                    undo.callback(place.__setitem__, key, place[key])
                else:
                    undo.callback(place.__delitem__, key)
                place[key] = _with_whole(module, function, writer)
        yield


def _with_whole(
    module: nn.Module, function: Callable[..., Any], writer: int | None
) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _gathered(module.parameters(recurse=False), writer):
            return function(*args, **kwargs)

    return call


def _gathered(tensors: Iterable[Tensor], writer: int | None = None) -> AbstractContextManager[Any]:
    """Inside, those that stage 3 divides are whole on all ranks."""
    divided = [t for t in tensors if hasattr(t, "ds_id")]
    if not divided:
        return nullcontext()
    zero = importlib.import_module("deepspeed").zero
    found: AbstractContextManager[Any] = zero.GatheredParameters(divided, writer)
    return found
