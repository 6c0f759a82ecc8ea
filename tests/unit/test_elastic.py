"""Steps of as many samples on any number of replicas, and ranks that are started again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Checkpointing, LocalSGD, Mesh, ParameterServer, Strategy, Sync, Trainer
from scaledtrain.comm.compress import TopK
from scaledtrain.comm.protocols import Link
from scaledtrain.command_line import compose
from scaledtrain.config import BatchSizes, check
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.errors import ConfigError
from scaledtrain.parallel.batches import share_out
from scaledtrain.ranks import RankInfo
from scaledtrain.rendezvous import meet
from scaledtrain.sim import Cluster, Gamma, Topology, Wire, simulate

HOSTS = Topology(ranks_per_host=4, hosts=1, port=Wire(1e-4, gigabits_per_second=1.0))
CLUSTER = Cluster(Gamma(seconds=0.01, shape=4.0), HOSTS)
SAMPLES, BATCH, BATCHES = 46, 2, 4  # 23 batches: five steps of four, and one of three


def data() -> TensorDataset:
    x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, x.sum(1, keepdim=True))


@pytest.mark.parametrize("is_iterable", [False, True])
@pytest.mark.parametrize("start", [0, 1, 4])
@pytest.mark.parametrize("replicas", range(1, 7))
def test_a_step_has_the_same_samples_on_any_number_of_replicas(
    replicas: int, start: int, is_iterable: bool
) -> None:
    loader: Any = DataLoader(TensorDataset(torch.arange(SAMPLES)), batch_size=BATCH)
    shares = [
        list(
            ReplicaLoader(
                list(loader) if is_iterable else loader,
                rank=rank,
                replicas=replicas,
                batches_per_step=BATCHES,
            ).epoch(0, start)
        )
        for rank in range(replicas)
    ]
    for number, step in enumerate(zip(*shares, strict=True), start):
        samples = [int(x) for share in step for (xs,) in share.microbatches for x in xs]
        first = number * BATCHES * BATCH
        assert sorted(samples) == list(range(first, min(first + BATCHES * BATCH, SAMPLES)))
        counts = [len(share.microbatches) for share in step]
        assert max(counts) - min(counts) <= 1
        assert sum(share.weight for share in step) == pytest.approx(
            replicas * len(samples) / (BATCHES * BATCH)
        )


def train(link: Link, run_dir: Path, max_steps: int) -> Tensor:
    torch.manual_seed(1)
    trainer = Trainer(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
        F.mse_loss,
        partial(torch.optim.AdamW, lr=0.05),
        batches_per_step=BATCHES,
        checkpointing=Checkpointing(every_steps=100),
        resume="auto",
        run_dir=run_dir,
        console=False,
        link=link,
    )
    trainer.fit(DataLoader(data(), batch_size=BATCH, shuffle=True), max_steps=max_steps)
    trainer._release()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_run_with_other_replicas_each_time_ends_as_one_alone(tmp_path: Path) -> None:
    """Of 6 steps an epoch; with three replicas the batches do not divide."""

    def ranks(workers: int, folder: str, max_steps: int) -> Tensor:
        program = partial(train, run_dir=tmp_path / folder, max_steps=max_steps)
        end = simulate(program, CLUSTER, workers).results[-1]
        assert end is not None
        return end

    alone = ranks(1, "alone", 16)
    for workers, max_steps in ((4, 4), (3, 9), (2, 13), (3, 16)):
        changing = ranks(workers, "changing", max_steps)
    torch.testing.assert_close(changing, alone, rtol=1e-4, atol=1e-5)


def unsent(link: Link, run_dir: Path, strategy: Callable[[], Strategy], epochs: int) -> Tensor:
    """What this rank has not sent yet, before a fit and after it."""
    torch.manual_seed(1)
    trainer = Trainer(
        nn.Linear(3, 1), F.mse_loss, partial(torch.optim.SGD, lr=0.05), strategy=strategy(),
        checkpointing=Checkpointing(every_steps=100), resume="auto", run_dir=run_dir,
        console=False, link=link,
    )  # fmt: skip

    def now() -> Tensor:
        state = trainer.strategy.state_dict()
        kept = state["compression"] if "server" not in state else state["server"]["feedback"][0]
        return torch.cat([own["kept"].flatten() for own in kept])

    before = now()
    trainer.fit(DataLoader(data(), batch_size=BATCH), max_epochs=epochs)
    trainer._release()
    return torch.stack([before, now()])


@pytest.mark.parametrize(
    "strategy",
    [partial(Sync, compression=TopK(0.1)), partial(ParameterServer, compression=TopK(0.1))],
)
def test_what_one_rank_has_not_sent_is_sent_by_no_other(
    strategy: Callable[[], Strategy], tmp_path: Path
) -> None:
    """A saved rank's part of the state is the beginning of ranks that were not there."""

    def ranks(workers: int, epochs: int) -> list[Tensor]:
        program = partial(unsent, run_dir=tmp_path, strategy=strategy, epochs=epochs)
        found = simulate(program, CLUSTER, workers).results
        return [kept for kept in found if kept is not None]

    first, again, more = ranks(2, 1), ranks(2, 2), ranks(3, 3)
    for one, same, other in zip(first, again, more, strict=False):
        assert one[1].count_nonzero() > 0
        assert torch.equal(same[0], one[1])
        assert same[1].count_nonzero() > 0
        assert other[0].count_nonzero() == 0
    assert more[2][0].count_nonzero() == 0


def test_what_cannot_be_shared_is_refused() -> None:
    shared = partial(share_out, accumulation=1, replicas_equal=True)
    assert shared(6, mesh=Mesh(pipe=2), ranks=4) == 3
    with pytest.raises(ConfigError, match="4 batches, .* divide by 3 ranks .* mesh.pipe is above"):
        shared(4, mesh=Mesh(pipe=2), ranks=6)
    with pytest.raises(ConfigError, match="must see equally many"):
        shared(4, mesh=Mesh(), ranks=3, replicas_equal=LocalSGD.replicas_equal)
    with pytest.raises(
        ConfigError, match="batches_per_step is 4 and gradient_accumulation_steps 2"
    ):
        shared(4, accumulation=2, mesh=Mesh(), ranks=1)
    with pytest.raises(ConfigError, match="batches_per_step is 0"):
        shared(0, mesh=Mesh(), ranks=1)
    with pytest.raises(ConfigError, match="replicas of this strategy make steps of their own"):
        ReplicaLoader([torch.zeros(1)], replicas=2, alone=True, batches_per_step=4)


GOES_ON = ["elastic=true", "run_dir=x", "resume=auto", "checkpointing=steps"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["elastic=true"], "takes run_dir=.*; run_dir and checkpointing is not so"),
        ([*GOES_ON, "resume=runs/other"], "resume=auto; resume is not so"),
        ([*GOES_ON, "gradient_accumulation_steps=2"], "with elastic it follows from"),
    ],
)
def test_an_elastic_run_that_would_begin_anew_is_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(compose(overrides))


def test_an_elastic_run_needs_both_batch_sizes() -> None:
    assert BatchSizes(16, 64).local(replicas=3, accumulation=1, elastic=True) == 16
    assert BatchSizes(16, 64).batches_per_step == 4
    for sizes in (BatchSizes(16), BatchSizes(None, 64)):
        with pytest.raises(ConfigError, match="takes both sizes"):
            sizes.local(replicas=1, accumulation=1, elastic=True)
    with pytest.raises(ConfigError, match="64, which does not divide into batches .* 24"):
        BatchSizes(24, 64).local(replicas=1, accumulation=1, elastic=True)


def test_ranks_that_a_launcher_starts_again_meet_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the store of those before them, whose words are of no meaning any more."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )
    for size in (2, 3, 1, 2):
        stores: list[dist.Store | None] = [None] * size

        def come(rank: int, size: int, stores: list[dist.Store | None]) -> None:
            info = RankInfo(rank, size, master_port=agent.port)
            stores[rank], attempt = meet(info, 20.0)
            assert attempt == 0

        threads = [threading.Thread(target=come, args=(r, size, stores)) for r in range(size)]
        for thread in reversed(threads):  # rank 0 is the last one
            thread.start()
        for thread in threads:
            thread.join()
        for rank, store in enumerate(stores):
            assert store is not None
            assert store.add("seen", 1) == rank + 1
