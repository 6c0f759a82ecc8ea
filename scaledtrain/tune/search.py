"""Runs the trials of a search, and goes on with one that was interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from scaledtrain.errors import ConfigError
from scaledtrain.jobs import Job, Place, arguments_for, last_lines, run_jobs, was_interrupted
from scaledtrain.launching import tell
from scaledtrain.run_dir import RESULT
from scaledtrain.tune.settings import Tuning
from scaledtrain.tune.space import Parameter, Value
from scaledtrain.tune.study import make_sampler
from scaledtrain.tune.trial import DIVERGED, MODULE, PRUNED, environment_of

__all__ = ["SECONDS", "Search", "run_dir_of"]

SECONDS = "seconds"  # attribute of a trial: of its training
_TRIES = 3  # if so many trials crash and none does not, the fault is not in their settings


def run_dir_of(folder: Path, number: int) -> Path:
    """Where a trial's run is."""
    return folder / "trials" / f"{number:04}"


class Search:
    """The trials of a study, as jobs.

    A trial that is under way when all ends is run again by the next `Search` of the folder: with
    the values that it had, from its newest checkpoint if the config saves some.

    Args:
        study: of the folder.
        folder: where runs go.
        arguments: of the training command, the same for all trials.
        space: what differs.
        points: values of the trials, if they are not drawn.
        tuning: settled.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        arguments: Sequence[str],
        space: Sequence[Parameter],
        points: Sequence[Mapping[str, Value]] | None,
        tuning: Tuning,
    ) -> None:
        self._study = study
        self._folder = folder
        self._arguments = list(arguments)
        self._space = space
        self._points = points
        self._tuning = tuning
        self._total = tuning.trials if points is None else len(points)

    def run(self, places: Sequence[Place], keep_open: Sequence[int] = ()) -> None:
        """Make all trials that have not been made.

        Args:
            places: as for `run_jobs`.
            keep_open: the same.

        Raises:
            ConfigError: all trials crash.
        """
        run_jobs(self._jobs(), places, self._ended, keep_open)

    def _jobs(self) -> Iterator[Job]:
        interrupted = self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        for before in interrupted:
            tell(f"trial {before.number}: it was interrupted, and is run again")
            self._study.sampler = make_sampler(self._tuning, before.number)  # if it had none yet
            yield self._job(Trial(self._study, before._trial_id))
        while (asked := self._asked()) < self._total:
            waiting = self._study.get_trials(deepcopy=False, states=[TrialState.WAITING])
            if self._points is not None and not waiting:
                self._study.enqueue_trial(dict(self._points[asked]))
            self._study.sampler = make_sampler(self._tuning, asked)
            yield self._job(self._study.ask())

    def _asked(self) -> int:
        trials = self._study.get_trials(deepcopy=False)
        return sum(trial.state != TrialState.WAITING for trial in trials)

    def _job(self, trial: Trial) -> Job:
        values = [f"{parameter.key}={parameter.draw(trial)}" for parameter in self._space]
        run_dir = run_dir_of(self._folder, trial.number)
        return Job(
            name=str(trial.number),
            module=MODULE,
            arguments=[*self._arguments, *values, *arguments_for(run_dir)],
            log=run_dir / "log.txt",
            environment=environment_of(self._folder, trial.number),
        )

    def _ended(self, job: Job, code: int) -> None:
        number = int(job.name)
        assert job.log is not None
        if was_interrupted(code):
            tell(f"trial {number}: it was interrupted; the same command runs it again")
            return
        trial = self._study.get_trials()[number]
        diverged = trial.user_attrs.get(DIVERGED)
        result = job.log.with_name(RESULT)
        if code == 0 and result.exists():
            self._finished(trial, result)
        elif diverged:  # its settings were bad, from which a sampler learns
            self._study.tell(number, state=TrialState.PRUNED)
            tell(f"trial {number}: {diverged}")
        else:
            self._study.tell(number, state=TrialState.FAIL)
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            tell(f"trial {number} crashed ({how}); {job.log} ends:\n{last_lines(job.log)}")
            self._end_if_all_crash()

    def _finished(self, trial: FrozenTrial, path: Path) -> None:
        metric = str(self._tuning.metric)
        result: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))["result"]
        value = result["evaluation"].get(metric)
        storage, number = self._study._storage, trial.number
        storage.set_trial_user_attr(trial._trial_id, SECONDS, result["seconds"])
        pruned = trial.user_attrs.get(PRUNED)
        if pruned is not None:
            self._study.tell(number, state=TrialState.PRUNED)
            tell(f"trial {number}: ended early, at step {pruned}: {metric} {value:.4f}")
        elif value is None:
            self._study.tell(number, state=TrialState.FAIL)
            there = ", ".join(result["evaluation"]) or "nothing"
            tell(f"trial {number}: tune.metric is {metric!r}, but it evaluated: {there}")
            self._end_if_all_crash()
        elif not math.isfinite(value):
            self._study.tell(number, state=TrialState.PRUNED)
            tell(f"trial {number}: {metric} {value} at the end")
        else:
            self._study.tell(number, value)
            best = self._study.best_trial
            tell(
                f"trial {number}: {metric} {value:.4f} after {result['seconds']:.0f} s; best: "
                f"{best.value:.4f}, trial {best.number}"
            )

    def _end_if_all_crash(self) -> None:
        states = [t.state for t in self._study.get_trials(deepcopy=False)]
        ended = [s for s in states if s.is_finished()]
        if len(ended) >= min(_TRIES, self._total) and set(ended) == {TrialState.FAIL}:
            raise ConfigError(
                f"the first {len(ended)} trials crashed, as told above, so the search has ended; "
                f"remove {self._folder}, or give another run_dir, when that is mended"
            )
