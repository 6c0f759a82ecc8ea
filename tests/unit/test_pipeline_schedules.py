"""Pipeline schedules as data: torch's own, checked, simulated, drawn; what they are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from scaledtrain import Precision
from scaledtrain.data.ragged import Ragged
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.parallel import Pipeline
from scaledtrain.parallel.engine import Recipe
from scaledtrain.parallel.pipe import Pipe
from scaledtrain.parallel.pipeline import (
    SCHEDULES,
    Action,
    PipelineOrder,
    asynchronous_order,
    breadth_first,
    check_order,
    delays,
    draw_pipeline,
    peak_live,
    pipeline_order,
    pipeline_text,
    pipemare,
    simulate,
    write_pipeline_trace,
)
from scaledtrain.parallel.pipeline.cut import cut_step
from scaledtrain.parallel.pipeline.pipeline import OwnStages
from scaledtrain.parallel.pipeline.split_backward import SplitBackward
from tests.worlds import World

SIZES = [(1, 3), (2, 2), (2, 8), (3, 6), (4, 4), (4, 16), (5, 10)]  # ranks, microbatches
EQUAL = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


def order_of(text: str, name: str = "mine") -> PipelineOrder:
    """`"0F0 0B0 | 1F0 1B0"`, a list for each rank."""
    ranks = [
        tuple(Action(a[1], int(a[0]), int(a[2:])) for a in rank.split())  # type: ignore[arg-type]
        for rank in text.split("|")
    ]
    return PipelineOrder(name, tuple(ranks))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_whole_and_ends(name: str) -> None:
    for n_ranks, n_microbatches in SIZES:
        if name == "DualPipeV" and n_microbatches < 2 * n_ranks:
            continue
        order = pipeline_order(name, n_ranks, n_microbatches)
        check_order(order)
        assert order.n_microbatches == n_microbatches
        assert order.n_stages == n_ranks * SCHEDULES[name].stages_per_rank


@pytest.mark.parametrize("n_microbatches", [4, 8, 13])
def test_idle_share_is_that_of_the_papers(n_microbatches: int) -> None:
    p, m = 4, n_microbatches
    for name in ("GPipe", "1F1B"):
        planned = simulate(pipeline_order(name, p, m), EQUAL)
        assert planned.seconds == (m + p - 1) * 3
        assert planned.idle_share == pytest.approx((p - 1) / (m + p - 1))


def test_more_stages_on_a_rank_make_it_smaller() -> None:
    p, m = 4, 8
    for v in (2, 3, 4):
        # A rank computes 3vm; it is idle while p - 1 chunks go forward and backward, 3(p - 1).
        planned = simulate(pipeline_order("Interleaved1F1B", p, m, v), EQUAL)
        assert planned.seconds == 3 * v * m + 3 * (p - 1)
        # Filled with W: a third of it.
        planned = simulate(pipeline_order("InterleavedZeroBubble", p, m, v), EQUAL)
        assert planned.seconds == 3 * v * m + (p - 1)
    for name in ("ZBVZeroBubble", "DualPipeV"):
        assert simulate(pipeline_order(name, p, m), EQUAL).seconds == 3 * 2 * m + (p - 1)


def test_gpipe_keeps_all_activations_and_1f1b_as_many_as_stages_follow() -> None:
    assert peak_live(pipeline_order("GPipe", 4, 8)) == [8, 8, 8, 8]
    assert peak_live(pipeline_order("1F1B", 4, 8)) == [4, 3, 2, 1]
    # ZBV: as 1F1B on its first rank, p whole models' shares, in 2p half stages.
    assert peak_live(pipeline_order("ZBVZeroBubble", 4, 16)) == [8, 8, 8, 8]


def test_gpipe_and_1f1b_are_torchs() -> None:
    from types import SimpleNamespace

    from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

    stage = SimpleNamespace(num_stages=4)
    for name, make in (("GPipe", ScheduleGPipe), ("1F1B", Schedule1F1B)):
        theirs = make(stage, 6)._get_pipeline_order()
        ours = pipeline_order(name, 4, 6)
        for rank in range(4 if name == "GPipe" else 3):  # its list for the last rank has no 3F0
            computed = [str(a) for a in theirs[rank] if a is not None and a.is_compute_op]
            assert computed == [str(a) for a in ours.ranks[rank]]


def test_fewer_microbatches_than_ranks() -> None:
    for name in ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"):
        check_order(pipeline_order(name, 4, 2))
    assert simulate(pipeline_order("1F1B", 4, 2), EQUAL).seconds == (2 + 3) * 3


def test_unequal_stages_and_transfers() -> None:
    # Stage 1 takes 3 + 6 per microbatch, stage 0 1 + 2: 1, then 4 x 9, then 2 for the last B of
    # stage 0; each of the two ways takes half a second.
    order = pipeline_order("1F1B", 2, 4)
    slow = simulate(order, lambda a: EQUAL[a.kind] * (3 if a.stage == 1 else 1), 0.5)
    assert slow.seconds == 1 + 0.5 + 4 * 9 + 0.5 + 2
    # Busy: 4 x 3 and 4 x 9 of twice 40 seconds.
    assert slow.idle_share == pytest.approx(1 - 48 / 80)


def test_breadth_first_fits_any_placement() -> None:
    for placement in ([0, 1, 1, 0], [0, 1, 2, 0, 1, 2], [0]):
        check_order(breadth_first(placement, 3))
        assert list(breadth_first(placement, 3).rank_of) == placement


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0B0 | 1F0", "microbatch 0 in stage 1 with {'F': 1, 'B': 0"),
        ("0F0 0B0 0B0 | 1F0 1B0", "microbatch 0 in stage 0"),
        ("0F0 0I0 | 1F0 1B0", "microbatch 0 in stage 0"),
        ("0B0 0F0 | 1F0 1B0", "rank 0 cannot do 0B0 before 0F0 and 1B0; rank 1 cannot do 1F0"),
        ("0F0 0F1 0B0 0B1 | 1F1 1B1 1F0 1B0 | 2F0 2B0 2F1 2B1", "rank 1 cannot do 1B1 before 2B1"),
    ],
)
def test_an_order_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_order(order_of(text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1F1b", 2, 4), "did you mean '1F1B'"),
        (("1F1B", 2, 4, 2), "1F1B has 1 stage per rank, not 2; for another number choose Inter"),
        (("ZBVZeroBubble", 2, 4, 3), "has 2 stages per rank"),
        (("Interleaved1F1B", 2, 4, 1), "has 2 or more stages per rank"),
        (("Interleaved1F1B", 4, 9), "Choose 8 microbatches"),
        (("DualPipeV", 4, 4), "Choose 8 microbatches"),
        (("GPipe", 2, 0), "both are >= 1"),
    ],
)
def test_numbers_that_do_not_fit(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline_order(*arguments)


def test_a_stage_is_on_one_rank() -> None:
    with pytest.raises(ConfigError, match=r"stage 0 .* is on ranks \[0, 1\]"):
        order_of("0F0 0B0 | 0F1 0B1")


def test_asynchronous_orders_have_no_bubble_but_at_the_ends() -> None:
    for name, m, steps in (("PipeDream", 1, 16), ("PipeDream-2BW", 4, 4)):
        order = asynchronous_order(name, 4, m, steps)  # type: ignore[arg-type]
        check_order(order)
        # As one 1F1B of all 16 microbatches, where four steps of 4 would take 4 x (4 + 3) x 3.
        assert simulate(order, EQUAL).seconds == (16 + 3) * 3
        assert peak_live(order) == [4, 3, 2, 1]


def test_delays() -> None:
    assert delays("PipeDream", 4, 1) == [3, 2, 1, 0]
    assert delays("PipeDream", 4, 3) == [1, 1, 1, 0]
    assert delays("PipeDream-2BW", 1, 1) == [0]
    with pytest.raises(ConfigError, match="keeps the weights for one; take 3 microbatches"):
        delays("PipeDream-2BW", 4, 2)
    assert delays("PipeDream-2BW", 4, 3) == [1, 1, 1, 1]


def test_pictures(tmp_path: Path) -> None:
    planned = simulate(pipeline_order("ZBVZeroBubble", 2, 4), EQUAL)
    first, second = pipeline_text(planned, 1.0).splitlines()
    assert first.startswith("rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1")
    assert second.startswith("rank 1   .  1F0 2F0 1F1 2F1 2I0 2W0")
    draw_pipeline(tmp_path / "pipeline.png", [planned, planned])
    assert (tmp_path / "pipeline.png").read_bytes().startswith(b"\x89PNG")
    # 2 ranks x 2 stages x 4 microbatches x (F, I, W), and 3 names
    assert write_pipeline_trace(tmp_path / "trace.json", [planned]) == 48 + 3
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    first = next(e for e in events if e["ph"] == "X" and e["tid"] == 1)
    assert first["name"] == "1F0"
    assert (first["ts"], first["dur"]) == (1e6, 1e6)
    assert first["args"] == {"stage": 1, "microbatch": 0}


def test_cut_evenly() -> None:
    x, y = torch.arange(10.0), torch.arange(10)
    cut = cut_step(StepBatch([(x, y), (x[:3], y[:3])], [10, 3]), 4)
    assert [m.samples for m in cut] == [3, 3, 2, 2, 1, 1, 1]
    assert [m.share for m in cut] == [s / 13 for s in (3, 3, 2, 2, 1, 1, 1)]
    assert torch.cat([m.batch[0] for m in cut]).tolist() == [*range(10), 0, 1, 2]
    assert cut[0].form == cut[1].form != cut[2].form


def test_microbatches_count_as_they_are_weighed() -> None:
    x, y = torch.zeros(4, 2), torch.tensor([[1, 0], [1, 0], [1, 1], [1, 1]])
    step = StepBatch([(x, y), (x[:1], y[:1])], [6, 1])
    cut = cut_step(step, 2, weigh=lambda batch: int(batch[1].sum()))
    assert [m.samples for m in cut] == [2, 4, 1]
    assert [m.share for m in cut] == [2 / 7, 4 / 7, 1 / 7]
    (alone,) = cut_step(StepBatch([(x, y)], [6]), 1)  # as it is in an evaluation
    assert (alone.samples, alone.share) == (6, 1.0)


def test_cut_mappings_and_ragged_batches() -> None:
    ragged = Ragged(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 3, 3, 4]))
    batch = {"ids": ragged, "labels": torch.tensor([1, 2, 3]), "weight": 0.5}
    first, second = cut_step(StepBatch([batch], [3]), 2)
    assert [s.tolist() for s in first.batch["ids"].unbind()] == [[5, 6, 7], []]
    assert [s.tolist() for s in second.batch["ids"].unbind()] == [[8]]
    assert second.batch["labels"].tolist() == [3]
    assert second.batch["weight"] == 0.5
    with pytest.raises(ConfigError, match="has a str in it"):
        cut_step(StepBatch([(torch.zeros(2), ["a", "b"])], [2]), 2)


class Shares(nn.Module):
    """One weight at two places, another one beside the input, and an output without an input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.norm = nn.LayerNorm(4)
        self.position = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x + self.position))
        return self.b(self.norm(h)) * self.position, self.position.exp()


def test_a_backward_in_two_parts_is_the_backward() -> None:
    given = torch.randn(3, 4), torch.randn(4)
    gradients = []
    for split in (False, True):
        net = Shares()
        calls: list[str] = []
        for name, p in net.named_parameters():
            p.register_post_accumulate_grad_hook(lambda _, add=calls.append, name=name: add(name))
        x = torch.ones(3, 4, requires_grad=True)
        roots = [get_gradient_edge(y) for y in net(x)]
        if split:
            parts = SplitBackward(roots, given, [x], net.parameters())
            assert not calls
            x.grad = parts.input_gradients[0]
            parts.finish()
        else:
            torch.autograd.backward(roots, given)
        assert sorted(calls) == sorted(name for name, _ in net.named_parameters())
        gradients.append([x.grad, *(p.grad for p in net.parameters())])
    for whole, in_parts in zip(*gradients, strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=1e-6, atol=1e-6)


def test_pipemare_corrects_a_schedule_and_resumes() -> None:
    def make(tau: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        halves = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
        return optimizer, pipemare(tau, 4, halves)(optimizer)

    def advance(optimizer: torch.optim.Optimizer, scheduler: object, n: int) -> list[float]:
        lrs = []
        for _ in range(n):
            lrs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()  # type: ignore[attr-defined]
        return lrs

    # 2^-k / 16^(1 - k/4): 1/16, 1/2 / 8, 1/4 / 4, 1/8 / 2, then the schedule alone
    expected = [1 / 16, 1 / 16, 1 / 16, 1 / 16, 1 / 16, 1 / 32]
    optimizer, scheduler = make(16)
    assert advance(optimizer, scheduler, 6) == pytest.approx(expected)
    assert advance(*make(0), 3) == [1.0, 0.5, 0.25]

    optimizer, scheduler = make(16)
    advance(optimizer, scheduler, 3)
    resumed, scheduler_resumed = make(16)
    resumed.load_state_dict(optimizer.state_dict())
    scheduler_resumed.load_state_dict(scheduler.state_dict())
    assert advance(resumed, scheduler_resumed, 3) == pytest.approx(expected[3:])
    with pytest.raises(ConfigError, match="staleness -1"):
        make(-1)


def pipe(schedule: str, rank: int, n_ranks: int, n_microbatches: int) -> Pipe:
    asked = Pipeline(schedule, n_microbatches, anneal_steps=2)
    recipe = Recipe(Precision(), torch.optim.SGD, True)
    return Pipe(cast(OwnStages, None), asked, [World(n_ranks).links[rank]], recipe)


def test_learning_rates_are_corrected_where_gradients_are_two_updates_late() -> None:
    """PipeDream on 4 ranks with a microbatch in a step: 3, 2, 1 and 0 updates late."""
    rates = []
    for rank in range(4):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.6)
        make = pipe("PipeDream", rank, 4, 1).scheduler(None)
        assert make is not None
        make(optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.6 / 3, 0.6 / 2, 0.6, 0.6])
    for schedule, n_ranks, n_microbatches in (("PipeDream", 4, 3), ("PipeDream-2BW", 4, 4)):
        with pytest.raises(ConfigError, match="in a step that is at most 1; leave it out"):
            pipe(schedule, 0, n_ranks, n_microbatches).scheduler(None)
