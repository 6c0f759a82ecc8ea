"""Every strategy, and what holds for it: one line each. A new strategy is tested by its line here.

For all of them: a run ends with the same parameters on every replica, also when replicas skipped
updates, or had different numbers of batches; on one replica a run that was saved in the middle and
resumed ends as one that was not, bit for bit; the learning rate's schedule advances once per
update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from scaledtrain import DiLoCo, LocalSGD, ParameterServer, Strategy, Sync
from scaledtrain.server import (
    Admission,
    Asynchronous,
    BackupWorkers,
    Rennala,
    Ringmaster,
    SoftSync,
    StaleSynchronous,
    Synchronous,
)
from scaledtrain.strategies import EASGD, AsyncLocalSGD, Gossip, Hogwild, PushSum, SlowMo

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One strategy with settings under which as much as possible holds.

    Args:
        name: in the names of the tests.
        make: the strategy, for so many replicas.
        tolerance: one replica is plain training up to this: 0.0 bit for bit, 1e-5 where only
            rounding differs; None: by its mathematics it is not plain training.
        equal_data: replicas given the same data do, up to ``tolerance``, what one process does;
            None: it depends on who is faster.
        deterministic: a run is a function of its seed on several replicas as well: twice the same,
            over shared memory what it is over gloo, and, where the replicas are in lockstep, the
            same when it was saved in the middle and resumed.
        skips_alone: a replica may skip an update that the others make; False: their gradients are
            the same, so that they skip together.
        own_memory: nobody else writes to a replica's parameters.
        keeps_mean: replicas that only meet keep the mean of their parameters, and get closer.
    """

    name: str
    make: Callable[[int], Strategy]
    tolerance: float | None = 0.0
    equal_data: bool | None = True
    deterministic: bool = True
    skips_alone: bool = True
    own_memory: bool = True
    keeps_mean: bool = False


def alone(name: str, make: Callable[[int], Strategy], tolerance: float | None = 0.0) -> Case:
    """A case whose replicas are in step with no other: what happens depends on who is faster."""
    return Case(name, make, tolerance, equal_data=None, deterministic=False)


def server(
    name: str, admission: Callable[[int], Admission], equal_data: bool | None = False
) -> Case:
    """An asynchronous case: on several workers, what happens depends on who is faster.

    Where every gradient is an update of its own, n workers make n times those of one process.
    """
    return Case(
        name, lambda n: ParameterServer(admission(n)), equal_data=equal_data, deterministic=False
    )


SGD_1 = partial(torch.optim.SGD, lr=1.0)  # outside it takes the mean: theta - 1 (theta - mean)
# Three does not divide the ten steps, nor the five after which a run is saved; the learning rate
# drops after the fourth.
CASES = [
    Case("sync", lambda n: Sync(), skips_alone=False),
    Case(
        "sync_overlap",
        lambda n: Sync(overlap=True, bucket_bytes=64),
        skips_alone=False,
    ),
    Case("server_synchronous", lambda n: ParameterServer(Synchronous())),
    server("server_asynchronous", lambda n: Asynchronous()),
    server("server_backup_workers", lambda n: BackupWorkers(k=1), equal_data=None),
    server("server_softsync", lambda n: SoftSync(c=n), equal_data=None),
    server("server_stale_synchronous", lambda n: StaleSynchronous(staleness_bound=1)),
    server("server_rennala", lambda n: Rennala(batch=n), equal_data=None),
    server("server_ringmaster", lambda n: Ringmaster(delay_threshold=2)),
    server("server_ringmaster_stop", lambda n: Ringmaster(delay_threshold=2, stop=True)),
    Case("local_sgd", lambda n: LocalSGD(3), keeps_mean=True),
    Case("post_local_sgd", lambda n: LocalSGD(3, local_after=4), keeps_mean=True),
    Case("post_local_sgd_lr_drop", lambda n: LocalSGD(4, local_after="lr_drop"), keeps_mean=True),
    Case("slow_mo_without_momentum", lambda n: SlowMo(3, slow_momentum=0.0), keeps_mean=True),
    Case("slow_mo", lambda n: SlowMo(3), tolerance=None),  # the momentum is more than the mean
    Case("diloco_mean", lambda n: DiLoCo(3, SGD_1), tolerance=1e-5, keeps_mean=True),
    Case("diloco", lambda n: DiLoCo(3), tolerance=None),  # 0.7 of the mean, and momentum
    Case(
        "diloco_fragments",
        lambda n: DiLoCo(3, SGD_1, fragments=2),
        tolerance=1e-5,
        keeps_mean=True,
    ),
    Case(  # after the 5th step two of its fragments are under way, after the 7th one
        "streaming_diloco",
        lambda n: DiLoCo(4, fragments=3, overlap_steps=2),
        tolerance=None,
    ),
    alone("async_local_sgd", lambda n: AsyncLocalSGD(3, SGD_1), tolerance=1e-5),
    alone("async_local_sgd_nesterov", lambda n: AsyncLocalSGD(3), tolerance=None),
    alone("easgd", lambda n: EASGD(3), tolerance=None),  # it is pulled back to where it was
    alone("gossip", lambda n: Gossip()),
    alone("push_sum", lambda n: PushSum()),
    alone("push_sum_overlap", lambda n: PushSum(overlap=True)),
    Case(
        "hogwild",
        lambda n: Hogwild(),
        equal_data=None,
        deterministic=False,
        own_memory=False,
    ),
    alone("server_shards", lambda n: ParameterServer(shards=n)),
]
