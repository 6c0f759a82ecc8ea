"""How many local steps a replica makes before it gives what it has learned."""

from __future__ import annotations

from typing import Any

__all__ = ["Round"]


class Round:
    """Counts the steps of a round and measures their speed; pure, the clock is the caller's.

    H steps, or with ``proportional`` max(1, floor(H v / v_max)) for a replica of speed v, steps per
    second of its last round, where v_max is the speed of the fastest one.

    Args:
        steps: H.
        proportional: let slower replicas make fewer steps.

    Attributes:
        length: steps in this round.
        made: of them so far.
        seconds: that these took.

    Example:
        >>> round = Round(steps=4, proportional=True)
        >>> for t in (0.0, 1.0, 2.0, 3.0):
        ...     round.begin_step(t)
        ...     round.end_step(t + 0.5)
        >>> round.complete, round.speed
        (True, 2.0)
        >>> round.restart(fastest=5.0)    # 4 * 2 / 5 = 1.6
        >>> round.length
        1
    """

    def __init__(self, steps: int, proportional: bool) -> None:
        self.length = steps
        self.made = 0
        self.seconds = 0.0
        self._steps = steps
        self._proportional = proportional
        self._began = 0.0

    def begin_step(self, now: float) -> None:
        """A step begins; not counted is what lies between two steps: data, evaluation."""
        self._began = now

    def end_step(self, now: float) -> None:
        """It ends."""
        self.seconds += now - self._began
        self.made += 1

    @property
    def complete(self) -> bool:
        """Whether all steps have been made."""
        return self.made >= self.length

    @property
    def speed(self) -> float:
        """Steps per second of this round."""
        return self.made / max(self.seconds, 1e-9)

    def restart(self, fastest: float = 0.0) -> None:
        """The next round begins; ``fastest``: the largest speed of a replica, 0 if not known."""
        if self._proportional and fastest > 0.0:
            share = min(self.speed / fastest, 1.0)
            self.length = max(1, int(self._steps * share))
        self.made, self.seconds = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Where the round is."""
        return {"length": self.length, "made": self.made, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.length, self.made, self.seconds = state["length"], state["made"], state["seconds"]
