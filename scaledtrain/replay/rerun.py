"""A run made again from its event log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from scaledtrain.build import settle
from scaledtrain.callbacks import Callback
from scaledtrain.config import TrainConfig
from scaledtrain.data.cut import count_samples
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError, ReplayError
from scaledtrain.evaluation import eval_mode
from scaledtrain.replay.history import History, Life
from scaledtrain.replay.link import ReplayLink
from scaledtrain.replay.player import Arrived, Player
from scaledtrain.replay.recorded import Recorded, read_run
from scaledtrain.replay.results import Push, Replayed
from scaledtrain.schedule import Computed, call_model
from scaledtrain.seeding import kept_generators
from scaledtrain.server.operations import Kind
from scaledtrain.sim.group import Collectives
from scaledtrain.sim.network import Network
from scaledtrain.sim.topology import Topology, Wire
from scaledtrain.sim.world import Rank, World
from scaledtrain.tasks import Task
from scaledtrain.train import run_settled
from scaledtrain.trainer import Trainer

__all__ = ["replay"]

_EVAL_BATCH = 256  # samples at once, where the config does not say


def replay(run_dir: str | Path, on_push: Callable[[Push], bool] | None = None) -> Replayed:
    """Make a run with a server again, from the order of events that it has written down.

    All ranks train in this process, one at a time, with the same Trainer, strategy, data and random
    numbers as before; when a worker pushes or pulls, it waits until the log says that it is its
    turn. So each gradient is computed at the version, and used at the moment, at which it was, and
    the parameters are those of the run, bit for bit, on a CPU of the same type with the same torch.
    Workers that died, were given up or came back do so again; so do those that abandoned work.

    A log that ends early, since the run was killed, is replayed up to its end.

    Left out, and refused where the config shows it: what time decided and no event says. That is
    ``drop_compute`` and ``proportional_steps``; and, with several microbatches in a step and random
    numbers in the model, at which of them `Ringmaster` stopped. Also GPUs, and optimizers on the
    server that draw random numbers. Where a time limit or a target ended the run, the number of
    steps that each worker made is taken from its metrics.

    Args:
        run_dir: the folder of a real or simulated run.
        on_push: called with each push when it has happened; returns whether to go on.

    Returns:
        The parameters at the end, how many events there were, and whether bits are equal.

    Raises:
        ConfigError: it is no such run, the log is damaged, or the config or the data were changed.
        ReplayError: a worker does something else than what the log says.

    Example:
        >>> import tempfile
        >>> from scaledtrain import connect
        >>> from scaledtrain.command_line import compose
        >>> from scaledtrain.train import run
        >>> config = compose(["strategy=async", "max_steps=5", "console=false"])
        >>> with tempfile.TemporaryDirectory() as folder, connect() as link:
        ...     _ = run(config, link, Path(folder))
        ...     replayed = replay(folder)
        >>> replayed.pushes, replayed.accepted, replayed.equal
        (5, 5, True)
    """
    recorded = read_run(Path(run_dir))
    config, task = settle(recorded.config)
    if recorded.facts is not None and dict(task.facts) != recorded.facts:
        raise ConfigError(
            f"the data is not that of the run: it is {dict(task.facts)}, and was {recorded.facts}"
        )
    config = replace(config, console=False, trace=False)
    with _computing_as_before(recorded.threads):
        return _Rerun(recorded, config, task, on_push).run()


class _Rerun:
    """One replay."""

    def __init__(
        self,
        recorded: Recorded,
        config: TrainConfig,
        task: Task,
        on_push: Callable[[Push], bool] | None,
    ) -> None:
        self._recorded = recorded
        self._config = config
        self._task = task
        self._on_push = on_push
        workers = recorded.workers
        self._world = World(workers)
        history = History(recorded.events, workers)
        watch = None if on_push is None else self._tell
        self._player = Player(self._world, recorded.events, history, self._revive, watch)
        wire = Wire(latency_seconds=0.0, gigabits_per_second=float("inf"))
        one_host = Topology(ranks_per_host=workers, hosts=1, port=wire)
        self._collectives = Collectives(self._world, Network(one_host, workers))
        self._limits = [
            steps if history.survived(worker) else None
            for worker, steps in enumerate(recorded.steps)
        ]
        self._witnesses: dict[int, _Witness] = {}
        for rank in self._world.ranks:
            self._start(rank, history.first(rank.number))

    def _start(self, rank: Rank, life: Life) -> None:
        witness = self._witnesses[rank.number] = _Witness(life, self._limits[rank.number])
        link = ReplayLink(self._player, life, rank, self._collectives)
        rank.start(lambda: run_settled(self._config, self._task, link, callbacks=[witness]))

    def _revive(self, worker: int, life: Life) -> None:
        """The process that died has waited in vain since; a new one begins."""
        world = self._world

        def begin() -> None:
            world.ranks[worker].kill()
            world.ranks[worker] = Rank(world, worker)
            self._start(world.ranks[worker], life)

        world.at(world.now, worker, begin)

    def run(self) -> Replayed:
        """Let everything happen."""
        player, recorded = self._player, self._recorded
        self._world.run()
        if player.shards is None:
            raise ReplayError("rank 0 ended before it had made a server; nothing can be replayed")
        player.raise_unless_finished()
        sha256 = self._witnesses[0].sha256
        if sha256 is None and recorded.sha256 is not None and not player.stopped:
            raise ReplayError(
                f"the log ends after event {player.position}, where the run had not ended yet; a "
                "part of it is missing"
            )
        events = recorded.events[: player.position]
        pushes = [event for event in events if event.operation.kind == Kind.PUSH]
        names = self._witnesses[0].names
        return Replayed(
            dict(zip(names, player.shards.parameters(), strict=True)),
            recorded.workers,
            len(events),
            len(pushes),
            sum(event.accepted for event in pushes),
            sha256,
            recorded.sha256,
            recorded.notes,
        )

    def _tell(self, arrived: Arrived) -> bool:
        event = arrived.event
        witness = self._witnesses[event.operation.worker]
        push = Push(
            arrived.number,
            event.seconds,
            event.operation.worker,
            arrived.step,
            event.operation.version,
            event.staleness,
            event.accepted,
            arrived.gradient,
            arrived.before,
            arrived.after,
            lambda parameters: self._loss(witness, parameters),
        )
        assert self._on_push is not None
        with kept_generators(), torch.no_grad():
            return self._on_push(push)

    @cached_property
    def _batches(self) -> list[Any]:
        """What the run is evaluated on."""
        loader = self._task.test_loader(self._config.data.get("eval_batch_size") or _EVAL_BATCH)
        return [] if loader is None else list(loader)

    def _loss(self, witness: _Witness, parameters: Sequence[Tensor]) -> float:
        trainer = witness.trainer
        assert trainer is not None
        own = trainer.replica.parameters
        values = [value.to(p.dtype) for value, p in zip(parameters, own, strict=True)]
        named = dict(zip(trainer.replica.names, values, strict=True))

        def called(*arguments: Any, **options: Any) -> Any:
            return functional_call(trainer.model, named, arguments, options)

        total, samples = 0.0, 0
        with eval_mode(trainer.model), trainer.precision.autocast(trainer.link.device):
            for batch in self._batches or witness.batches:
                size = count_samples(batch)
                total += call_model(called, batch, self._task.loss_fn)[1].item() * size
                samples += size
        return total / samples if samples else float("nan")


class _Witness(Callback):
    """Sees one process's Trainer, its last batch, and its parameters at the end.

    Args:
        life: what the process did.
        limit: the steps after which time ended the run; None: something else ends it.
    """

    def __init__(self, life: Life, limit: int | None) -> None:
        self._life = life
        self._left = limit
        self.trainer: Trainer | None = None
        self.sha256: str | None = None
        self.batches: Sequence[Any] = ()

    @property
    def names(self) -> Sequence[str]:
        """Of the parameters."""
        return self.trainer.replica.names if self.trainer is not None else ()

    def on_fit_start(self, trainer: Trainer) -> None:
        """Look at what it computes with, too."""
        self.trainer = trainer
        schedule = trainer.schedule  # nothing else sees the batch of a step
        run_step = schedule.run

        def run(batch: StepBatch, abandon: Callable[[], bool] | None = None) -> Computed | None:
            self.batches = batch.microbatches
            return run_step(batch, abandon)

        schedule.run = run  # type: ignore[method-assign]

    def on_step_end(self, trainer: Trainer) -> None:
        """One step less is left."""
        if self._left is not None:
            self._left -= 1
            self._stop_where_it_did(trainer)

    def on_evaluation(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """After the last step of an epoch, time may have run out before this or after it."""
        self._stop_where_it_did(trainer)

    def _stop_where_it_did(self, trainer: Trainer) -> None:
        # A pull would be for an evaluation that still came, or the one by which it was told to end.
        if self._left is not None and self._left <= 0 and not self._life.pulls_next:
            trainer.stop()

    def on_fit_end(self, trainer: Trainer) -> None:
        """All replicas are equal."""
        self.sha256 = trainer.replica.sha256()


@contextmanager
def _computing_as_before(threads: int) -> Iterator[None]:
    """Sums in another number of threads may have other bits; what ranks set ends with them."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
