"""Where each rank writes one number for all others to read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.distributed as dist

from scaledtrain.comm.shared_memory import SharedSegment
from scaledtrain.comm.store_client import own_client, reconnected
from scaledtrain.errors import WaitTimeoutError

__all__ = ["SharedBoard", "StoreBoard"]

_POLL_SECONDS = 0.005
_REFRESH_SECONDS = 0.1
_SILENCE_SECONDS = 10.0  # a rank that does not refresh for so long has died
_CLOSE_SECONDS = 3.0
_DEAD = -1


class _Waiting:
    """The wait that both kinds share."""

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self._rank = rank
        self._timeout_seconds = timeout_seconds

    def read(self) -> Sequence[int]:
        raise NotImplementedError

    def wait(self, until: Callable[[Sequence[int]], bool], doing: str) -> None:
        """Return as soon as the words are such that ``until`` is true."""
        words, begin = self.read(), time.monotonic()
        while not until(words):
            time.sleep(_POLL_SECONDS)
            before, words = words, self.read()
            if words != before:
                begin = time.monotonic()
            elif time.monotonic() - begin > self._timeout_seconds:
                listed = ", ".join(f"rank {r}: {w}" for r, w in enumerate(words))
                raise WaitTimeoutError(
                    f"rank {self._rank} waited {self._timeout_seconds:g} s in {doing} for the "
                    f"others, and none of them got on ({listed}); one is stuck or too slow: look "
                    "at the one that is behind, or raise timeout_seconds"
                )


class SharedBoard(_Waiting):
    """A board in memory that all ranks of one host share.

    Args:
        segment: of at least 8 bytes per rank.
        timeout_seconds: the longest wait in which no word changes.
    """

    def __init__(self, segment: SharedSegment, timeout_seconds: float) -> None:
        super().__init__(segment.rank, timeout_seconds)
        self._segment = segment
        self._words = segment.tensor(0, [segment.size], torch.int64).numpy()

    def write(self, word: int) -> None:
        """Replace this rank's word."""
        self._words[self._rank] = word

    def read(self) -> Sequence[int]:
        """The words; -1 of a rank that died."""
        words: list[int] = self._words.tolist()
        processes = self._segment.processes
        return [
            word if rank == self._rank or processes[rank].alive() else _DEAD
            for rank, word in enumerate(words)
        ]

    def close(self) -> None:
        """Leave."""
        self._segment.close()


class StoreBoard(_Waiting):
    """A board in the job's key-value store, for ranks on several hosts.

    A thread writes this rank's word and reads the others' ten times a second; one that has not
    written for ten seconds has died. A lost connection is made again.

    Args:
        store: of this board alone.
        rank: this one.
        size: how many ranks there are.
        timeout_seconds: the longest wait in which no word changes.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_seconds: float) -> None:
        super().__init__(rank, timeout_seconds)
        self._origin = store
        self._store = own_client(store)
        self._size = size
        self._words = [0] * size
        self._beats = [-1] * size
        self._seen = [time.monotonic()] * size
        self._over = threading.Event()
        self._has_store = True
        self._store.set(f"{rank}", "0 0")
        self._thread = threading.Thread(target=self._refresh, name="board", daemon=True)
        self._thread.start()

    def write(self, word: int) -> None:
        """Replace this rank's word; the others see it within a fifth of a second."""
        self._words[self._rank] = word

    def read(self) -> Sequence[int]:
        """The words; -1 of a rank that died."""
        return list(self._words)

    def close(self) -> None:
        """Leave; rank 0, whose process has the store, when the others have left or are silent.

        Where that process is just ending, a new connection to it can be taken and never answered:
        a client then tries for as long as it may wait.
        """
        self._over.set()
        self._thread.join(_CLOSE_SECONDS)
        if self._has_store and not self._thread.is_alive():
            with suppress(RuntimeError, dist.DistError):  # it has gone meanwhile
                self._leave()

    def _leave(self) -> None:
        if self._rank != 0:
            self._store.set(f"{self._rank} left", "")
            return
        end = time.monotonic() + _CLOSE_SECONDS
        others = [f"{rank} left" for rank in range(1, self._size) if self._words[rank] != _DEAD]
        while others and not self._store.check(others) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)

    def _refresh(self) -> None:
        beat, is_over = 0, False
        while not is_over:
            is_over = self._over.wait(_REFRESH_SECONDS)
            beat += 1
            try:
                self._exchange(beat)
            except (RuntimeError, dist.DistError):
                store = None if is_over else reconnected(self._origin)
                if store is None:
                    self._has_store = False
                    break
                self._store = store
        if not is_over and self._rank != 0:  # which has the store, and died
            self._words[0] = _DEAD

    def _exchange(self, beat: int) -> None:
        self._store.set(f"{self._rank}", f"{self._words[self._rank]} {beat}")
        for rank in range(self._size):
            if rank != self._rank and self._words[rank] != _DEAD:
                self._look_at(rank)

    def _look_at(self, rank: int) -> None:
        if not self._store.check([f"{rank}"]):
            return
        word, beat = map(int, self._store.get(f"{rank}").split())
        now = time.monotonic()
        if beat != self._beats[rank]:
            self._beats[rank], self._seen[rank] = beat, now
            self._words[rank] = word
        elif now - self._seen[rank] > _SILENCE_SECONDS:
            self._words[rank] = _DEAD
