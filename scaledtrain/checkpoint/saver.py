"""When all ranks of a run save it, and that they do it at the same moment."""

from __future__ import annotations

import logging
import secrets
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scaledtrain.checkpoint.folder import clean, saved_steps, set_aside
from scaledtrain.checkpoint.lock import RunLock
from scaledtrain.checkpoint.memory import Memory
from scaledtrain.checkpoint.policy import Checkpointing
from scaledtrain.checkpoint.signals import Preempted, StopRequest
from scaledtrain.checkpoint.writer import Writer
from scaledtrain.comm.protocols import Link
from scaledtrain.copies import Copies, Uncopied
from scaledtrain.disk import replace_file
from scaledtrain.errors import ConfigError
from scaledtrain.launching import Interrupted, tell
from scaledtrain.strategies import Strategy

if TYPE_CHECKING:
    from scaledtrain.checkpoint.part import Owner

__all__ = ["Saver"]

_logger = logging.getLogger(__name__)

_ASKED, _SETTLED, _STOP, _INTERRUPT = 1, 2, 4, 8  # bits of a word; above them the round
_ROUND = 16
_RUN_WORD = "run"  # a file beside the checkpoints
_VOTE_SECONDS = 1.0
_MAX_STEPS_BETWEEN_VOTES = 1000


class Saver:
    """Saves a run while it trains.

    Replicas in lockstep save at the same step, without changing anything. Whether the time has
    come, or a signal, they ask each other about once in a second. Replicas that are in step with no
    other settle first, as at the end of a run, and go on from there: so nothing is on its way when
    the state is taken, and what a server has is all that the workers have made.

    Args:
        options: when, and what is kept.
        folder: of the checkpoints.
        link: to the other ranks.
        strategy: attached.
        goes_on: whether the run goes on from what may be in the folder.
        is_newest: whether that is the newest there is, copies in memory included.
        state: makes a copy of this rank's state, with `copied`.
        evaluation: tells the last evaluation's values.
        owner: this rank.
        agree: whether a rank of this replica says so; all of them ask together.
        facts: for the manifest.
        lock: of the folder, held until this is closed.

    Attributes:
        memory: keeps copies in the memory of hosts; None: nothing does.

    Raises:
        ConfigError: the folder has another run's checkpoints, or cannot be made; or copies in
            memory are asked for of replicas that settle to be saved.
    """

    def __init__(
        self,
        options: Checkpointing,
        folder: Path,
        link: Link,
        strategy: Strategy,
        *,
        goes_on: bool,
        is_newest: bool,
        state: Callable[[], Mapping[str, Any]],
        evaluation: Callable[[], Mapping[str, float]],
        owner: Owner,
        agree: Callable[[bool], bool],
        facts: Mapping[str, Any],
        lock: RunLock,
    ) -> None:
        self._options = options
        self._lock = lock
        if not goes_on and saved_steps(folder):
            raise ConfigError(
                f"{folder} holds the checkpoints of a run already; go on from them with "
                "resume='auto', or give this run another folder"
            )
        self._link = link
        self._agree = agree
        self._folder = folder
        self._strategy = strategy
        self._state = state
        self._copies = Copies() if options.asynchronous else Uncopied()
        self._evaluation = evaluation
        self._rank = link.group.rank
        if self._rank == 0:
            clean(folder)
        words = torch.tensor([secrets.randbits(62), self._run_word(is_newest)], device=link.device)
        link.group.broadcast([words])
        session, run = (f"{word:x}" for word in words.tolist())
        self.memory: Memory | None = None
        if options.memory_every_steps is not None:
            if strategy.settles_to_save:
                raise ConfigError(
                    f"checkpointing.memory_every_steps is {options.memory_every_steps}, but under "
                    f"{strategy} there is no step that all ranks make together; leave it out: who "
                    "is left goes on without a restart there"
                )
            self.memory = Memory(options.memory_folder, run, session, link, owner, facts)
        self._writer = Writer(
            options,
            folder,
            session,
            link.board(),
            owner,
            facts,
            strategy.settles_to_save,
        )
        self._apart = strategy.settles_to_save
        self._board = link.board()
        self._word = 0
        self._round = 0
        self._saved_step: int | None = None
        self._last_step = self._last_copy = 0
        self._max_steps: int | None = None
        self.stop_request = StopRequest()

    def _run_word(self, is_newest: bool) -> int:
        """By which this run's copies in memory are known, on rank 0: a new one for a new course."""
        if self._rank > 0:
            return 0
        path = self._folder / _RUN_WORD
        if self._options.memory_every_steps is None or not is_newest:
            path.unlink(missing_ok=True)  # or a later job would take up what is older by then
        with suppress(OSError, ValueError):
            return int(path.read_text(), 16)
        word = secrets.randbits(62)
        if self._options.memory_every_steps is not None:
            try:
                replace_file(path, f"{word:x}".encode())
            except OSError as error:
                _logger.warning(
                    "%s cannot be written: %s; training goes on, but a later job will not find "
                    "this one's copies in memory",
                    path,
                    error,
                )
        return word

    def resumed(self, step: int | None, is_saved: bool) -> None:
        """What the run has now is the state of this step; None: it begins, or is another's.

        Checkpoints in the folder that are not older are set aside, or they would be the newest,
        which stay, and this run's would go.

        Args:
            step: of this run.
            is_saved: there is a checkpoint of it in the folder.
        """
        self._saved_step = step if is_saved else None
        if self._rank == 0:
            set_aside(self._folder, after=-1 if step is None else step)

    def went_back(self, step: int) -> None:
        """The run is at this step again; what it saved since is set aside, as it is another's."""
        self._writer.finish()
        if self._saved_step is not None and self._saved_step > step:
            self._saved_step = None
        self._last_step, self._last_copy = min(self._last_step, step), min(self._last_copy, step)
        if self._rank == 0:
            set_aside(self._folder, after=step)
        if self.memory is not None:
            self.memory.forget_after(step)

    def start(self, max_steps: int | None) -> None:
        """A fit begins; the strategy has been started with this limit."""
        self._max_steps = max_steps
        self._last_step = self._last_copy = self._strategy.step
        self._last_time = self._vote_time = self._link.timeline.now()
        self._since_vote = 0
        self._next_vote = 1

    def after_step(self) -> None:
        """A step has been made, and what follows it: save if it is time.

        Raises:
            Preempted: a signal came to one of the ranks; the run is saved.
            Interrupted: the same, by Ctrl-C.
            CheckpointError: see `Writer.begin`.
        """
        self._writer.progress()
        if self._apart:
            self._save_apart()
        else:
            self._save_in_lockstep()

    def end(self, is_stopping: bool, is_changed: bool) -> None:
        """This replica has made its last step: save, and settle with the others.

        Args:
            is_stopping: it asked the others to end.
            is_changed: updates have been made since that step, which count as none.
        """
        if is_changed:
            self._saved_step = None
        if not self._apart:
            self._save()  # before, so that a run with a later end goes on as if it had none
            self._writer.finish()
            self._forget_copies()
            self._strategy.settle()
            return
        while self._settle():
            self._go_on()
            if is_stopping:
                self._strategy.agree_to_stop(True)
        self._save()
        self._writer.finish()

    def close(self) -> None:
        """Wait for this rank's own writing."""
        self._writer.close()
        self._lock.release()

    def _save_in_lockstep(self) -> None:
        step = self._strategy.step
        now = self._link.timeline.now()
        caught = self._caught()
        late = self._options.is_due_by_time(now - self._last_time)
        if self._link.group.size > 1:
            late, caught = self._vote(late, caught, now)
        # The last step's state is taken before another batch is read, which may draw at random.
        is_last = self._max_steps is not None and step >= self._max_steps
        by_steps = self._options.is_due_by_steps(step, self._last_step)
        if late or caught or by_steps or is_last:
            self._save()
        elif self.memory is not None and self._options.is_copied(step, self._last_copy):
            self._last_copy = step
            with Uncopied():  # written when it returns
                self.memory.keep(step, self._state(), self._evaluation())
        if caught:
            self._leave(caught)

    def _vote(self, late: bool, caught: int, now: float) -> tuple[bool, int]:
        """What any rank wants; all ask after the same steps, about once in a second."""
        self._since_vote += 1
        if self._since_vote < self._next_vote:
            return False, 0
        step_seconds = (now - self._vote_time) / self._since_vote
        votes = torch.tensor(
            [float(late), float(caught), step_seconds],
            dtype=torch.float64,
            device=self._link.device,
        )
        self._link.group.all_reduce([votes], "max").wait()
        any_late, any_caught, slowest = votes.tolist()
        steps = int(_VOTE_SECONDS / max(slowest, 1e-9))
        self._next_vote = min(max(steps, 1), _MAX_STEPS_BETWEEN_VOTES)
        self._since_vote, self._vote_time = 0, now
        return bool(any_late), int(any_caught)

    def _caught(self) -> int:
        number = self.stop_request.caught
        return 0 if number is None else _INTERRUPT if number == signal.SIGINT else _STOP

    def _save_apart(self) -> None:
        words = self._board.read()
        if caught := self._caught():
            self._write(_ASKED | caught)
        elif self._rank == min(rank for rank, word in enumerate(words) if word >= 0):
            seconds = self._link.timeline.now() - self._last_time
            if self._options.is_due_by_steps(
                self._strategy.step, self._last_step
            ) or self._options.is_due_by_time(seconds):
                self._write(_ASKED)
        if self._agree(bool(self._word & _ASKED) or any(self._asks(word) for word in words)):
            self._settle()
            self._go_on()

    def _settle(self) -> bool:
        """Wait for all replicas; whether one has asked to save. A signal that it told ends all."""
        self._write(_SETTLED)
        self._strategy.settle()
        self._board.wait(self._all_settled, "the end of a round")
        words = self._board.read()
        mine = [word for word in words if word // _ROUND == self._round]
        for caught in (_INTERRUPT, _STOP):
            if any(word & caught for word in mine):
                self._save()
                self._leave(caught)
        asked = any(self._asks(word) for word in words)
        if asked:
            self._save()
        return asked

    def _go_on(self) -> None:
        self._round += 1
        self._word = 0
        self._write(0)
        self._strategy.start(self._max_steps)

    def _all_settled(self, words: Sequence[int]) -> bool:
        return all(
            word < 0
            or word // _ROUND > self._round
            or (word // _ROUND == self._round and word & _SETTLED)
            for word in words
        )

    def _asks(self, word: int) -> bool:
        """Whether to save in this round; who is in the next one already knows that it was so."""
        of = word // _ROUND
        return of > self._round or (of == self._round and bool(word & _ASKED))

    def _write(self, bits: int) -> None:
        self._word |= bits
        self._board.write(self._round * _ROUND + self._word)

    def _save(self) -> None:
        step = self._strategy.step
        if self._apart or step != self._saved_step:  # apart, others may have got on meanwhile
            self._writer.finish()  # it has the memory of the last copy
            with self._copies:
                state = self._state()
            self._writer.begin(step, state, self._evaluation())
            self._saved_step = step
        self._last_step, self._last_time = step, self._link.timeline.now()

    def _forget_copies(self) -> None:
        """Unless the disk was full, and they are the newest that there is."""
        if self.memory is not None and self._writer.path(self._strategy.step).is_dir():
            self.memory.remove()

    def _leave(self, caught: int) -> None:
        self._writer.finish()
        self._forget_copies()
        step = self._strategy.step
        text = f"saved at step {step} in {self._writer.path(step)}; resume with resume=auto"
        if caught == _INTERRUPT:
            raise Interrupted(f"interrupted; {text}")
        if self._rank == 0:
            tell(text)
        raise Preempted(step)
