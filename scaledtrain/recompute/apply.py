"""Activation checkpointing for a model in any training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.apart import Sample, computes, loss_without_gradients
from scaledtrain.recompute.blocks import Compiled, find_blocks, is_compiled, named_blocks
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.policies import CheckpointPolicy

__all__ = ["checkpoint_activations", "tried"]


def checkpoint_activations(
    model: nn.Module,
    policy: CheckpointPolicy,
    sample: Sample | None = None,
    *,
    compile: str | None = None,
    stand_in: nn.Module | None = None,
) -> Executor:
    """Let a model compute activations again instead of keeping them, in any training loop.

    Args:
        model: that has a chain of blocks: an ``nn.Sequential``, or an ``nn.ModuleList`` whose
            modules it calls one after another, each with the output of the one before as its first
            argument.
        policy: what is kept, and of which blocks.
        sample: called with what runs the model's ``forward``, returns the loss of a microbatch, as
            large as any. `MemoryBudget` needs it; with it, every policy is tried out.
        compile: backend for ``torch.compile`` (``"inductor"``), with which each block is compiled;
            what is not in a block is not. None: nothing is. Policies are tried out, and a budget's
            bytes are counted, as if nothing were.
        stand_in: a model with the same blocks, on which everything is measured and tried out where
            the model itself cannot be run alone (a sharded one). None: it can.

    Returns:
        A handle; its ``remove()`` undoes it.

    Raises:
        ConfigError: no blocks are found, or the loss of the sample is another one when blocks run
            again; see the policies, too.

    Example:
        >>> import torch
        >>> from scaledtrain.recompute import MemoryBudget
        >>> from scaledtrain.recompute.apart import peak_bytes
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(16)))
        >>> x = torch.randn(256, 64)
        >>> handle = checkpoint_activations(
        ...     model, MemoryBudget("900KiB"), lambda called: called(x).square().mean()
        ... )
        >>> peak_bytes(model, lambda called: called(x).square().mean()) <= 900 * 1024
        True
        >>> handle.remove()
    """
    names = policy.blocks
    chain = find_blocks(model) if names is None else named_blocks(model, names)
    compiled = None if compile is None else Compiled(chain, compile)
    try:
        if stand_in is None:
            with _as_written(chain):
                executor = tried(lambda: policy.install(model, chain, sample), model, sample)
        else:
            on_stand_in = checkpoint_activations(stand_in, policy, sample, compile=compile)
            on_stand_in.remove()
            executor = on_stand_in.on(model, chain)
    except BaseException:
        if compiled is not None:
            compiled.remove()
        raise
    if compiled is not None:
        executor.when_removed(compiled.remove)
    return executor


def _as_written(blocks: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    """Inside, compiled blocks run as if they were not.

    What is first called inside a mode that sees operators, as the one that counts bytes, torch
    would not compile later on either.
    """
    if not any(map(is_compiled, blocks)):
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def tried(install: Callable[[], Executor], model: nn.Module, sample: Sample | None) -> Executor:
    """What lets a model's blocks run, if with it the loss stays; see `checkpoint_activations`."""
    if sample is None:
        return install()
    expected = loss_without_gradients(model, sample)
    executor = install()
    try:
        if not computes(model, sample, expected):
            raise ConfigError(
                f"with activations that are computed again the model's loss is not {expected:g} "
                "any more. Either it does something between two blocks that the second one depends "
                "on: choose a policy that takes blocks one by one (full, selective). Or it does "
                "not compute the same each time: only torch's default generators are rewound"
            )
    except BaseException:
        executor.remove()
        raise
    return executor
