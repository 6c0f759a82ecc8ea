"""What a search found: its trials as a table, and what each of its settings mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from scaledtrain.tune.search import SECONDS, run_dir_of
from scaledtrain.tune.trial import DIVERGED, PRUNED

__all__ = [
    "LEAST",
    "aligned",
    "best_first",
    "hint_of",
    "how_it_ended",
    "importances",
    "number",
    "rows",
    "told",
]

LEAST = 10
"""Complete trials from which importances are told."""
_ENOUGH = 20  # complete trials; with fewer of them importances are a hint
_SHARE = 0.25  # of the trials: what it takes to be among the best ones is asked for


def best_first(study: Study) -> list[FrozenTrial]:
    """Complete trials, the best first; then those that ended early, the rest in their order."""
    sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
    order = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL)

    def key(trial: FrozenTrial) -> tuple[int, float, int]:
        value = trial.value
        known = value is not None and not math.isnan(value)
        return order.index(trial.state), sign * value if known else math.inf, trial.number  # type: ignore[operator]

    trials = study.get_trials(deepcopy=False)
    return sorted((t for t in trials if t.state in order), key=key)


def how_it_ended(trial: FrozenTrial) -> str:
    """In words: complete, ended early, diverged, crashed or running."""
    if trial.user_attrs.get(DIVERGED):
        return "diverged"
    if trial.state == TrialState.PRUNED:
        return f"ended early, step {trial.user_attrs.get(PRUNED) or '?'}"
    words = {TrialState.COMPLETE: "complete", TrialState.FAIL: "crashed"}
    return words.get(trial.state, "running")


def importances(study: Study) -> dict[str, float]:
    """How much each parameter matters for being among the best quarter of the complete trials.

    Shares of 1, the largest first; empty where there are too few trials to tell. PED-ANOVA
    (Watanabe et al. 2023, https://arxiv.org/abs/2304.10255): how far the values of the best trials
    are from those of all.
    """
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    varied = {
        key: trial.distributions[key]
        for trial in complete
        for key in trial.params
        if not trial.distributions[key].single()
    }
    if len(complete) < LEAST or not varied or len({trial.value for trial in complete}) == 1:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=_SHARE, evaluate_on_local=False)
    return dict(get_param_importances(study, evaluator=evaluator, params=sorted(varied)))


def hint_of(study: Study) -> str:
    """What is to be said beside importances that few trials tell; empty for enough of them."""
    complete = len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
    return f" (only a hint: {complete} complete trials)" if complete < _ENOUGH else ""


def rows(study: Study, metric: str) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table of trials."""
    trials = best_first(study)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    cells = [
        [
            str(trial.number),
            "-" if trial.value is None else number(trial.value),
            _seconds(trial.user_attrs),
            how_it_ended(trial),
            *(_short(trial.params.get(key, "-")) for key in keys),
        ]
        for trial in trials
    ]
    return ["trial", metric, "seconds", "ended", *keys], cells


def _seconds(attributes: Mapping[str, object]) -> str:
    seconds = attributes.get(SECONDS)
    return f"{seconds:.1f}" if isinstance(seconds, float) else "-"


def number(value: float) -> str:
    """As short as tells values apart."""
    return f"{value:.4f}" if abs(value) < 10_000 else f"{value:.4g}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def told(study: Study, metric: str, folder: Path) -> str:
    """The table, importances, and how the best trial is found again."""
    head, cells = rows(study, metric)
    lines = [aligned([head, *cells])]
    shares = importances(study)
    if shares:
        lines += ["", f"what mattered for being among the best quarter{hint_of(study)}:"]
        width = max(map(len, shares))
        lines += [f"  {key:<{width}}  {share:4.0%}" for key, share in shares.items()]
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if complete:
        best = study.best_trial
        values = " ".join(f"{key}={value}" for key, value in best.params.items())
        lines += [
            "",
            f"best: trial {best.number}, {metric} {number(study.best_value)}, with",
            f"  {values}",
        ]
        lines += [f"its run: {run_dir_of(folder, best.number)}"]
    return "\n".join(lines)


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns of a table below each other, a line below the heads."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
