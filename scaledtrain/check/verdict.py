"""What a rung of the ladder came to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "EVERYTHING",
    "Status",
    "Verdict",
    "failed",
    "named",
    "passed",
    "skipped",
    "together",
    "warning",
]

Status = Literal["passed", "skipped", "warning", "failed"]

_ORDER: tuple[Status, ...] = ("passed", "skipped", "warning", "failed")
_SHOWN = 4  # names in a line

EVERYTHING = ("*",)
"""Every later rung."""


@dataclass(frozen=True)
class Verdict:
    """Of one rung.

    Args:
        status: ``"failed"`` is a bug, ``"warning"`` something that may be meant.
        found: what was seen, and where.
        advice: what to do about it; empty where nothing is to be done.
        measured: the numbers behind it, by name.
        undermines: names of later rungs that mean nothing after this.
        rung: its name.
        seconds: that it took.
    """

    status: Status
    found: str
    advice: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)
    undermines: Sequence[str] = ()
    rung: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        """One line."""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.status:<8}{self.rung:<14}{self.found}{advice}  [{self.seconds:.1f} s]"


def passed(found: str, **measured: Any) -> Verdict:
    """All is well."""
    return Verdict("passed", found, "", measured)


def warning(found: str, advice: str, **measured: Any) -> Verdict:
    """It may be meant."""
    return Verdict("warning", found, advice, measured)


def failed(found: str, advice: str, *, undermines: Sequence[str] = (), **measured: Any) -> Verdict:
    """A bug."""
    return Verdict("failed", found, advice, measured, undermines)


def skipped(why: str) -> Verdict:
    """It cannot be said."""
    return Verdict("skipped", why)


def together(findings: Iterable[Verdict], otherwise: Verdict) -> Verdict:
    """Several findings of a rung as one verdict: the worst one's status, and what all say.

    Args:
        findings: none: all is well.
        otherwise: the verdict then; its numbers are told in any case.

    Example:
        >>> found = [warning("images in 0..255", "scale them"), failed("NaN", "look at the files")]
        >>> str(together(found, passed("8 samples")))
        'failed                NaN; look at the files; images in 0..255; scale them  [0.0 s]'
    """
    ranked = sorted(findings, key=lambda verdict: -_ORDER.index(verdict.status))
    if not ranked:
        return otherwise
    first, *others = ranked
    told = [text for other in others for text in (other.found, other.advice) if text]
    measured: dict[str, Any] = dict(otherwise.measured)
    for finding in reversed(ranked):
        measured.update(finding.measured)
    undermined = [name for finding in ranked for name in finding.undermines]
    advice = "; ".join([first.advice, *told])
    return Verdict(first.status, first.found, advice, measured, undermined)


def named(names: Iterable[str]) -> str:
    """The first few of some names.

    Example:
        >>> named(["a", "b", "c", "d", "e", "f"])
        'a, b, c, d and 2 more'
    """
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
