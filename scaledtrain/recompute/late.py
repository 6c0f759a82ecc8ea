"""Activation checkpointing that is planned when there is a batch to try it out with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scaledtrain.errors import ConfigError
from scaledtrain.schedule import LossFn, call_model

if TYPE_CHECKING:
    from scaledtrain.data.steps import StepBatch
    from scaledtrain.parallel import Layout
    from scaledtrain.precision import Precision
    from scaledtrain.recompute.execute import Executor
    from scaledtrain.recompute.policies import CheckpointPolicy

__all__ = ["LatePlan"]


class LatePlan:
    """Decides once, with the first batch, what a rank's piece of a model keeps.

    Only with a batch it can be seen what activations take, and that the loss stays as it is.

    Args:
        policy: how to decide; None: all activations are kept.
        layout: of the replica.
        precision: in which it computes.
        loss_fn: None: the model computes its own loss.
        compile: backend for ``torch.compile``; None does not compile.
        device: on which it computes.
        say: told what was planned.
    """

    def __init__(
        self,
        policy: CheckpointPolicy | None,
        layout: Layout,
        precision: Precision,
        loss_fn: LossFn | None,
        compile: str | None,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self._unplanned = policy
        self._layout = layout
        self._precision = precision
        self._loss_fn = loss_fn
        self._compile = compile
        self._device = device
        self._say = say
        self._executor: Executor | None = None

    def plan(self, batch: StepBatch) -> None:
        """Plan, unless that has been done. Collective among the ranks of a replica.

        Raises:
            ConfigError: the policy cannot be had, on this rank or on another one.
        """
        policy = self._unplanned
        if policy is None or not batch.microbatches:
            return
        largest = max(range(len(batch.sizes)), key=batch.sizes.__getitem__)

        def sample(called: Callable[..., Any]) -> Tensor:
            with self._precision.autocast(self._device):
                return call_model(called, batch.microbatches[largest], self._loss_fn)[1]

        refused = None
        try:
            self._executor = self._layout.recompute(
                policy, sample, self._compile, batch.microbatches[largest]
            )
        except ConfigError as error:  # another rank may have batches of another shape, and none
            refused = error
        if self._layout.agree(refused is not None):
            raise refused or ConfigError(
                "another rank of this replica cannot run with this activation checkpointing; its "
                "own error says why"
            )
        assert self._executor is not None
        self._unplanned = None
        self._say(self._executor.told)

    def close(self) -> None:
        """The model is the user's again."""
        if self._executor is not None:
            self._executor.remove()
            self._executor = None
