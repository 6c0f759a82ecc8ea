"""Learning rates that follow the batch, and schedules that follow the updates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from scaledtrain import Callback
from scaledtrain.build import build
from scaledtrain.command_line import compose
from scaledtrain.errors import ConfigError
from scaledtrain.models import MLP, ConvNet
from scaledtrain.optim import LearningRateScaling, WarmupDecay, zero_gamma
from scaledtrain.sim import Cluster, Constant, Topology, Wire, simulate

PORT = Wire(0.0, gigabits_per_second=float("inf"))
CLUSTER = Cluster(Constant(1.0), Topology(ranks_per_host=2, hosts=1, port=PORT))
WEIGHT = nn.Parameter(torch.zeros(1))


def rates(schedule: WarmupDecay, updates: int) -> list[float]:
    found = []
    for _ in range(updates):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def test_rules() -> None:
    assert LearningRateScaling("none", 32).factor(512) == 1.0
    assert LearningRateScaling("linear", 32).factor(512) == 16.0
    assert LearningRateScaling("sqrt", 32).factor(512) == 4.0
    adam = torch.optim.AdamW([WEIGHT], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    LearningRateScaling("linear", 32).apply(adam, 64)
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["betas"]) == (0.2, (0.9, 0.99))
    LearningRateScaling("sqrt", 64).apply(adam, 16)  # also to a smaller batch: kappa = 1/4
    group = adam.param_groups[0]
    assert group["lr"] == pytest.approx(0.1)
    assert group["betas"] == pytest.approx((0.975, 0.9975))
    assert group["eps"] == pytest.approx(2e-8)


def test_where_the_square_root_rule_ends() -> None:
    """1 - 0.9 times kappa is at most 1: kappa <= 10, so up to 320 samples."""
    scaling = LearningRateScaling("sqrt", 32)
    scaling.apply(torch.optim.Adam([WEIGHT], betas=(0.9, 0.999)), 319)
    with pytest.raises(ConfigError, match=r"-0\.0031.*up to 320 samples"):
        scaling.apply(torch.optim.Adam([WEIGHT], betas=(0.9, 0.999)), 321)


def test_warmup_and_cosine_in_steps() -> None:
    """Up from a half in 2 updates, down to 0.2 in 4: 0.2 + 0.8 (1 + cos(pi k / 4)) / 2."""
    schedule = WarmupDecay(sgd(), 6, warmup=2, start_factor=0.5, end_factor=0.2)
    down = [0.2 + 0.4 * (1 + math.cos(math.pi * k / 4)) for k in range(5)]
    assert rates(schedule, 8) == pytest.approx([0.5, 0.75, *down, 0.2])


def test_milestones_in_epochs_of_37_updates() -> None:
    """The first update of the epoch has the new rate, however 1/37 is rounded."""
    schedule = WarmupDecay(
        sgd(), unit="epochs", decay="milestones", milestones=[1, 3], updates_per_epoch=37
    )
    found = rates(schedule, 37 * 4)
    assert found == pytest.approx([1.0] * 37 + [0.1] * 74 + [0.01] * 37)


def test_samples_go_on_counting_when_a_run_resumes_with_larger_updates() -> None:
    def make(batch: int) -> WarmupDecay:
        return WarmupDecay(sgd(), 1000, unit="samples", decay="linear", samples_per_update=batch)

    first = make(100)
    rates(first, 4)  # 400 samples
    state = first.state_dict()
    same, larger = make(100), make(200)
    for schedule, expected in ((same, [0.6, 0.5, 0.4]), (larger, [0.6, 0.4, 0.2])):
        schedule.load_state_dict(state)
        assert rates(schedule, 3) == pytest.approx(expected)
    again = make(200)
    again.load_state_dict(larger.state_dict())
    assert again.progress == 1000.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "minutes"}, "unit is 'minutes'; it is steps, epochs or samples"),
        ({"unit": "epochs", "total": 3}, "updates_per_epoch is None; it follows from data"),
        ({"total": 3, "warmup": 3}, "decay cosine ends after 3 steps, .* warmup's 3"),
        ({}, "decay cosine ends after None"),
        ({"decay": "milestones"}, r"milestones are \[\] with decay milestones"),
        ({"decay": "milestones", "milestones": [2, 1]}, "rising order"),
        ({"decay": "steps"}, "decay is 'steps'"),
        ({"decay": "constant", "warmup": -1}, "warmup is -1"),
    ],
)
def test_schedules_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WarmupDecay(sgd(), **arguments)


OF_RUN = [
    "data.local_batch_size=16",
    "gradient_accumulation_steps=2",
    "optimizer.lr=0.1",
    "lr_scaling={rule: linear, reference_batch: 32}",
    "lr_scheduler=gradual_warmup",
    "console=false",
]


def trained_rates(workers: int, *overrides: str) -> list[list[float]]:
    """For each rank, the learning rate that it knows of after each of its steps."""
    config = compose([*OF_RUN, *overrides])

    def program(link: Any) -> list[float]:
        trainer, train, _ = build(config, link)
        found: list[float] = []
        trainer.callbacks.append(Note(found))
        with trainer:
            trainer.fit(train, max_steps=config.max_steps)
        return found

    return [r or [] for r in simulate(program, CLUSTER, workers).results]


class Note(Callback):
    def __init__(self, found: list[float]) -> None:
        self._found = found

    def on_step_end(self, trainer: Any) -> None:
        self._found.append(trainer.strategy.learning_rate)


SAMPLES = ["lr_scheduler.unit=samples", "lr_scheduler.warmup=256", "lr_scheduler.decay=constant"]


def test_two_replicas_advance_a_schedule_once_per_update() -> None:
    """An update has 16 samples x 2 batches x 2 replicas = 64: lr = 0.1 * 64/32 = 0.2, from 0.1.

    After k updates 64 k of the warmup's 256 samples: 0.1 + 0.1 k / 4. A schedule that every rank,
    or every batch, advanced would be at 0.2 after two.
    """
    for found in trained_rates(2, *SAMPLES, "max_steps=5"):
        assert found == pytest.approx([0.125, 0.15, 0.175, 0.2, 0.2])
    # One replica with as many samples in an update.
    alone = trained_rates(1, *SAMPLES, "max_steps=5", "gradient_accumulation_steps=4")
    assert alone[0] == pytest.approx([0.125, 0.15, 0.175, 0.2, 0.2])


def test_a_servers_schedule_counts_its_updates() -> None:
    """Each gradient is an update of 32 samples, so lr is not scaled: 0.1, warmup has no way to go.

    With sqrt from a reference of 8: 0.1 * 2 = 0.2, from 0.1, over 128 samples: 4 updates, of both
    workers together; a worker sees the rate of the next update when it pulls.
    """
    steps = ["strategy=async", "max_steps=6", "lr_scheduler.warmup=128", *SAMPLES[::2]]
    flat = trained_rates(2, *steps)
    assert set(flat[0] + flat[1]) == {0.1}
    scaled = trained_rates(2, *steps, "lr_scaling={rule: sqrt, reference_batch: 8}")
    seen = sorted({round(rate, 6) for rate in scaled[0] + scaled[1]})
    assert seen == [0.1, 0.125, 0.15, 0.175, 0.2]


ADASCALE = ["lr_scaling={rule: adascale, reference_batch: 16}", "batch=measured", "batch.every=1"]


def test_adascale_multiplies_by_at_most_the_batch_over_the_reference_one() -> None:
    """Steps of 64 samples: gains from 1 to 4 of lr 0.1, or of what is left of it after 40 x."""
    decay = ["lr_scheduler.unit=steps", "lr_scheduler.warmup=0", "lr_scheduler.decay=linear"]
    zero, one = trained_rates(2, *ADASCALE, *decay, "max_steps=40", "log_every=1")
    assert zero == one
    assert 0.1 < max(zero) <= 0.4
    assert 10 <= len(zero) < 40  # ended when it was worth 40 of 16 samples
    assert zero[-1] == 0.0


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (ADASCALE[:1], "but nothing measures it"),
        ([*ADASCALE, "strategy=async"], "ParameterServer: Asynchronous.. has none of all"),
        ([*ADASCALE, "max_epochs=2"], "which follows from max_steps; set it"),
    ],
)
def test_where_adascale_cannot_be(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        trained_rates(1, *overrides)


def test_what_a_config_does_to_the_model_and_its_groups() -> None:
    overrides = ["model=convnet", "optimizer=lars", "weight_decay_on=matrices", "zero_gamma=true"]
    config = compose([*OF_RUN, *overrides, "max_epochs=20"])

    def program(link: Any) -> Any:
        trainer, _, _ = build(config, link)
        with trainer:
            optimizer = trainer.strategy._updater.optimizer  # type: ignore[attr-defined]
            zero = [n for n, p in trainer.model.named_parameters() if not p.any()]
            return zero, [(g["weight_decay"], g["param_names"]) for g in optimizer.param_groups]

    (found,) = simulate(program, CLUSTER, 1).results
    assert found is not None
    zero, ((decay, matrices), (none, others)) = found
    assert [n for n in zero if n.endswith("weight")] == [
        "stages.0.branch.4.weight",
        "stages.1.branch.4.weight",
    ]
    assert (decay, none) == (1e-4, 0.0)
    assert "head.weight" in matrices
    assert {"head.bias", "stem.1.weight", "stages.0.branch.4.bias"} <= set(others)


def test_a_model_that_names_no_norms() -> None:
    with pytest.raises(ConfigError, match="MLP does not name the last norms"):
        zero_gamma(MLP(in_features=2, hidden=[2], out_features=2))
    with pytest.raises(ConfigError, match="has no weight that could be 0"):
        zero_gamma(nn.Identity(), [nn.Flatten()])
    x = torch.randn(2, 1, 8, 8)
    model = ConvNet(1, 10, width=8)
    zero_gamma(model)
    block = model.stages[0]
    assert torch.equal(block(x.relu().repeat(1, 8, 1, 1)), x.relu().repeat(1, 8, 1, 1))
