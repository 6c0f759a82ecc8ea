"""What `ssgd_vs_asgd` has in each of its processes: workloads, and the loops that are compared."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import rpc
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from scaledtrain import (
    Callback,
    DiLoCo,
    LocalSGD,
    ParameterServer,
    Precision,
    Strategy,
    Sync,
    Trainer,
    connect,
)
from scaledtrain.comm.compress import TopK
from scaledtrain.data import digits
from scaledtrain.data.steps import StepBatch
from scaledtrain.models import MLP
from scaledtrain.schedule import MicrobatchLoop, Schedule, Slowdown
from scaledtrain.server import (
    Admission,
    Asynchronous,
    BackupWorkers,
    Rennala,
    Ringmaster,
    SoftSync,
    StaleSynchronous,
)
from scaledtrain.strategies import EASGD, AsyncLocalSGD, Gossip, Hogwild, PushSum, SlowMo

TARGET = 0.95
"""Test accuracy; the time to it is compared."""
SLOW = 4.0
"""How many times slower the straggler is."""
GAMMA_SHAPE = 4.0
"""Times vary by a half."""

# --- What is trained, and under which conditions ----------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A model on digits, and for how long it is trained."""

    title: str
    hidden: tuple[int, ...]
    batch_size: int
    learning_rate: float
    """Of an update by one gradient; one by n gradients has n times that (linear scaling)."""
    min_compute_seconds: float
    seconds: float
    """Of training."""
    vote_every: int
    """Steps between two moments at which replicas in lockstep ask each other whether to end."""
    warmup_seconds: float = 1.0
    """Left out of the rates."""
    copy_seconds: float = 0.2
    """Between two copies of the parameters on rank 0, which are evaluated after the run."""
    copy_steps: int = 2
    """Replicas in lockstep take them at multiples of it only."""

    def model(self) -> MLP:
        return MLP(64, list(self.hidden), 10)

    def batches(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Ready batches of 20 epochs, as many as 2 and 4 workers can share evenly."""
        inputs, targets = digits("train").tensors
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(inputs), generator=generator) for _ in range(20)]
        rows = [row for order in orders for row in order.split(self.batch_size)]
        whole = [row for row in rows if len(row) == self.batch_size]
        return [(inputs[row], targets[row]) for row in whole[: len(whole) // 4 * 4]]


WORKLOADS = {
    "slept": Workload(
        title="computing slept, 20 ms a step (MLP 64-128-10, batch 32)",
        hidden=(128,),
        batch_size=32,
        learning_rate=0.25,
        min_compute_seconds=0.02,
        seconds=8.0,
        vote_every=10,
    ),
    "real": Workload(
        title="real computing, about 3 ms a step (MLP of 1.2 M parameters, batch 48)",
        hidden=(1056, 1056),
        batch_size=48,
        learning_rate=0.05,
        min_compute_seconds=0.0,
        seconds=5.0,
        vote_every=50,
        copy_steps=10,
    ),
}

CONDITIONS = {
    "equal": "no straggler",
    "straggler": f"one {SLOW:g}x straggler",
    "gamma": "gamma-distributed times",
}


def quick(workload: Workload) -> Workload:
    """As little as shows that it runs."""
    return replace(workload, seconds=1.0, warmup_seconds=0.2, copy_seconds=0.1)


def slowdown(workload: Workload, condition: str, slow_rank: int) -> Slowdown:
    """What is slept, in each worker's own time."""
    return Slowdown(
        {slow_rank: SLOW} if condition == "straggler" else {},
        min_compute_seconds=workload.min_compute_seconds,
        gamma_shape=GAMMA_SHAPE if condition == "gamma" else None,
    )


# --- What every loop tells --------------------------------------------------------------------


class Step(NamedTuple):
    """What was so when a step ended."""

    seconds: float
    used: float
    sent_bytes: float


class Watch:
    """When the steps of one worker ended, and its parameters now and then.

    Args:
        workload: says when to end, and what to leave out.
        model: whose parameters are copied.
    """

    def __init__(self, workload: Workload, model: nn.Module) -> None:
        self._workload = workload
        self._model = model
        self._begin = 0.0
        self._knows_all = False
        self._steps: list[Step] = []
        self._copies: list[tuple[float, list[Tensor]]] = []

    def start(self) -> None:
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    @property
    def late(self) -> bool:
        return self.seconds >= self._workload.seconds

    def step(self, used: float | None = None, sent_bytes: float = 0.0) -> None:
        """A step of this worker has ended.

        Args:
            used: gradients of all workers that have gone into the parameters so far; None: it uses
                all of its own, and knows of no others.
            sent_bytes: by this worker so far.
        """
        own = float(len(self._steps) + 1)
        self._steps.append(Step(self.seconds, own if used is None else used, sent_bytes))
        self._knows_all = used is not None

    def copy(self) -> None:
        """Keep the parameters, if the last copy is old enough."""
        now = self.seconds
        if not self._copies or now - self._copies[-1][0] >= self._workload.copy_seconds:
            kept = [p.detach().clone() for p in self._model.parameters()]
            self._copies.append((now, kept))

    def report(self) -> dict[str, Any]:
        """Rates between the first and the last step that count."""
        low, high = self._workload.warmup_seconds, self._workload.seconds
        counted = [step for step in self._steps if low <= step.seconds <= high]
        return {**rates(counted), "knows_all": self._knows_all}

    def evaluate(self) -> dict[str, float | None]:
        """Accuracy of the model as it is, and when a copy had first reached the target."""
        inputs, targets = digits("test").tensors
        final = list(self._model.parameters())

        @torch.no_grad()
        def accuracy(parameters: Sequence[Tensor]) -> float:
            torch._foreach_copy_(final, list(parameters))
            return (self._model(inputs).argmax(1) == targets).double().mean().item()

        ended = accuracy([p.detach().clone() for p in final])
        reached = (t for t, copy in self._copies if accuracy(copy) >= TARGET)
        return {"accuracy": ended, "seconds_to_target": next(reached, None)}


def rates(steps: Sequence[Step]) -> dict[str, float]:
    """Steps and used gradients per second, and bytes per step."""
    if len(steps) < 2:
        return {"steps_per_second": 0.0, "used_per_second": 0.0, "bytes_per_step": 0.0}
    first, last = steps[0], steps[-1]
    seconds = last.seconds - first.seconds
    return {
        "steps_per_second": (len(steps) - 1) / seconds,
        "used_per_second": (last.used - first.used) / seconds,
        "bytes_per_step": (last.sent_bytes - first.sent_bytes) / (len(steps) - 1),
    }


@dataclass
class Task:
    """What a loop is given on one rank."""

    workload: Workload
    condition: str
    rank: int
    ranks: int
    seed: int
    learning_rate: float
    folder: Path
    """For what it writes; the same on all ranks, and with a name of its own."""
    model: nn.Module = field(init=False)
    watch: Watch = field(init=False)
    all_batches: list[tuple[Tensor, Tensor]] = field(init=False)
    """Those of all ranks, in turn."""

    def __post_init__(self) -> None:
        self.all_batches = self.workload.batches(self.seed)
        torch.manual_seed(self.seed)
        self.model = self.workload.model()
        self.watch = Watch(self.workload, self.model)

    @property
    def slowdown(self) -> Slowdown:
        return slowdown(self.workload, self.condition, slow_rank=self.ranks - 1)

    @property
    def n_bytes(self) -> int:
        """Of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=self.learning_rate)

    def compute(self, model: Callable[..., Any] | None = None) -> Schedule:
        """Forward and backward, and the sleep of this rank."""
        pace = self.slowdown.pace(self.rank, self.seed)
        return MicrobatchLoop(
            model or self.model,
            F.cross_entropy,
            Precision(),
            list(self.model.parameters()),
            paces=[] if pace is None else [pace],
        )

    def batches(self) -> Iterator[StepBatch]:
        """This rank's, without an end."""
        for batch in itertools.cycle(self.all_batches[self.rank :: self.ranks]):
            yield StepBatch([batch], [self.workload.batch_size])


# --- Ours -------------------------------------------------------------------------------------


class Watching(Callback):
    """Lets the watch of a task see the steps of a Trainer."""

    def __init__(self, watch: Watch, copy_steps: int) -> None:
        self._watch, self._copy_steps = watch, copy_steps
        self._steps = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        self._watch.start()

    def on_step_end(self, trainer: Trainer) -> None:
        strategy, group = trainer.strategy, trainer.link.group
        self._steps += 1
        used = strategy.step * strategy.gradients_per_step
        self._watch.step(used, trainer.link.bytes_sent)
        together = strategy.lockstep.size == group.size
        if self._steps % self._copy_steps == 0 if together else group.rank == 0:
            with strategy.consensus():
                if group.rank == 0:
                    self._watch.copy()


def ours(make_strategy: Callable[[int], Strategy], task: Task) -> None:
    """The Trainer, as a user runs it, without a progress bar."""
    workload = task.workload
    with connect() as link:
        watching = Watching(task.watch, workload.copy_steps)
        with Trainer(
            task.model,
            F.cross_entropy,
            partial(torch.optim.SGD, lr=task.learning_rate),
            strategy=make_strategy(task.ranks),
            callbacks=[watching],
            seed=task.seed,
            slowdown=task.slowdown,
            run_dir=task.folder / "run",
            log_every=workload.vote_every,
            console=False,
            link=link,
        ) as trainer:
            trainer.fit(task.all_batches, max_seconds=workload.seconds)


# --- Peers ------------------------------------------------------------------------------------


def alone(task: Task) -> None:
    """A worker by itself: the loop whose rate is its own."""
    optimizer, compute = task.optimizer(), task.compute()
    task.watch.start()
    for batch in task.batches():
        optimizer.zero_grad()
        compute.run(batch)
        optimizer.step()
        task.watch.step()
        if task.watch.late:
            break
        task.watch.copy()


def ddp(task: Task) -> None:
    """torch's DistributedDataParallel over gloo."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(task.model, gradient_as_bucket_view=True, static_graph=True)
    optimizer, compute = task.optimizer(), task.compute(model)
    dist.barrier()
    task.watch.start()
    for number, batch in enumerate(task.batches(), start=1):
        optimizer.zero_grad()
        compute.run(batch)
        optimizer.step()
        task.watch.step(number * task.ranks, number * task.n_bytes)
        if number % task.workload.copy_steps == 0 and task.rank == 0:
            task.watch.copy()
        if number % task.workload.vote_every == 0:
            late = torch.tensor([task.watch.late], dtype=torch.float32)
            dist.all_reduce(late, dist.ReduceOp.MAX)
            if late.item():
                break


def _shared_parameters(task: Task) -> list[Tensor]:
    """Tensors that all ranks share, with rank 0's values. Collective."""
    dist.init_process_group("gloo")
    own = list(task.model.parameters())
    sizes = [p.numel() for p in own]
    memory = Path("/dev/shm")
    file = (memory if memory.is_dir() else task.folder) / f"{task.folder.name}-hogwild"
    flat = torch.from_file(str(file), shared=True, size=sum(sizes))
    shared = [part.view_as(p) for part, p in zip(flat.split(sizes), own, strict=True)]
    if task.rank == 0:
        torch._foreach_copy_(shared, [p.detach() for p in own])
    dist.barrier()
    if task.rank == 0:
        file.unlink()  # the memory lives on until the last rank ends, however it ends
    return shared


def bare_hogwild(task: Task) -> None:
    """Every worker computes with, and updates, the same memory, without a lock."""
    for parameter, shared in zip(task.model.parameters(), _shared_parameters(task), strict=True):
        parameter.data = shared
    alone(task)


def bare_hogwild_copy(task: Task) -> None:
    """Every worker computes with a copy, and updates the shared memory, without a lock."""
    shared, own = _shared_parameters(task), list(task.model.parameters())
    compute, per_step = task.compute(), 2 * task.n_bytes
    task.watch.start()
    for number, batch in enumerate(task.batches(), start=1):
        with torch.no_grad():
            torch._foreach_copy_(own, shared)
        for parameter in own:
            parameter.grad = None
        compute.run(batch)
        gradient = [p.grad for p in own if p.grad is not None]
        torch._foreach_add_(shared, gradient, alpha=-task.learning_rate)
        task.watch.step(sent_bytes=number * per_step)
        if task.watch.late:
            break
        task.watch.copy()


class _RpcServer:
    """What rank 0 holds; the others call it by the functions below."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.parameters: list[Tensor] = []
        self.optimizer: torch.optim.Optimizer | None = None


_SERVER = _RpcServer()


def _rpc_step(gradient: list[Tensor]) -> list[Tensor]:
    """Runs on rank 0: use a gradient, return the parameters."""
    with _SERVER.lock:
        assert _SERVER.optimizer is not None
        for parameter, g in zip(_SERVER.parameters, gradient, strict=True):
            parameter.grad = g
        _SERVER.optimizer.step()
        return [p.detach().clone() for p in _SERVER.parameters]


def rpc_server(task: Task, overlap: bool = False) -> None:
    """A parameter server of a few lines on torch.distributed.rpc.

    With ``overlap`` a worker computes its next gradient while the last one is on its way, with the
    parameters that came back for the one before.
    """
    if task.rank == 0:
        _SERVER.parameters = [nn.Parameter(p.detach().clone()) for p in task.model.parameters()]
        _SERVER.optimizer = torch.optim.SGD(_SERVER.parameters, lr=task.learning_rate)
    rpc.init_rpc(f"worker{task.rank}", rank=task.rank, world_size=task.ranks)
    own, compute = list(task.model.parameters()), task.compute()
    under_way: Any = None
    task.watch.start()
    for number, batch in enumerate(task.batches(), start=1):
        for parameter in own:
            parameter.grad = None
        compute.run(batch)
        gradient = [p.grad for p in own if p.grad is not None]
        before, under_way = under_way, rpc.rpc_async("worker0", _rpc_step, (gradient,))
        answer = before if overlap else under_way
        if answer is not None:
            with torch.no_grad():
                torch._foreach_copy_(own, answer.wait())
        task.watch.step(sent_bytes=number * 2 * task.n_bytes)
        if task.watch.late:
            break
        if task.rank == 0:
            task.watch.copy()
    under_way.wait()
    rpc.shutdown()


# --- Who takes part ---------------------------------------------------------------------------


def _one(n: int) -> int:
    return 1


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Args:
        loop: run on every rank.
        about: what it is, for README.md.
        scale: number of workers -> what the learning rate is multiplied by: the gradients whose
            mean makes an update.
        writes_metrics: whether it leaves what `scaledtrain.report.read_run` reads.
    """

    loop: Callable[[Task], None]
    about: str
    scale: Callable[[int], int] = _one
    writes_metrics: bool = False


def our(
    about: str, make_strategy: Callable[[int], Strategy], scale: Callable[[int], int] = _one
) -> Contender:
    """A strategy, made for a number of workers."""
    return Contender(partial(ours, make_strategy), about, scale, writes_metrics=True)


def server(about: str, make_admission: Callable[[int], Admission]) -> Contender:
    """`ParameterServer` with an admission policy, made for a number of workers."""
    return our(
        about,
        lambda n: ParameterServer(make_admission(n)),
        lambda n: make_admission(n).gradients_per_update(n),
    )


OURS: Mapping[str, Contender] = {
    "sync": our("`Sync()`", lambda n: Sync(), scale=lambda n: n),
    "sync_top_k": our(
        "`Sync(compression=TopK(0.01))`",
        lambda n: Sync(compression=TopK(fraction=0.01)),
        scale=lambda n: n,
    ),
    "local_sgd": our("`LocalSGD(sync_every=16)`", lambda n: LocalSGD(16)),
    "slow_mo": our("`SlowMo(sync_every=16)`", lambda n: SlowMo(16)),
    "diloco": our("`DiLoCo(sync_every=16)`", lambda n: DiLoCo(16)),
    "diloco_streaming": our(
        "`DiLoCo(sync_every=16, fragments=2, overlap_steps=4)`",
        lambda n: DiLoCo(16, fragments=2, overlap_steps=4),
    ),
    "async": server("`ParameterServer(Asynchronous())`", lambda n: Asynchronous()),
    "async_overlap": our("the same with `overlap=True`", lambda n: ParameterServer(overlap=True)),
    "async_shards": our("the same with `shards=n`", lambda n: ParameterServer(shards=n)),
    "async_shards_overlap": our(
        "the same with both", lambda n: ParameterServer(shards=n, overlap=True)
    ),
    "async_top_k": our(
        "the same with `compression=TopK(0.01)`",
        lambda n: ParameterServer(compression=TopK(fraction=0.01)),
    ),
    "softsync": server("`SoftSync(c=2)`", lambda n: SoftSync(2)),
    "ssp": server("`StaleSynchronous(staleness_bound=8)`", lambda n: StaleSynchronous(8)),
    "backup": server("`BackupWorkers(k=n − 1)`", lambda n: BackupWorkers(n - 1)),
    "rennala": server("`Rennala(batch=n)`", lambda n: Rennala(n)),
    "ringmaster": server("`Ringmaster(delay_threshold=2 n)`", lambda n: Ringmaster(2 * n)),
    "async_local_sgd": our("`AsyncLocalSGD(sync_every=16)`", lambda n: AsyncLocalSGD(16)),
    "easgd": our("`EASGD(sync_every=16)`", lambda n: EASGD(16)),
    "gossip": our("`Gossip()`", lambda n: Gossip()),
    "push_sum": our("`PushSum()`", lambda n: PushSum()),
    "push_sum_overlap": our("`PushSum(overlap=True)`", lambda n: PushSum(overlap=True)),
    "hogwild": our("`Hogwild()`", lambda n: Hogwild()),
}

PEERS: Mapping[str, Contender] = {
    "ddp": Contender(ddp, "torch's `DistributedDataParallel` over gloo", scale=lambda n: n),
    "rpc": Contender(rpc_server, "a parameter server of a few lines on `torch.distributed.rpc`"),
    "rpc_overlap": Contender(
        partial(rpc_server, overlap=True), "the same; a worker computes on while its call is away"
    ),
    "bare_hogwild": Contender(
        bare_hogwild, "processes that compute with and update the same memory"
    ),
    "bare_hogwild_copy": Contender(bare_hogwild_copy, "the same, but each computes with a copy"),
}

REFERENCES: Mapping[str, Contender] = {
    "alone": Contender(alone, "one worker by itself: its own rate"),
    "alone_slow": Contender(alone, "the straggler by itself"),
}

CONTENDERS: Mapping[str, Contender] = {**OURS, **PEERS, **REFERENCES}
