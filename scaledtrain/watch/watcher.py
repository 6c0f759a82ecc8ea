"""What a Trainer asks and tells about being watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from scaledtrain.watch.judge import Judge
from scaledtrain.watch.messenger import Messenger
from scaledtrain.watch.paces import Paces, Table, logger
from scaledtrain.watch.policy import Watch
from scaledtrain.watch.position import Position, Stage
from scaledtrain.watch.watchdog import Watchdog, round_seconds

if TYPE_CHECKING:
    from scaledtrain.checkpoint.saver import Saver
    from scaledtrain.data.steps import StepBatch, Steps
    from scaledtrain.schedule import Computed, LossFn
    from scaledtrain.trainer import Trainer

__all__ = ["Watcher"]


class Watcher:
    """Follows the steps of one rank, and whatever watches them.

    Args:
        options: what for; None: nothing.
        trainer: with all its parts.
        loss_fn: as the Trainer has it.
        run_dir: of the run.
        saver: of the run, told where it goes back.

    Attributes:
        enter: the rank comes to a stage of its step; see `Position`.
        needs_norm: whether `is_in_order` is to be given the gradient's norm.
    """

    def __init__(
        self,
        options: Watch | None,
        trainer: Trainer,
        loss_fn: LossFn | None,
        run_dir: str | Path | None,
        saver: Saver | None = None,
    ) -> None:
        self._options = options or Watch()
        self._trainer = trainer
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._position = Position(lambda: (trainer.step_count, trainer.epoch))
        self.enter: Callable[[Stage], None] = self._position.enter
        self.needs_norm = self._options.judges
        self._judge: Judge | None = None
        if self._options.judges:
            self._judge = Judge(self._options, trainer, loss_fn, self._run_dir, saver)
        self._paces: Paces | None = None

    @contextmanager
    def watching(self, loader: Steps) -> Iterator[None]:
        """Inside, a fit is made, on these batches."""
        trainer, options = self._trainer, self._options
        self.enter("start")
        if self._judge is not None:
            self._judge.start(loader)
        wanted = options.looks_for_hangs or options.ranks_every is not None
        notes = trainer.link.notes() if wanted else None
        if notes is None:
            yield
            return
        watchdog = None
        jobs = []
        if options.looks_for_hangs:
            lockstep = trainer.in_lockstep
            watchdog = Watchdog(options, self._position, notes, self._run_dir, lockstep)
            jobs.append(watchdog.exchange)
        if options.ranks_every is not None:
            every, factor = options.ranks_every, options.slow_factor
            self._paces = Paces(notes, trainer.timeline, every, factor)
            jobs.append(self._paces.exchange)
        messenger = Messenger(notes, jobs, round_seconds(options))
        try:
            yield
        finally:
            if watchdog is not None:
                watchdog.close()
            messenger.close()
            paces, self._paces = self._paces, None
        if paces is not None:
            self._show(paces.last())

    def begin_computing(self) -> None:
        """The forward passes of a step are about to begin."""
        self.enter("compute")
        if self._judge is not None:
            self._judge.begin_computing()

    def is_in_order(self, batch: StepBatch, computed: Computed, norm: Tensor | None) -> bool:
        """Whether the step's update may be made, as far as is watched; see `Judge`."""
        return self._judge is None or self._judge.is_in_order(batch, computed, norm)

    def after_step(self) -> None:
        """A step is over, with or without an update."""
        if self._judge is not None:
            self._judge.after_step()
        if self._paces is not None:
            self._show(self._paces.count(self._trainer.step_count))

    def _show(self, made: tuple[int, Table] | None) -> None:
        if made is None:
            return
        step, table = made
        metrics = self._trainer.metrics
        metrics.say(f"step {step}, what each rank spent its time on\n{table}")
        rows = [dict(row) for row in table.seconds]
        metrics.note("ranks", step, {"rank_seconds": rows, "slow": table.slow})
        if (warning := table.warning()) is not None:
            logger.warning("step %d: %s", step, warning)
