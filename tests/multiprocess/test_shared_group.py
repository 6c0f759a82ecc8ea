"""Collectives through shared memory: the right values, bit by bit, or an error that names ranks."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scaledtrain.comm import shared_memory
from scaledtrain.comm.protocols import ReduceOp
from scaledtrain.comm.shared_group import SharedMemoryGroup
from scaledtrain.errors import ClusterError, ConfigError, PeerLostError, WaitTimeoutError
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not shared_memory.available(), reason="needs Linux")

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *HALF)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


# What the values should be


def values(seed: int, rank: int, shapes: list[tuple[int, ...]], dtypes: Any) -> list[Tensor]:
    """The tensors of one rank; every rank can make those of every other."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    tensors = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        if dtype.is_floating_point:
            tensors.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            high = 2 if dtype is torch.bool else 100
            tensors.append(torch.randint(0, high, shape, generator=generator).to(dtype))
    return tensors


def reduced(xs: list[Tensor], op: ReduceOp, weights: list[float]) -> Tensor:
    """((x0 + x1) + x2) + ..., one after the other; 16-bit floats in float32, rounded at the end."""
    if op == "max":
        result = xs[0]
        for x in xs[1:]:
            result = torch.maximum(result, x)
        return result
    wide = torch.float32 if xs[0].dtype in HALF else xs[0].dtype
    if op == "sum":
        weights = [1.0] * len(xs)
    terms = [
        x.to(wide) if w == 1 else x.to(wide) * w for x, w in zip(xs, weights, strict=True) if w
    ]
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    if op == "mean":
        result = result / sum(weights)
    return result.to(xs[0].dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    def raw(x: Tensor) -> Tensor:
        return x.reshape(-1).contiguous().view(torch.uint8)

    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(raw(a), raw(b))


@dataclass(frozen=True)
class Case:
    name: str
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    op: ReduceOp
    weights: Callable[[int], float] = lambda rank: 1.0


MIXED = [(3,), (), (0, 4), (5, 7), (1,), (2, 3, 4)]
LARGE = [(3,), (100_003,), (), (300, 1000), (0,), (17,)]  # 1.6 MB of float32: four chunks

CASES = [
    *(Case(f"sum {d}", MIXED, [d] * 6, "sum") for d in (*FLOATS, *INTEGERS)),
    *(Case(f"max {d}", MIXED, [d] * 6, "max") for d in (*FLOATS, *INTEGERS, torch.bool)),
    *(Case(f"mean {d}", MIXED, [d] * 6, "mean") for d in FLOATS),
    *(Case(f"weighted {d}", MIXED, [d] * 6, "mean", lambda r: 0.3 + r) for d in FLOATS),
    *(Case(f"large sum {d}", LARGE, [d] * 6, "sum") for d in (*FLOATS, torch.uint8, torch.int64)),
    *(Case(f"large max {d}", LARGE, [d] * 6, "max") for d in (torch.float32, torch.bool)),
    *(Case(f"large weighted {d}", LARGE, [d] * 6, "mean", lambda r: 0.7 * r) for d in FLOATS),
    Case("half are one", MIXED, [torch.float32] * 6, "mean", lambda r: 1.0 if r % 2 else 0.5),
    Case("mixed dtypes", MIXED * 2, [*FLOATS, *INTEGERS, *FLOATS[:3]], "sum"),
    Case("large mixed dtypes", LARGE * 2, [*FLOATS, *INTEGERS, *FLOATS[:3]], "sum"),
    Case("no tensors", [], [], "sum"),
    Case("only empty tensors", [(0,), (3, 0)], [torch.float32] * 2, "mean"),
    Case("as many bytes as the small path takes", [(8192,)], [torch.float32], "sum"),
    Case("a byte more", [(32769,)], [torch.uint8], "sum"),
    Case("exactly one chunk", [(131072,)], [torch.float32], "sum"),
    Case("one element more", [(131073,)], [torch.float32], "sum"),
    Case("fewer elements than ranks", [(1,)], [torch.float64], "mean"),
]


# What the ranks do


def meet() -> tuple[int, int, dist.Store]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        address, port, size, rank == 0, timedelta(seconds=30), wait_for_workers=False
    )
    return rank, size, store


def part(store: dist.Store, rank: int, size: int) -> None:
    """Rank 0 has the store, so it goes last."""
    store.set(f"done/{rank}", "1")
    if rank == 0:
        store.wait([f"done/{r}" for r in range(size)])


def new_group(rank: int, size: int, store: dist.Store, timeout: float = 30) -> SharedMemoryGroup:
    group = SharedMemoryGroup.connect(rank, size, store, timeout)
    assert group is not None
    return group


def mapped() -> list[str]:
    """Shared memory of this process: with a name in /dev/shm, or of ours."""
    with open("/proc/self/maps") as file:
        return [line for line in file if "/dev/shm" in line or "memfd:scaledtrain" in line]


def compute(n_rounds: int) -> dict[str, Any]:
    """Every case and then many rounds; returns what was wrong and a digest of all results."""
    rank, size, store = meet()
    group = new_group(rank, size, store)
    named = [line for line in mapped() if "/dev/shm" in line]
    wrong = []
    digest = hashlib.sha256()

    def check(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            digest.update(a.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            if not same_bits(a, b):
                wrong.append(f"{name}, tensor {i}")

    def all_values(seed: int, shapes: Any, dtypes: Any) -> list[list[Tensor]]:
        return [values(seed, r, shapes, dtypes) for r in range(size)]

    for seed, case in enumerate(CASES):
        inputs = all_values(seed, case.shapes, case.dtypes)
        weights = [case.weights(r) for r in range(size)]
        mine = [t.clone() for t in inputs[rank]]
        group.all_reduce(mine, case.op, weights[rank]).wait()
        expected = [reduced(list(xs), case.op, weights) for xs in zip(*inputs, strict=True)]
        check(case.name, mine, expected)

        mine = [t.clone() for t in inputs[rank]]
        src = seed % size
        group.broadcast(mine, src)
        check(f"broadcast of {case.name}", mine, inputs[src])

    # Not contiguous: written in place all the same, and nothing beside.
    columns = [torch.zeros(50, 4000) for _ in range(2)]
    inputs = all_values(500, [(50,)] * 2, [torch.float32] * 2)
    for column, x in zip(columns, inputs[rank], strict=True):
        column[:, 7] = x
    group.all_reduce([c[:, 7] for c in columns], "sum").wait()
    sums = [reduced(list(xs), "sum", []) for xs in zip(*inputs, strict=True)]
    check("columns", [c[:, 7] for c in columns], sums)
    check("beside columns", [c[:, 8:] for c in columns], [torch.zeros(50, 3992)] * 2)

    # A rank of weight 0 may hold anything, the first one too.
    for outsider in {0, size - 1}:
        for n in (5, 200_000):
            inputs = all_values(501 + n, [(n,)], [torch.float32])
            inputs[outsider][0].fill_(torch.nan)
            mine = [inputs[rank][0].clone()]
            weights = [0.0 if r == outsider else 1.0 for r in range(size)]
            group.all_reduce(mine, "mean", weights[rank]).wait()
            check(
                f"rank {outsider} outside", mine, [reduced([x[0] for x in inputs], "mean", weights)]
            )

    nan = torch.tensor([0.0, torch.nan if rank == size - 1 else 1.0])
    group.all_reduce([nan], "max").wait()
    if nan[0] != 0 or not nan[1].isnan():
        wrong.append("NaN in max")

    # Handles in any order; those in front are done first.
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    first, second = group.all_reduce([a], "sum"), group.all_reduce([a, b], "sum")
    second.wait()
    first.wait()
    check("two in a row", [a, b], [torch.tensor([1.0 * size * size]), torch.tensor([2.0 * size])])

    # An error that all ranks make together leaves the group in step.
    refused = []
    for weight in (0.0, -1.0 if rank == size - 1 else 1.0, torch.nan if rank == 0 else 1.0):
        for n in (4, 200_000):
            try:
                group.all_reduce([torch.ones(n)], "mean", weight).wait()
            except ConfigError as error:
                refused.append(str(error))
    a = torch.tensor([1.0])
    group.all_reduce([a], "sum").wait()
    check("after refusals", [a], [torch.tensor([float(size)])])

    # Sizes in random order, ranks at random times.
    order, pace = random.Random(1), random.Random(rank)
    start = time.perf_counter()
    for i in range(n_rounds):
        n = order.choice([1, 2, 100, 8192, 8193, 50_000, 131_072, 300_000])
        op: ReduceOp = order.choice(["sum", "mean", "max"])
        x = torch.arange(n, dtype=torch.float32) % 1000 + rank + i
        if pace.random() < 0.1:
            time.sleep(pace.random() * 1e-3)
        if order.random() < 0.2:
            group.broadcast([x], i % size)
            expected_x = torch.arange(n, dtype=torch.float32) % 1000 + i % size + i
        else:
            group.all_reduce([x], op).wait()
            # sum_r (k + r) = n k + n (n - 1) / 2, all exact in float32
            base = torch.arange(n, dtype=torch.float32) % 1000 + i
            total = base * size + size * (size - 1) / 2
            expected_x = {"sum": total, "mean": total / size, "max": base + size - 1}[op]
        check(f"round {i}: {op} of {n}", [x], [expected_x])
    seconds = time.perf_counter() - start

    n_plans = len(group._plans)
    for n in range(200):
        group.broadcast([torch.zeros(n)])
    n_plans = max(n_plans, len(group._plans))

    group.close()
    part(store, rank, size)
    gc.collect()
    return {
        "wrong": wrong,
        "digest": digest.hexdigest(),
        "refused": refused,
        "named": named,
        "left": mapped(),
        "seconds": seconds,
        "plans": n_plans,
    }


def time_spent() -> dict[str, float]:
    """Rank 1 comes 0.3 s late; then a large payload."""
    rank, size, store = meet()
    seconds = {"waiting": 0.0, "communication": 0.0}
    last = time.perf_counter()
    orderly = True

    def observe(phase: str, start: float, end: float) -> None:
        nonlocal last, orderly
        orderly = orderly and last <= start <= end <= time.perf_counter()
        last = end
        seconds[phase] += end - start

    group = SharedMemoryGroup.connect(rank, size, store, 30, observe=observe)
    assert group is not None
    group.all_reduce([torch.ones(4)]).wait()
    before = dict(seconds)
    if rank == 1:
        time.sleep(0.3)
    group.all_reduce([torch.ones(4)]).wait()
    late = {phase: seconds[phase] - before[phase] for phase in seconds}
    large = [torch.ones(4_000_000)]
    group.all_reduce(large).wait()
    handle = group.all_reduce(large)
    start = time.perf_counter()
    before = dict(seconds)
    handle.wait()
    covered = sum(seconds.values()) - sum(before.values())
    share = covered / (time.perf_counter() - start)
    group.close()
    part(store, rank, size)
    return {**late, "orderly": orderly, "covered": share}


def disagree(call: str, group: SharedMemoryGroup, odd: bool) -> None:
    """One call on the odd rank, another one on the rest."""
    x = torch.ones(8)
    if call == "shape":
        x = torch.ones(2, 4) if odd else x
    elif call == "dtype":
        x = torch.ones(8, dtype=torch.int32) if odd else x
    elif call == "bytes":
        x = torch.ones(300_000) if odd else x
    if call == "op":
        group.all_reduce([x], "max" if odd else "sum").wait()
    elif call == "source":
        group.broadcast([x], 1 if odd else 0)
    elif call == "collective" and odd:
        group.broadcast([x], 0)
    elif call == "count" and odd:
        group.all_reduce([x, x.clone()]).wait()
    else:
        group.all_reduce([x]).wait()


DISAGREEMENTS = ("op", "bytes", "dtype", "shape", "count", "collective", "source")


def told(call: Callable[[], object]) -> tuple[str, str, float]:
    """What a call raises, its message, and how long it took."""
    start = time.perf_counter()
    try:
        call()
    except (Exception, KeyboardInterrupt) as error:
        return type(error).__name__, str(error), time.perf_counter() - start
    return "", "", time.perf_counter() - start


def victim() -> None:
    """A process that is rank 2 of a group, does one all-reduce and then nothing."""
    rank, size, store = meet()
    group = new_group(rank, size, dist.PrefixStore("killed", store))
    group.all_reduce([torch.ones(1)]).wait()
    store.set("victim", str(os.getpid()))
    time.sleep(60)


def fail() -> dict[str, Any]:
    """All that can go wrong between three ranks, one after the other, each with a new group."""
    rank, size, store = meet()
    results: dict[str, Any] = {"pid": os.getpid()}

    for call in DISAGREEMENTS:
        group = new_group(rank, size, store)
        results[call] = told(lambda call=call, group=group: disagree(call, group, rank == 1))
        results[call + " again"] = told(lambda group=group: group.broadcast([torch.ones(1)]))
        group.close()

    group = new_group(rank, size, store, timeout=0.5)
    if rank != 1:
        results["late"] = told(lambda: group.all_reduce([torch.ones(4)]).wait())
        store.set(f"late/{rank}", "1")
    else:
        store.wait(["late/0", "late/2"])
        x = torch.ones(4)
        results["in time"] = told(lambda: group.all_reduce([x]).wait()), x.tolist()
        results["late"] = told(lambda: group.all_reduce([x]).wait())
    group.close()

    group = new_group(rank, size, store)
    if rank == 1:
        group.close()
    results["closed"] = told(lambda: group.broadcast([torch.ones(4)]))
    group.close()

    group = new_group(rank, size, store)
    if rank == 0:

        def interrupt() -> None:
            time.sleep(0.3)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        results["interrupted"] = told(lambda: group.all_reduce([torch.ones(300_000)]).wait())
        results["interrupted again"] = told(lambda: group.all_reduce([torch.ones(4)]).wait())
        thread.join()
        store.set("interrupted", "1")
    else:
        store.wait(["interrupted"])
        results["interrupted"] = told(lambda: group.all_reduce([torch.ones(300_000)]).wait())
    group.close()

    store_of_killed = dist.PrefixStore("killed", store)
    if rank == 2:
        command = "from tests.multiprocess.test_shared_group import victim; victim()"
        code = f"import sys; sys.path[:] = {sys.path!r}; {command}"
        with subprocess.Popen([sys.executable, "-c", code]) as process:
            store.wait(["victim"])
            time.sleep(0.3)  # by now the others wait
            results["killed at"] = time.perf_counter()
            process.kill()
    else:
        group = new_group(rank, size, store_of_killed)
        group.all_reduce([torch.ones(1)]).wait()
        results["killed"] = told(lambda: group.all_reduce([torch.ones(300_000)]).wait())
        results["noticed at"] = time.perf_counter()
        group.close()
    results["victim"] = int(store.get("victim"))
    part(store, rank, size)
    gc.collect()
    results["left"] = mapped()
    return results


# Values


@pytest.mark.parametrize(
    ("world_size", "n_rounds"),
    [(2, 300), (3, 150), pytest.param(6, 60, marks=pytest.mark.slow)],
)
def test_every_rank_gets_the_sum_in_the_order_of_ranks(world_size: int, n_rounds: int) -> None:
    ranks = run_ranks(compute, world_size, n_rounds, timeout_seconds=90)
    for result in ranks:
        assert result["wrong"] == []
        assert result["named"] == []  # nothing in /dev/shm while it runs
        assert result["left"] == []  # nor anywhere after
        assert result["plans"] <= 64
    assert len({result["digest"] for result in ranks}) == 1
    last = world_size - 1
    zero, minus, nan = (
        f"all {world_size} ranks gave the weight 0 to a mean, so that it has no value; at least "
        "one rank must have a sample",
        f"rank {last} gave a mean the weight -1.0; a weight is a finite number >= 0",
        "rank 0 gave a mean the weight nan; a weight is a finite number >= 0",
    )
    assert ranks[0]["refused"] == [zero, zero, minus, minus, nan, nan]
    assert all(result["refused"] == ranks[0]["refused"] for result in ranks)
    # More ranks than cores take turns, but none starves: a round, of 0.5 MB on average, takes
    # milliseconds.
    assert max(result["seconds"] for result in ranks) < 0.3 * n_rounds


@pytest.mark.alone
def test_a_late_rank_is_seen_as_waiting_by_the_others() -> None:
    punctual, late = run_ranks(time_spent, 2)
    assert punctual["waiting"] > 0.25
    assert late["waiting"] < 0.15
    assert punctual["communication"] < 0.15
    for result in (punctual, late):
        assert result["orderly"]
        assert 0.9 < result["covered"] <= 1.0


# Errors


@pytest.fixture(scope="module")
def failures() -> list[dict[str, Any]]:
    return run_ranks(fail, 3, timeout_seconds=90)


def expect(told: tuple[str, str, float], kind: type[BaseException], *parts: str) -> None:
    name, message, _ = told
    assert name == kind.__name__, message
    for piece in parts:
        assert piece in message


@pytest.mark.parametrize("call", DISAGREEMENTS)
def test_ranks_that_call_different_things_are_told_who_called_what(
    failures: list[dict[str, Any]], call: str
) -> None:
    usual = "all_reduce(op='sum') of 1 tensors, 32 bytes"
    odd = {
        "op": "all_reduce(op='max') of 1 tensors, 32 bytes",
        "bytes": "all_reduce(op='sum') of 1 tensors, 1200000 bytes",
        "count": "all_reduce(op='sum') of 2 tensors, 64 bytes",
        "collective": "broadcast(src=0) of 1 tensors, 32 bytes",
        "source": "broadcast(src=1) of 1 tensors, 32 bytes",
    }.get(call, usual)
    if call == "source":
        usual = "broadcast(src=0) of 1 tensors, 32 bytes"
    for result in failures:
        calls = f"rank 0: {usual}; rank 1: {odd}; rank 2: {usual}"
        expect(result[call], ClusterError, "called different collectives", calls)
        expect(result[call + " again"], ClusterError, "cannot use this group any more", calls)


def test_a_rank_that_does_not_come_is_named_after_the_timeout(
    failures: list[dict[str, Any]],
) -> None:
    for rank in (0, 2):
        late = failures[rank]["late"]
        waited = f"rank {rank} waited in all_reduce for rank 1 (pid {failures[1]['pid']}) for "
        expect(late, WaitTimeoutError, waited, "is alive", "raise timeout_seconds (now 0.5)")
        assert 0.5 <= late[2] < 2.0
    # The late one finds what the others brought, so that one is complete; the next cannot be.
    (error, *_), values = failures[1]["in time"]
    assert (error, values) == ("", [3.0] * 4)
    expect(failures[1]["late"], PeerLostError, "rank 0", "gave up after an error of its own")


def test_a_rank_that_closed_its_group_is_not_waited_for(failures: list[dict[str, Any]]) -> None:
    for rank in (0, 2):
        expect(failures[rank]["closed"], PeerLostError, f"rank {rank} waited in broadcast for rank")
        assert failures[rank]["closed"][2] < 2.0
    assert any("rank 1" in f["closed"][1] and "closed its side" in f["closed"][1] for f in failures)
    expect(failures[1]["closed"], ClusterError, "it was closed")


def test_ctrl_c_ends_a_wait_at_once_and_the_others_learn_of_it(
    failures: list[dict[str, Any]],
) -> None:
    expect(failures[0]["interrupted"], KeyboardInterrupt)
    assert failures[0]["interrupted"][2] < 2.0
    expect(failures[0]["interrupted again"], ClusterError, "cannot use this group any more")
    for rank in (1, 2):
        expect(failures[rank]["interrupted"], PeerLostError, "gave up after an error of its own")
        assert failures[rank]["interrupted"][2] < 2.0


def test_a_killed_rank_is_noticed_within_two_seconds_by_all_others(
    failures: list[dict[str, Any]],
) -> None:
    for rank in (0, 1):
        result = failures[rank]
        expect(result["killed"], PeerLostError, f"rank {rank} waited in all_reduce for rank")
        assert 0 < result["noticed at"] - failures[2]["killed at"] < 2.0
    messages = [failures[rank]["killed"][1] for rank in (0, 1)]
    assert any(f"for rank 2 (pid {failures[2]['victim']}), which has died" in m for m in messages)


def test_nothing_is_left_of_groups_that_failed(failures: list[dict[str, Any]]) -> None:
    assert [result["left"] for result in failures] == [[], [], []]


# A group of one, in this process


@pytest.fixture
def alone() -> Iterator[SharedMemoryGroup]:
    group = new_group(0, 1, dist.HashStore())
    yield group
    group.close()


def test_one_rank_takes_the_same_path_as_many(alone: SharedMemoryGroup) -> None:
    for n in (3, 300_000):
        x = torch.randn(n)
        before = x.clone()
        alone.all_reduce([x], "sum").wait()
        alone.all_reduce([x], "mean").wait()
        alone.all_reduce([x], "max").wait()
        alone.broadcast([x])
        assert same_bits(x, before)
        alone.all_reduce([x], "mean", weight=4.0).wait()
        assert same_bits(x, before)  # 4 x / 4: powers of two are exact


def test_the_work_is_done_in_wait(alone: SharedMemoryGroup) -> None:
    x = torch.ones(2)
    handle = alone.all_reduce([x], "mean", weight=0.5)
    x.fill_(3.0)
    handle.wait()
    handle.wait()
    assert x.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("tensors", "op", "message"),
    [
        ([torch.ones(2, dtype=torch.bool)], "sum", "bool, of which no sum is taken"),
        ([torch.ones(2), torch.ones(2, dtype=torch.int64)], "mean", "tensor 1 is torch.int64"),
        ([torch.ones(2, dtype=torch.complex64)], "max", "complex64, of which no max"),
        ([torch.ones(2, device="meta")], "sum", "is on meta"),
        ([torch.ones(2).to_sparse()], "sum", "sparse"),
        ([torch.ones(2)], "prod", "op='prod' is none of 'sum', 'mean', 'max'"),
        ([torch.ones(2)], "broadcast", "op='broadcast' is none of"),
    ],
)
def test_what_cannot_be_reduced_is_refused_at_once(
    alone: SharedMemoryGroup, tensors: list[Tensor], op: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        alone.all_reduce(tensors, op)
    assert message in str(raised.value)
    alone.all_reduce([torch.ones(2)]).wait()


def test_the_error_of_one_handle_is_not_that_of_the_next(alone: SharedMemoryGroup) -> None:
    x = torch.ones(2)
    wrong, right = alone.all_reduce([x], "mean", weight=0.0), alone.all_reduce([x])
    right.wait()
    with pytest.raises(ConfigError, match="all 1 ranks gave the weight 0"):
        wrong.wait()


def test_memory_that_is_not_there_or_given_twice_is_refused(alone: SharedMemoryGroup) -> None:
    x = torch.ones(4)
    with pytest.raises(ConfigError, match="in the same memory"):
        alone.broadcast([x, x])
    x.untyped_storage().resize_(0)
    with pytest.raises(ConfigError, match="tensor 1 has no memory"):
        alone.broadcast([torch.ones(0), x])
    with pytest.raises(ConfigError, match="src=1 is no rank of a group of 1"):
        alone.broadcast([torch.ones(4)], src=1)


def test_autograd_knows_that_a_tensor_was_written(alone: SharedMemoryGroup) -> None:
    w = torch.ones(3, requires_grad=True)
    loss = (w * w).sum()
    alone.all_reduce([w]).wait()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_group_made_or_used_in_inference_mode_works_outside_too() -> None:
    with torch.inference_mode():
        group = new_group(0, 1, dist.HashStore())
        group.all_reduce([torch.ones(3), torch.ones(2)], "mean").wait()
    x = torch.ones(3)
    group.all_reduce([x, torch.ones(2)], "mean", weight=2.0).wait()
    group.close()
    assert x.tolist() == [1.0, 1.0, 1.0]


def test_a_closed_group_says_so(alone: SharedMemoryGroup) -> None:
    handle = alone.all_reduce([torch.ones(1)])
    alone.close()
    alone.close()
    for call in (handle.wait, lambda: alone.all_reduce([torch.ones(1)])):
        with pytest.raises(
            ClusterError, match="rank 0 cannot use this group any more: it was clos"
        ):
            call()
