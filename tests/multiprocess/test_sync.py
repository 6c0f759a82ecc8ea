"""Sync over real processes: overlap changes nothing, compression does what it says, no leaks."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import DropCompute, Replica, Sync, Trainer, connect
from scaledtrain.comm.compress import (
    BF16,
    FP16,
    Compression,
    PowerSGD,
    Sign,
    TopK,
    compressed,
)
from scaledtrain.connection import Connection, Transport
from scaledtrain.errors import ClusterError, ConfigError
from scaledtrain.faults import FaultInjector
from tests.ranks import run_ranks

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
PLAIN = partial(torch.optim.SGD, lr=1.0)
TRANSPORTS: list[Transport] = ["shared_memory", "torch"]
RANKS = 3


@dataclass(frozen=True)
class Forgetful(TopK):
    """Top-k that keeps nothing."""

    needs_feedback: ClassVar[bool] = False


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))


def data(n: int) -> TensorDataset:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, (x.sum(1) > 0).long())


LOADER = DataLoader(data(30), batch_size=4)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def trainer(link: Connection, strategy: Sync, **options: Any) -> Trainer:
    return Trainer(
        net(), F.cross_entropy, SGD, strategy=strategy, gradient_accumulation_steps=2,
        console=False, link=link, **options,
    )  # fmt: skip


def train(link: Connection, strategy: Sync, steps: int = 6, **options: Any) -> Trainer:
    """30 samples in batches of 4 on 3 ranks, two to a step: 24 samples, then the other 6.

    In the second step rank 0 has a batch of 4, rank 1 one of 2, and rank 2 none.
    """
    t = trainer(link, strategy, **options)
    t.fit(LOADER, max_steps=steps)
    return t


class Loop:
    """A loop of one's own around Sync."""

    def __init__(self, link: Connection, model: nn.Module, **options: Any) -> None:
        self.group = link.group
        self.model = model
        self.sync = Sync(**options)
        self.replica = Replica(model, PLAIN)
        self.sync.attach(self.replica, link)
        self.sent = link.group.bytes_sent

    def begin(self, microbatches: int = 1, weight: float = 1.0) -> None:
        self.replica.zero_grad()
        self.sync.before_forward(microbatches, weight)
        self.sent = self.group.bytes_sent

    @property
    def sent_early(self) -> int:
        return self.group.bytes_sent - self.sent

    def gradients(self) -> list[list[float] | None]:
        return [None if p.grad is None else p.grad.tolist() for p in self.replica.parameters]


class Tied(nn.Module):
    """One matrix used twice, by two modules: its gradient has two contributions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        nn.init.ones_(self.a.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).sum()


class Partly(nn.Module):
    """Parameters that all, some (rank 1) or no ranks use, and a frozen one."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.first, self.some, self.none, self.frozen, self.last = (
            nn.Parameter(torch.ones(1)) for _ in range(5)
        )
        self.frozen.requires_grad_(False)
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        some = self.some if self.rank == 1 else 0.0
        return (self.first * x + some + self.last * x * self.frozen).sum()


def gathers(link: Connection) -> bool:
    """Whether all_gather brings every rank's tensors, of any dtype, and counts their bytes."""
    group = link.group
    dtypes = [torch.uint8, torch.float32, torch.bfloat16, torch.int64, torch.bool]

    def of(rank: int) -> list[Tensor]:
        return [torch.arange(i + 2).to(d) + rank for i, d in enumerate(dtypes[:-1])] + [
            torch.tensor([rank == 1]),
            torch.empty(0, 3),
            torch.tensor(float(rank)),
        ]

    before = group.bytes_sent
    rows = group.all_gather(of(group.rank))
    # 2 + 3 x 4 + 4 x 2 + 5 x 8 + 1 + 0 + 4
    counted = group.bytes_sent - before == 67
    before = group.bytes_sent
    group.broadcast([torch.zeros(5)], src=1)
    counted = counted and group.bytes_sent - before == (20 if group.rank == 1 else 0)
    return counted and all(
        torch.equal(a, b) and a.dtype is b.dtype
        for rank, row in enumerate(rows)
        for a, b in zip(row, of(rank), strict=True)
    )


def tied(link: Connection) -> dict[str, Any]:
    """The loss of (x, 0) is 2 x sum w: all entries' gradients are x (w + w), see the test."""
    loop = Loop(link, Tied(), overlap=True)
    loop.begin(microbatches=2)
    x = torch.tensor([1.0 + link.group.rank, 0.0])
    loop.model(x).backward()
    after_one = loop.sent_early
    loop.model(x).backward()
    after_two = loop.sent_early
    loop.sync.reduce_gradients()
    return {"early": (after_one, after_two), "gradient": loop.gradients()[0]}


def partly(link: Connection) -> list[Any]:
    """Two steps; buckets of one parameter each, from the last to the first."""
    loop = Loop(link, Partly(link.group.rank), overlap=True, bucket_bytes=1)
    seen: list[Any] = []
    for _ in range(2):
        loop.begin()
        loop.model(torch.tensor([3.0])).backward()
        seen.append(loop.sent_early)
        loop.sync.reduce_gradients()
        seen.append(loop.gradients())
    return seen


def cut_short(link: Connection) -> dict[str, Any]:
    """Two microbatches announced; rank 0 computes one, rank 1 two, rank 2 was given none."""
    rank = link.group.rank
    loop = Loop(link, nn.Linear(1, 1, bias=False), overlap=True)
    loop.begin(microbatches=0 if rank == 2 else 2, weight=0.0 if rank == 2 else 1.0)
    if rank == 0:
        loop.model(torch.tensor([2.0])).backward()  # the mean over what was computed
    elif rank == 1:
        for x in (4.0, 6.0):
            (loop.model(torch.tensor([x])) / 2).backward()
    early = loop.sent_early
    loop.sync.reduce_gradients(weight=[0.5, 1.0, 0.0][rank])
    return {"early": early, "gradient": loop.gradients()[0]}


def mistakes(link: Connection) -> dict[str, str]:
    """Made by all ranks at once, so that they stay in step."""
    told = {}
    x = torch.ones(1)
    twice = torch.tensor([float(link.group.rank)])
    handle = link.group.all_reduce([twice], "mean")
    for _ in range(2):
        handle.wait()
    told["waited for twice"] = str(twice.tolist())
    loop = Loop(link, nn.Linear(1, 1), overlap=True)
    loop.begin()
    loop.model(x).backward()
    with pytest.raises(ConfigError) as error:
        loop.sync.reduce_gradients(weight=0.5)
    told["weight"] = str(error.value)
    with pytest.raises(ClusterError) as broken:
        loop.begin()
    told["unfinished"] = str(broken.value)
    loop = Loop(link, nn.Linear(1, 1), overlap=True)
    loop.begin()
    loop.model(x).backward()
    with pytest.raises(ConfigError) as error:
        loop.model(x).backward()
    told["twice"] = str(error.value)
    loop = Loop(link, nn.Linear(1, 1), overlap=True)
    for _ in range(2):  # nothing announced, nothing begun early
        loop.model(x).backward()
    told["unannounced"] = str(loop.sent_early)
    loop.sync.reduce_gradients()
    told["unannounced gradient"] = str(loop.gradients())
    return told


def hooks(link: Connection) -> list[int]:
    """Hooks on the weight with a strategy, and without it."""
    model = nn.Linear(2, 1)
    counts = []
    loop = Loop(link, model, overlap=True)
    counts.append(len(model.weight._post_accumulate_grad_hooks or {}))
    del loop
    gc.collect()
    counts.append(len(model.weight._post_accumulate_grad_hooks or {}))
    return counts


def quadratic(link: Connection, codec: TopK) -> float:
    """f(x) = (x1^2 + x2^2 / 10) / 2 + noise x1 from (0, 10), lr 0.2, 250 steps; the last x2."""

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([0.0, 10.0]))

        def forward(self, noise: Tensor) -> Tensor:
            return (self.x[0] ** 2 + self.x[1] ** 2 / 10) / 2 + noise * self.x[0]

    model = Quadratic()
    sync = Sync(compression=codec)
    sync.attach(Replica(model, partial(torch.optim.SGD, lr=0.2)), link)
    noise = torch.tensor([4.0, -2.0, -2.0][link.group.rank])
    for _ in range(250):
        model.x.grad = None
        model(noise).backward()
        sync.reduce_gradients()
        sync.apply_gradients()
    return float(model.x.detach()[1])


def weighted_top_k(link: Connection) -> list[Any]:
    """Top 1 of 2 with the weights 1, 3 and 0; the last rank's tensors are NaN, then they count."""
    rank = link.group.rank
    group = compressed(link.group, TopK(0.5), [torch.zeros(2)])
    result = []
    for step in range(2):
        g = torch.tensor([[4.0, 1.0], [1.0, -8.0], [torch.nan, 1.0]][rank])
        if step == 1 and rank == 2:
            g = torch.tensor([0.0, 7.0])
        weight = [1.0, 3.0, 0.0][rank] if step == 0 else 1.0
        group.all_reduce([g], "mean", weight).wait()
        result.append(g.tolist())
    return result


def shared_left_factor(link: Connection) -> tuple[float, float]:
    """Rank r has u v_r^T: the mean has rank 1, so PowerSGD(1) is exact; the largest error."""
    u = torch.arange(1.0, 13.0)

    def of(rank: int) -> Tensor:
        return torch.outer(u, torch.randn(20, generator=torch.Generator().manual_seed(rank)))

    m = of(link.group.rank)
    group = compressed(link.group, PowerSGD(1), [m])
    group.all_reduce([m], "mean", weight := [1.0, 2.0, 0.5][link.group.rank]).wait()
    assert weight > 0
    exact = (of(0) + 2 * of(1) + 0.5 * of(2)) / 3.5
    return float((m - exact).abs().max()), float(group.state_dict()[0]["kept"].abs().max())


def sync_rank(transport: Transport) -> dict[str, Any]:
    with connect(transport=transport, timeout_seconds=30) as link:
        assert link.transport == transport
        small = {"bucket_bytes": 100}  # the first layer alone is 16 x 3 x 4 = 192 bytes
        result: dict[str, Any] = {
            "off": flat(train(link, Sync(overlap=False)).model),
            "on": flat(train(link, Sync(overlap=True, **small)).model),
            "default": flat(train(link, Sync()).model),
            "gathers": gathers(link),
            "tied": tied(link),
            "partly": partly(link),
            "cut short": cut_short(link),
            "hooks": hooks(link),
        }
        dropping = DropCompute(0.0) if link.group.rank == 0 else None
        for overlap in (False, True):
            t = train(link, Sync(overlap=overlap, **small), 1, drop_compute=dropping)
            result[f"dropped, overlap {overlap}"] = flat(t.model)
            nan = [FaultInjector().nan_at(1, 1)]
            t = train(link, Sync(overlap=overlap, **small), 1, callbacks=nan)
            result[f"nan, overlap {overlap}"] = flat(t.model)
        result["mistakes"] = mistakes(link)
        return result


def step_bytes(link: Connection, compression: Compression | None) -> int:
    """Of the second step: the first also asks for parameters without a gradient."""
    loop = Loop(link, net(), compression=compression, overlap=False)
    for _ in range(2):
        loop.begin()
        loop.model(torch.ones(2, 3)).sum().backward()
        loop.sync.reduce_gradients()
    return loop.sent_early


def resumed(link: Connection, compression: Compression) -> bool:
    """Whether a run that is saved in the middle of an epoch goes on as if it had not been.

    Bit for bit, since what is gathered is added up in the order of ranks; PowerSGD's own
    all-reduces only through shared memory.
    """
    straight = train(link, Sync(compression=compression), steps=6)
    first = train(link, Sync(compression=compression), steps=3)
    second = trainer(link, Sync(compression=compression, overlap=True, bucket_bytes=100))
    second.load_state_dict(first.state_dict())
    second.fit(LOADER, max_steps=6)
    return torch.allclose(flat(straight.model), flat(second.model), rtol=1e-5, atol=1e-6)


def other_compression(link: Connection) -> str:
    saved = train(link, Sync(compression=TopK(0.1)), steps=1).state_dict()
    with pytest.raises(ConfigError) as error:
        trainer(link, Sync(compression=PowerSGD(1))).load_state_dict(saved)
    return str(error.value)


def compressed_rank(transport: Transport) -> dict[str, Any]:
    all_of_them: list[Compression | None] = [
        None, FP16(), BF16(), TopK(0.1), Sign(), PowerSGD(1),
    ]  # fmt: skip
    with connect(transport=transport, timeout_seconds=30) as link:
        trained = {}
        for compression in all_of_them:
            t = train(link, Sync(compression=compression), steps=60)
            trained[str(compression)] = (flat(t.model), t.evaluate(LOADER)["loss"])
        return {
            "trained": trained,
            "bytes": {str(c): step_bytes(link, c) for c in all_of_them},
            "resumed": {str(c): resumed(link, c) for c in (TopK(0.1), PowerSGD(1))},
            "other compression": other_compression(link),
            "weighted": weighted_top_k(link),
            "shared factor": shared_left_factor(link),
            "quadratic": (quadratic(link, Forgetful(0.5)), quadratic(link, TopK(0.5))),
        }


@pytest.fixture(scope="module", params=TRANSPORTS)
def synced(request: pytest.FixtureRequest) -> tuple[Transport, list[dict[str, Any]]]:
    return request.param, run_ranks(sync_rank, RANKS, request.param)


@pytest.fixture(scope="module", params=TRANSPORTS)
def compressed_runs(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(compressed_rank, RANKS, request.param)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, samples: list[int]) -> None:
    x, y = data(30)[samples]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


# What the ranks found


def test_overlap_changes_nothing(synced: tuple[Transport, list[dict[str, Any]]]) -> None:
    """Through shared memory bit for bit; gloo's sums depend on where a value lies in a message.

    Rounding: see test_equality: six steps on values of order 1 stay well below 1e-5.
    """
    transport, ranks = synced
    model = net()
    optimizer = SGD(model.parameters())
    for step in range(6):
        one_step(model, optimizer, list(range(24) if step % 2 == 0 else range(24, 30)))
    for rank in ranks:
        for name in ("off", "on", "default"):
            assert torch.equal(rank[name], ranks[0][name])
            torch.testing.assert_close(rank[name], flat(model), rtol=1e-5, atol=1e-5)
        if transport == "shared_memory":
            assert torch.equal(rank["on"], rank["off"])
            assert torch.equal(rank["default"], rank["off"])


def test_all_gather(synced: tuple[Transport, list[dict[str, Any]]]) -> None:
    assert [rank["gathers"] for rank in synced[1]] == [True] * RANKS


def test_a_tied_weight_is_sent_once_when_its_last_microbatch_is_done(
    synced: tuple[Transport, list[dict[str, Any]]],
) -> None:
    """W = ones, x = (c, 0): dL/dW = 1 (Wx)^T + (W^T 1) x^T = (c c; c c) + (2c 0; 2c 0).

    Twice, and c = 1, 2, 3 on the ranks, 2 in the mean: (12 4; 12 4). 4 floats are 16 bytes.
    """
    for rank in synced[1]:
        assert rank["tied"] == {"early": (0, 16), "gradient": [[12.0, 4.0], [12.0, 4.0]]}


def test_parameters_without_a_gradient(synced: tuple[Transport, list[dict[str, Any]]]) -> None:
    """first: 3; some: 1 on one of three ranks; none: stays without; last: 3.

    The bucket of "last" is sent during backward; "none" holds back what comes after it.
    """
    gradients = [[3.0], [pytest.approx(1 / 3)], None, [3.0]]
    for rank in synced[1]:
        assert rank["partly"] == [4, gradients, 4, gradients]


def test_a_step_that_was_cut_short_has_sent_nothing_early(
    synced: tuple[Transport, list[dict[str, Any]]],
) -> None:
    """Gradients 2 (one of two microbatches, weight 0.5), 5 (weight 1), none: 6 / 1.5."""
    assert [rank["cut short"]["early"] for rank in synced[1]] == [0, 4, 0]
    for rank in synced[1]:
        assert rank["cut short"]["gradient"] == [[pytest.approx(4.0)]]


def test_drop_compute_is_one_process_on_the_samples_that_were_used(
    synced: tuple[Transport, list[dict[str, Any]]],
) -> None:
    """The first step's batches are 0 to 5; rank 0 has 0 and 3, and leaves out 3: samples 12-15."""
    model = net()
    one_step(model, SGD(model.parameters()), [*range(12), *range(16, 24)])
    for rank in synced[1]:
        for overlap in (False, True):
            got = rank[f"dropped, overlap {overlap}"]
            torch.testing.assert_close(got, flat(model), rtol=1e-5, atol=1e-5)


def test_an_injected_nan_is_sent(synced: tuple[Transport, list[dict[str, Any]]]) -> None:
    """Rank 1's, to all; also where it is sent before the Trainer calls ``on_gradients``."""
    for rank in synced[1]:
        for overlap in (False, True):
            assert rank[f"nan, overlap {overlap}"].isnan().all()


def test_mistakes_are_told(synced: tuple[Transport, list[dict[str, Any]]]) -> None:
    for rank in synced[1]:
        told = rank["mistakes"]
        assert "has the weight 0.5, but before_forward announced 1.0" in told["weight"]
        assert "1 all-reduces of the last one have begun" in told["unfinished"]
        assert "got a gradient 2 times in a step that was announced as 1" in told["twice"]
        assert told["waited for twice"] == "[1.0]"  # (0 + 1 + 2) / 3
        assert told["unannounced"] == "0"
        assert told["unannounced gradient"] == "[[[2.0]], [2.0]]"


def test_hooks_are_gone_with_the_strategy(
    synced: tuple[Transport, list[dict[str, Any]]],
) -> None:
    assert [rank["hooks"] for rank in synced[1]] == [[1, 0]] * RANKS


def test_every_compression_trains_and_all_ranks_agree(
    compressed_runs: list[dict[str, Any]],
) -> None:
    for rank in compressed_runs:
        for name, (parameters, loss) in rank["trained"].items():
            assert torch.equal(parameters, compressed_runs[0]["trained"][name][0])
            assert loss < 0.35, name  # ln 2 = 0.69 at the start


def test_bytes_sent_in_a_step(compressed_runs: list[dict[str, Any]]) -> None:
    """The net has 16 x 3, 16, 8 x 16, 8, 2 x 8 and 2 parameters: 218 float32 are 872 bytes.

    Top 10 %: 5 + 2 + 13 + 1 + 2 + 1 values of 4 bytes with places of 4; the weight takes 8.
    Sign: 6 + 2 + 16 + 1 + 2 + 1 bytes, six means, the weight: 28 + 24 + 8.
    PowerSGD, rank 1: (16 + 3) + (8 + 16) + (2 + 8) and 16 + 8 + 2 as they are: 79 floats, and 8.
    """
    for rank in compressed_runs:
        assert rank["bytes"] == {
            "None": 872,
            "FP16()": 436,
            "BF16()": 436,
            "TopK(fraction=0.1)": 200,
            "Sign()": 60,
            "PowerSGD(rank=1)": 324,
        }


def test_a_run_with_compression_is_resumed_where_it_was(
    compressed_runs: list[dict[str, Any]],
) -> None:
    for rank in compressed_runs:
        assert rank["resumed"] == {"TopK(fraction=0.1)": True, "PowerSGD(rank=1)": True}
        assert "resume with the compression" in rank["other compression"]


def test_weighted_mean_of_what_was_sent(compressed_runs: list[dict[str, Any]]) -> None:
    """Weights 1, 3, 0: (4, 0) + 3 (0, -8) over 4; kept: (0, 1), 3 (1, 0), and on rank 2 nothing.

    Then (4, 2), (4, -8) and (0, 7): (4, 0) + (0, -8) + (0, 7) over 3.
    """
    for rank in compressed_runs:
        assert rank["weighted"] == [[1.0, -6.0], pytest.approx([4 / 3, -1 / 3])]


def test_power_sgd_of_a_mean_of_its_rank_is_exact(compressed_runs: list[dict[str, Any]]) -> None:
    """Entries up to about 12 x 2.5; a float32 product and mean of them errs by some 1e-5."""
    for rank in compressed_runs:
        error, kept = rank["shared factor"]
        assert error < 1e-4
        assert kept < 1e-4


def test_error_feedback_reaches_what_top_k_without_does_not(
    compressed_runs: list[dict[str, Any]],
) -> None:
    """Each rank's first entry is at least 2, its second at most 1: only the first is ever sent.

    Its mean is x1 = 0, so nothing moves. With feedback the second comes once it has grown to the
    size of the first: x2 is 10 x 0.98^250 = 0.06 as in plain descent, up to lr times what the
    ranks keep, at most about the size of the first entry: 0.2 x 4.
    """
    for rank in compressed_runs:
        without, with_feedback = rank["quadratic"]
        assert without == 10.0
        assert abs(with_feedback) < 0.9
