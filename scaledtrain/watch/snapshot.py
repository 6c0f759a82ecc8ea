"""A copy of a run's state in memory, to go back to."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from scaledtrain.seeding import generator_states, set_generator_states

if TYPE_CHECKING:
    from scaledtrain.trainer import Trainer

__all__ = ["Snapshot"]


class Snapshot:
    """All of a rank's state but its place in the data; ranks take and restore theirs together.

    Args:
        trainer: between two steps.

    Attributes:
        step: at which it was taken.
    """

    def __init__(self, trainer: Trainer) -> None:
        trainer.layout.refresh()
        self._trainer = trainer
        self.step = trainer.step_count
        self._model = copy.deepcopy(trainer.model.state_dict())
        self._strategy = copy.deepcopy(trainer.strategy.state_dict())
        self._scaler = trainer.scaler.state_dict()
        self._generators = generator_states()

    def restore(self) -> None:
        """Go back there; what was recorded since is of a way that the run has left."""
        trainer = self._trainer
        trainer.strategy.state_dict()  # waits for reductions that are under way
        trainer.model.load_state_dict(self._model)
        trainer.strategy.load_state_dict(copy.deepcopy(self._strategy))
        trainer.scaler.load_state_dict(self._scaler)
        set_generator_states(self._generators)
        trainer.layout.refresh()
        trainer.metrics.forget_after(self.step)
