"""The times of a run on a virtual cluster, without computing any gradient."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.replica import Replica, Updater
from scaledtrain.sim.cluster import Cluster
from scaledtrain.sim.simulate import simulate
from scaledtrain.strategies.strategy import Strategy
from scaledtrain.timeline import Phase

__all__ = ["SizedReplica", "Times", "WorkerTimes", "simulate_times"]

_BYTES_PER_NUMBER = 4  # fp32
_OF_NO_VALUES = ("meta tensor", "'Meta' backend")  # what torch says of tensors without


@dataclass(frozen=True)
class WorkerTimes:
    """What one worker did."""

    steps: int
    """That it made, with a gradient that was used or not."""
    seconds: Mapping[Phase, float]
    """Where its time went."""
    bytes_sent: int
    staleness: Mapping[int, int]
    """Of its gradients: staleness -> how many had it; empty where there is no such thing."""
    began: float
    """Virtual seconds at which all had their parameters."""
    ended: float
    """... and at which it had the final ones."""


@dataclass(frozen=True)
class Times:
    """What a run of all workers came to.

    Counted is what workers did that were there at the end, each since it came back last; where
    workers die, others did more, which only the server's version tells.
    """

    workers: list[WorkerTimes | None]
    """By rank; None: it died and did not come back in time."""

    @property
    def seconds(self) -> float:
        """Virtual, from the moment at which all had their parameters to the end."""
        there = [worker for worker in self.workers if worker is not None]
        if not there:
            return 0.0
        return max(w.ended for w in there) - min(w.began for w in there)

    @property
    def steps(self) -> int:
        """Gradients that were computed, by all these workers together."""
        return sum(worker.steps for worker in self.workers if worker is not None)

    @property
    def steps_per_second(self) -> float:
        """Of all workers together."""
        return self.steps / self.seconds if self.seconds else 0.0

    @property
    def staleness(self) -> Counter[int]:
        """Of all gradients: staleness -> how many had it."""
        total: Counter[int] = Counter()
        for worker in self.workers:
            total.update(worker.staleness if worker is not None else {})
        return total

    def share(self, phase: Phase) -> float:
        """Which part of the workers' time it took, 0 to 1."""
        told = [worker.seconds for worker in self.workers if worker is not None]
        everything = sum(sum(seconds.values()) for seconds in told)
        return sum(s.get(phase, 0.0) for s in told) / everything if everything else 0.0


class _SizedParameter(nn.Parameter):
    """One whose hooks are called by `SizedReplica.backward`, since nothing is differentiated."""

    hooks: dict[int, Callable[[Tensor], None]]

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        handle = RemovableHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle


class SizedReplica(Replica):
    """A replica of tensors that have shapes but no values (torch's ``meta`` device).

    Its optimizer does nothing. What a strategy decides by values that it makes itself (votes,
    counts) is decided as always.

    Args:
        parameters: on the meta device.
        names: of them.
    """

    def __init__(self, parameters: Sequence[Tensor], names: Sequence[str]) -> None:
        self.names = list(names)
        self._sized = [_SizedParameter(p) for p in parameters]
        self.parameters = list[nn.Parameter](self._sized)
        self.frozen = []
        self._pieces = LocalGroup()
        self._gradients: list[Tensor] = [p.detach() for p in self.parameters]
        for parameter, gradient in zip(self._sized, self._gradients, strict=True):
            parameter.grad = gradient
            parameter.hooks = OrderedDict()

    def backward(self) -> None:
        """Gradients come, those of the last parameters first."""
        for parameter in reversed(self._sized):
            for hook in parameter.hooks.values():
                hook(parameter)

    @property
    def buffers(self) -> list[Tensor]:
        """None."""
        return []

    @property
    def device(self) -> torch.device:
        """Where a strategy makes what has values."""
        return torch.device("cpu")

    def updater(
        self,
        parameters: Sequence[nn.Parameter] | None = None,
        names: Sequence[str] | None = None,
    ) -> Updater:
        """One that changes nothing."""
        return _NoUpdater()

    def gradients(self) -> list[Tensor]:
        """As large as the parameters."""
        return self._gradients


class _NoUpdater(Updater):
    """Makes updates that change nothing."""

    has_schedule = False
    learning_rate = 0.0

    def __init__(self) -> None:
        self.optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0)

    def step(self, scale: float = 1.0) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def simulate_times(
    make_strategy: Callable[[], Strategy],
    cluster: Cluster,
    workers: int,
    *,
    max_steps: int,
    parameters: nn.Module | int,
    seed: int = 0,
) -> Times:
    """How long a run takes, where the time goes, and how stale gradients are.

    Strategy, server and policies are those of real runs; the parameters have sizes but no values,
    and nothing is computed, so that tens of thousands of workers, or of gigabytes, cost nothing.
    Workers have as much data as they ask for, and a step is one microbatch. What decides by values
    of gradients cannot be simulated so: a correction that looks at them, an overflow, the mean of
    what `TopK` or `Sign` leave of them under `Sync`.

    Args:
        make_strategy: called once for each worker.
        cluster: what everything costs.
        workers: how many.
        max_steps: as `Trainer.fit` has it: updates of the parameters.
        parameters: a model, of which only the shapes of the trainable parameters are used (make it
            under ``torch.device("meta")`` if it is large), or how many bytes of fp32 parameters.
        seed: of all times that are drawn.

    Raises:
        ConfigError: the cluster has no room for so many workers, or no bytes; the strategy needs
            values.
        DeadlockError: workers wait for each other for ever.

    Example:
        A step of `Sync` on 8 workers over 1 Gb/s: 0.1 s of computing, then a ring all-reduce of
        125 MB, 2 * 7/8 * 1 s.

        >>> from scaledtrain import Sync
        >>> from scaledtrain.sim import Cluster, Constant, Nic, Topology, Wire
        >>> card = Nic(Wire(latency_seconds=0.0, gigabits_per_second=1.0))
        >>> cluster = Cluster(Constant(0.1), Topology(nic=card, algorithm="ring"))
        >>> times = simulate_times(Sync, cluster, 8, max_steps=10, parameters=125_000_000)
        >>> round(times.seconds, 6), round(times.share("compute"), 3)
        (18.5, 0.054)
    """
    if isinstance(parameters, int):
        if parameters < _BYTES_PER_NUMBER:
            raise ConfigError(f"parameters is {parameters} bytes; it is at least one number's")
        shapes = {"parameters": torch.empty(parameters // _BYTES_PER_NUMBER, device="meta")}
    else:
        trainable = [(n, p) for n, p in parameters.named_parameters() if p.requires_grad]
        shapes = {name: torch.empty_like(p, device="meta") for name, p in trainable}

    def program(link: Link) -> WorkerTimes:
        replica = SizedReplica(list(shapes.values()), list(shapes))
        return _run(link, replica, make_strategy(), max_steps, seed)

    try:
        result = simulate(program, cluster, workers, seed=seed, own_generators=False)
    except RuntimeError as error:
        if not any(text in str(error) for text in _OF_NO_VALUES):
            raise
        raise ConfigError(
            "the strategy, or its compression, looks at values of parameters or gradients, which "
            f"there are none of if only times are simulated ({error}); simulate it with real "
            "gradients"
        ) from error
    return Times(result.results)


def _run(
    link: Link, replica: SizedReplica, strategy: Strategy, max_steps: int, seed: int
) -> WorkerTimes:
    """The Trainer's loop, without what needs values."""
    timeline, clock, pace = link.timeline, link.clock, link.pace(seed)
    assert pace is not None
    strategy.attach(replica, link)
    strategy.start(max_steps)
    began = timeline.now()
    timeline.drain()
    sent = link.bytes_sent
    steps, staleness = 0, Counter[int]()
    while True:
        going = strategy.before_forward()
        if strategy.staleness is not None:
            staleness[strategy.staleness] += 1
        if not going:
            break
        start = timeline.now()
        pace.begin_step()
        replica.backward()  # takes no time yet: what begins in it is under way while time passes
        abandon = strategy.abandons if strategy.may_abandon else None
        wanted = clock.sleep_until(start + pace.seconds(0.0, 1.0), abandon)
        timeline.add("compute", start)
        if not wanted:
            continue
        strategy.reduce_gradients()
        strategy.apply_gradients()
        strategy.after_step()
        steps += 1
    strategy.settle()
    seconds, _ = timeline.drain()
    sent = link.bytes_sent - sent
    return WorkerTimes(steps, seconds, sent, staleness, began, timeline.now())
