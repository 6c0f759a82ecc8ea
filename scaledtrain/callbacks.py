"""User code at fixed moments of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scaledtrain.errors import ConfigError

if TYPE_CHECKING:
    from scaledtrain.data.steps import StepBatch
    from scaledtrain.trainer import Trainer

__all__ = ["Callback", "StopAtTarget"]


class Callback:
    """Override what you need; every rank calls its own. ``trainer.stop()`` ends the run.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from scaledtrain import Trainer
        >>> class StopAt(Callback):
        ...     def on_step_end(self, trainer):
        ...         if trainer.step_count == 3:
        ...             trainer.stop()
        >>> data = [(torch.ones(4, 2), torch.ones(4, 1))] * 10
        >>> trainer = Trainer(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss,
        ...                   partial(torch.optim.SGD, lr=0.1), console=False, callbacks=[StopAt()])
        >>> trainer.fit(data, max_epochs=1).step
        3
    """

    def on_fit_start(self, trainer: Trainer) -> None:
        """Called before the first step."""

    def needs_own_gradients(self, trainer: Trainer, batch: StepBatch) -> bool:
        """Whether ``on_gradients`` is to see this replica's own gradients of the step that begins.

        If so, nothing is sent before. Replicas in lockstep have to answer the same.
        """
        return False

    def on_gradients(self, trainer: Trainer) -> None:
        """Called in each step when the gradients are computed, before they are used.

        With `Sync` and overlap most have been sent by then, so that to change them does nothing,
        unless ``needs_own_gradients`` asked for them.
        """

    def on_reduced(self, trainer: Trainer) -> None:
        """Called in each step when the gradients have been combined, before they are clipped."""

    def on_step_end(self, trainer: Trainer) -> None:
        """Called after each step; ``trainer.step_count`` says which."""

    def on_evaluation(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Called after each evaluation, on the ranks that evaluated."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Called after the last step, when all replicas are equal."""

    def close(self) -> None:
        """Called when the Trainer is closed, or left with an exception: let go of the model."""

    def metrics(self) -> Mapping[str, float]:
        """What a record should tell, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, of numbers, texts, tensors, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


class StopAtTarget(Callback):
    """End the run as soon as an evaluated metric is good enough.

    Args:
        metric: its name in the evaluation, e.g. ``"accuracy"`` or ``"loss"``.
        at_least: stop when it is this or more.
        at_most: stop when it is this or less.

    Raises:
        ConfigError: not exactly one bound; or (at the first evaluation) no such metric.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from scaledtrain import Trainer
        >>> data = [(torch.ones(4, 2), torch.ones(4, 1))] * 10
        >>> trainer = Trainer(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss,
        ...                   partial(torch.optim.SGD, lr=0.1), console=False,
        ...                   callbacks=[StopAtTarget("loss", at_most=0.01)])
        >>> trainer.fit(data, max_epochs=9, eval=data, eval_every=1).stopped_by
        'callback'
    """

    def __init__(
        self, metric: str, *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        if (at_least is None) == (at_most is None):
            raise ConfigError("give StopAtTarget one of at_least and at_most")
        self._metric = metric
        self._at_least = at_least
        self._at_most = at_most

    def on_evaluation(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Compare, and stop."""
        if self._metric not in values:
            raise ConfigError(
                f"StopAtTarget watches {self._metric!r}, but the evaluation has: "
                f"{', '.join(values)}"
            )
        value = values[self._metric]
        if (self._at_least is not None and value >= self._at_least) or (
            self._at_most is not None and value <= self._at_most
        ):
            trainer.metrics.say(f"goal reached: {self._metric} is {value:.4f}")
            trainer.stop()
