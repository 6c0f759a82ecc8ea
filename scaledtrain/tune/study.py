"""The trials of a search in a file: Optuna's study, its samplers and pruners by word."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection

from scaledtrain.tune.settings import Tuning

__all__ = ["make_pruner", "make_sampler", "mend", "open_study"]

_JOURNAL = "journal.log"
_NAME = "search"


def open_study(folder: Path, tuning: Tuning) -> Study:
    """The study in a folder, made if it is not there.

    It is a journal to which each process adds lines under a lock: what is in it survives whatever
    ends them.

    Args:
        folder: of the search.
        tuning: settled.
    """
    storage = JournalStorage(JournalFileBackend(str(folder / _JOURNAL)))
    if not storage.get_all_studies():
        direction = (
            StudyDirection.MINIMIZE if tuning.best_is == "lowest" else StudyDirection.MAXIMIZE
        )
        storage.create_new_study([direction], _NAME)
    return optuna.load_study(study_name=_NAME, storage=storage)


def mend(folder: Path) -> None:
    """Cut off a line that was only half written, after which no other could be read.

    To be called while nobody else has the folder.
    """
    path = folder / _JOURNAL
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def make_sampler(tuning: Tuning, number: int) -> BaseSampler:
    """What draws the values of a trial.

    One for each trial, which draws by the search's seed and the trial's number: so a search that
    was interrupted goes on as it would have, and does not draw again what it has drawn.
    """
    seed = tuning.seed * 1_000_003 + number
    if tuning.sampler == "tpe":
        return TPESampler(n_startup_trials=tuning.startup_trials, constant_liar=True, seed=seed)
    return RandomSampler(seed=seed)


def make_pruner(tuning: Tuning, first_step: int) -> BasePruner:
    """What ends bad trials early.

    Args:
        tuning: settled.
        first_step: of a trial's first evaluation. Successive halving begins there: had it begun at
            step 1, the first evaluation at step 64 would stand for those at 1, 4, 16 and 64, and
            one trial in 256 be let through.
    """
    least = max(1, first_step, tuning.prune_after_steps)
    if tuning.pruner == "median":
        return MedianPruner(tuning.startup_trials)
    if tuning.pruner == "asha":
        return SuccessiveHalvingPruner(min_resource=least)
    if tuning.pruner == "hyperband":
        return HyperbandPruner(min_resource=least)
    return NopPruner()
