"""What the strategies have in common whose replicas count their own steps, and wait for nobody."""

from __future__ import annotations

from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.protocols import Group
from scaledtrain.strategies.strategy import Strategy

__all__ = ["Alone"]

_ALONE = LocalGroup()


class Alone(Strategy):
    """Replicas with an optimizer of their own, in step with no other.

    ``step`` and ``max_steps`` count this replica's own steps, also those without an update.
    """

    settles_to_save = True

    @property
    def gradients_per_step(self) -> int:
        """One of every replica, if all are equally fast."""
        return self._group.size

    @property
    def lockstep(self) -> Group:
        """This replica alone."""
        return _ALONE

    def skip_update(self) -> None:
        """Let the schedule go on, as the other replicas' do."""
        self._updater.skip()
