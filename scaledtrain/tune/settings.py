"""How a search is made: the keys below ``tune``, and what of a search must not change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from scaledtrain.config import Target
from scaledtrain.disk import replace_file
from scaledtrain.errors import ConfigError
from scaledtrain.judged import BestIs, judged_by
from scaledtrain.schema import parse

__all__ = ["Asked", "Tuning", "require_optuna"]

ASKED = "search.json"
_OF_A_START = ("tune.trials=", "tune.at_once=", "run_dir=", "console=")  # may be others each time


@dataclass(frozen=True)
class Tuning:
    """The keys below ``tune``; ``configs/tune.yaml`` says what each means."""

    trials: int
    metric: str | None
    best_is: BestIs | None
    sampler: Literal["tpe", "random", "grid"]
    pruner: Literal["median", "asha", "hyperband", "none"]
    startup_trials: int
    prune_after_steps: int
    at_once: int | None
    seed: int

    def __post_init__(self) -> None:
        for key, least in (("trials", 1), ("startup_trials", 1), ("prune_after_steps", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"tune.{key} is {getattr(self, key)}, but must be >= {least}")

    def settled(self, target: Target) -> Tuning:
        """With metric and direction, which may follow from the config's target.

        Raises:
            ConfigError: nothing says whether the metric is good when it is high.
        """
        metric, best_is = judged_by("tune", self.metric, self.best_is, target)
        return replace(self, metric=metric, best_is=best_is)


@dataclass(frozen=True)
class Asked:
    """What a search was started with, kept in its folder.

    Args:
        arguments: of the command line, those that may not change.
        tuning: settled.
        eval_every: steps between evaluations; None: each after an epoch.
    """

    arguments: list[str]
    tuning: Tuning
    eval_every: int | None

    @classmethod
    def of(cls, arguments: Sequence[str], tuning: Tuning, eval_every: int | None) -> Asked:
        """What a command line asks for."""
        lasting = [a for a in arguments if not a.startswith(_OF_A_START)]
        return cls(lasting, tuning, eval_every)

    @classmethod
    def load(cls, folder: Path) -> Asked:
        """Read it.

        Raises:
            ConfigError: the folder is not that of a search.
        """
        try:
            saved = json.loads((folder / ASKED).read_text(encoding="utf-8"))
            return cls(**{**saved, "tuning": parse("tune", saved["tuning"], Tuning)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder} holds no search ({ASKED}: {error}); give the folder that scaledtrain "
                "tune wrote to"
            ) from error

    def begin(self, folder: Path) -> None:
        """Keep it in a folder; or see that the search there was started with the same.

        Raises:
            ConfigError: it was not.
        """
        if not (folder / ASKED).exists():
            replace_file(folder / ASKED, json.dumps(asdict(self), indent=2).encode())
            return
        before = Asked.load(folder)
        if set(before.arguments) != set(self.arguments):
            gone = sorted(set(before.arguments) - set(self.arguments))
            new = sorted(set(self.arguments) - set(before.arguments))
            raise ConfigError(
                f"{folder} holds a search with other arguments (then: {' '.join(gone) or 'none'}; "
                f"now: {' '.join(new) or 'none'}), whose trials cannot be held against new ones; "
                "give the same, or another run_dir; tune.trials and tune.at_once may change"
            )


def require_optuna() -> None:
    """Raise a ConfigError that says what to install if Optuna is missing."""
    if find_spec("optuna") is None:
        raise ConfigError(
            "a search needs Optuna, which is not installed here: pip install 'scaledtrain[tune]'"
        )
