"""What every strategy is: an answer to the question what replicas tell each other, and when."""

from __future__ import annotations

from typing import Any, Protocol

from scaledtrain.comm.protocols import Group, Link
from scaledtrain.replica import Replica

__all__ = ["Strategy"]


class Strategy(Protocol):
    """Decides what replicas tell each other, at four moments of a step.

    In this order::

        strategy.before_forward()      # may fetch parameters or wait; False: the run is over
        loss.backward()
        strategy.reduce_gradients()    # may combine gradients over replicas
        strategy.apply_gradients()     # make the update, or hand the gradient over
        strategy.after_step()          # always, also when the update was skipped

    A strategy sees local tensors and links, never a loader, a loss, autocast or a device.
    """

    def attach(self, replica: Replica, link: Link) -> None:
        """Make all replicas equal (rank 0's values) and get ready. Collective; once."""

    def start(self, max_steps: int | None) -> None:
        """A run begins that ends when ``step`` reaches ``max_steps``."""

    def before_forward(self) -> bool:
        """Whether to go on with this step."""

    def reduce_gradients(self, weight: float = 1.0) -> None:
        """Combine gradients; ``weight``: this replica's in a mean (samples / nominal samples)."""

    def apply_gradients(self) -> None:
        """Use the gradients."""

    def after_step(self) -> None:
        """Advance the clock."""

    def agree_to_stop(self, vote: bool) -> bool:
        """Whether to stop now; replicas in lockstep ask together and get the same answer."""

    def settle(self) -> None:
        """The run is over: wait for the others, end with the same parameters everywhere."""

    @property
    def step(self) -> int:
        """Updates that the parameters of this replica have received."""

    @property
    def gradients_per_step(self) -> int:
        """How many replicas' gradients make one update."""

    @property
    def learning_rate(self) -> float:
        """Of the next update."""

    @property
    def staleness(self) -> int | None:
        """Of this replica's last gradient that was judged; None where there is no such thing."""

    @property
    def lockstep(self) -> Group:
        """The replicas that are at the same step as this one at any time."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond the model's own state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; after ``attach``."""
