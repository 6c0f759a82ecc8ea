"""Whether the numbers of a step are in order, and what is done where they are not."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scaledtrain.errors import ConfigError, LossSpikeError, NonFiniteLossError
from scaledtrain.schedule import Computed, LossFn
from scaledtrain.watch.dump import BadBatch, save_batch
from scaledtrain.watch.locate import Found, KeptBuffers, find_nonfinite, nonfinite_names
from scaledtrain.watch.policy import Reaction, Watch
from scaledtrain.watch.snapshot import Snapshot
from scaledtrain.watch.spike import LossHistory

if TYPE_CHECKING:
    from scaledtrain.checkpoint.saver import Saver
    from scaledtrain.data.steps import StepBatch, Steps
    from scaledtrain.trainer import Trainer

__all__ = ["Judge"]

_logger = logging.getLogger(__name__)

_MOST_NAMES = 5  # of parameters in a message
_DONE = {
    "skip": "the update is left out",
    "rollback": "the run goes back to its last copy, and on with the data after this batch",
    "stop": "the run ends",
}


class Judge:
    """Looks at each step's loss and gradient norm before the update is made.

    Replicas that make the same updates (`Sync`), and all in lockstep where one may have to go back,
    come to one verdict, by one small all-reduce a step; so do the ranks that have a replica
    together. A replica that updates by itself leaves out an update by itself, as after an overflow.

    Args:
        options: what to look for.
        trainer: with all its parts.
        loss_fn: as the Trainer has it.
        run_dir: where batches go.
        saver: told where the run goes back.

    Raises:
        ConfigError: a rollback that cannot be, or a dump without a folder.
    """

    def __init__(
        self,
        options: Watch,
        trainer: Trainer,
        loss_fn: LossFn | None,
        run_dir: Path | None,
        saver: Saver | None,
    ) -> None:
        self._options = options
        self._trainer = trainer
        self._loss_fn = loss_fn
        self._saver = saver
        self._folder = None if run_dir is None else run_dir / "troubles"
        self._check()
        equal = trainer.strategy.replicas_equal or options.rolls_back
        self._all_agree = trainer.in_lockstep and equal
        self._history = LossHistory(options.spike_window, options.spike_sigmas)
        self._buffers = KeptBuffers(trainer.model)
        self._snapshot: Snapshot | None = None
        self._goes_back = False
        self._records: list[dict[str, Any]] = []
        self._loader: Steps | None = None
        self._count = 0

    def _check(self) -> None:
        trainer = self._trainer
        if self._options.dump and self._folder is None:
            raise ConfigError("watch.dump writes into the folder of the run; set run_dir")
        if not self._options.rolls_back:
            return
        if not trainer.in_lockstep:
            raise ConfigError(
                f"watch: a rollback takes all replicas back to the same step, but under "
                f"{trainer.strategy} each goes its own way, and what a bad gradient did is in "
                "parameters that others use already; take 'skip' or 'stop'"
            )
        if trainer.layout.updated_together.size != trainer.layout.pieces.size:
            raise ConfigError(
                "watch: a rollback would lose the gradients that are under way in an asynchronous "
                "pipeline; take 'skip' or 'stop', or a synchronous pipeline.schedule"
            )

    def start(self, loader: Steps) -> None:
        """A fit begins on these batches."""
        self._loader = loader
        if self._options.rolls_back:
            self._snapshot = Snapshot(self._trainer)

    def begin_computing(self) -> None:
        """The forward passes of a step are about to begin."""
        self._buffers.keep()

    def is_in_order(self, batch: StepBatch, computed: Computed, norm: Tensor | None) -> bool:
        """Whether the update may be made.

        Args:
            batch: of the step.
            computed: with it.
            norm: of the gradient; None: the loss scale's own verdict is that it overflowed.

        Raises:
            NonFiniteLossError: the run is to end.
            LossSpikeError: the same.
        """
        loss, samples = float(computed.loss), computed.samples
        grad_norm = None if norm is None else float(norm)
        is_bad = (samples > 0 and not math.isfinite(loss)) or (
            grad_norm is not None and not math.isfinite(grad_norm)
        )
        mean, any_bad = self._agree(loss, samples, is_bad)
        if any_bad:
            if self._options.on_nonfinite is None:
                return True
            own = f"loss {loss:g}" if samples else "no samples"
            what = f"not finite: {own}" + ("" if grad_norm is None else f", gradient {grad_norm:g}")
            found = self._compute_again(batch)
            culprit = bool(found) or (samples > 0 and not math.isfinite(loss))
            self._react(batch, self._options.on_nonfinite, what, found, culprit)
            return False
        if mean is None:
            return True
        if self._options.on_spike is not None and self._history.is_spike(mean):
            deviations = self._history.deviations(mean)
            what = f"a loss spike: {mean:g}, {deviations:.1f} deviations above the last ones"
            culprit = samples > 0 and self._history.is_spike(loss)
            self._react(batch, self._options.on_spike, what, None, culprit)
            return False
        self._history.add(mean)
        return True

    def after_step(self) -> None:
        """The step is over: go back, if that was decided, or take a copy, if it is time."""
        trainer = self._trainer
        if self._goes_back and self._snapshot is not None:
            self._snapshot.restore()
            if self._saver is not None:
                self._saver.went_back(self._snapshot.step)
            self._history.forget()
            self._goes_back = False
        elif (
            self._snapshot is not None
            and trainer.step_count - self._snapshot.step >= self._options.copy_every
        ):
            self._snapshot.take()
        self._write_records()  # not before: a rollback removes those of later steps

    def _write_records(self) -> None:
        for record in self._records:
            self._trainer.metrics.note("trouble", self._trainer.step_count, record)
        self._records.clear()

    def _agree(self, loss: float, samples: int, is_bad: bool) -> tuple[float | None, bool]:
        """The mean of the finite losses, None if there is none, and whether any rank's are bad."""
        counts = samples if math.isfinite(loss) else 0
        told = [loss * counts if counts else 0.0, float(counts), float(is_bad)]
        if self._ranks > 1:
            values = torch.tensor(told, dtype=torch.float64, device=self._trainer.link.device)
            self._sum(values)
            told = values.tolist()
        return (told[0] / told[1] if told[1] else None), told[2] > 0

    @property
    def _ranks(self) -> int:
        trainer = self._trainer
        return trainer.link.group.size if self._all_agree else trainer.layout.pieces.size

    def _sum(self, values: Tensor) -> None:
        if self._all_agree:
            self._trainer.link.group.all_reduce([values], "sum").wait()
        else:
            self._trainer.layout.sum(values)

    def _compute_again(self, batch: StepBatch) -> Found | None:
        """What is not finite in this rank's own batch; None where that cannot be found out."""
        trainer = self._trainer
        if not trainer.layout.is_whole:
            return None
        try:
            return find_nonfinite(
                trainer.model, batch.microbatches, self._loss_fn, trainer.precision
            )
        except RuntimeError as error:  # out of memory, as a rule
            _logger.warning("the bad batch could not be computed again: %s", error)
            return None

    def _react(
        self, batch: StepBatch, reaction: Reaction, what: str, found: Found | None, culprit: bool
    ) -> None:
        rank = self._trainer.link.group.rank
        culprits = self._all(culprit)
        self._count += 1
        over = self._count > self._options.at_most
        if rank in culprits or (not culprits and self._tells_for_all):
            facts = self._facts(what, reaction, found, culprits)
            dumped = self._dump(batch, facts)
            text = self._text(facts) + (f"; the batch is in {dumped}" if dumped else "")
            self._records.append({**facts, "dump": None if dumped is None else str(dumped)})
            _logger.warning("%s", text)
        else:
            others = f"rank{'s' if len(culprits) > 1 else ''} {', '.join(map(str, culprits))}"
            text = f"trouble in step {self._trainer.step_count + 1} on {others or 'no rank alone'}"
        if reaction == "stop" or over:
            why = f"; that is more than watch.at_most={self._options.at_most}" if over else ""
            self._write_records()
            error = LossSpikeError if what.startswith("a loss spike") else NonFiniteLossError
            raise error(
                f"{text}{why}. Lower the learning rate, clip gradients (max_grad_norm=1.0), or "
                "look at the batch"
            )
        self._buffers.put_back()
        self._goes_back = reaction == "rollback"

    @property
    def _tells_for_all(self) -> bool:
        trainer = self._trainer
        group = trainer.link.group if self._all_agree else trainer.layout.pieces
        return group.rank == 0

    def _all(self, culprit: bool) -> list[int]:
        """The ranks whose own numbers are bad, of those that agree."""
        group = self._trainer.link.group
        if self._ranks == 1:
            return [group.rank]
        flags = torch.zeros(group.size, device=self._trainer.link.device)
        flags[group.rank] = float(culprit)
        self._sum(flags)
        return [int(rank) for rank in flags.nonzero().flatten()]

    def _facts(
        self, what: str, reaction: Reaction, found: Found | None, culprits: list[int]
    ) -> dict[str, Any]:
        trainer, replica = self._trainer, self._trainer.replica
        there = [p.grad for p in replica.parameters]  # where replicas combine them, of all
        assert self._loader is not None
        return {
            "what": what,
            "reaction": reaction,
            "rank": trainer.link.group.rank,
            "ranks": culprits,
            "where": None if found is None else found.where,
            "parameters": found.parameters if found else nonfinite_names(replica.names, there),
            "seen_again": None if found is None else bool(found),
            "in_step": trainer.step_count + 1,
            "epoch": trainer.epoch,
            "step_in_epoch": trainer.steps_in_epoch,
            "samples": self._loader.indices(trainer.epoch, trainer.steps_in_epoch),
        }

    def _text(self, facts: dict[str, Any]) -> str:
        parts = [
            f"trouble in step {facts['in_step']} of rank {facts['rank']}, {facts['what']}: "
            f"{_DONE[facts['reaction']]} ({self._count} of at most {self._options.at_most})"
        ]
        names = facts["parameters"]
        if facts["seen_again"] is False:
            parts.append("when it was computed again, all was finite")
        if facts["where"]:
            parts.append(f"first not finite: {facts['where']}")
        if names:
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            parts.append(f"gradients not finite: {', '.join(names[:_MOST_NAMES])}{more}")
        samples = "" if facts["samples"] is None else f", samples {facts['samples']}"
        parts.append(
            f"batch: step {facts['step_in_epoch']} of epoch {facts['epoch']}, counted from 0"
            f"{samples}"
        )
        return "; ".join(parts)

    def _dump(self, batch: StepBatch, facts: dict[str, Any]) -> Path | None:
        if not self._options.dump or self._folder is None:
            return None
        name = f"step-{facts['in_step']:09d}-rank{facts['rank']}-{self._count}.safetensors"
        try:
            save_batch(self._folder / name, BadBatch(batch.microbatches, facts))
        except (OSError, ConfigError) as error:  # training is more than its debugging
            _logger.warning("the bad batch could not be written: %s", error)
            return None
        return self._folder / name
