"""What happens inside a model, by the names of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

__all__ = [
    "differing_module",
    "dropout_off",
    "dropouts",
    "infinite_module",
    "norms_of_batches",
    "outputs_by_module",
    "same",
    "take_small_steps",
]

_SMALL = 0.01  # of the parameters' norm, that a step changes

Outputs = list[tuple[str, list[Tensor]]]


def outputs_by_module(model: nn.Module, call: Callable[[], object]) -> Outputs:
    """Copies of what each module returned, in the order in which they ended: inner ones first.

    Args:
        model: whose modules.
        call: calls it.
    """
    found: Outputs = []
    hooks = []
    for name, module in model.named_modules():

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            tensors = [t.detach().clone() for t in tree_leaves(output) if isinstance(t, Tensor)]
            found.append((name or "the model itself", tensors))

        hooks.append(module.register_forward_hook(keep))
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def differing_module(a: Outputs, b: Outputs) -> str:
    """The first module that returned something else the second time; empty: none did.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        >>> x = torch.ones(64, 2)
        >>> a, b = (outputs_by_module(model, lambda: model(x)) for _ in range(2))
        >>> differing_module(a, b)
        '1'
    """
    for (name, before), (_, after) in zip(a, b, strict=False):
        if not same(before, after):
            return name
    return ""


def infinite_module(outputs: Outputs) -> str:
    """The first module that returned NaN or an infinite number; empty: none did."""
    for name, tensors in outputs:
        if any(t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors):
            return name
    return ""


def same(a: Any, b: Any) -> bool:
    """Whether two trees of values are equal, bit for bit; NaN is equal to NaN."""
    these, those = tree_leaves(a), tree_leaves(b)
    return len(these) == len(those) and all(map(_same, these, those))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, torch.Generator) and isinstance(b, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return bool(a == b)


def dropouts(model: nn.Module) -> dict[str, _DropoutNd]:
    """The modules that drop something, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _DropoutNd) and module.p > 0
    }


def norms_of_batches(model: nn.Module) -> dict[str, _BatchNorm]:
    """The modules that follow the statistics of batches, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Its dropout modules drop nothing."""
    found = list(dropouts(model).values())
    kept = [module.p for module in found]
    for module in found:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in zip(found, kept, strict=True):
            module.p = p


def take_small_steps(
    model: nn.Module, losses: Iterator[Tensor], seen: Callable[[], None] = lambda: None
) -> None:
    """Descend a little, so that layers which begin at zero no longer are.

    Each step changes the parameters by a hundredth of their norm.

    Args:
        model: is changed.
        losses: one for each step, computed when it is asked for.
        seen: called with the gradients there.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for loss in losses:
        model.zero_grad()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        seen()
        mine = [p for p in parameters if p.grad is not None]
        if not mine:
            return
        size = torch.stack([p.detach().norm() for p in mine]).norm()
        slope = torch.stack([p.grad.norm() for p in mine if p.grad is not None]).norm()
        if not bool(slope > 0) or not bool(slope.isfinite()):
            return
        with torch.no_grad():
            for p in mine:
                p.sub_(_SMALL * size / slope * p.grad)
