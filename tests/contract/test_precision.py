"""Every strategy with lower precision, on two simulated replicas, of which one may overflow.

Simulated ranks run the code of real ones in one process.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from scaledtrain import Precision, Sync, Trainer
from scaledtrain.comm.compress import TopK
from scaledtrain.comm.protocols import Link
from scaledtrain.faults import FaultInjector
from scaledtrain.loss_scale import LossScale
from scaledtrain.sim import simulate
from tests.contract.cases import CASES, Case
from tests.contract.test_replicas import UNEVEN
from tests.contract.training import batches, flat, plain_training, trainer

FP16 = Precision("fp16-mixed", loss_scale=LossScale(initial=64.0))  # no gradient overflows by it
every_strategy = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Outcome(NamedTuple):
    """What one replica saw of one strategy."""

    equal_data: Tensor
    after_overflow: Tensor
    overflows: int
    scale: float
    steps: int
    bf16: Tensor
    fp16: Tensor


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Outcome]]:
    """By rank and strategy."""
    return simulate(every_case, UNEVEN, 2).results


def every_case(link: Link) -> dict[str, Outcome]:
    return {case.name: observe(case, link) for case in CASES}


def observe(case: Case, link: Link) -> Outcome:
    n = link.group.size
    equal = trainer(strategy=case.make(n), link=link, precision="bf16-mixed")
    equal.fit([batch for batch in batches(24) for _ in range(n)], max_epochs=1)

    overflow = FaultInjector().nan_at(rank=1, step=3)
    fp16 = trainer(strategy=case.make(n), link=link, precision=FP16, callbacks=[overflow])
    steps = fp16.fit(batches(4 * 6 * n), max_epochs=1).step

    bf16_true = trainer(strategy=case.make(n), link=link, precision="bf16-true")
    bf16_true.fit(batches(4 * 6 * n), max_epochs=1)
    fp16_true = trainer(strategy=case.make(n), link=link, precision="fp16-true")
    fp16_true.fit(batches(4 * 6 * n), max_epochs=1)
    return Outcome(
        flat(equal.model),
        flat(fp16.model),
        fp16.scaler.overflows,
        fp16.scaler.metrics()["loss_scale"],
        steps,
        flat(bf16_true.model),
        flat(fp16_true.model),
    )


@every_strategy
def test_bf16_mixed_with_equal_data_is_one_process(
    case: Case, outcomes: list[dict[str, Outcome]]
) -> None:
    plain = plain_training(batches(24), autocast=torch.bfloat16)
    for rank in outcomes:
        final = rank[case.name].equal_data
        assert torch.equal(final, outcomes[0][case.name].equal_data)
        if case.equal_data and case.tolerance == 0.0:
            assert torch.equal(final, plain)


@every_strategy
def test_an_overflow_on_one_replica_parts_nobody(
    case: Case, outcomes: list[dict[str, Outcome]]
) -> None:
    """The scale of 64 is halved where there was one; the run goes on, and ends as any other."""
    zero, one = (rank[case.name] for rank in outcomes)
    assert torch.isfinite(zero.after_overflow).all()
    assert torch.equal(zero.after_overflow, one.after_overflow)
    assert (one.overflows, one.scale) == (1, 32.0)
    if case.skips_alone:
        assert (zero.overflows, zero.scale) == (0, 64.0)
    else:  # it was in their mean
        assert (zero.overflows, zero.scale) == (1, 32.0)
    assert zero.steps == one.steps
    if case.deterministic:
        assert zero.steps == 6


@every_strategy
def test_parameters_of_16_bits_end_equal(case: Case, outcomes: list[dict[str, Outcome]]) -> None:
    zero, one = (rank[case.name] for rank in outcomes)
    assert torch.equal(zero.bf16, one.bf16)
    assert torch.equal(zero.fp16, one.fp16)
    assert torch.equal(zero.bf16, zero.bf16.bfloat16().double())
    assert torch.equal(zero.fp16, zero.fp16.half().double())


class Weights(nn.Module):
    """Its gradient is its input, summed over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum()


@pytest.mark.parametrize("overlap", [False, True], ids=["at_once", "overlap"])
@pytest.mark.parametrize("name", ["fp16-mixed", "fp16-true"])
def test_feedback_is_in_units_of_the_loss(name: str, overlap: bool) -> None:
    """The scale doubles with every step; what a compression keeps must not.

    Whole numbers, so that float16 is exact: the parameters are those of float32, bit for bit.
    """
    doubles = LossScale(initial=4.0, growth_interval=1)

    def final(precision: Precision) -> Tensor:
        def run(link: Link) -> Tensor:
            strategy = Sync(overlap=overlap, compression=TopK(0.25))
            t = Trainer(
                Weights(),
                lambda outputs, targets: outputs,
                lambda parameters: torch.optim.SGD(parameters, lr=1.0),
                strategy=strategy,
                precision=precision,
                console=False,
                link=link,
            )
            x = torch.randint(-8, 9, (12, 8), generator=torch.Generator().manual_seed(0))
            t.fit([(row.float(), torch.zeros(1)) for row in x], max_epochs=1)
            expected = 4.0 * 2**6 if precision.name != "fp32" else None
            assert t.scaler.metrics().get("loss_scale") == expected
            return t.replica.parameters[0].detach().float()

        first, second = simulate(run, UNEVEN, 2).results
        assert torch.equal(first, second)
        return first

    assert final(Precision("fp32")).norm() > 0
    assert torch.equal(
        final(Precision(name, loss_scale=doubles)),  # type: ignore[arg-type]
        final(Precision("fp32")),
    )
