"""By which metric several trainings are held against each other, and whether a high one is good."""

from __future__ import annotations

from typing import Literal

from scaledtrain.config import Target
from scaledtrain.errors import ConfigError

__all__ = ["NO_TARGET", "BestIs", "judged_by"]

BestIs = Literal["lowest", "highest"]

NO_TARGET = ("target.metric=null", "target.at_least=null", "target.at_most=null")
"""What lets each training go on to its end: those that end at a target are equally good."""


def judged_by(
    command: str, metric: str | None, best_is: BestIs | None, target: Target
) -> tuple[str, BestIs]:
    """The metric, and where it is best, as far as they are given or follow from the target.

    Args:
        command: whose keys ``metric`` and ``best_is`` are.
        metric: of the evaluations; None: the target's, or the loss.
        best_is: None: as the target says, and lowest for the loss.
        target: of the config.

    Raises:
        ConfigError: nothing says whether the metric is good when it is high.

    Example:
        >>> judged_by("tune", None, None, Target("accuracy", at_least=0.9))
        ('accuracy', 'highest')
    """
    metric = metric or target.metric or "loss"
    if best_is is None and metric == target.metric:
        best_is = "lowest" if target.at_least is None else "highest"
    elif best_is is None and metric == "loss":
        best_is = "lowest"
    if best_is is None:
        raise ConfigError(
            f"{command}.metric is {metric!r}, but is a high one good? Set {command}.best_is to "
            "highest or to lowest"
        )
    return metric, best_is
