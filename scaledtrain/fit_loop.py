"""The loop over epochs and steps of one fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from scaledtrain.errors import ConfigError

if TYPE_CHECKING:
    from scaledtrain.data.steps import Steps
    from scaledtrain.trainer import Trainer

__all__ = ["FitLoop", "FitResult", "Limits"]


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    step: int
    """Updates made to the parameters since training began."""
    seconds: float
    """Wall time of this fit."""
    stopped_by: str
    """``"max_steps"``, ``"max_epochs"``, ``"max_seconds"``, ``"callback"`` or, when it was not
    this replica's own decision, ``"another replica"``; the same on all ranks of a replica."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """The last evaluation's values, on the ranks that evaluate."""


@dataclass(frozen=True)
class Limits:
    """When a fit ends, and how often it is evaluated; as `Trainer.fit` has them.

    Raises:
        ConfigError: one is not above 0.
    """

    max_steps: int | None = None
    max_epochs: int | None = None
    max_seconds: float | None = None
    eval_every: int | None = None

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if limit is not None and not limit > 0:  # so that NaN is refused, too
                raise ConfigError(f"{name} is {limit}; it is > 0, or None for no such limit")

    @property
    def has_end(self) -> bool:
        """Whether one of them ends the fit."""
        return (self.max_steps, self.max_epochs, self.max_seconds) != (None, None, None)

    def at_most(self, steps: int) -> Limits:
        """The same, but so many steps at most."""
        fewer = steps if self.max_steps is None else min(self.max_steps, steps)
        return replace(self, max_steps=fewer)


class FitLoop:
    """One fit: the loop over epochs and steps, and what ends it.

    Args:
        trainer: makes the steps and evaluations.
        loader: this replica's share of the batches.
        tell: called with the name of a callback's method, and its further arguments.
        limits: of this fit.
        eval_loader: to evaluate on; None: nothing is.
        may_stop: whether this replica, or another in lockstep, may want to end before the limits.
        after_step: called when a step, and what follows it, has been made.
        ready: called when the first batch is about to be read.

    Attributes:
        stopping: a callback wants the run to end.
        evaluation: the last one's values.
    """

    def __init__(
        self,
        trainer: Trainer,
        loader: Steps,
        tell: Callable[..., None],
        limits: Limits,
        *,
        eval_loader: Iterable[Any] | None,
        may_stop: bool,
        after_step: Callable[[], None],
        ready: Callable[[], None],
    ) -> None:
        self.stopping = False
        self._may_stop = may_stop
        self.evaluation: dict[str, float] = {}
        self._trainer = trainer
        self._loader = loader
        self._tell = tell
        self._limits = limits
        self._eval_loader = eval_loader
        self._after_step = after_step
        self._ready: Callable[[], None] | None = ready
        self._evaluated_at = trainer.step_count
        self._steps = 0

    def run(self) -> str:
        """Step until something ends the run; returns what."""
        trainer, timeline = self._trainer, self._trainer.timeline
        enter = trainer.watcher.enter
        trainer.model.train()
        while self._limits.max_epochs is None or trainer.epoch < self._limits.max_epochs:
            enter("data")
            start = timeline.now()
            ready, self._ready = self._ready, None
            rest = self._loader.epoch(trainer.epoch, trainer.steps_in_epoch, ready)
            with closing(rest) as steps:
                for batch in steps:
                    timeline.add("data", start)
                    if not trainer.step(batch):
                        return self._ended_by_strategy()
                    trainer.steps_in_epoch += batch.multiple
                    self._steps += 1
                    if trainer.step_count < self._evaluated_at:  # it went back
                        self._evaluated_at, self.evaluation = trainer.step_count - 1, {}
                    self._tell("on_step_end")
                    evaluated = self._evaluation_is_due() and self._evaluate()
                    enter("save")
                    self._after_step()
                    if reason := self._reason_to_stop(evaluated):
                        return reason
                    enter("data")
                    start = timeline.now()
            trainer.epoch += 1
            trained, trainer.steps_in_epoch = trainer.steps_in_epoch > 0, 0
            if trained and self._limits.eval_every is None and self._eval_loader is not None:
                evaluated = self._evaluate()
                if reason := self._reason_to_stop(evaluated):
                    return reason
        return "max_epochs"

    def evaluate_at_end(self) -> None:
        """Evaluate the final parameters, unless that has just been done."""
        trainer = self._trainer
        if self._eval_loader is None:
            return
        # Where each makes its own steps, the others' may have come since, up to the end.
        own_steps = self._steps > 0 and not trainer.in_lockstep
        # And a run that was stopped when it had made its last step has not been evaluated.
        if own_steps or trainer.step_count > self._evaluated_at or not self.evaluation:
            self._evaluate()

    def _ended_by_strategy(self) -> str:
        reached = (
            self._limits.max_steps is not None
            and self._trainer.step_count >= self._limits.max_steps
        )
        return "max_steps" if reached else "another replica"

    def _evaluation_is_due(self) -> bool:
        """Whether a multiple of ``eval_every`` has been reached or passed since the last one."""
        every = self._limits.eval_every
        if every is None or self._eval_loader is None:
            return False
        return self._trainer.step_count // every > self._evaluated_at // every

    def _evaluate(self) -> bool:
        """Evaluate, if this rank is one that does; returns whether it did."""
        trainer = self._trainer
        self._evaluated_at = trainer.step_count
        evaluates = trainer.in_lockstep or trainer.layout.link.group.rank == 0
        if self._eval_loader is None or not evaluates:
            return False
        self.evaluation = trainer.evaluate(self._eval_loader)
        trainer.metrics.evaluated(trainer.step_count, self.evaluation)
        self._tell("on_evaluation", self.evaluation)
        return True

    def _reason_to_stop(self, evaluated: bool) -> str | None:
        """Why to stop now, if the replicas in lockstep agree.

        A replica alone, on one rank, stops as soon as it wants to. Several, and ranks that have
        pieces of one, ask each other at moments that all reach at the same step: after an
        evaluation and every ``log_every`` steps.
        """
        trainer = self._trainer
        late = (
            self._limits.max_seconds is not None
            and trainer.metrics.seconds >= self._limits.max_seconds
        )
        stopping = self.stopping
        if trainer.strategy.lockstep.size == 1 and trainer.layout.pieces.size == 1:
            ask = stopping or late
        else:
            ask = self._may_stop and (evaluated or self._steps % trainer.metrics.log_every == 0)
            if ask:
                stopping, late = trainer.layout.agree(stopping), trainer.layout.agree(late)
        if not ask or not trainer.strategy.agree_to_stop(stopping or late):
            return None
        if stopping:
            return "callback"
        return "max_seconds" if late else "another replica"
