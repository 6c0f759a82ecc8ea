"""What a step takes: bytes that are kept, and bytes at most; of real tensors as of fake ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from scaledtrain.recompute.apart import Sample, peak_bytes
from scaledtrain.recompute.blocks import Call
from scaledtrain.recompute.live_bytes import LiveBytes
from scaledtrain.replica import Replica

__all__ = ["Kept", "UpdateBytes", "activation_bytes", "most_bytes", "update_bytes"]


@dataclass(frozen=True)
class Kept:
    """Activations at the end of a forward pass, by where in the model they were made.

    Blocks that are computed again together count as the first of them.
    """

    before: int
    """Up to the first block."""
    blocks: tuple[int, ...]
    """By block, output included, as far as somebody still needs it."""
    after: int
    """Behind the last block: head and loss."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.before + sum(self.blocks) + self.after


def activation_bytes(
    model: nn.Module, sample: Sample, blocks: Sequence[nn.Module]
) -> tuple[int, Kept]:
    """Activations in a forward and backward pass: at most, and between the two.

    Args:
        model: with or without activation checkpointing.
        sample: see `Sample`.
        blocks: in the order in which the model calls them.
    """
    counted = LiveBytes()
    marks: list[int] = []  # live bytes where each block begins, and where the last one has ended
    inside = False
    end = 0

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal inside
        if not inside and len(marks) < len(blocks) and module is blocks[len(marks)]:
            marks.append(counted.live)
            inside = True

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal inside
        if inside and module is blocks[len(marks) - 1]:
            inside = False
            if len(marks) == len(blocks):
                marks.append(counted.live)

    def watched(called: Call) -> Tensor:
        nonlocal end
        # Hooks of all modules, since blocks that have some of their own cannot be run together.
        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            with counted:
                loss = sample(called)
        finally:
            for hook in hooks:
                hook.remove()
        end = counted.live
        return loss

    peak = peak_bytes(model, watched)
    if len(marks) <= len(blocks):  # without blocks, or with some that were not called
        return peak, Kept(end, (), 0)
    sizes = tuple(after - before for before, after in pairwise(marks))
    return peak, Kept(marks[0], sizes, end - marks[-1])


@dataclass(frozen=True)
class UpdateBytes:
    """What an optimizer takes."""

    state: int
    """From step to step: momenta, 32-bit copies of 16-bit parameters, compensations."""
    working: int
    """At most, while it makes an update, beside parameters, gradients and state."""


def update_bytes(replica: Replica) -> UpdateBytes:
    """Let a replica make two updates; the first one makes the state.

    Args:
        replica: whose parameters and gradients may be written to.
    """
    replica.gradients()
    with LiveBytes() as counted:
        updater = replica.updater()
        for _ in range(2):
            state = counted.peak = counted.live
            updater.step()
    return UpdateBytes(counted.live, counted.peak - state)


def most_bytes(run: Callable[[], object]) -> int:
    """That are alive at once of what something makes."""
    with LiveBytes() as counted:
        run()
    peak: int = counted.peak
    return peak
