"""Measures what steps take the replicas, and lets them agree on their shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from scaledtrain.balance.agree import Agree
from scaledtrain.balance.policies import Balance
from scaledtrain.balance.shares import Cost, apportion, step_seconds
from scaledtrain.timeline import Timeline

__all__ = ["Balancer"]

_MAX_SHOWN = 16  # replicas that a line of the log lists


class Balancer:
    """The shares of a run, by replica, and what was measured since they were last decided on.

    Args:
        balance: what decides.
        replicas: how many there are.
        timeline: of this rank.
        device: on which it computes.
        agree: tells all replicas' costs, in a call that all make at the same steps; None: there is
            nothing to be decided later.
        say: shows a line to people.

    Attributes:
        shares: samples of each replica, of a full step of ``sum(shares)``; None before the first.
        decisions: how often they have changed.
    """

    def __init__(
        self,
        balance: Balance,
        replicas: int,
        timeline: Timeline,
        device: torch.device,
        agree: Agree | None,
        say: Callable[[str], None],
    ) -> None:
        self.balance = balance
        self.replicas = replicas
        self.shares: list[int] | None = None
        self.decisions = 0
        self._say = say
        self._timeline = timeline
        self._device = device
        self._agree = agree
        self._round = 0
        self._multiple = 1  # of the usual step, that the shares are for
        self._computing: list[float] = []  # seconds per sample of each measured step
        self._other: list[float] = []  # and its seconds beside
        self._handed_out = 0
        self._lately = (0.0, 0.0)  # of the step under way: seconds of its passes, and samples
        self._began = (0.0, 0.0)

    def start(self) -> None:
        """A run begins, or goes on; called before the replicas wait for each other."""
        if self._agree is not None:
            self._agree.start()
        self._began = self._marks()

    def begin(self, total: int, multiple: int = 1) -> Sequence[int]:
        """The shares, of steps of so many samples, which are ``multiple`` usual steps in one."""
        if self.shares is None:
            self.shares = self.balance.first(self.replicas, total)
        elif multiple != self._multiple:
            grown = sum(self.shares) * multiple // self._multiple
            self.shares = apportion(self.shares, grown)
        self._multiple = multiple
        return self.shares

    @property
    def _every(self) -> int | None:
        return self.balance.every if self._agree is not None else None

    def measures(self, step: int) -> bool:
        """Whether what this step takes is to be known."""
        every = self._every
        return every is not None and step % every >= every - self.balance.measured

    def handed_out(self, samples: int) -> None:
        """This rank's step that comes next has so many."""
        self._handed_out = samples

    def computed(self, step: int, start: float, waited: float, share: float) -> None:
        """The passes of a step are done.

        Args:
            step: which.
            start: when they began.
            waited: ``Timeline.waited`` at that time.
            share: of the step's samples, that they were made with.
        """
        if self.measures(step):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            now, waited_now = self._marks()
            self._lately = (max(0.0, now - start - (waited_now - waited)), share * self._handed_out)

    def step_ended(self, step: int) -> None:
        """All that belongs to a step is done; ``step``: updates so far, the same everywhere."""
        began, self._began = self._began, self._marks()
        (seconds, samples), self._lately = self._lately, (0.0, 0.0)
        if samples:
            now, waited = self._began
            busy = now - began[0] - (waited - began[1])
            self._computing.append(seconds / samples)
            self._other.append(max(0.0, busy - seconds))
        every = self._every
        if every is not None and step // every > self._round and self.shares is not None:
            self._round = step // every
            self._decide(step)
            self._began = self._marks()

    def _decide(self, step: int) -> None:
        assert self._agree is not None
        assert self.shares is not None
        mine = Cost(median(self._other), median(self._computing)) if self._computing else None
        self._computing, self._other = [], []
        costs = self._agree(self._round, mine)
        if costs is None:
            return
        before = self.shares
        self.shares = self.balance.next(before, costs)
        if self.shares != before:
            self.decisions += 1
            self._say(
                f"step {step}: samples of the replicas are now {_shown(self.shares)}; a step takes "
                f"{step_seconds(costs, self.shares):.4g} s instead of "
                f"{step_seconds(costs, before):.4g} s by what was measured"
            )

    def _marks(self) -> tuple[float, float]:
        return self._timeline.now(), self._timeline.waited

    def end(self) -> None:
        """This rank makes no further step: nobody is to wait for what it would say."""
        if self._agree is not None:
            self._agree.end()

    def state_dict(self) -> dict[str, Any]:
        """Shares, and what has been measured for the next decision."""
        return {
            "shares": self.shares,
            "decisions": self.decisions,
            "round": self._round,
            "multiple": self._multiple,
            "computing": list(self._computing),
            "other": list(self._other),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; with another number of replicas, from even shares."""
        if state["shares"] is not None and len(state["shares"]) != self.replicas:
            return
        self.shares, self.decisions = state["shares"], state["decisions"]
        self._round, self._multiple = state["round"], state["multiple"]
        self._computing, self._other = list(state["computing"]), list(state["other"])


def _shown(shares: Sequence[int]) -> str:
    more = ", ..." if len(shares) > _MAX_SHOWN else ""
    return ", ".join(map(str, shares[:_MAX_SHOWN])) + more
