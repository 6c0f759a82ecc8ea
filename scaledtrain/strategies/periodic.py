"""What the strategies have in common whose replicas train alone and become equal now and then."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scaledtrain.comm.protocols import Group, Handle, Link
from scaledtrain.copies import copied
from scaledtrain.errors import ConfigError
from scaledtrain.replica import Replica
from scaledtrain.strategies.strategy import Strategy

__all__ = ["Fragment", "Periodic"]

_logger = logging.getLogger(__name__)


class Fragment:
    """Parameters that become equal together, and what this replica did since they last were.

    Args:
        parameters: of this replica.
        anchored: keep a copy of their values at the start of the period.

    Attributes:
        anchor: that copy; empty if it is not kept.
        steps: of this replica in the period.
        apart: whether the replicas' values may differ.
    """

    def __init__(self, parameters: Sequence[Tensor], anchored: bool = False) -> None:
        self.parameters = list(parameters)
        self.anchor = [p.detach().clone() for p in parameters] if anchored else []
        self.apart = False
        self.restart()

    @property
    def weight(self) -> float:
        """Of this replica in a mean: of its steps' weights; exactly 1 if all of them were full."""
        return self._total / self.steps if self.steps else 1.0

    def count(self, weight: float) -> None:
        """Take note of a step, skipped or not, with its weight."""
        self.steps += 1
        self._total += weight
        self.apart = True

    def reduce(self, group: Group, tensors: Sequence[Tensor]) -> Handle:
        """Begin to replace tensors by their means, weighted by the samples of the period."""
        return group.all_reduce(tensors, "mean", self.weight)

    def restart(self) -> None:
        """Count from here."""
        self.steps = 0
        self._total = 0.0

    @torch.no_grad()
    def begin(self) -> None:
        """The replicas are equal now: a period begins with these values."""
        self.restart()
        self.apart = False
        if self.anchor:
            torch._foreach_copy_(self.anchor, self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """A copy of anchor and counts."""
        return {
            "steps": self.steps,
            "total": self._total,
            "apart": self.apart,
            "anchor": copied(self.anchor),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.steps, self._total, self.apart = state["steps"], state["total"], state["apart"]
        for anchor, value in zip(self.anchor, state["anchor"], strict=True):
            anchor.copy_(value)


class Periodic(Strategy):
    """Replicas with an optimizer of their own that become equal every ``sync_every`` steps.

    Clocks count steps, not updates, so that replicas of which one skipped an update still meet.
    The state of the optimizers stays local. A period that the run's end leaves unfinished, or into
    which an evaluation falls, ends with the mean of the parameters over the replicas, weighted by
    their samples in it; for the evaluation every replica then takes its own back.

    A subclass says in ``_synchronise_if_due`` what happens, and where it needs more than one
    fragment without an anchor, in ``_divide`` of what the replicas' parameters consist.

    Args:
        sync_every: steps of a period; it ends after the steps H, 2 H, 3 H, ...

    Raises:
        ConfigError: ``sync_every`` is less than 1.
    """

    def __init__(self, sync_every: int) -> None:
        if sync_every < 1:
            raise ConfigError(
                f"sync_every is {sync_every}; it is the steps that a replica makes alone, >= 1 "
                "(1: the replicas meet after every step)"
            )
        super().__init__()
        self.sync_every = sync_every
        self._weight = 1.0

    def attach(self, replica: Replica, link: Link) -> None:
        """Give every replica rank 0's parameters; the first period begins. Collective; once."""
        super().attach(replica, link)
        self._fragments = self._divide(replica.parameters)

    def _divide(self, parameters: Sequence[nn.Parameter]) -> list[Fragment]:
        return [Fragment(parameters)]

    @abstractmethod
    def _synchronise_if_due(self) -> None:
        """Called at the end of every step, when it has been counted."""

    @property
    def gradients_per_step(self) -> int:
        """One of every replica: all of them move the mean."""
        return self._group.size

    def reduce_gradients(self, weight: float = 1.0) -> None:
        """Take note of the samples; each replica uses its own gradients."""
        self._weight = weight

    def apply_gradients(self) -> None:
        """Update this replica; an update may also come late, when a period has just ended."""
        super().apply_gradients()
        for fragment in self._fragments:
            fragment.apart = True

    def skip_update(self) -> None:
        """Let the schedule go on, as the other replicas' do."""
        self._updater.skip()

    def after_step(self) -> None:
        """Advance the clocks; at a period's end, meet the other replicas."""
        super().after_step()
        for fragment in self._fragments:
            fragment.count(self._weight)
        self._synchronise_if_due()

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Inside, every replica has the parameters that the run would end with now."""
        apart = [f for f in self._fragments if f.apart and self._group.size > 1]
        own = [[p.detach().clone() for p in f.parameters] for f in apart]
        for fragment in apart:
            fragment.reduce(self._group, fragment.parameters).wait()
        try:
            yield
        finally:
            with torch.no_grad():
                for fragment, values in zip(apart, own, strict=True):
                    torch._foreach_copy_(fragment.parameters, values)

    def settle(self) -> None:
        """End an unfinished period with the mean; buffers are rank 0's."""
        for fragment in self._fragments:
            if fragment.apart:
                fragment.reduce(self._group, fragment.parameters).wait()
                fragment.begin()
        super().settle()

    def state_dict(self) -> dict[str, Any]:
        """Step, optimizer and the period under way; every replica's is its own."""
        fragments = [fragment.state_dict() for fragment in self._fragments]
        return {**super().state_dict(), "fragments": fragments, "sync_every": self.sync_every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned on this rank; after ``attach``."""
        period = state.get("sync_every", self.sync_every)
        if period != self.sync_every and self._group.rank == 0:
            _logger.warning(
                "the run was saved with sync_every=%d; from here on periods have %d steps, and the "
                "one under way ends with the next multiple of that",
                period,
                self.sync_every,
            )
        super().load_state_dict(state)
        for fragment, saved in zip(self._fragments, state["fragments"], strict=True):
            fragment.load_state_dict(saved)
