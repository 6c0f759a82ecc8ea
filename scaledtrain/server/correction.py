"""What a staleness correction is: a rule for gradients that arrive late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from scaledtrain.errors import ConfigError

__all__ = [
    "Arrival",
    "Context",
    "Corrected",
    "Correction",
    "Uncorrected",
]


class Arrival(NamedTuple):
    """A gradient that was accepted."""

    worker: int
    gradient: Sequence[Tensor]
    """Of the parameters' shapes and dtypes, on their devices; not to be written to."""
    staleness: int
    sent: Sequence[Tensor]
    """The parameters that it was computed with, if the correction ``needs_sent``; else empty."""


class Corrected(NamedTuple):
    """What is made of it."""

    gradient: Sequence[Tensor]
    """The same, or new tensors."""
    scale: float = 1.0
    """Factor on the learning rate, > 0.

    In an update of several gradients g_i their weights in the mean are s_i / sum_j s_j and the
    factor is the mean of the s_i; under SGD that is (1/c) sum_i s_i g_i. The learning rate is
    scaled and not the gradient, for three reasons: the papers define it so; an optimizer that
    normalises its gradients (Adam) would undo a factor on them; and no tensor is read once more.
    A momentum buffer, then, takes in the gradient unscaled.
    """


@dataclass
class Context:
    """The server as a correction sees it, and the tensors that the correction keeps there."""

    parameters: Sequence[nn.Parameter]
    """Of the server, as they are now."""
    optimizer: Optimizer
    """That updates them."""
    n_members: int
    """Workers taking part."""
    gradients_per_update: int
    """Of which an update takes the mean."""
    shared: dict[str, list[Tensor]] = field(default_factory=dict)
    """By name, one tensor for each parameter; saved with the server."""
    of_worker: dict[int, list[Tensor]] = field(default_factory=dict)
    """By worker, one tensor for each parameter; saved with the server."""
    numbers: dict[str, list[float]] = field(default_factory=dict)
    """By name, one number for each parameter; saved with the server."""

    def option(self, name: str, default: float = 0.0) -> list[float]:
        """For each parameter its value of an optimizer's option (``"lr"``), as a number."""
        groups = self.optimizer.param_groups
        values = {id(p): group.get(name, default) for group in groups for p in group["params"]}
        return [float(values.get(id(p), default)) for p in self.parameters]

    def state_dict(self) -> dict[str, Any]:
        """A copy of what is kept."""
        return {
            "shared": {name: [t.clone() for t in kept] for name, kept in self.shared.items()},
            "of_worker": {w: [t.clone() for t in kept] for w, kept in self.of_worker.items()},
            "numbers": {name: list(kept) for name, kept in self.numbers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ConfigError: another correction kept it.
        """
        for kind, kept in (("shared", self.shared), ("numbers", self.numbers)):
            if state[kind].keys() != kept.keys():
                raise ConfigError(
                    f"the saved server's correction kept {sorted(state[kind])}, this one's keeps "
                    f"{sorted(kept)}; go on with the correction that it was saved with"
                )
        self.shared = {name: self._here(kept) for name, kept in state["shared"].items()}
        self.of_worker = {worker: self._here(kept) for worker, kept in state["of_worker"].items()}
        self.numbers = {name: list(kept) for name, kept in state["numbers"].items()}

    def _here(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(tensors, self.parameters, strict=True)
        return [t.to(p.device, copy=True) for t, p in pairs]


class Correction:
    """The moments at which a correction may act; each does nothing unless it is overridden.

    A correction is a frozen dataclass; what it has to remember it keeps in the `Context`.

    Example:
        The learning rate falls with the square root of the staleness:

        >>> @dataclass(frozen=True)
        ... class SquareRoot(Correction):
        ...     def correct(self, arrival: Arrival, server: Context) -> Corrected:
        ...         return Corrected(arrival.gradient, (1 + arrival.staleness) ** -0.5)
    """

    needs_sent: ClassVar[bool] = False
    """Whether the server has to remember what each worker was sent."""

    def start(self, server: Context) -> None:
        """The server was made.

        Raises:
            ConfigError: the optimizer does not fit the correction.
        """

    def correct(self, arrival: Arrival, server: Context) -> Corrected:
        """What becomes of a gradient that was accepted."""
        return Corrected(arrival.gradient)

    def before_update(self, server: Context) -> None:
        """The optimizer is about to step, from the parameters' ``.grad``."""

    def after_update(self, server: Context) -> None:
        """The optimizer, and its schedule, have stepped."""

    def outgoing(self, server: Context) -> Sequence[Tensor]:
        """What a worker that pulls is sent; valid until the next push."""
        return server.parameters

    def forget(self, worker: int, server: Context) -> None:
        """The worker is lost; nothing is forgotten of one that has only ended a run."""


@dataclass(frozen=True)
class Uncorrected(Correction):
    """Stale gradients are used as if they were fresh."""
