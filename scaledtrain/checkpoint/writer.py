"""Writes checkpoints, one at a time: every rank its part, rank 0 the name when all are there."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaledtrain.checkpoint.folder import Manifest, name_of, prune, seal
from scaledtrain.checkpoint.policy import Checkpointing
from scaledtrain.comm.protocols import Board
from scaledtrain.errors import CheckpointError

if TYPE_CHECKING:
    from scaledtrain.checkpoint.part import Owner

__all__ = ["Writer"]

_logger = logging.getLogger(__name__)

_WRITTEN, _FAILED, _NAMED = 1, 2, 3
_STATUS = 4  # a word on the board is 4 x the number of the checkpoint + a status


@dataclass
class _Saving:
    """A checkpoint that is being written."""

    number: int
    step: int
    folder: Path
    evaluation: Mapping[str, float]
    own: Future[None]
    is_told: bool = False
    naming: Future[None] | None = None


class Writer:
    """Writes checkpoints of all ranks together.

    A crash loses what is being written; every checkpoint that has its name is whole.

    Args:
        options: what is kept, and whether training waits.
        folder: where they go; the same on all ranks.
        session: a word that no other run in this folder has.
        board: where the ranks say what they have written; nobody else writes on it.
        owner: of the state: this rank.
        facts: for the manifest.
        survives: a checkpoint without the part of a rank that died is one, since the others go on.
    """

    def __init__(
        self,
        options: Checkpointing,
        folder: Path,
        session: str,
        board: Board,
        owner: Owner,
        facts: Mapping[str, Any],
        survives: bool,
    ) -> None:
        self._options = options
        self._folder = folder
        self._session = session
        self._rank = owner.rank
        self._board = board
        self._owner = owner
        self._facts = facts
        self._survives = survives
        self._number = 0
        self._saving: _Saving | None = None
        self._pool = ThreadPoolExecutor(1, "checkpoint") if options.asynchronous else None

    def begin(self, step: int, state: Any, evaluation: Mapping[str, float]) -> None:
        """Begin to write; unless it is asynchronous it is over when this returns. Collective.

        Args:
            step: of this rank; the checkpoint is named after rank 0's.
            state: of this rank; nobody may change its tensors any more.
            evaluation: the last one's values.

        Raises:
            CheckpointError: this one, or the last one that was asynchronous, could not be written,
                and ``on_failure`` is ``"end"``.
        """
        self.finish()
        self._number += 1
        from scaledtrain.checkpoint.part import Part  # DCP takes a second to import

        part = Part(self._owner, state)
        folder = self._folder / f".writing-{self._session}-{self._number}"

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            part.write(folder)

        self._saving = _Saving(self._number, step, folder, evaluation, self._run(write))
        if self._pool is None:
            self.finish()

    def _run(self, work: Callable[[], None]) -> Future[None]:
        if self._pool is not None:
            return self._pool.submit(work)
        done: Future[None] = Future()
        try:
            work()
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        return done

    def finish(self) -> None:
        """Wait until what is being written is over on all ranks."""
        if self._saving is not None:
            self._saving.own.exception()
            self.progress()
        if self._saving is not None:
            doing = f"the checkpoint of step {self._saving.step}"
            if self._rank == 0:
                self._board.wait(lambda words: not self._missing(words), doing)
                self.progress()
                if self._saving is not None and self._saving.naming is not None:
                    self._saving.naming.exception()
                    self.progress()
            else:
                self._board.wait(lambda words: self._verdict(words) is not None, doing)
                self.progress()

    def progress(self) -> None:
        """Do what can be done by now; it never waits."""
        saving = self._saving
        if saving is None or not saving.own.done():
            return
        if not saving.is_told:
            saving.is_told = True
            error = saving.own.exception()
            if error is not None:
                _logger.error("rank %d cannot write its part: %s", self._rank, error)
            self._tell(_FAILED if error is not None else _WRITTEN)
        if self._rank == 0:
            self._name(saving)
        verdict = self._verdict(self._board.read())
        if verdict is not None and (self._rank > 0 or saving.naming is not None):
            self._saving = None
            if verdict == _FAILED:
                self._failed(saving)

    def _name(self, saving: _Saving) -> None:
        """Of rank 0: when all parts are there, give the checkpoint its name."""
        words = self._board.read()
        if saving.naming is None:
            if self._missing(words):
                return
            mine = _STATUS * saving.number
            failed = [
                f"rank {rank} could not write its part" if word >= 0 else f"rank {rank} was lost"
                for rank, word in enumerate(words)
                if word == mine + _FAILED or (word < 0 and not self._survives)
            ]
            there = [rank for rank, word in enumerate(words) if word >= 0]
            saving.naming = self._run(lambda: self._commit(saving, there, failed))
        if saving.naming.done():
            error = saving.naming.exception()
            if error is not None:
                _logger.error("the checkpoint of step %d is not kept: %s", saving.step, error)
            self._tell(_FAILED if error is not None else _NAMED)

    def _commit(self, saving: _Saving, ranks: Sequence[int], failed: Sequence[str]) -> None:
        try:
            if failed:
                raise CheckpointError(failed[0])
            from scaledtrain.checkpoint.part import files_of

            files = {name: f for rank in ranks for name, f in files_of(saving.folder, rank).items()}
            seal(
                saving.folder,
                Manifest(
                    saving.step,
                    ranks,
                    files,
                    self._owner.pieces,
                    self._owner.stages,
                    saving.evaluation,
                    self._facts,
                ),
            )
        except BaseException:
            shutil.rmtree(saving.folder, ignore_errors=True)
            raise
        try:
            prune(self._folder, self._options.kept)
        except OSError as error:  # there is one too many: nothing is lost
            _logger.warning("an old checkpoint in %s cannot be removed: %s", self._folder, error)

    def _missing(self, words: Sequence[int]) -> list[int]:
        """The ranks that have not said yet whether their part is written."""
        first = _STATUS * self._number + _WRITTEN
        return [rank for rank, word in enumerate(words) if 0 <= word < first]

    def _verdict(self, words: Sequence[int]) -> int | None:
        """What has become of the checkpoint, if that is known."""
        status = words[0] - _STATUS * self._number
        if words[0] < 0 or status == _FAILED:
            return _FAILED
        return _NAMED if status >= _NAMED else None

    def _tell(self, status: int) -> None:
        self._board.write(_STATUS * self._number + status)

    def _failed(self, saving: _Saving) -> None:
        text = (
            f"the checkpoint of step {saving.step} could not be written to {self._folder} (the log "
            "of the rank that could not says why); those before it are intact. Make room there, or "
            "set checkpointing.folder"
        )
        if self._options.on_failure == "end":
            raise CheckpointError(text)
        if self._rank == 0:
            _logger.error("%s; training goes on", text)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self._folder / name_of(step)

    def close(self) -> None:
        """Wait for this rank's own writing only."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
