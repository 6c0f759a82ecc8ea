"""What every strategy is: an answer to the question what replicas tell each other, and when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from scaledtrain.comm.protocols import Group, Link
from scaledtrain.comm.votes import any_rank
from scaledtrain.optim.scaling import LearningRateScaling
from scaledtrain.replica import Replica

__all__ = ["Strategy"]


class Strategy(ABC):
    """Decides what replicas tell each other, at four moments of a step.

    In this order::

        strategy.before_forward()      # may fetch parameters or wait; False: the run is over
        loss.backward()
        strategy.reduce_gradients()    # may combine gradients over replicas
        strategy.apply_gradients()     # make the update, or hand the gradient over
        strategy.after_step()          # always, also when the update was skipped

    Who leaves an update out calls ``skip_update`` instead of ``apply_gradients``.

    A strategy sees local tensors and links, never a loader, a loss, autocast or a device.

    The members below are those of replicas that make the same steps at the same time, each with an
    optimizer of its own, and that tell each other nothing; a strategy overrides what it does
    otherwise. One that has no optimizer on the replica overrides ``attach``, and all that follows.

    Attributes:
        step: updates that the parameters of this replica have received.
        staleness: of this replica's last gradient that was judged; None where there is no such
            thing.
        may_abandon: whether ``abandons`` is worth asking.
        settles_to_save: ``state_dict`` is exact only when all replicas have settled.
        replicas_equal: parameters and optimizer are the same on all replicas after every step.
        makes_equal_steps: no replica begins a step before all have ended the last one, although
            they are not in lockstep.
        pushes_gradients: a gradient of the whole replica is handed over to somebody else.

    Example:
        Replicas that tell each other nothing:

        >>> from functools import partial
        >>> from scaledtrain import Trainer
        >>> class Silent(Strategy):
        ...     gradients_per_step = 1
        >>> data = [(torch.ones(4, 2), torch.ones(4, 1))] * 10
        >>> trainer = Trainer(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss,
        ...                   partial(torch.optim.SGD, lr=0.1), console=False, strategy=Silent())
        >>> trainer.fit(data, max_steps=2).step
        2
    """

    staleness: int | None = None
    may_abandon = False
    settles_to_save = False
    replicas_equal = False
    makes_equal_steps = False
    pushes_gradients = False

    def __init__(self) -> None:
        self.step = 0
        self._max_steps: int | None = None

    def __str__(self) -> str:
        """What a run is introduced with."""
        return type(self).__name__

    def attach(self, replica: Replica, link: Link) -> None:
        """Give every replica rank 0's parameters and buffers. Collective; once."""
        self._replica = replica
        self._group = link.group
        self._timeline = link.timeline
        self._group.broadcast([*replica.parameters, *replica.frozen, *replica.buffers])
        self._updater = replica.updater()

    def start(self, max_steps: int | None) -> None:
        """A run begins, for all replicas at once, that ends when ``step`` reaches ``max_steps``."""
        self._max_steps = max_steps
        self._group.all_reduce([torch.zeros(1, device=self._replica.device)], "max").wait()

    def before_forward(self, microbatches: int = 1, weight: float = 1.0) -> bool:
        """Whether to go on with this step.

        Args:
            microbatches: how many backward passes will add up in the gradients; 0: not known.
            weight: as ``reduce_gradients`` will be given it, unless computing is cut short.
        """
        return self._max_steps is None or self.step < self._max_steps

    def abandons(self) -> bool:
        """Whether the work under way has become useless; asked while it is being done.

        If so, the step begins anew with ``before_forward``; no other verb is called before.
        """
        return False

    def reduce_gradients(self, weight: float = 1.0) -> None:  # noqa: B027 - nothing is an answer, too
        """Combine gradients.

        Args:
            weight: this replica's in a mean: its samples over those of a full step; 0 if it had
                none.
        """

    def apply_gradients(self) -> None:
        """Let the replica's own optimizer use the gradients."""
        start = self._timeline.now()
        self._updater.step()
        self._timeline.add("compute", start)

    def skip_update(self) -> None:  # noqa: B027 - nothing is an answer, too
        """Leave out an update that gradients came for, but that must not be made of them.

        Where replicas do so together their schedules stay where they are, as if the batch had never
        been; where each does so alone its schedule goes on, so that it is not behind the others'.
        """

    def after_step(self) -> None:
        """Advance the clock."""
        self.step += 1

    def agree_to_stop(self, vote: bool) -> bool:
        """Whether to stop now; replicas in lockstep ask together and get the same answer."""
        return any_rank(self.lockstep, vote, self._replica.device)

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Inside, the replica has the parameters that the run would end with now; to evaluate.

        Replicas in lockstep enter together.
        """
        yield

    def settle(self) -> None:
        """The run is over: wait for the others, end with the same parameters everywhere."""
        self._group.broadcast(self._replica.buffers)

    @property
    @abstractmethod
    def gradients_per_step(self) -> int:
        """How many replicas' gradients make one update."""

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self._updater.learning_rate

    def scale_settings(self, scaling: LearningRateScaling, batch: float) -> None:
        """Bring the optimizer's settings to a batch in each of the next updates.

        Args:
            scaling: of what the optimizer and its schedule have.
            batch: samples in one update.
        """
        self._updater.scale_settings(scaling, batch)

    @property
    def lockstep(self) -> Group:
        """The replicas that are at the same step as this one at any time."""
        return self._group

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the model's own state: here step and optimizer."""
        return {"step": self.step, "updater": self._updater.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; after ``attach``."""
        self.step = state["step"]
        self._updater.load_state_dict(state["updater"])
