"""Admission policies: three questions that make one asynchronous algorithm differ from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Admission", "Asynchronous", "ServerView"]


class ServerView(Protocol):
    """What a policy may know of the server."""

    @property
    def version(self) -> int:
        """Updates made."""

    @property
    def n_workers(self) -> int:
        """Workers taking part."""

    @property
    def clocks(self) -> list[int]:
        """For each worker, the gradients it has pushed."""

    @property
    def pulled(self) -> list[int]:
        """For each worker, the version it pulled last; -1 before its first pull."""


class Admission(Protocol):
    """Decides what happens to gradients and workers; a frozen dataclass of a few lines."""

    def accepts(self, staleness: int) -> bool:
        """Whether a gradient of this staleness is used."""

    def gradients_per_update(self, n_workers: int) -> int:
        """How many accepted gradients make one update, with their mean."""

    def releases(self, worker: int, server: ServerView) -> bool:
        """Whether this worker may pull and go on now, or must wait for other workers' pushes."""


@dataclass(frozen=True)
class Asynchronous:
    r"""Asynchronous SGD: every gradient is an update at once, and nobody waits.

    x_{k+1} = x_k - eta g(x_{k - tau}). Among n workers the mean staleness tau is n - 1, whatever their
    speeds: between two pushes of one worker lie all pushes of the others.

    Sent: one gradient and one set of parameters per step and worker. A crashed worker loses the
    gradient it was computing and delays nobody.

    References:
        Dean et al. 2012, Large Scale Distributed Deep Networks (Downpour SGD).
    """

    def accepts(self, staleness: int) -> bool:
        """Always."""
        return True

    def gradients_per_update(self, n_workers: int) -> int:
        """One."""
        return 1

    def releases(self, worker: int, server: ServerView) -> bool:
        """Always."""
        return True
