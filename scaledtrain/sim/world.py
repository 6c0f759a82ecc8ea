"""A cluster in virtual time: one rank runs at a time, the one whose clock is earliest.

Each rank is a greenlet, a function that can stop in the middle of any call and go on later, all in
one thread. What a rank computes takes no virtual time by itself; time passes where it sleeps, and
where it waits for something that another rank does, or for a message. So the order of events
follows from the costs and the seed alone, however fast the host is.
"""

from __future__ import annotations

import copy
import heapq
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from greenlet import GreenletExit, getcurrent, greenlet

from scaledtrain.errors import DeadlockError

__all__ = ["Rank", "World"]

_logger = logging.getLogger(__name__)

_MAX_NAMED = 8  # ranks that an error names

Action = Callable[[], object]


class Rank:
    """What runs in the name of one rank: its program, or an errand beside it.

    Args:
        world: where it lives.
        number: of the rank.
        errand: it is no program, and has no random generators of its own.

    Attributes:
        number: of the rank.
        alive: it has been started, and neither ended nor died.
        doing: what it waits in, for messages; None: it runs, or sleeps.
    """

    def __init__(self, world: World, number: int, errand: bool = False) -> None:
        self._world = world
        self._errand = errand
        self.number = number
        self.alive = False
        self.doing: Callable[[], str] | str | None = None
        self._greenlet: greenlet | None = None
        self._errands: list[Rank] = []
        self.generators: _Generators | None = None

    def start(self, program: Action) -> None:
        """Let a function run in this rank's name, from now on; once."""
        self._set_alive(True)
        self._greenlet = greenlet(lambda: self._main(program), parent=self._world.hub)
        self._world.at(self._world.now, self.number, self._greenlet.switch)

    def begin_errand(self, errand: Action) -> None:
        """Let a function run beside this rank's program; it dies with the rank."""
        beside = Rank(self._world, self.number, errand=True)
        self._errands = [one for one in self._errands if one.alive]
        self._errands.append(beside)
        beside.start(errand)

    def _main(self, program: Action) -> None:
        torch.set_grad_enabled(True)
        self._take_over()
        try:
            program()
        except GreenletExit:
            pass
        except BaseException as error:
            self._world.fail(self, error)
        finally:
            self._set_alive(False)

    def kill(self) -> None:
        """End it where it is; only from outside, while it waits or sleeps."""
        self._set_alive(False)
        dying, self._greenlet = self._greenlet, None
        if dying is not None and not dying.dead:
            dying.throw(GreenletExit)
        for errand in self._errands:
            errand.kill()

    def _set_alive(self, alive: bool) -> None:
        if not self._errand:
            self._world.n_alive += alive - self.alive
        self.alive = alive

    def sleep_until(self, moment: float) -> None:
        """Return at that moment."""
        world = self._world
        if moment <= world.now:
            return
        self._end_if_killed()
        if world.is_next(moment, self.number):  # nobody else does anything before
            world.now = moment
            return
        world.at(moment, self.number, getcurrent().switch)
        self._leave()

    def wait(self, doing: Callable[[], str] | str) -> None:
        """Return when another one has called `wake`.

        Args:
            doing: what this rank waits for, to be told if nobody ever wakes it.
        """
        self._end_if_killed()
        self.doing = doing
        self._leave()

    def _end_if_killed(self) -> None:
        """What a program does as it dies, in a ``finally``, cannot take time any more."""
        if self._greenlet is None:
            raise GreenletExit

    def wake(self, moment: float | None = None) -> None:
        """Let it go on, now or at a moment to come; it must be waiting, or have been killed."""
        self.doing = None
        world = self._world
        if self._greenlet is not None:
            moment = world.now if moment is None else moment
            world.at(moment, self.number, self._greenlet.switch)

    def go_on(self) -> None:
        """As `wake`, now: at once, if nobody runs but what happens between the ranks."""
        if getcurrent() is self._world.hub and self._greenlet is not None:
            self.doing = None
            self._greenlet.switch()
        else:
            self.wake()

    def _leave(self) -> None:
        """Let others run; what belongs to the thread is this rank's again afterwards."""
        gradients = torch.is_grad_enabled()
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                self._world.hub.switch()
        else:
            self._world.hub.switch()
        if torch.is_grad_enabled() is not gradients:
            torch.set_grad_enabled(gradients)
        self._take_over()

    def _take_over(self) -> None:
        self._world.running = self
        if not self._errand:
            self._world.take_generators(self)


class World:
    """Ranks on one clock, and what is to happen when.

    Args:
        size: ranks.
        own_generators: each rank has global random generators (Python's, NumPy's, torch's on the
            CPU) of its own, as in a process of its own; they are exchanged when ranks take turns.
            All begin as they are when `run` is called.

    Attributes:
        now: virtual seconds since the beginning.
        ranks: all of them; one that came back is a new one.
        running: who runs now, or ran last.
        n_alive: ranks whose program runs.
    """

    def __init__(self, size: int, own_generators: bool = True) -> None:
        self.now = 0.0
        self.hub = getcurrent()
        self.ranks = [Rank(self, number) for number in range(size)]
        self.running = self.ranks[0]
        self.n_alive = 0
        self._events: list[tuple[float, int, int, Action]] = []
        self._count = 0
        self._owner: Rank | None = None
        self._own_generators = own_generators
        self._before: _Generators | None = None
        self._failure: BaseException | None = None
        self._on_stall: list[Callable[[], bool]] = []

    def at(self, moment: float, rank: int, action: Action) -> None:
        """Do something at a moment; of two at the same one the lower rank's is first."""
        self._count += 1
        heapq.heappush(self._events, (moment, rank, self._count, action))

    def is_next(self, moment: float, rank: int) -> bool:
        """Whether nothing happens before what that rank does at that moment."""
        return not self._events or (moment, rank) < self._events[0][:2]

    def on_stall(self, look: Callable[[], bool]) -> None:
        """Ask this when nothing is left to happen; true: it has found something."""
        self._on_stall.append(look)

    def fail(self, rank: Rank, error: BaseException) -> None:
        """That rank's program raised: the simulation ends with this error."""
        if self._failure is None:
            self._failure = error
            if isinstance(error, Exception):  # Ctrl-C is of no rank
                _logger.error("simulated rank %d raised at %g s: %r", rank.number, self.now, error)

    def run(self) -> None:
        """Let everything happen, until every rank has ended or died.

        Raises:
            DeadlockError: ranks wait, and nothing will ever wake them.
            Exception: whatever a rank's program raised first; the log says on which rank.
        """
        with self._separate():
            try:
                self._loop()
            finally:
                for rank in self.ranks:
                    rank.kill()
                self._events.clear()

    def _loop(self) -> None:
        events = self._events
        while self.n_alive:
            if events:
                self.now, _, _, action = heapq.heappop(events)
                action()
                if self._failure is not None:
                    raise self._failure
            elif not any(look() for look in self._on_stall):
                self._raise_deadlock()

    def _raise_deadlock(self) -> None:
        waiting = [rank for rank in self.ranks if rank.alive]
        told = "; ".join(f"rank {rank.number} {_said(rank.doing)}" for rank in waiting[:_MAX_NAMED])
        more = f"; and {len(waiting) - _MAX_NAMED} more" if len(waiting) > _MAX_NAMED else ""
        gone = [str(rank.number) for rank in self.ranks if not rank.alive]
        if gone:
            named = ", ".join(gone[:_MAX_NAMED]) + (", ..." if len(gone) > _MAX_NAMED else "")
            more += f". Already ended: rank{'s' if len(gone) > 1 else ''} {named}"
        raise DeadlockError(
            f"at {self.now:g} virtual seconds nobody can go on, and nothing is under way: {told}"
            f"{more}. On real machines they would wait until a timeout: look at who waits for whom"
        )

    def take_generators(self, rank: Rank) -> None:
        """Let the global random generators be those of this rank."""
        if self._own_generators and self._owner is not rank:
            if self._owner is not None and self._owner.generators is not None:
                self._owner.generators.keep()
            if rank.generators is None:
                assert self._before is not None
                rank.generators = self._before.copy()
            rank.generators.install()
            self._owner = rank

    @contextmanager
    def _separate(self) -> Iterator[None]:
        """What the ranks do to the generators and to the mode of gradients ends with the run."""
        gradients = torch.is_grad_enabled()
        if self._own_generators:
            self._before = _Generators(np.random.mtrand.get_bit_generator())
        try:
            yield
        finally:
            torch.set_grad_enabled(gradients)
            if self._before is not None:
                self._before.install()
            self._owner = None


class _Generators:
    """The global random generators, as they are for one rank.

    Args:
        numpy: NumPy's; the states of the others are taken from what they are now.
    """

    def __init__(self, numpy: Any) -> None:
        self._numpy = numpy
        self.keep()

    def copy(self) -> _Generators:
        """Others in the same state, that go on by themselves."""
        copied = copy.copy(self)
        copied._numpy = copy.deepcopy(self._numpy)
        return copied

    def keep(self) -> None:
        """Take note of the states now; NumPy's is kept by the generator itself."""
        self._torch = torch.get_rng_state()
        self._python = random.getstate()

    def install(self) -> None:
        """Go on from there."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.mtrand.set_bit_generator(self._numpy)


def _said(doing: Callable[[], str] | str | None) -> str:
    if doing is None:
        return "has stopped outside any wait"
    return f"waits {doing if isinstance(doing, str) else doing()}"
