"""What is told about ranks that are stuck: where each is, and the stacks of its threads."""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scaledtrain.watch.position import Place

__all__ = ["Part", "compose", "compose_alone", "save", "stacks"]

_MOST_CHARACTERS = 60_000  # of one rank: a thousand of them are still a file that opens


class Part(NamedTuple):
    """What one rank tells about itself."""

    place: Place
    seconds: float
    """That it has been in this stage."""
    stacks: str = ""

    def to_json(self) -> str:
        """As a text."""
        return json.dumps([list(self.place), self.seconds, self.stacks])

    @classmethod
    def from_json(cls, text: str) -> Part:
        """From that text."""
        place, seconds, stacks = json.loads(text)
        return cls(Place(*place), seconds, stacks)


def stacks(own: Sequence[str]) -> str:
    """The Python stack of each thread of this process, the main one first.

    Args:
        own: names of threads that are left out.
    """
    frames = sys._current_frames()
    threads = [threading.main_thread(), *threading.enumerate()]
    names = {thread.ident: thread.name for thread in threads}
    texts = []
    for ident in sorted(frames, key=lambda i: i != threading.main_thread().ident):
        name = names.get(ident, "not started by Python")
        if name not in own:
            lines = "".join(traceback.format_stack(frames[ident]))
            texts.append(f"thread {name}, the most recent call last:\n{lines}")
    return "\n".join(texts)[:_MOST_CHARACTERS]


def compose(
    reason: str, told: Mapping[int, Part], last: Mapping[int, Part], size: int, lockstep: bool
) -> str:
    """The report.

    Args:
        reason: why there is one.
        told: of the ranks that answered.
        last: what silent ranks told last, as far as they ever did.
        size: how many ranks there are.
        lockstep: whether all ranks make the same steps.
    """
    silent = [rank for rank in range(size) if rank not in told]
    lines = [f"{reason}; all ranks end (exit code 70)", "", _HEAD]
    for rank in range(size):
        lines.append(_row(rank, told.get(rank), last.get(rank)))
    if blamed := _waited_for(told, silent, lockstep):
        lines += ["", blamed]
    for rank, part in sorted(told.items()):
        lines += ["", f"--- rank {rank} ---", part.stacks.rstrip()]
    for rank in silent:
        lines += ["", f"--- rank {rank} does not answer: stopped, dead, or held in C code ---"]
    return "\n".join(lines) + "\n"


def compose_alone(reason: str, rank: int, part: Part) -> str:
    """The report of one rank that can reach no other: it knows nothing about them."""
    lines = [f"{reason}; this rank ends (exit code 70)", "", _HEAD, _row(rank, part, None)]
    lines += [
        "",
        f"rank {rank} tells this about itself alone: the job's store, which is on rank 0 or at the "
        "launcher, does not answer",
    ]
    return "\n".join([*lines, "", f"--- rank {rank} ---", part.stacks.rstrip()]) + "\n"


_HEAD = f"{'rank':>6}  {'step':>8}  {'epoch':>6}  {'in':<9} for"


def _row(rank: int, part: Part | None, last: Part | None) -> str:
    known = part or last
    if known is None:
        return f"{rank:>6}  never reported"
    place = known.place
    row = f"{rank:>6}  {place.step:>8}  {place.epoch:>6}  {place.stage:<9} {known.seconds:.1f} s"
    return row if part is not None else f"{row}, then silent"


def _waited_for(told: Mapping[int, Part], silent: Sequence[int], lockstep: bool) -> str:
    """Who keeps the others waiting, if that can be known."""
    if silent:
        kept = "the others wait for it" if lockstep else "no other rank need wait for it"
        return f"{_named(silent)} {'does' if len(silent) == 1 else 'do'} not answer; {kept}"
    if not lockstep or len(told) < 2:
        return ""
    first = min(part.place.order for part in told.values())
    behind = [rank for rank, part in told.items() if part.place.order == first]
    if len(behind) == len(told):
        return "all ranks are at the same place: what they wait for is outside (network, disk)"
    waiting = [rank for rank in told if rank not in behind]
    return f"{_named(waiting)} wait{'s' if len(waiting) == 1 else ''} for {_named(behind)}"


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def save(text: str, run_dir: Path | None, rank: int) -> Path | None:
    """Write a report into the folder of a run; None if there is none, or it cannot be written."""
    if run_dir is None:
        return None
    path = run_dir / f"stuck-{time.strftime('%Y%m%d-%H%M%S')}-rank{rank}.txt"
    unfinished = path.with_name(f".{path.name}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError:  # the disk may be what everybody waits for: stderr has it, too
        return None
    return path
