"""In which module of a model a forward or backward pass stops being finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from scaledtrain.recompute.blocks import is_diverted

__all__ = ["PassTrace", "is_finite"]


class _Gradient(NamedTuple):
    """One that is not finite: of a module's input, or of its output."""

    module: nn.Module
    is_of_input: bool


class PassTrace:
    """Follows the passes through a model's modules, until it finds where NaN or infinities begin.

    In a forward pass that is the first module with an output that is not finite; where what it was
    given was not finite either, although all modules before it returned finite outputs, it is the
    code between them. In a backward pass it is the first module that is given a finite gradient of
    its output, and passes one on that is not.

    Args:
        model: inner modules come before those that contain them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {
            module: f"{name or 'the model'} ({type(module).__name__})"
            for name, module in model.named_modules()
        }
        self._first: str | None = None
        self._gradients: list[_Gradient] = []  # in the order of the backward pass

    def began_in(self, place: str) -> None:
        """Not finite is what was made there, if nothing was before."""
        self._first = self._first or place

    def where(self, parameters: Sequence[str]) -> str | None:
        """Where it began; None: all was finite.

        Args:
            parameters: names of those whose gradients are not finite.
        """
        if self._first is not None or not parameters:  # a ReLU may have stopped it
            return self._first
        given_bad = {g.module for g in self._gradients if not g.is_of_input}
        if self._model in given_bad:
            return "the backward pass of the loss"
        for gradient in self._gradients:
            if gradient.is_of_input and gradient.module not in given_bad:
                return f"the backward pass of {self._names[gradient.module]}"
        if self._gradients:
            of = self._names[self._gradients[0].module]
            return f"the backward pass of what uses the output of {of}"
        return f"the gradient of {parameters[-1]}"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, passes are followed."""
        hooks = []
        for module in self._names:
            if not is_diverted(module):  # blocks that run together see other calls
                hooks += [
                    module.register_forward_pre_hook(self._before, with_kwargs=True),
                    module.register_forward_hook(self._after),
                ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch._C._current_graph_task_id() != -1:  # activations that are computed again
            return None
        # Masks are without a gradient, and may well be infinite.
        computed = [t for t in tree_leaves((args, kwargs)) if _has_gradient(t)]
        if not all(map(is_finite, computed)):
            self.began_in(f"what {self._names[module]} is given, made between modules")

        def own(tensor: Tensor) -> Tensor:
            """So that its gradient is what this module passes on, and no other."""
            if not _has_gradient(tensor):
                return tensor
            view = tensor.view_as(tensor)
            view.register_hook(partial(self._look, _Gradient(module, True)))  # type: ignore[no-untyped-call]
            return view

        return tree_map_only(Tensor, own, args), tree_map_only(Tensor, own, kwargs)

    def _after(self, module: nn.Module, _: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        if not is_finite(output):
            self.began_in(f"the output of {self._names[module]}")
        for tensor in tree_leaves(output):
            if _has_gradient(tensor):
                tensor.register_hook(partial(self._look, _Gradient(module, False)))

    def _look(self, of: _Gradient, gradient: Tensor) -> None:
        if not is_finite(gradient):
            self._gradients.append(of)


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def is_finite(value: Any) -> bool:
    """Whether all tensors with fractions in it are."""
    if isinstance(value, Tensor):  # in no graph, which would keep what is looked at
        has_fractions = value.is_floating_point() or value.is_complex()
        return not has_fractions or bool(value.detach().isfinite().all())
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(is_finite, value))
    return True
