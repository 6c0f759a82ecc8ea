"""A copy of a run's state in memory, to go back to."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from scaledtrain.copies import Copies, copied
from scaledtrain.seeding import generator_states, set_generator_states

if TYPE_CHECKING:
    from scaledtrain.trainer import Trainer

__all__ = ["Snapshot"]


class Snapshot:
    """All of a rank's state but its place in the data, and what callbacks have of their own.

    It is on the host. Ranks take and restore theirs together.

    Args:
        trainer: between two steps.

    Attributes:
        step: at which it was taken.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._copies = Copies()
        self.take()

    def take(self) -> None:
        """Take one, in place of the last."""
        trainer = self._trainer
        self.step = trainer.step_count
        with self._copies:
            self._model = copied(trainer.layout.state_dict())
            self._strategy = trainer.strategy.state_dict()
        self._scaler = trainer.scaler.state_dict()
        self._generators = generator_states()

    def restore(self) -> None:
        """Go back there; what was recorded since is of a way that the run has left."""
        trainer = self._trainer
        left = trainer.step_count
        trainer.strategy.state_dict()  # waits for reductions that are under way
        trainer.layout.load_state_dict(self._model)
        trainer.strategy.load_state_dict(copy.deepcopy(self._strategy))
        trainer.scaler.load_state_dict(self._scaler)
        set_generator_states(self._generators)
        trainer.layout.refresh()
        trainer.metrics.went_back(left, self.step)
