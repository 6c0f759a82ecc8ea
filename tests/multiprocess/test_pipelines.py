"""Pipelines over real processes: gradients of the plain model, whatever the schedule; errors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scaledtrain import Precision
from scaledtrain.comm.process_group import meet_in_pairs
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError, PeerLostError, WaitTimeoutError
from scaledtrain.loss_scale import DynamicScaler, LossScale
from scaledtrain.parallel.pipeline import (
    SCHEDULES,
    PipeDreamSchedule,
    PipelineSchedule,
    Timetable,
    pipeline_order,
    simulate,
)
from scaledtrain.parallel.pipeline.cut import cut_step
from tests.pipelines import SGD, batch, join, parts, plain
from tests.ranks import run_ranks

N = 8  # microbatches: enough for DualPipeV on 4 ranks


def check(stages: dict[int, nn.Module], whole: Sequence[nn.Module], exact: bool = True) -> None:
    for number, stage in stages.items():
        expected = whole[number].parameters()
        for (name, p), q in zip(stage.named_parameters(), expected, strict=True):
            assert (p.grad is None) == (q.grad is None), (number, name)
            if q.grad is not None:
                tolerance = 0.0 if exact else 1e-6
                torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)


def own_stages(name: str, n: int, whole: Sequence[nn.Module] | None = None) -> Any:
    """This rank's stages of a model, and a whole copy of it."""
    order = pipeline_order(name, dist.get_world_size(), n)
    mine = parts(order.n_stages)
    return {s: mine[s] for s in order.stages(dist.get_rank())}, parts(order.n_stages)


def every_schedule(precision: str) -> None:
    join()
    for name in SCHEDULES:
        stages, whole = own_stages(name, N)
        schedule = PipelineSchedule(
            name, stages, N, F.cross_entropy, dist.group.WORLD, precision=Precision(precision)
        )
        fired: dict[nn.Parameter, int] = {}
        for stage in stages.values():
            for p in stage.parameters():
                p.register_post_accumulate_grad_hook(
                    lambda p, fired=fired: fired.update({p: fired.get(p, 0) + 1})
                )
        # 8 x 4 samples, 8 microbatches of unequal sizes, and 3 microbatches of one sample.
        for samples, n in ((32, 8), (29, 8), (3, 3)):
            fired.clear()
            for module in (*stages.values(), *whole):
                module.zero_grad()
            loss = plain(nn.Sequential(*whole), batch(samples), N, precision)
            computed = schedule.run(batch(samples))
            assert torch.equal(computed.loss, loss)
            assert computed.samples == samples
            assert schedule.backward_passes(batch(samples)) == n
            check(stages, whole)
            assert set(fired.values()) == {n}
        assert schedule.run(StepBatch([], [])).samples == 0
    dist.destroy_process_group()


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_every_schedule_has_the_gradients_of_the_plain_model(n_ranks: int) -> None:
    run_ranks(every_schedule, n_ranks, "fp32")


def test_under_autocast_too() -> None:
    run_ranks(every_schedule, 2, "bf16-mixed")


def few_microbatches() -> None:
    """Two microbatches, and accumulation over two batches of the loader."""
    join()
    for name in ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"):
        stages, whole = own_stages(name, 2)
        schedule = PipelineSchedule(name, stages, 1, F.cross_entropy, dist.group.WORLD, batches=2)
        two = StepBatch([*batch(4).microbatches, *batch(3, seed=2).microbatches], [4, 3])
        plain(nn.Sequential(*whole), two, 1)
        schedule.run(two)
        check(stages, whole)
    dist.destroy_process_group()


@pytest.mark.parametrize("n_ranks", [1, 4])
def test_fewer_microbatches_than_ranks_and_a_single_rank(n_ranks: int) -> None:
    run_ranks(few_microbatches, n_ranks)


class Head(nn.Module):
    """An embedding at the beginning, and its transpose at the end."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(5, 8))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight) if self.first else F.linear(x, self.weight)


def language_model(n: int) -> list[nn.Module]:
    return [Head(True), *parts(n - 1)[:-1], Head(False)]


def tied_weights() -> None:
    rank, n_ranks = join()
    x, y = torch.randint(5, (2, 12), generator=torch.Generator().manual_seed(4))
    for name in ("1F1B", "ZBVZeroBubble"):  # in a V the first rank has both
        order = pipeline_order(name, n_ranks, 4)
        last = order.n_stages - 1
        mine, whole = language_model(order.n_stages), language_model(order.n_stages)
        stages = {s: mine[s] for s in order.stages(rank)}
        whole[-1].weight = whole[0].weight
        named = {0: "weight", last: "weight"}
        held = [stages[s].weight for s in named if s in stages]
        fired: list[nn.Parameter] = []
        for weight in held:
            weight.register_post_accumulate_grad_hook(fired.append)
        schedule = PipelineSchedule(
            name, stages, 4, F.cross_entropy, dist.group.WORLD, tied=[[*named.items()]]
        )
        own = [p for stage in stages.values() for p in stage.parameters()]
        optimizers = [SGD(own), SGD(nn.Sequential(*whole).parameters())]
        for step in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            fired.clear()
            loss = plain(nn.Sequential(*whole), StepBatch([(x, y)], [12]), 4)
            computed = schedule.run(StepBatch([(x, y)], [12]))
            torch.testing.assert_close(computed.loss, loss)
            assert len(fired) == len(held), step
            for weight in held:
                torch.testing.assert_close(weight.grad, whole[0].weight.grad)
            for optimizer in optimizers:
                optimizer.step()
        copies: list[Any] = [None] * n_ranks
        dist.all_gather_object(copies, [w.tolist() for w in held])
        values = [weight for of_rank in copies for weight in of_rank]
        assert len(values) == 2
        assert values[0] == values[1]
    dist.destroy_process_group()


def test_tied_weights_get_one_gradient_and_stay_equal() -> None:
    run_ranks(tied_weights, 2)


def scaled() -> None:
    """A power of two changes no bit, in backward passes of one or two parts."""
    join()
    for name in ("1F1B", "ZBVZeroBubble"):
        stages, whole = own_stages(name, 4)
        scaler = DynamicScaler(
            LossScale(initial=1024.0), [p for s in stages.values() for p in s.parameters()]
        )
        schedule = PipelineSchedule(
            name, stages, 4, F.cross_entropy, dist.group.WORLD, scaler=scaler
        )
        plain(nn.Sequential(*whole), batch(16), 4)
        schedule.run(batch(16))
        check(stages, whole)
    dist.destroy_process_group()


def test_a_scaled_loss_gives_unscaled_gradients() -> None:
    run_ranks(scaled, 2)


class Recomputed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, x, use_reentrant=False)

    def _forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def recompute() -> None:
    join()
    for name, recomputed, calls in (
        ("1F1B", False, 2),
        ("ZBVZeroBubble", True, 2),  # forward, and once more
        ("ZBVZeroBubble", False, 4),  # and for each of the two branches, Linear and LayerNorm
    ):
        stages, whole = own_stages(name, 4)
        for number, stage in stages.items():
            if number < len(whole) - 1:
                stages[number] = Recomputed(stage)
        schedule = PipelineSchedule(
            name, stages, 4, F.cross_entropy, dist.group.WORLD, recomputed=recomputed
        )
        plain(nn.Sequential(*whole), batch(16), 4)
        schedule.run(batch(16))
        check(stages, whole)
        for number, stage in stages.items():
            if 0 < number < len(whole) - 1:  # the first stage has no inputs to be first with
                assert stage.calls == 4 * calls
    dist.destroy_process_group()


def test_stages_that_recompute() -> None:
    run_ranks(recompute, 2)


class Several(nn.Module):
    """Hands on a hidden state, whole numbers, and a skip connection; one output is not used."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.last = last

    def forward(self, given: Any) -> Any:
        x, mask, skip, _ = given if isinstance(given, tuple) else (given, given > 0, given, None)
        h = torch.tanh(self.linear(x)) * mask
        if self.last:
            return h + skip
        return h, mask, skip, h * 2


def tuples(frozen: int) -> None:
    rank, n_ranks = join()
    torch.manual_seed(0)
    mine = [Several(i == n_ranks - 1) for i in range(n_ranks)]
    torch.manual_seed(0)
    whole = [Several(i == n_ranks - 1) for i in range(n_ranks)]
    for module in (mine[frozen], whole[frozen]):
        module.requires_grad_(False)
    schedule = PipelineSchedule("1F1B", {rank: mine[rank]}, 4, F.mse_loss, dist.group.WORLD)
    for rows in (2, 3):  # another form of microbatches after the first
        x = torch.randn(8, rows, 8, generator=torch.Generator().manual_seed(rows))
        step = StepBatch([(x, x + 1)], [8])
        model = nn.Sequential(*whole)
        for module in (model, mine[rank]):
            module.zero_grad()
        for m in cut_step(step, 4):
            (F.mse_loss(model(m.batch[0]), m.batch[1]) * m.share).backward()
        schedule.run(step)
        check({rank: mine[rank]}, whole)
    dist.destroy_process_group()


@pytest.mark.parametrize("frozen", [0, 1])  # nothing goes back to stage 0 if it is frozen
def test_stages_hand_on_tuples_and_parts_are_frozen(frozen: int) -> None:
    run_ranks(tuples, 3, frozen)


class Wants(nn.Module):
    """The first stage of a model with its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(inputs), labels


class OwnLoss(nn.Module):
    def forward(self, given: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(*given)}


def own_loss() -> None:
    rank, _ = join()
    torch.manual_seed(0)
    stages = [Wants(), OwnLoss()]
    schedule = PipelineSchedule("GPipe", {rank: stages[rank]}, 2, None, dist.group.WORLD)
    ((x, y),) = batch(6).microbatches
    computed = schedule.run(StepBatch([{"inputs": x, "labels": y}], [6]))
    torch.manual_seed(0)
    first = Wants()
    loss = F.cross_entropy(first.linear(x), y)
    loss.backward()
    torch.testing.assert_close(computed.loss, loss.detach())
    if rank == 0:
        torch.testing.assert_close(stages[0].linear.weight.grad, first.linear.weight.grad)
    dist.destroy_process_group()


def test_a_model_with_its_own_loss() -> None:
    run_ranks(own_loss, 2)


class Waiting(nn.Module):
    """Its parameter is not where it computes, as a shard that waits in the host's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shard = nn.Parameter(torch.empty(1, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def told_where_to_compute() -> float:
    rank, _ = join()
    first = nn.Linear(8, 3)
    schedule = PipelineSchedule(
        "1F1B", {rank: [first, Waiting()][rank]}, 1, lambda y, _: y.sum(), dist.group.WORLD,
        precision=Precision("bf16-mixed"), device=torch.device("cpu"),
    )  # fmt: skip
    schedule.run(batch(4))
    dist.destroy_process_group()
    return float(first.bias.grad.sum()) if rank == 0 else 0.0


def test_messages_arrive_where_the_stages_compute() -> None:
    """Of each of 3 outputs, twice and of 4 samples: 3 x 2 x 4."""
    assert run_ranks(told_where_to_compute, 2) == [24.0, 0.0]


def predicting() -> None:
    """Between steps, also while gradients of an asynchronous pipeline are on their way."""
    rank, n_ranks = join()
    ((x, y),) = batch(6).microbatches
    two = StepBatch([(x[:4], y[:4]), (x[4:], y[4:])], [4, 2])
    zbv = pipeline_order("ZBVZeroBubble", n_ranks, 4)
    v = {s: parts(2 * n_ranks)[s] for s in zbv.stages(rank)}
    one = parts(n_ranks)[rank]
    for schedule, n_stages, last in (
        (PipelineSchedule(zbv, v, 4, F.cross_entropy, dist.group.WORLD), 2 * n_ranks, 0),
        (PipeDreamSchedule("PipeDream", one, 1, F.cross_entropy, dist.group.WORLD), n_ranks, 1),
    ):
        whole = nn.Sequential(*parts(n_stages))
        for _ in range(2):
            schedule.run(batch(16))
            outputs, loss = schedule.predict(two)
            torch.testing.assert_close(loss, F.cross_entropy(whole(x), y).detach())
            if rank == last:
                assert torch.equal(outputs[0], whole(x[:4]))
                assert torch.equal(outputs[1], whole(x[4:]))
            else:
                assert outputs is None
        with pytest.raises(ConfigError, match="no microbatch"):
            schedule.predict(StepBatch([], []))
    while schedule.pending:
        schedule.run(StepBatch([], []))
    dist.destroy_process_group()


def test_forward_passes_alone() -> None:
    run_ranks(predicting, 2)


def refused() -> None:
    rank, _ = join()
    stages, _ = own_stages("1F1B", 4)

    def make(name: Any, n: int, given: Any = stages, **options: Any) -> PipelineSchedule:
        return PipelineSchedule(name, given, n, F.cross_entropy, dist.group.WORLD, **options)

    with pytest.raises(ConfigError, match="3 stages cannot be shared equally by the 2 ranks"):
        make("Interleaved1F1B", 4, n_stages=3)
    with pytest.raises(ConfigError, match=r"by its schedule it has the stages \["):
        make("Interleaved1F1B", 4)
    with pytest.raises(ConfigError, match="is for 2 ranks and 4 microbatches, but"):
        make(pipeline_order("1F1B", 2, 4), 8)
    with pytest.raises(ConfigError, match="has 2 microbatches, but the schedule 1F1B was made for"):
        make("1F1B", 1).run(StepBatch(batch(4).microbatches * 2, [4, 4]))
    with pytest.raises(ConfigError, match="has no parameter 'nothing'"):
        make("1F1B", 4, tied=[[(0, "nothing"), (1, "nothing")]])
    with pytest.raises(ConfigError, match="fp16-mixed: stages of an asynchronous"):
        PipeDreamSchedule(
            "PipeDream", stages[rank], 1, None, dist.group.WORLD, precision=Precision("fp16-mixed")
        )
    dist.destroy_process_group()


def test_what_cannot_be_is_refused_before_anything_is_sent() -> None:
    run_ranks(refused, 2)


class Changing(nn.Module):
    def __init__(self, returns: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        return self.returns(self.linear(x))


def changing() -> None:
    rank, _ = join()
    for returns, message in (
        (lambda x: x[:, : 1 + int(x.sum() > 0) * 2], "returned float32 .* for an earlier one"),
        (lambda x: {"x": x}, "returned a dict; what goes from one stage"),
    ):
        if rank == 0:
            torch.manual_seed(1)
            schedule = PipelineSchedule(
                "GPipe", {0: Changing(returns)}, 4, F.cross_entropy, dist.group.WORLD
            )
            with pytest.raises(ConfigError, match=message):
                schedule.run(batch(16))
    dist.barrier()
    dist.destroy_process_group()


def test_outputs_that_cannot_be_sent() -> None:
    run_ranks(changing, 2)


def stuck(how: str) -> str:
    rank, _ = join()
    stages, _ = own_stages("1F1B", 4)
    schedule = PipelineSchedule(
        "1F1B", stages, 4, F.cross_entropy, dist.group.WORLD, timeout_seconds=1.0
    )
    schedule.run(batch(16))
    if rank == 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2)
        dist.destroy_process_group()
        return ""
    with pytest.raises(WaitTimeoutError if how == "sleeps" else PeerLostError) as caught:
        schedule.run(batch(16))
    dist.destroy_process_group()
    return str(caught.value)


def test_a_rank_that_is_stuck_is_named() -> None:
    told, _ = run_ranks(stuck, 2, "sleeps")
    assert "rank 0 waited 1 s for the gradients for stage 0, microbatch 0, from rank 1" in told


def test_a_rank_that_dies_is_named() -> None:
    told, _ = run_ranks(stuck, 2, "dies", killed=[1])
    assert "rank 1 died or has ended while rank 0 waited" in told


def measured() -> list[Any]:
    _, n_ranks = join()
    stages, _ = own_stages("Interleaved1F1B", 4)
    schedule = PipelineSchedule(
        "Interleaved1F1B", stages, 4, F.cross_entropy, dist.group.WORLD, timed=True
    )
    schedule.run(batch(16))
    times: list[Any] = [None] * n_ranks
    dist.all_gather_object(times, schedule.times)
    dist.destroy_process_group()
    return times


def test_what_was_measured_is_what_was_planned() -> None:
    times = run_ranks(measured, 2)[0]
    table = Timetable("Interleaved1F1B", tuple(map(tuple, times)))
    order = pipeline_order("Interleaved1F1B", 2, 4)
    assert tuple(tuple(t.action for t in own) for own in table.ranks) == order.ranks
    seconds = {t.action: t.end - t.start for own in table.ranks for t in own}
    # The ranks of one host share a clock: nobody can be faster than the plan with these durations.
    assert table.seconds >= simulate(order, lambda action: seconds[action]).seconds
    assert 0.0 <= table.idle_share < 1.0


def in_pairs() -> int:
    join()
    meet_in_pairs(dist.group.WORLD, dist.new_group(), torch.device("cpu"))
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank


def test_ranks_meet_in_pairs() -> None:
    """As NCCL needs it; each of 6 pairs in both directions, and nobody waits for nobody."""
    assert run_ranks(in_pairs, 4, timeout_seconds=60) == [0, 1, 2, 3]
