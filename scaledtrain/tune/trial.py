"""A trial in its own processes: the training command, with a callback that tells Optuna."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from copy import copy
from pathlib import Path

from optuna.study import Study

from scaledtrain.callbacks import Callback
from scaledtrain.errors import ConfigError, LossSpikeError, NonFiniteLossError
from scaledtrain.launching import guarded
from scaledtrain.schema import did_you_mean
from scaledtrain.train import launch
from scaledtrain.trainer import Trainer
from scaledtrain.tune.settings import Asked, Tuning
from scaledtrain.tune.study import make_pruner, open_study

__all__ = ["DIVERGED", "MODULE", "PRUNED", "Reporter", "environment_of", "main"]

MODULE = "scaledtrain.tune.trial"
PRUNED, DIVERGED = "pruned at step", "diverged"  # attributes of a trial
_VARIABLE = "SCALEDTRAIN_TRIAL"


class Reporter(Callback):
    """Tells a study the metric at each evaluation, and ends the run if the pruner says so.

    Rank 0 does; the others end with it.

    Args:
        study: of the search.
        number: of the trial.
        tuning: settled: its metric is one of the evaluations.
        eval_every: steps between evaluations: some strategies evaluate a little later, and are held
            against each other at its multiples. None: they are taken as they come.
    """

    def __init__(self, study: Study, number: int, tuning: Tuning, eval_every: int | None) -> None:
        self._study = study
        self._tuning = tuning
        self._metric = str(tuning.metric)
        self._every = eval_every or 1
        # The same that `optuna.Trial` is made of, which would draw values first.
        self._storage = study._storage
        self._id = self._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)

    def on_fit_start(self, trainer: Trainer) -> None:
        """Forget what an attempt before this one, which was interrupted, came to."""
        if trainer.link.group.rank == 0:
            for name in (PRUNED, DIVERGED):
                self._storage.set_trial_user_attr(self._id, name, None)

    def on_evaluation(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Report; stop if it is worse than it should be by now."""
        if trainer.link.group.rank != 0:
            return
        if self._metric not in values:
            raise ConfigError(
                f"tune.metric is {self._metric!r}{did_you_mean(self._metric, values)}, but an "
                f"evaluation has: {', '.join(values)}"
            )
        step = trainer.step_count // self._every * self._every
        self._storage.set_trial_intermediate_value(self._id, step, values[self._metric])
        if not math.isfinite(values[self._metric]) or self._is_bad(step):
            self._storage.set_trial_user_attr(self._id, PRUNED, trainer.step_count)
            trainer.stop()

    def _is_bad(self, step: int) -> bool:
        if step < self._tuning.prune_after_steps:
            return False
        trial = copy(self._storage.get_trial(self._id))
        known = trial.intermediate_values  # those of an interrupted attempt may lie ahead
        trial.intermediate_values = {s: value for s, value in known.items() if s <= step}
        return make_pruner(self._tuning, min(known)).prune(self._study, trial)

    def diverged(self, error: Exception) -> None:
        """Note that the training did not crash: its settings were bad."""
        self._storage.set_trial_user_attr(self._id, DIVERGED, str(error))


def environment_of(folder: Path, number: int) -> dict[str, str]:
    """The variables by which a process knows its trial."""
    return {_VARIABLE: json.dumps([str(folder.resolve()), number])}


def main() -> None:
    """Train as the command line says, as the trial that the environment names."""
    guarded(_main)


def _main() -> None:
    place, number = json.loads(os.environ[_VARIABLE])
    asked = Asked.load(Path(place))
    study = open_study(Path(place), asked.tuning)
    reporter = Reporter(study, number, asked.tuning, asked.eval_every)
    try:
        launch(sys.argv[1:], MODULE, [reporter])
    except (NonFiniteLossError, LossSpikeError) as error:
        reporter.diverged(error)
        raise
