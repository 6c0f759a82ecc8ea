"""The timelines of a run, read back from its folder: spans of every rank, events of a server.

Files are read one line at a time, so that the traces of a thousand ranks need no memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from scaledtrain.comm.serving.event_log import begun_at, read_events
from scaledtrain.errors import ConfigError
from scaledtrain.report.lines import parse_lines
from scaledtrain.run_dir import EVENTS
from scaledtrain.server.operations import Kind
from scaledtrain.timeline import PHASES, Named, Span

__all__ = ["WHOLE", "Arrival", "Trace", "Window", "find_trace", "flatten", "read_spans"]


_ACTION = re.compile(r"\d+[FBIW]\d+")  # of a pipeline
# What a person looks for on a timeline; pulls are the ends of the waiting that is there already.
_SHOWN = {
    Kind.PUSH: "push",
    Kind.REJECT: "unusable gradient",
    Kind.SKIP: "no gradient",
    Kind.REMOVE: "leaves",
    Kind.ADD: "joins",
}


class Window(NamedTuple):
    """A part of a run, in seconds since it began."""

    start: float = 0.0
    end: float = float("inf")


WHOLE = Window()
"""All of a run."""


class Arrival(NamedTuple):
    """Something that a worker's message did at the server, ``seconds`` after the run began."""

    what: str
    rank: int
    seconds: float
    version: int = -1
    """At which a pushed gradient was computed."""
    staleness: int = -1
    accepted: bool = False
    """Whether a pushed gradient was used."""


class _Begin(NamedTuple):
    """When a fit began on the clock of a host."""

    seconds: float
    host: str


@dataclass(frozen=True)
class Trace:
    """Where the timelines of one run are, and how their clocks are set against each other.

    Each rank counts from the beginning of its own fit. Ranks on one host share a clock and tell
    when that was, so that all count from the beginning of the lowest rank's; ranks on other hosts
    are taken to have begun together with it, since clocks of hosts cannot be compared.
    """

    folder: Path
    paths: Mapping[int, Path]
    """Rank -> its file, in the order of the ranks."""
    origin: _Begin | None
    """Of the lowest rank; None where files do not tell, and all ranks count from 0."""
    n_ranks: int
    """With a trace in the folder, chosen or not."""

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.resolve().name

    def only(self, ranks: Sequence[int]) -> Trace:
        """The same run with fewer ranks.

        Raises:
            ConfigError: one of them has no trace.
        """
        if missing := [rank for rank in ranks if rank not in self.paths]:
            raise ConfigError(
                f"{self.folder} has no trace of rank {', '.join(map(str, missing))}; it has those "
                f"of {len(self.paths)} ranks, {min(self.paths)} to {max(self.paths)}"
            )
        return replace(self, paths={rank: self.paths[rank] for rank in sorted(set(ranks))})

    def spans(self, rank: int, window: Window = WHOLE) -> Iterator[Span]:
        """The spans of a rank that are at least partly in a window, in the order of their ends."""
        for span in read_spans(self.paths[rank], self.origin):
            if span.end > window.start and span.start < window.end:
                yield span

    def actions(self, rank: int) -> Iterator[Named]:
        """The passes of a rank that has stages of a pipeline, in order; none of any other."""
        shift = 0.0
        for line in parse_lines(self.paths[rank], _line):
            if isinstance(line, _Begin):
                shift = _shift(line, self.origin or line)
            elif isinstance(line, Named):
                yield Named(line.name, line.start + shift, line.end + shift)

    def arrivals(self, window: Window = WHOLE) -> Iterator[Arrival]:
        """What happened at the server on behalf of these ranks; nothing where there was none."""
        path = self.folder / EVENTS
        if not path.exists():
            return
        shift = 0.0 if self.origin is None else begun_at(path) - self.origin.seconds
        for (kind, worker, version), seconds, accepted, staleness in read_events(path):
            time = seconds + shift
            if kind not in (Kind.PUSH, Kind.REJECT):
                version = -1  # it is no gradient's
            if worker in self.paths and kind in _SHOWN and window.start <= time <= window.end:
                yield Arrival(_SHOWN[kind], worker, time, version, staleness, accepted)


def find_trace(folder: str | Path) -> Trace:
    """Find the timelines that a run left in its folder.

    Args:
        folder: ``run_dir`` of the run.

    Raises:
        ConfigError: there are none; the message says how to get some.
    """
    folder = Path(folder)
    found = {
        int(match[1]): path
        for path in folder.glob("trace-rank*.jsonl")
        if (match := re.fullmatch(r"trace-rank(\d+)\.jsonl", path.name))
    }
    if not found:
        raise ConfigError(f"{folder} {_why_not(folder)}")
    paths = {rank: found[rank] for rank in sorted(found)}
    first = next(parse_lines(next(iter(paths.values())), _line), None)
    return Trace(folder, paths, first if isinstance(first, _Begin) else None, len(paths))


def _why_not(folder: Path) -> str:
    if not folder.is_dir():
        return "is no folder; give the run_dir of a run"
    inner = sorted({path.parent for path in folder.glob("*/trace-rank*.jsonl")})
    if inner:
        return f"holds no trace itself, but these do: {' '.join(map(str, inner))}; give them"
    return (
        "holds no trace-rank0.jsonl; run with trace=true (a Trainer with trace=True and a "
        "run_dir) to have every span of time written there"
    )


def read_spans(path: Path, origin: _Begin | None = None) -> Iterator[Span]:
    """The spans of one rank's file, in the order of their ends; a cut last line is left out.

    Args:
        path: ``trace-rank<r>.jsonl``.
        origin: what 0 seconds is; None: the beginning of the (first) fit in this file.

    Raises:
        ConfigError: a line other than the last is not what `Metrics` writes.
    """
    shift = 0.0
    for line in parse_lines(path, _line):
        if isinstance(line, Span):
            yield Span(line.phase, line.start + shift, line.end + shift)
        elif isinstance(line, _Begin):
            origin = origin or line
            shift = _shift(line, origin)


def _shift(begin: _Begin, origin: _Begin) -> float:
    return begin.seconds - origin.seconds if begin.host == origin.host else 0.0


def _line(line: list[Any]) -> Span | Named | _Begin:
    kind, start, end = line
    if kind == "begin":
        return _Begin(float(start), str(end))
    if _ACTION.fullmatch(kind):
        return Named(kind, float(start), float(end))
    if kind not in PHASES:
        raise ValueError(f"unknown phase {kind!r}")
    return Span(kind, float(start), float(end))


def flatten(spans: Iterable[Span], window: Window = WHOLE) -> list[Span]:
    """Spans that do not overlap, in order: what lies inside a span is cut out of it.

    So a rank does one thing at any moment: the innermost, as in the sums of `Timeline`.

    Args:
        spans: in the order of their ends.
        window: what is outside is cut off.

    Example:
        >>> flatten([Span("communication", 2, 3), Span("compute", 0, 5)])  # doctest: +ELLIPSIS
        [Span(phase='compute', start=0, end=2), Span(phase='communication', ...), Span(...end=5)]
    """
    flat: list[Span] = []
    for phase, start, end in spans:
        n_inside = next((i for i, s in enumerate(reversed(flat)) if s.start < start), len(flat))
        inside = flat[len(flat) - n_inside :]
        del flat[len(flat) - n_inside :]
        at = max(start, flat[-1].end) if flat else start
        for inner in inside:
            if inner.start > at:
                flat.append(Span(phase, at, inner.start))
            flat.append(inner)
            at = inner.end
        if end > at:
            flat.append(Span(phase, at, end))
    clipped = (Span(p, max(s, window.start), min(e, window.end)) for p, s, e in flat)
    return [span for span in clipped if span.end > span.start]
