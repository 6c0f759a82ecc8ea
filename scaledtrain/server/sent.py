"""What the server remembers of the parameters that it sent out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["Sent"]


class Sent:
    """For each worker the parameters it computes with: one copy per version, shared by its holders.

    A worker holds the version it computes with and at most one that it pulled ahead. n workers cost
    at most as many copies as they hold different versions.
    """

    def __init__(self) -> None:
        self._held: dict[int, list[int]] = {}
        self._copies: dict[int, list[Tensor]] = {}

    def keep(self, worker: int, version: int, parameters: Sequence[Tensor]) -> None:
        """Remember that the worker was sent this version."""
        if version not in self._copies:
            self._copies[version] = [p.detach().clone() for p in parameters]
        self._hold(worker, [*self._held.get(worker, ()), version][-2:])

    def take(self, worker: int, version: int) -> list[Tensor] | None:
        """The parameters of a version whose gradient has come; None if they are not known.

        What it was sent before that is forgotten: nothing more comes of it.
        """
        held = self._held.get(worker, [])
        if version not in held:
            return None
        copy = self._copies[version]
        self._hold(worker, held[held.index(version) + 1 :])  # it may hold the same version twice
        return copy

    def forget(self, worker: int) -> None:
        """Forget all that the worker was sent."""
        self._hold(worker, [])

    def _hold(self, worker: int, versions: list[int]) -> None:
        released = set(self._held.get(worker, ())) - set(versions)
        self._held[worker] = versions
        if released:
            for version in released.difference(*self._held.values()):
                del self._copies[version]

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything."""
        copies = {v: [t.clone() for t in copy] for v, copy in self._copies.items()}
        return {"held": {w: list(v) for w, v in self._held.items()}, "copies": copies}

    def load_state_dict(self, state: dict[str, Any], like: Sequence[Tensor]) -> None:
        """Restore what ``state_dict`` returned, on the devices of ``like``."""
        self._held = {w: list(v) for w, v in state["held"].items()}
        self._copies = {
            version: [t.to(p.device, copy=True) for t, p in zip(copy, like, strict=True)]
            for version, copy in state["copies"].items()
        }
