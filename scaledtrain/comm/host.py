"""A server among threads: one lock, and a condition on which workers wait that may not go on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scaledtrain.comm.protocols import Pulled
from scaledtrain.errors import ClusterError, WaitTimeoutError
from scaledtrain.server import Pushed, Server
from scaledtrain.timeline import Timeline

__all__ = ["DirectStore", "ServerHost"]

_logger = logging.getLogger(__name__)

_NO_PUSH = Pushed(False, -1)
_MAX_FAULTS = 100  # in a row: then no good gradient is to be expected any more


class ServerHost:
    """Lets the threads that speak for the workers call one `Server`, each for its worker.

    Args:
        server: the pure state machine; nothing else may touch it.
        timeout_seconds: the longest that a worker may be kept waiting.
    """

    def __init__(self, server: Server, timeout_seconds: float) -> None:
        self._server = server
        self._timeout_seconds = timeout_seconds
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._stopped = False
        self._last_push = [_NO_PUSH] * server.n_workers
        self._speeds = [0.0] * server.n_workers
        self._faults = 0
        self._here: set[int] = set()
        self._meetings = 0

    def push(
        self, worker: int, gradient: Sequence[Tensor], version: int, speed: float = 0.0
    ) -> None:
        """Hand a gradient to the server; wakes the workers that it sets free."""
        with self._changed:
            self._raise_failure()
            self._speeds[worker] = speed
            try:
                pushed = self._last_push[worker] = self._server.push(worker, gradient, version)
            except Exception as error:
                self.fail(error)
                raise
            if pushed.fault is None:
                self._faults = 0
            else:
                self._count_fault(pushed.fault)
            self._changed.notify_all()

    def skip(self, worker: int) -> None:
        """Count a step of the worker that had no gradient."""
        with self._changed:
            self._raise_failure()
            self._server.skip(worker)
            self._changed.notify_all()

    def pull(self, worker: int, into: Sequence[Tensor]) -> Pulled:
        """Copy the parameters out as soon as the worker may go on."""
        with self._changed:
            self._wait(worker, "pull", lambda: self._stopped or self._server.may_go_on(worker))
            return self._copy_out(worker, into, self._server.pull(worker))

    def limit(self, last_version: int | None) -> None:
        """Make no update beyond this version."""
        with self._changed:
            self._server.last_version = last_version
            self._changed.notify_all()

    def stop(self) -> None:
        """Tell every worker at its next pull that the run is over."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def settle(self, worker: int, into: Sequence[Tensor]) -> Pulled:
        """Wait until all workers are here, take the final parameters, go on when all have them."""
        with self._changed:
            self._server.remove(worker)  # those that still compute need not wait for it
            self._changed.notify_all()
            self._meet(worker)
            pulled = self._copy_out(worker, into, self._server.parameters)
            self._stopped = False
            self._server.add(worker)
            # Else a fast worker could begin its next run while a slow one still copies.
            self._meet(worker)
            return pulled

    def _meet(self, worker: int) -> None:
        """Return when all workers have called this equally often."""
        self._here.add(worker)
        mine = self._meetings
        if len(self._here) == self._server.n_workers:
            self._here.clear()
            self._meetings += 1
            self._changed.notify_all()
        self._wait(worker, "the end of fit", lambda: self._meetings > mine)

    def state_dict(self) -> dict[str, Any]:
        """The server's state between two pushes."""
        with self._changed:
            return self._server.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; all workers take part again."""
        with self._changed:
            self._server.load_state_dict(state)
            for worker in set(range(self._server.n_workers)) - self._server.members:
                self._server.add(worker)

    def _count_fault(self, fault: str) -> None:
        self._faults += 1
        if self._faults == 1:
            _logger.warning("a gradient was rejected: %s", fault)
        if self._faults >= _MAX_FAULTS:
            self.fail(
                ClusterError(
                    f"the last {_MAX_FAULTS} gradients were all rejected, the latest because of "
                    f"{fault}; lower the learning rate, clip gradients, or look at the data"
                )
            )
            self._raise_failure()

    def fail(self, error: BaseException) -> None:
        """Every call from now on, and every waiting one, raises: the run cannot go on."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _copy_out(self, worker: int, into: Sequence[Tensor], values: Sequence[Tensor]) -> Pulled:
        with torch.no_grad():
            torch._foreach_copy_(list(into), list(values))
        last, self._last_push[worker] = self._last_push[worker], _NO_PUSH  # told once
        return Pulled(
            version=self._server.version,
            staleness=last.staleness,
            learning_rate=self._server.learning_rate,
            stopped=self._stopped or self._server.finished,
            fastest=max((self._speeds[w] for w in self._server.members), default=0.0),
        )

    def _wait(self, worker: int, what: str, ready: Callable[[], bool]) -> None:
        clocks = None
        while not ready() and self._failure is None and clocks != list(self._server.clocks):
            clocks = list(self._server.clocks)  # as long as others make steps, they are only slow
            self._changed.wait_for(lambda: self._failure or ready(), self._timeout_seconds)
        self._raise_failure()
        if not ready():
            steps = ", ".join(f"worker {i}: {c}" for i, c in enumerate(self._server.clocks))
            here = f"; arrived: workers {sorted(self._here)}" if self._here else ""
            raise WaitTimeoutError(
                f"worker {worker} waited {self._timeout_seconds:g} s in {what} for the other "
                f"workers (steps so far: {steps}{here}); one of them is stuck or too slow: "
                "look at the one that is behind, or raise timeout_seconds"
            )

    def _raise_failure(self) -> None:
        if isinstance(self._failure, ClusterError):
            raise self._failure
        if self._failure is not None:
            raise ClusterError(f"the parameter server stopped: {self._failure}") from self._failure


class DirectStore:
    """The store of the worker that lives in the server's own process: plain calls.

    Args:
        host: the server.
        worker: this worker's number.
        timeline: where waiting and communication are recorded.
    """

    def __init__(self, host: ServerHost, worker: int, timeline: Timeline) -> None:
        self._host = host
        self._worker = worker
        self._timeline = timeline

    def push(self, update: Sequence[Tensor], version: int, speed: float = 0.0) -> None:
        """Let the server take the gradient now."""
        start = self._timeline.now()
        self._host.push(self._worker, update, version, speed)
        self._timeline.add("communication", start)

    def pull(self, into: Sequence[Tensor]) -> Pulled:
        """Copy the parameters, when the admission policy says so."""
        start = self._timeline.now()
        pulled = self._host.pull(self._worker, into)
        self._timeline.add("waiting", start)
        return pulled

    def skip(self) -> None:
        """Let the server count a step without a gradient."""
        self._host.skip(self._worker)

    def limit(self, last_version: int | None) -> None:
        """Make no update beyond this version."""
        self._host.limit(last_version)

    def stop(self) -> None:
        """Ask that every worker ends."""
        self._host.stop()

    def settle(self, into: Sequence[Tensor]) -> Pulled:
        """Wait for all workers, then pull."""
        start = self._timeline.now()
        pulled = self._host.settle(self._worker, into)
        self._timeline.add("waiting", start)
        return pulled

    def state_dict(self) -> dict[str, Any]:
        """The server's state."""
        return self._host.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the server's state."""
        self._host.load_state_dict(state)

    def close(self) -> None:
        """Nothing to do: the server needs no message to know."""
