"""Lets the blocks of a model run as a plan says."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.blocks import (
    Call,
    Interception,
    check_arguments,
    first_tensor,
    has_hooks,
    same_arguments,
)
from scaledtrain.recompute.dear import Inside, MakeContexts
from scaledtrain.recompute.offload import Offload, Store, storages, storages_of
from scaledtrain.recompute.placeholder import Placeholder
from scaledtrain.recompute.plan import ELSEWHERE, Keep, Plan, Planned, Step, count_blocks
from scaledtrain.recompute.rerun import Rerun

__all__ = ["Executor"]


class Executor:
    """Takes over the calls of some blocks, until it is removed.

    Nothing of the model changes but where calls of ``forward`` of each block go; names of
    parameters, hooks and state dicts stay. Blocks that are computed again together run when the
    first of them is called, and the last one's call returns the output; the others' return a
    `Placeholder`, which nobody but the next block can do anything with. Gradients have the bits
    that they have without it: the same operators run on the same values, with the same numbers from
    torch's default generators.

    Where no gradients are recorded, as in evaluation, everything runs as if there were no plan.

    Args:
        model: that has the blocks.
        blocks: in the order in which the model calls them, each with the output of the one before.
        plan: for all of them.
        ways: of running a block that a plan's `Keep` may name beside ``"all"`` and `ELSEWHERE`, and
            the contexts in which it is checkpointed then.
        store: where a plan offloads to.
        told: what to tell the user about the plan.
        inside: modules whose calls the ways want to know of.

    Attributes:
        told: see above.
        planned: what the plan is to come to, if something was measured for it; of one microbatch,
            and of the first stage that this rank has.

    Raises:
        ConfigError: when the model is called: blocks that are to be computed again together are not
            called one after another with the same other arguments, or return more than one thing,
            or what they return is used elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        plan: Plan,
        ways: Mapping[str, MakeContexts] | None = None,
        store: Store | None = None,
        told: str = "",
        inside: Inside | None = None,
    ) -> None:
        self.told = told
        self.planned: Planned | None = None
        self._plan, self._ways, self._store, self._inside = plan, ways, store, inside
        assert count_blocks(plan) == len(blocks)
        self._waiting: _Together | None = None  # has run, but not all of its blocks were called
        self._model = weakref.ref(model)
        self._model_stays: Sequence[int] | None = None  # its storages, in this forward pass
        self._is_inside = False  # of the model's forward pass
        self._place: list[tuple[_Together, int]] = []
        for step in plan:
            n, first = count_blocks((step,)), len(self._place)
            own = list(blocks[first : first + n])
            together = _Together(own, step, ways or {}, store, self._stays)
            self._place += [(together, place) for place in range(n)]
        self._interception = Interception(blocks, self._call)
        self._when_removed: Callable[[], None] = _nothing
        self._hooks = [
            model.register_forward_pre_hook(_Tell(self._begin)),
            model.register_forward_hook(_Tell(self._end)),
        ]
        if inside is not None:
            try:
                self._hooks += inside.watch(blocks)
            except ConfigError:
                self.remove()
                raise

    def when_removed(self, call: Callable[[], None]) -> None:
        """Have something done after the blocks have been let go."""
        self._when_removed = call

    def on(self, model: nn.Module, blocks: Sequence[nn.Module]) -> Executor:
        """Let the blocks of another model run as these do."""
        plan, ways, store = self._plan, self._ways, self._store
        other = Executor(model, blocks, plan, ways, store, self.told, self._inside)
        other.planned = self.planned
        return other

    def remove(self) -> None:
        """Let the blocks run as they are."""
        self._interception.remove()
        for hook in self._hooks:
            hook.remove()
        self._when_removed()

    def _call(
        self, index: int, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        together, place = self._place[index]
        if together.running or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if together.keeps_all:
            self._raise_if_waiting()
            return forward(*args, **kwargs)
        check_arguments(together.blocks[place], args, kwargs)
        if place == 0 or self._waiting is not together:
            self._raise_if_waiting()
        if place == 0:
            output = together.run(forward, args, kwargs)
        else:
            output = together.hand_on(place, args, kwargs)
        self._waiting = together if place < len(together.blocks) - 1 else None
        return output

    def _stays(self) -> Sequence[int]:
        """Storages that the model has anyway, which a block may use without having them."""
        model = self._model()
        if model is None:
            return ()
        if self._model_stays is None or not self._is_inside:
            self._model_stays = tuple(storages_of(model))
        return self._model_stays

    def _begin(self) -> None:
        self._is_inside, self._model_stays = True, None
        self._forget()

    def _end(self) -> None:
        self._is_inside, self._model_stays = False, None
        self._raise_if_waiting()

    def _forget(self) -> None:
        """What is left of a forward pass that ended with an exception, is nobody's any more."""
        if self._waiting is not None:
            self._waiting.forget()
            self._waiting = None

    def _raise_if_waiting(self) -> None:
        if self._waiting is not None:
            waiting = self._waiting
            self._forget()
            raise ConfigError(
                "not all blocks that are computed again together were called, one after another, "
                f"after the first of them ({type(waiting.blocks[0]).__name__}): choose a policy "
                "that takes them one by one"
            )


class _Tell:
    """A hook that calls something without arguments; a copy of the model's does nothing."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __call__(self, *_: Any) -> None:
        self._call()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Tell, (_nothing,)


def _nothing() -> None:
    pass


class _Together:
    """Blocks of one step of the plan."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        step: Step,
        ways: Mapping[str, MakeContexts],
        store: Store | None,
        stays: Callable[[], Sequence[int]],
    ) -> None:
        self.blocks = blocks
        self.step = step
        self.keeps_all = step == Keep()
        self.running = False  # a block's call is one of ours, not the model's
        self.ways = ways
        self.store = store
        self.stays = stays
        self._pass: _Pass | None = None
        self._output: Any = None
        self._handed: list[Any] = []  # what the calls of the others return

    def run(self, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run all of them, when the first is called."""
        one = _Pass(self, forward, args[1:], kwargs)
        output = one.steps((self.step,), 0, None, args[0])
        if one.noted is not None:
            self._output, self._handed, one.noted = output, one.noted, None
            self._pass = one
            if any(map(has_hooks, self.blocks)):
                raise self._error(
                    "one of them has hooks (as fully_shard's), which would see other calls"
                )
            return self._handed[0]
        return output

    def hand_on(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block has already run, on what it seems to be given."""
        fits = self._pass is not None and self._pass.was_given(args[1:], kwargs)
        if not (fits and args[0] is first_tensor(self._handed[place - 1])):
            raise self._error(
                f"number {place}, a {type(self.blocks[place]).__name__}, was not called with what "
                "the one before it returned, and the same other arguments"
            )
        if place < len(self.blocks) - 1:
            return self._handed[place]
        output = self._output
        self.forget()
        return output

    def stands_for(self, place: int, output: Any) -> Any:
        """What is returned in the place of a block's output."""
        kind = type(self.blocks[place]).__name__
        if isinstance(output, tuple) and len(output) > 1:
            raise self._error(f"number {place}, a {kind}, returns {len(output)} things, not one")
        told = self._told(
            f"what number {place}, a {kind}, returns is used for something else than the next block"
        )
        placeholder = Placeholder(first_tensor(output), told)
        return (placeholder,) if isinstance(output, tuple) else placeholder

    def forget(self) -> None:
        """No more of its blocks will be called in this pass."""
        self._pass = self._output = None
        self._handed = []

    def _told(self, why: str) -> str:
        return (
            f"{len(self.blocks)} blocks are to be computed again together, but {why}: choose a "
            "policy that takes them one by one (full, selective)"
        )

    def _error(self, why: str) -> ConfigError:
        self.forget()
        return ConfigError(self._told(why))


class _Pass:
    """One forward pass of them, and what it takes to make it again."""

    def __init__(
        self,
        together: _Together,
        first_forward: Call,
        others: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._together = together
        self._first_forward = first_forward
        self._others = others
        self._kwargs = kwargs
        self._tensors = [t for t in tree_leaves((others, kwargs)) if isinstance(t, Tensor)]
        self._versions = [t._version for t in self._tensors]
        self.noted: list[Any] | None = [] if len(together.blocks) > 1 else None

    def was_given(self, others: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether these are the arguments that the blocks were given beside the first."""
        return (
            same_arguments((self._others, self._kwargs), (others, kwargs)) and self._is_unchanged()
        )

    def _is_unchanged(self) -> bool:
        return self._versions == [t._version for t in self._tensors]

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
        if step == Keep():
            return self._block(first, x)
        if isinstance(step, Keep) and step.way == ELSEWHERE:
            assert inside is None
            assert self._together.store is not None
            own = storages_of(blocks[0]) | storages(self._tensors)
            with Offload.of_block(self._together.store, own.union(self._together.stays()), x):
                return self._block(first, x)
        is_kept = inside is None or inside.again  # if not, all of this runs again, and keeps then
        run: Callable[[Tensor], Any]
        if isinstance(step, Keep):
            rerun = Rerun(blocks, self._together.ways[step.way] if is_kept else None)
            run = partial(self._block, first)
        else:
            rerun = Rerun(blocks)
            run = partial(self.steps, step.plan, first, rerun)
        store = self._together.store if step.offload and is_kept else None
        with nullcontext() if store is None else Offload(store):
            return checkpoint(run, x, use_reentrant=False, context_fn=rerun.contexts)

    def _block(self, place: int, x: Tensor) -> Any:
        if not self._is_unchanged():
            raise ConfigError(
                f"an argument of {type(self._together.blocks[place]).__name__} was changed in "
                "place after the block was called, so that it cannot be computed again with it: "
                "give it a tensor of its own"
            )
        together = self._together
        if place == 0:  # its hooks have been called by whoever called it
            output = self._first_forward(x, *self._others, **self._kwargs)
        else:
            together.running = True
            try:
                output = together.blocks[place](x, *self._others, **self._kwargs)
            finally:
                together.running = False
        if self.noted is not None:  # it is the first time that they run
            self.noted.append(together.stands_for(place, output))
        return output
