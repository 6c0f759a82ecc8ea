"""Ends a job of which a rank gets no further, with a report of where each rank is."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from scaledtrain.comm.notes import Notes
from scaledtrain.launching import STUCK, tell
from scaledtrain.watch.policy import Watch
from scaledtrain.watch.position import Position
from scaledtrain.watch.report import Part, compose, compose_alone, save, stacks

__all__ = ["Watchdog", "round_seconds"]

_logger = logging.getLogger(__name__)

_ROUND_SECONDS = 1.0  # between two looks
_LEAST_SECONDS = 10.0  # of a limit in multiples: below it is the noise of a busy host
_ANSWER_SECONDS = 2.0  # for the other ranks to tell where they are
_DISK_SECONDS = 2.0  # to write the report
_STORE_SECONDS = 5.0  # for all that is done over the store
_LEAVE_SECONDS = 0.5  # that rank 0, which may have the store, stays for the others
_POLL_SECONDS = 0.02
_IN_C_SECONDS = 30.0  # beyond twice the limit
_THREADS = ("watchdog", "watch-report", "watch-notes")


def round_seconds(options: Watch) -> float:
    """Between two looks at what ranks do."""
    return min(_ROUND_SECONDS, (options.step_seconds or 10 * _ROUND_SECONDS) / 10)


class Watchdog:
    """Watches one rank from a thread; one more thread, a `Messenger`, calls `exchange`.

    Each rank looks at its own progress, at an alarm of any rank, and at whether the next rank still
    reports: so a rank whose process is stopped is found by another one, at the same cost however
    many there are. The rank that is first to raise the alarm writes the report from what all tell
    within 2 s. Where the store does not answer, since the rank that has it is stuck, each tells
    about itself. A thread that holds Python's lock in C code for twice the limit and 30 s ends the
    process by ``faulthandler``, which shows the stacks (exit code 1).

    Args:
        options: the limits.
        position: of this rank.
        notes: between the ranks.
        run_dir: where the report goes, besides stderr.
        lockstep: whether all ranks make the same steps, so that none can go on without another.
    """

    def __init__(
        self,
        options: Watch,
        position: Position,
        notes: Notes,
        run_dir: Path | None,
        lockstep: bool,
    ) -> None:
        self._options = options
        self._position = position
        self._notes = notes
        self._run_dir = run_dir
        self._lockstep = lockstep
        self._seconds = round_seconds(options)
        self._over = threading.Event()
        self._awake_since = time.monotonic()
        self._beat = 0
        self._next = (notes.rank + 1) % notes.size
        self._next_beat: tuple[str | None, float] = (None, time.monotonic())
        self._heard: str | None = None  # why another rank, or the messenger, raises the alarm
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The run is over, also for the other ranks: the `Messenger` tells them in its last round.

        Call it before that is closed.
        """
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    # --- in the watchdog's thread -------------------------------------------------------------

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._seconds):
            now = time.monotonic()
            if now - last > 2 * self._seconds + 1.0:  # the whole process was stopped meanwhile
                self._awake_since = now
            last = now
            limit = self._limit()
            if limit is not None:
                faulthandler.dump_traceback_later(2 * limit + _IN_C_SECONDS, exit=True, file=2)
            else:  # that of a step is not for what comes after it
                faulthandler.cancel_dump_traceback_later()
            reason = self._own_reason(now, limit) or self._heard
            if reason is not None:
                faulthandler.cancel_dump_traceback_later()
                self._report(reason)
                _end(STUCK)
                return

    def _limit(self) -> float | None:
        """For the stage that this rank is in."""
        limits = [self._options.step_seconds]
        usual, place = self._position.usual_seconds, self._position.place
        # Out of lockstep one may wait for another that evaluates alone, which takes no usual time.
        is_own = place.in_step and (self._lockstep or place.stage != "pull")
        if self._options.step_times is not None and usual and is_own:
            limits.append(max(self._options.step_times * usual, _LEAST_SECONDS))
        return min((limit for limit in limits if limit is not None), default=None)

    def _own_reason(self, now: float, limit: float | None) -> str | None:
        place = self._position.place
        seconds = now - max(place.began, self._awake_since)
        if limit is None or seconds <= limit:
            return None
        what = f"step {place.step + 1}" if place.in_step else f"{place.stage!r}"
        where = f", in {place.stage!r}" if place.in_step else ""
        return (
            f"watchdog: {what} of rank {self._notes.rank} has taken {seconds:.1f} s{where}; the "
            f"limit is {limit:.1f} s"
        )

    def _report(self, reason: str) -> None:
        own = self._part(stacks(_THREADS))
        told = threading.Event()
        # In a thread, since a store whose process is stopped never answers.
        thread = threading.Thread(
            target=self._tell_all, args=(reason, own, told), name="watch-report", daemon=True
        )
        thread.start()
        thread.join(_STORE_SECONDS)
        if not told.is_set():
            self._show(compose_alone(reason, self._notes.rank, own))

    def _tell_all(self, reason: str, own: Part, told: threading.Event) -> None:
        notes = self._notes
        with suppress(RuntimeError, dist.DistError):
            first = notes.first("alarm", f"{notes.rank} {reason}")
            notes.write(f"part/{notes.rank}", own.to_json())
            if first.split(" ", 1)[0] == str(notes.rank):
                self._collect(reason)
                notes.write("told", "1")
                told.set()
            elif self._wait_for("told", _STORE_SECONDS - 1.0):
                told.set()
            if notes.rank == 0 and notes.size > 1:
                time.sleep(_LEAVE_SECONDS)

    def _collect(self, reason: str) -> None:
        notes, deadline = self._notes, time.monotonic() + _ANSWER_SECONDS
        texts: dict[int, str] = {}
        for rank in range(notes.size):
            if (text := self._wait_for(f"part/{rank}", deadline - time.monotonic())) is not None:
                texts[rank] = text
        last = {r: notes.read(f"beat/{r}") for r in range(notes.size) if r not in texts}
        self._show(
            compose(
                reason,
                {rank: Part.from_json(text) for rank, text in texts.items()},
                {r: Part.from_json(t.split(" ", 1)[1]) for r, t in last.items() if t},
                notes.size,
                self._lockstep,
            )
        )

    def _wait_for(self, name: str, seconds: float) -> str | None:
        deadline = time.monotonic() + seconds
        while (text := self._notes.read(name)) is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return text

    def _show(self, text: str) -> None:
        """First where it needs no disk, which may be what everybody waits for."""
        tell(text)
        paths: list[Path | None] = []
        saving = threading.Thread(
            target=lambda: paths.append(save(text, self._run_dir, self._notes.rank)),
            name="watch-report",
            daemon=True,
        )
        saving.start()
        saving.join(_DISK_SECONDS)
        if any(paths):
            tell(f"(this is also in {paths[0]})\n")

    def _part(self, stacks: str = "") -> Part:
        place = self._position.place
        return Part(place, time.monotonic() - place.since, stacks)

    # --- in the messenger's -------------------------------------------------------------------

    def exchange(self) -> None:
        """Report that this rank is alive, and look at others."""
        notes = self._notes
        self._beat += 1
        mark = "over" if self._over.is_set() else str(self._beat)
        notes.write(f"beat/{notes.rank}", f"{mark} {self._part().to_json()}")
        if mark == "over":
            return
        if (alarm := notes.read("alarm")) is not None:
            self._heard = alarm.split(" ", 1)[1]
        if notes.size > 1:
            self._look_at_next()

    def _look_at_next(self) -> None:
        now = time.monotonic()
        beat, since = self._next_beat
        found = self._notes.read(f"beat/{self._next}")
        if found != beat:
            self._next_beat = (found, now)
            return
        limit = self._limit()
        silent = now - max(since, self._awake_since)
        if limit is None or silent <= limit or (found is not None and found.startswith("over")):
            return
        reason = (
            f"watchdog: rank {self._next} has not reported to rank {self._notes.rank} for "
            f"{silent:.1f} s; the limit is {limit:.1f} s"
        )
        if self._lockstep:
            self._heard = reason
        else:
            _logger.warning("%s; the others go on without it", reason)
            self._next_beat = (found, now)


def _end(code: int) -> None:
    """End this process: its main thread is stuck, and would never see an exception."""
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(code)
