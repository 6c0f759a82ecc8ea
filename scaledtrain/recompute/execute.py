"""Lets the blocks of a model run as a plan says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.blocks import Call, Interception, check_arguments, first_tensor
from scaledtrain.recompute.dear import MakeContexts
from scaledtrain.recompute.plan import Keep, Plan, Step, count_blocks
from scaledtrain.recompute.rerun import Rerun

__all__ = ["Executor"]


class Executor:
    """Takes over the calls of some blocks, until it is removed.

    Nothing of the model changes but where calls of ``forward`` of each block go; names of
    parameters, hooks and state dicts stay. Blocks that are computed again together run when the
    first of them is called; the calls of the others hand on what they are given. Gradients have the
    bits that they have without it: the same operators run on the same values, random numbers of
    torch included.

    Where no gradients are recorded, as in evaluation, everything runs as if there were no plan.

    Args:
        blocks: in the order in which the model calls them, each with the output of the one before.
        plan: for all of them.
        ways: of a block that a plan's `Keep` may name: the contexts in which it is checkpointed;
            None: it keeps everything.
        told: what to tell the user about the plan.

    Raises:
        ConfigError: when the model is called: blocks that are to be computed again together are not
            called one after another with the same other arguments, or return more than one thing.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        plan: Plan,
        ways: Sequence[MakeContexts | None] = (None,),
        told: str = "",
    ) -> None:
        self.told = told
        assert count_blocks(plan) == len(blocks)
        self._place: list[tuple[_Together, int]] = []
        for step in plan:
            n, first = count_blocks((step,)), len(self._place)
            together = _Together(list(blocks[first : first + n]), step, ways)
            self._place += [(together, place) for place in range(n)]
        self._interception = Interception(blocks, self._call)

    def remove(self) -> None:
        """Let the blocks run as they are."""
        self._interception.remove()

    def _call(
        self, index: int, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        together, place = self._place[index]
        if together.keeps_all or together.running or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        check_arguments(together.blocks[place], args, kwargs)
        if place == 0:
            return together.run(forward, args, kwargs)
        return together.hand_on(place, args, kwargs)


class _Together:
    """Blocks of one step of the plan."""

    def __init__(
        self, blocks: Sequence[nn.Module], step: Step, ways: Sequence[MakeContexts | None]
    ) -> None:
        self.blocks = blocks
        self.step = step
        self.keeps_all = isinstance(step, Keep) and ways[step.way] is None
        self.running = False  # a block's call is one of ours, not the model's
        self._ways = ways
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._is_tuple = False

    def run(self, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run all of them, when the first is called."""
        one = _Pass(self, forward, args[1:], kwargs, self._ways)
        output = one.steps((self.step,), 0, None, args[0])
        if len(self.blocks) > 1:
            self._is_tuple = isinstance(output, tuple)
            if isinstance(output, tuple) and len(output) > 1:
                raise ConfigError(
                    f"{type(self.blocks[-1]).__name__} returns {len(output)} things; blocks that "
                    "are computed again together return one: choose a policy that takes them one "
                    "by one"
                )
            self._given = args[1:], kwargs
        return output

    def hand_on(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block has already run: what came out of the last one is what it was given."""
        if self._given is None or not _alike(self._given, (args[1:], kwargs)):
            raise ConfigError(
                f"{type(self.blocks[place]).__name__} number {place} of those that are computed "
                "again together was called out of order, or with other arguments than the first: "
                "choose a policy that takes them one by one"
            )
        if place == len(self.blocks) - 1:
            self._given = None
        return (args[0],) if self._is_tuple else args[0]


class _Pass:
    """One forward pass of them, and what it takes to make it again."""

    def __init__(
        self,
        together: _Together,
        first_forward: Call,
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
        ways: Sequence[MakeContexts | None],
    ) -> None:
        self._together = together
        self._first_forward = first_forward
        self._others = others
        self._kwargs = kwargs
        self._ways = ways

    def steps(self, plan: Plan, first: int, inside: Rerun | None, x: Tensor) -> Any:
        """Run steps; returns the last block's output.

        Args:
            plan: of these steps.
            first: the first block's place.
            inside: what they are a part of; None: the whole.
            x: what the first block is given.
        """
        output: Any = x
        for step in plan:
            n = count_blocks((step,))
            output = self._step(step, first, n, inside, first_tensor(output))
            first += n
        return output

    def _step(self, step: Step, first: int, n: int, inside: Rerun | None, x: Tensor) -> Any:
        blocks = self._together.blocks[first : first + n]
        if isinstance(step, Keep):
            contexts = self._ways[step.way]
            if contexts is None:
                return self._block(first, x)
            # What keeps nothing keeps nothing dear either: that is for when it runs again.
            rerun = Rerun(blocks, contexts if inside is None or inside.again else None)
            return checkpoint(self._block, first, x, use_reentrant=False, context_fn=rerun.contexts)
        rerun = Rerun(blocks)
        return checkpoint(
            self.steps, step.plan, first, rerun, x, use_reentrant=False, context_fn=rerun.contexts
        )

    def _block(self, place: int, x: Tensor) -> Any:
        if place == 0:  # its hooks have been called by whoever called it
            return self._first_forward(x, *self._others, **self._kwargs)
        together = self._together
        together.running = True
        try:
            return together.blocks[place](x, *self._others, **self._kwargs)
        finally:
            together.running = False


def _alike(one: Any, other: Any) -> bool:
    """The same tensors, and equal values."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return bool(one is other or one == other)
