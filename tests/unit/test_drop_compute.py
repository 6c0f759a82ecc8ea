"""DropCompute: what is computed, what the gradient then is, and which threshold is best."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaledtrain import DropCompute, ParameterServer, Precision, Strategy, Sync, Trainer
from scaledtrain.command_line import compose
from scaledtrain.config import check
from scaledtrain.data.steps import StepBatch
from scaledtrain.drop_compute import choose_threshold
from scaledtrain.errors import ConfigError
from scaledtrain.schedule import Computed, MicrobatchLoop, Pace, Slowdown


class Clock:
    """A clock that computing and sleeping move; who may abandon is asked once in a second."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def now(self) -> float:
        return self.seconds

    def sleep_until(self, moment: float, abandon: Callable[[], bool] | None = None) -> bool:
        while self.seconds < moment:
            if abandon is not None and abandon():
                return False
            self.seconds = moment if abandon is None else min(moment, self.seconds + 1.0)
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def paces(slowdown: Slowdown | None, rank: int) -> list[Pace]:
    pace = slowdown.pace(rank) if slowdown is not None else None
    return [] if pace is None else [pace]


class Line(nn.Module):
    """The mean of w x, whose gradient is the mean of x; computing it takes a second."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.clock = clock

    def forward(self, x: Tensor) -> Tensor:
        if self.clock is not None:
            self.clock.seconds += 1.0
        return (self.w * x).mean()


def run(
    clock: Clock,
    microbatches: list[list[float]],
    threshold: float,
    slowdown: Slowdown | None = None,
) -> tuple[Computed, float, list[float]]:
    """What was computed, the gradient, and what each microbatch took."""
    model = Line(clock)
    loop = MicrobatchLoop(
        model,
        None,
        Precision(),
        list(model.parameters()),
        drop_compute=DropCompute(threshold),
        paces=paces(slowdown, 3),
        clock=clock,
    )
    tensors = [torch.tensor(values) for values in microbatches]
    computed = loop.run(StepBatch(tensors, [len(t) for t in tensors]))
    assert computed is not None
    assert model.w.grad is not None
    return computed, float(model.w.grad), loop.microbatch_seconds


@pytest.mark.parametrize(
    ("threshold", "count", "gradient"),
    [
        (0.0, 1, 1.0),  # after one second
        (0.9, 1, 1.0),
        (1.0, 2, 1.5),  # one second is not longer than the threshold: (1 + 2) / 2
        (2.5, 3, 2.0),
        (3.0, 4, 2.5),
        (math.inf, 4, 2.5),
    ],
)
def test_a_step_begins_nothing_more_once_it_took_longer(
    clock: Clock, threshold: float, count: int, gradient: float
) -> None:
    computed, got, seconds = run(clock, [[1.0], [2.0], [3.0], [4.0]], threshold)
    assert computed.samples == count
    assert got == gradient
    assert computed.loss == 2.0 * gradient  # w = 2
    assert seconds == [1.0] * count


def test_the_gradient_is_the_mean_over_the_samples_that_were_used(clock: Clock) -> None:
    """Microbatches of 2, 1 and 3 samples; the last is left out: (1 + 3 + 8) / 3."""
    computed, gradient, _ = run(clock, [[1.0, 3.0], [8.0], [0.0, 0.0, 0.0]], 1.0)
    assert computed.samples == 3
    assert gradient == pytest.approx(4.0)  # scaled by 3 / 6 and back: an ulp
    assert float(computed.loss) == pytest.approx(8.0)


def test_a_replica_without_samples_has_nothing_to_leave_out(clock: Clock) -> None:
    model = Line(clock)
    loop = MicrobatchLoop(
        model,
        None,
        Precision(),
        [model.w],
        drop_compute=DropCompute(0.0),
        paces=paces(Slowdown({3: 4.0}, min_compute_seconds=1.0), 3),
        clock=clock,
    )
    assert loop.run(StepBatch([], [], 0.0)) == Computed(torch.zeros(()), 0)
    assert clock.now() == 100.0


def test_a_slowed_replica_leaves_out_what_a_slow_one_would(clock: Clock) -> None:
    """Four times slower, a microbatch takes 4 s; at least 24 s for two of them 12 s each, x 4."""
    computed, _, seconds = run(clock, [[1.0], [2.0], [3.0]], 5.0, Slowdown({3: 4.0}))
    assert computed.samples == 2
    assert seconds == pytest.approx([4.0, 4.0])
    slowdown = Slowdown({3: 4.0}, min_compute_seconds=24.0)
    computed, _, seconds = run(clock, [[1.0], [2.0]], math.inf, slowdown)
    assert seconds == pytest.approx([48.0, 48.0])
    assert Slowdown({3: 4.0}).pace(rank=2) is None


def test_a_sleeper_looks_whether_its_work_is_still_wanted(clock: Clock) -> None:
    model = Line(clock)
    loop = MicrobatchLoop(
        model, None, Precision(), [model.w], paces=paces(Slowdown({3: 4.0}), 3), clock=clock
    )
    batch = StepBatch([torch.ones(1)], [1])
    assert loop.run(batch, lambda: clock.now() > 102.0) is None  # 1 s of computing, then 3 of sleep
    assert clock.now() == 103.0  # not 104


@pytest.mark.parametrize("strategy", [Sync, ParameterServer])
def test_training_sees_only_what_was_computed(strategy: Callable[[], Strategy]) -> None:
    """lr 1, threshold 0: of each pair of batches the first: w = 2 - 1 - 3 = -2."""
    loader: list[Any] = [torch.tensor([x]) for x in (1.0, 2.0, 3.0, 4.0)]
    t = Trainer(
        model := Line(), None, partial(torch.optim.SGD, lr=1.0), strategy=strategy(),
        gradient_accumulation_steps=2, drop_compute=DropCompute(0.0), console=False,
    )  # fmt: skip
    result = t.fit(loader, max_epochs=1)
    assert result.step == 2
    assert float(model.w.detach()) == -2.0
    assert len(t.schedule.microbatch_seconds) == 1


@pytest.mark.parametrize("threshold", [-1.0, math.nan])
def test_a_threshold_is_a_time(threshold: float) -> None:
    with pytest.raises(ConfigError, match="threshold_seconds is"):
        DropCompute(threshold)


def test_it_is_one_key_of_a_config() -> None:
    assert check(compose()).drop_compute == DropCompute(math.inf)
    config = check(compose(["drop_compute.threshold_seconds=0.5"]))
    assert config.drop_compute == DropCompute(0.5)


# The choice of a threshold


def rate(log: list[list[list[float]]], communication: float, threshold: float) -> float:
    """Useful microbatches per second, as a loop."""
    useful, seconds = 0, 0.0
    for step in range(len(log[0])):
        slowest = 0.0
        for worker in log:
            elapsed = 0.0
            for i, took in enumerate(worker[step]):
                if i > 0 and elapsed > threshold:
                    break
                elapsed += took
                useful += 1
            slowest = max(slowest, elapsed)
        seconds += slowest + communication
    return useful / seconds


def test_by_hand() -> None:
    """Workers (1, 1, 1) and (1, 1, 4), communication 1.

    T < 1: 2 / (1 + 1) = 1.    1 <= T < 2: 4 / (2 + 1) = 1.33.    T >= 2: 6 / (6 + 1) = 0.857.
    So T = 1, 1.33 / 0.857 = 14 / 9 as fast, 2 of 6 left out.
    """
    choice = choose_threshold([[[1, 1, 1]], [[1, 1, 4]]], communication_seconds=1)
    assert choice.threshold_seconds == 1.0
    assert choice.speedup == pytest.approx(14 / 9)
    assert choice.dropped == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_is_better(seed: int) -> None:
    """Against all thresholds of a fine grid, each simulated by a loop."""
    generator = random.Random(seed)
    log = [
        [[generator.lognormvariate(0.0, 1.0) for _ in range(4)] for _ in range(6)] for _ in range(3)
    ]
    choice = choose_threshold(log, communication_seconds=0.5)
    everything = rate(log, 0.5, math.inf)
    best = max(rate(log, 0.5, i / 100) for i in range(4000))
    assert rate(log, 0.5, choice.threshold_seconds) >= best
    assert choice.speedup == pytest.approx(rate(log, 0.5, choice.threshold_seconds) / everything)


def test_equal_workers_leave_nothing_out() -> None:
    """With communication 1: T < 1 gives 2 / 2 a second, nothing left out 6 / 4."""
    assert choose_threshold([[[1, 1, 1]], [[1, 1, 1]]], 1.0) == (math.inf, 1.0, 0.0)


def test_rounding_leaves_nothing_out() -> None:
    """Without communication all thresholds are equally good, up to the last bit of sums of 3.99."""
    assert choose_threshold([[[3.99] * 7], [[3.99] * 7]]) == (math.inf, 1.0, 0.0)


def test_a_step_of_one_microbatch_has_nothing_to_leave_out() -> None:
    assert choose_threshold([[[1.0]], [[9.0]]]) == (math.inf, 1.0, 0.0)


def test_communication_may_differ_from_step_to_step() -> None:
    """Step 0: (1, 9), c = 0; step 1: (1, 1), c = 9. Nothing out: 4 / (10 + 11); T = 0: 2 / 11.

    Between them, 1 <= T, both are computed whole: 4 / 21 = 0.190 > 2 / 11 = 0.182.
    With c = 0 twice T = 0 is better: 2 / 2 > 4 / 12.
    """
    log = [[[1, 9], [1, 1]]]
    assert choose_threshold(log, [0, 9]).threshold_seconds == math.inf
    assert choose_threshold(log, [0, 0]) == (0.0, pytest.approx(3.0), 0.5)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ([[1.0, 2.0]], r"shape \(1, 2\); it must be \[workers, steps, microbatches\]"),
        ([[[1.0, 0.0]]], "not positive and finite"),
        ([[[1.0, math.nan]]], "not positive and finite"),
    ],
)
def test_a_log_that_is_none(log: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_threshold(log)
