"""What a replay tells: of each push, and in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

__all__ = ["Push", "Replayed"]


@dataclass(frozen=True)
class Push:
    """A push that has just happened; its tensors are valid until the callback returns.

    Losses are those on the data that the run is evaluated on; without such data, those of the last
    step's batch of the worker that pushes. They are computed when they are first asked for.
    """

    number: int
    """Of its event, from 1."""
    seconds: float
    """In the run, since its log was begun."""
    worker: int
    """Its rank."""
    step: int
    """Which of the worker's pushes it is, from 1."""
    version: int
    """At which the gradient was computed."""
    staleness: int
    """Updates that had been made since."""
    accepted: bool
    """Whether the server used it."""
    gradient: Sequence[Tensor]
    """As the server received it."""
    before: Sequence[Tensor]
    """The server's parameters before it."""
    after: Sequence[Tensor]
    """... and after it."""
    loss: Callable[[Sequence[Tensor]], float]
    """Of a model with these parameters."""

    @cached_property
    def gradient_norm(self) -> float:
        """2-norm of the gradient."""
        return _norm(self.gradient)

    @cached_property
    def update_norm(self) -> float:
        """2-norm of what the parameters were changed by."""
        pairs = zip(self.after, self.before, strict=True)
        return _norm([after - before for after, before in pairs])

    @cached_property
    def loss_before(self) -> float:
        """Without this push."""
        return self.loss(self.before)

    @cached_property
    def loss_after(self) -> float:
        """With it."""
        return self.loss_before if self.update_norm == 0.0 else self.loss(self.after)


@dataclass(frozen=True)
class Replayed:
    """What a replay came to."""

    parameters: Mapping[str, Tensor]
    """The server's, by name, after the last event that was replayed."""
    workers: int
    """Ranks that took part."""
    events: int
    """That were replayed."""
    pushes: int
    """Among them."""
    accepted: int
    """Among these."""
    sha256: str | None
    """Of rank 0's parameters at the end, as `Replica.sha256`; None: the replay, or the run, ended
    before."""
    recorded_sha256: str | None
    """The same of the run; None: it did not come to its end."""
    notes: Sequence[str]
    """Why bits might differ."""

    @property
    def equal(self) -> bool | None:
        """Whether the parameters are those of the run, bit for bit; None: nothing to compare."""
        if self.sha256 is None or self.recorded_sha256 is None:
            return None
        return self.sha256 == self.recorded_sha256


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(nn.utils.get_total_norm(list(tensors)))
