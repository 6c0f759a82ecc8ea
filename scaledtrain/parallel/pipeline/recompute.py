"""Lets stages compute activations again, as is best for what a schedule keeps alive of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from scaledtrain.memory.fake import bytes_of
from scaledtrain.parallel.pipeline.mailbox import AHEAD
from scaledtrain.parallel.pipeline.parts import spread
from scaledtrain.precision import Precision
from scaledtrain.recompute.apart import Sample
from scaledtrain.recompute.apply import tried
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.policies import CheckpointPolicy, Live
from scaledtrain.schedule import LossFn, call_model

__all__ = ["Called", "StageMemory", "seen_calls"]


class Called(NamedTuple):
    """What a stage was called with, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def seen_calls(stages: Mapping[int, nn.Module], run: Callable[[], object]) -> dict[int, Called]:
    """Of each stage its call in a run of all ranks; modes and random numbers stay as they are.

    Args:
        stages: of this rank, by number.
        run: makes a forward pass through all stages. Collective.
    """
    seen: dict[int, Called] = {}

    def watch(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[number] = Called(args, kwargs, output)

        return hook

    hooks = [s.register_forward_hook(watch(n), with_kwargs=True) for n, s in stages.items()]
    modes = {module: module.training for stage in stages.values() for module in stage.modules()}
    try:
        for module in modes:
            module.training = False
        run()
    finally:
        for module, mode in modes.items():
            module.training = mode
        for registered in hooks:
            registered.remove()
    return seen


class StageMemory:
    """A stage that can be tried out on one rank alone, and what a schedule keeps of it.

    Args:
        number: of the stage.
        n_stages: of all ranks.
        called: with a microbatch as large as any.
        batch: that microbatch.
        loss_fn: see `PipelineSchedule`.
        precision: of the forward passes.
    """

    def __init__(
        self,
        number: int,
        n_stages: int,
        called: Called,
        batch: Any,
        loss_fn: LossFn | None,
        precision: Precision,
    ) -> None:
        self._is_first, self._is_last = number == 0, number == n_stages - 1
        self._called = called
        self._batch, self._loss_fn, self._precision = batch, loss_fn, precision
        # The gradient that comes from the next stage is as large as the output.
        outputs = [] if self._is_last else _floating(spread(called.output))
        self._weights = [torch.ones_like(output) for output in outputs]

    def sample(self, call: Callable[..., Any]) -> Tensor:
        """A number, of which a backward pass through the stage can be made."""
        args, kwargs = self._called.args, self._called.kwargs
        if not self._is_first:
            args = tree_map_only(Tensor, _received, args)
        device = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)).device
        with self._precision.autocast(device):
            output = call(*args, **kwargs)
            if self._is_last:
                return call_model(lambda *_, **__: output, self._batch, self._loss_fn)[1]
        pairs = zip(_floating(spread(output)), self._weights, strict=True)
        return torch.stack([(made * weight).sum().float() for made, weight in pairs]).sum()

    def live(self, microbatches: int, stages_per_rank: int) -> Live:
        """What is alive at once of the stage, and of what it sends and receives.

        What came in waits for the backward pass, what goes out until it is taken; receives are
        posted ahead, of activations and of gradients, and so many gradients may be on their way.

        Args:
            microbatches: between their passes at the same time.
            stages_per_rank: each has an equal part of what the rank has.
        """
        came = 0 if self._is_first else bytes_of(_floating(tree_leaves(self._called.args)))
        goes = bytes_of(self._weights)
        once = AHEAD * (came + goes) + AHEAD * came
        return Live(microbatches, came + goes, once, 1 / stages_per_rank)

    def install(
        self, policy: CheckpointPolicy, stage: nn.Module, blocks: Sequence[nn.Module], live: Live
    ) -> Executor:
        """Let the stage run by that policy.

        Raises:
            ConfigError: it cannot.
        """
        sample: Sample = self.sample
        return tried(lambda: policy.install_on_stage(stage, blocks, sample, live), stage, sample)


def _floating(values: Iterable[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _received(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())
