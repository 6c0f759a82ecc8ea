"""The ladder: its rungs as data, and climbing it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scaledtrain.check.rungs.cost import cost
from scaledtrain.check.rungs.gradients import gradients
from scaledtrain.check.rungs.initial_loss import initial_loss
from scaledtrain.check.rungs.modes import modes
from scaledtrain.check.rungs.overfit import overfit
from scaledtrain.check.rungs.precision import precision
from scaledtrain.check.rungs.ranks import ranks
from scaledtrain.check.rungs.resume import resume
from scaledtrain.check.rungs.samples import samples
from scaledtrain.check.rungs.seed import seed
from scaledtrain.check.rungs.shapes import shapes
from scaledtrain.check.rungs.units import units
from scaledtrain.check.subject import Subject
from scaledtrain.check.verdict import EVERYTHING, Verdict, failed, skipped
from scaledtrain.errors import ConfigError, ScaledTrainError
from scaledtrain.ranks import RankInfo
from scaledtrain.schema import did_you_mean

__all__ = ["LADDER", "Rung", "climb", "summary"]


@dataclass(frozen=True)
class Rung:
    """One question about a subject.

    Args:
        ask: answers it.
    """

    ask: Callable[[Subject], Verdict]

    @property
    def name(self) -> str:
        """As it is chosen and told."""
        return self.ask.__name__


LADDER: Sequence[Rung] = (
    Rung(shapes),
    Rung(initial_loss),
    Rung(gradients),
    Rung(units),
    Rung(modes),
    Rung(samples),
    Rung(overfit),
    Rung(seed),
    Rung(resume),
    Rung(ranks),
    Rung(precision),
    Rung(cost),
)


def climb(
    subject: Subject,
    only: Sequence[str] | None = None,
    told: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Ask every rung, from the simplest on.

    An error that a rung meets is its verdict. What a verdict undermines is skipped: everything if
    the model gives no loss for a batch.

    Args:
        subject: what is checked.
        only: names of rungs; None: all.
        told: called with each verdict when it is there.

    Raises:
        ConfigError: there is no rung of such a name; or this is one process of several.
    """
    here = RankInfo.from_environment()
    if here.size > 1:
        raise ConfigError(
            f"this is rank {here.rank} of {here.size}, but the check runs in one process, also for "
            "what several ranks do; start it without a launcher"
        )
    names = [rung.name for rung in LADDER]
    if only is not None and not only:
        raise ConfigError(f"check.only is empty; name some rungs: {', '.join(names)}")
    for name in only or []:
        if name not in names:
            raise ConfigError(
                f"check.only names {name!r}{did_you_mean(name, names)}; rungs: {', '.join(names)}"
            )
    verdicts: list[Verdict] = []
    undermined: dict[str, str] = {}  # rung -> by which
    for rung in LADDER:
        if only is not None and rung.name not in only:
            continue
        start = time.perf_counter()
        by = undermined.get(EVERYTHING[0]) or undermined.get(rung.name)
        verdict = skipped(f"it means nothing while {by} fails") if by else _answer(rung, subject)
        verdict = replace(verdict, rung=rung.name, seconds=time.perf_counter() - start)
        undermined |= dict.fromkeys(verdict.undermines, rung.name)
        verdicts.append(verdict)
        told(verdict)
    return verdicts


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many there are of each kind.

    Example:
        >>> summary([skipped(""), failed("", ""), failed("", "")])
        '3 rungs: 2 failed, 1 skipped'
    """
    counts = [(s, sum(v.status == s for v in verdicts)) for s in _TOLD]
    return f"{len(verdicts)} rungs: " + ", ".join(f"{n} {status}" for status, n in counts if n)


_TOLD = ("failed", "warning", "skipped", "passed")


def _answer(rung: Rung, subject: Subject) -> Verdict:
    try:
        return rung.ask(subject)
    except ScaledTrainError as error:
        return failed(
            f"{type(error).__name__}: {_one_line(error)}",
            "",
            undermines=_undermined(rung),
            error=repr(error),
        )
    except Exception as error:  # of the user's model, data or loss: that is what is checked
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
        return failed(
            f"{type(error).__name__} at {place}: {_one_line(error)}",
            "mend it and check again",
            undermines=_undermined(rung),
            error=repr(error),
        )


def _undermined(rung: Rung) -> Sequence[str]:
    """By an error."""
    return EVERYTHING if rung.ask is shapes else ()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
