"""The server without its tensors: who takes part, what each pulled and pushed, who may go on."""

from __future__ import annotations

from collections import Counter
from typing import Any

from scaledtrain.errors import ConfigError
from scaledtrain.server.admission import Admission

__all__ = ["Ledger"]


class Ledger:
    """Counts pulls, pushes and updates, and asks the admission policy what follows from them.

    Every answer is a function of the order of the calls, so that two ledgers that are told the same
    events in the same order always agree.

    Args:
        n_workers: workers, numbered from 0; all of them take part at first.
        admission: the policy.
    """

    def __init__(self, n_workers: int, admission: Admission) -> None:
        if n_workers < 1:
            raise ConfigError(f"n_workers is {n_workers}; a server needs at least one worker")
        self.version = 0
        self.last_version: int | None = None
        self.members = set(range(n_workers))
        self.clocks = [0] * n_workers
        self.pulled = [-1] * n_workers
        self.pushed = [0] * n_workers
        self.accepted = [0] * n_workers
        self.computing: set[int] = set()
        self.pending: dict[int, int] = {}
        self.gathered = 0
        self.slowest = 0
        self._admission = admission
        self._at_clock = Counter(self.clocks)  # how many members are there: the least is at hand

    @property
    def n_workers(self) -> int:
        """Workers that there are numbers for, taking part or not."""
        return len(self.clocks)

    @property
    def finished(self) -> bool:
        """Whether the last update that was allowed has been made."""
        return self.last_version is not None and self.version >= self.last_version

    def may_go_on(self, worker: int) -> bool:
        """Whether this worker may pull and begin its next step now."""
        return self.finished or (worker in self.members and self._admission.releases(worker, self))

    def pull(self, worker: int) -> None:
        """A worker takes the present version and computes with it."""
        if worker not in self.members:
            raise ConfigError(f"worker {worker} pulls but does not take part; add({worker}) first")
        self.pulled[worker] = self.version
        self.computing.add(worker)

    def admits(self, worker: int, staleness: int) -> bool:
        """Whether a gradient of this staleness from this worker would be accepted now."""
        return (
            worker in self.members
            and not self.finished
            and self._admission.accepts(worker, staleness, self)
        )

    def push(self, worker: int, version: int, accepted: bool) -> None:
        """A worker pushed a gradient of this version, and so finished a step."""
        self._check_number(worker)
        self.pushed[worker] += 1
        if accepted:
            self.accepted[worker] += 1
            self.pending[worker] = self.pending.get(worker, 0) + 1
            self.gathered += 1
        if version >= self.pulled[worker]:  # else it has pulled ahead for its next step
            self.computing.discard(worker)
        self._tick(worker)

    def skip(self, worker: int) -> None:
        """A worker finished a step that gave no gradient."""
        self._check_number(worker)
        self.computing.discard(worker)
        self._tick(worker)

    @property
    def completes(self) -> bool:
        """Whether the gradients that wait make an update now."""
        return self.gathered > 0 and not self.finished and self._admission.completes(self)

    def update(self) -> None:
        """The gradients that waited made an update."""
        self.pending.clear()
        self.gathered = 0
        self.version += 1

    def to_abandon(self) -> list[int]:
        """Workers whose present work the policy wants given up."""
        return [
            worker
            for worker in sorted(self.computing)
            if self._admission.abandons(self.version - self.pulled[worker])
        ]

    def remove(self, worker: int) -> None:
        """Nobody waits for this worker any more; the gradients that it gave stay."""
        self._check_number(worker)
        if worker in self.members:
            self.members.remove(worker)
            self.computing.discard(worker)
            self._leave_clock(worker)

    def add(self, worker: int) -> None:
        """This worker takes part from now on, level with the slowest."""
        self.remove(worker)
        self.members.add(worker)
        self.clocks[worker] = self.slowest
        self._at_clock[self.slowest] += 1

    def _tick(self, worker: int) -> None:
        if worker in self.members:
            self._at_clock[self.clocks[worker] + 1] += 1
            self._leave_clock(worker)
        self.clocks[worker] += 1

    def _leave_clock(self, worker: int) -> None:
        clock = self.clocks[worker]
        self._at_clock[clock] -= 1
        if not self._at_clock[clock]:
            del self._at_clock[clock]
            if clock == self.slowest:
                self.slowest = min(self._at_clock, default=clock)

    def _check_number(self, worker: int) -> None:
        if not 0 <= worker < self.n_workers:
            raise ConfigError(
                f"there is no worker {worker}; this server knows workers 0 to {self.n_workers - 1}"
            )

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything but the policy and the limit."""
        return {
            "version": self.version,
            "members": sorted(self.members),
            "clocks": list(self.clocks),
            "pulled": list(self.pulled),
            "pushed": list(self.pushed),
            "accepted": list(self.accepted),
            "computing": sorted(self.computing),
            "pending": dict(self.pending),
            "slowest": self.slowest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, also from another number of workers.

        Workers beyond the saved number take part anew; saved ones beyond this number are gone, but
        not the gradients that they gave.
        """
        n, saved = self.n_workers, len(state["clocks"])
        fresh = max(0, n - saved)
        self.version = state["version"]
        self.slowest = state["slowest"]
        self.clocks = state["clocks"][:n] + [self.slowest] * fresh
        self.pulled = state["pulled"][:n] + [-1] * fresh
        self.pushed = state["pushed"][:n] + [0] * fresh
        self.accepted = state["accepted"][:n] + [0] * fresh
        self.members = {w for w in state["members"] if w < n} | set(range(saved, n))
        self.computing = {w for w in state["computing"] if w < n}
        self.pending = dict(state["pending"])
        self.gathered = sum(self.pending.values())
        self._at_clock = Counter(self.clocks[w] for w in self.members)
        self.slowest = min(self._at_clock, default=self.slowest)
