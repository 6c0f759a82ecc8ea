"""AdaScale: gains of known gradients, progress in steps of the reference batch, in a Trainer."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Callback, LocalSGD, NoiseScale, Strategy, Trainer
from scaledtrain.batch_growth import BatchGrowth
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.optim import AdaScale, GradientNoise, WarmupDecay, adascale_gain
from scaledtrain.sim import Cluster, Constant, Nic, Topology, Wire, simulate
from tests.worlds import World


def estimates(gradients: Tensor) -> tuple[float, float]:
    """mu^2 and sigma^2 from n batches' gradients, as the paper estimates them.

    sigma^2 = (sum |g_i|^2 - n |g|^2) / (n - 1),   mu^2 = |g|^2 - sigma^2 / n
    """
    n, mean = len(gradients), gradients.mean(0)
    variance = (gradients.square().sum() - n * mean.square().sum()) / (n - 1)
    return (mean.square().sum() - variance / n).item(), variance.item()


def noise(squared_norm: float, variance: float) -> GradientNoise:
    """sigma^2 of the variance in reference batches of 10 samples."""
    return GradientNoise(squared_norm, 10 * variance)


@pytest.mark.parametrize("n", [2, 5])
def test_equal_gradients_gain_nothing_orthogonal_ones_everything(n: int) -> None:
    equal = estimates(torch.ones(n, 3, dtype=torch.float64))
    assert adascale_gain(*equal, scale=n) == pytest.approx(1.0)
    orthogonal = estimates(torch.eye(n, dtype=torch.float64))  # sigma^2 = 1, mu^2 = 1/n - 1/n = 0
    assert adascale_gain(*orthogonal, scale=n) == pytest.approx(n)


def test_a_schedule_counts_steps_of_the_reference_batch() -> None:
    """sigma^2 = mu^2 = 1, scale 4: gain 2 / (1/4 + 1) = 1.6; x = 0, 1.6, 3.2, 4.8 -> 0, 1, 3, 4."""
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    make = partial(WarmupDecay, total=8, decay="linear")
    schedule = AdaScale(sgd, 10, make, smoothing=0.0)
    found = []
    for step in range(4):
        if step == 2:
            state = schedule.state_dict()
            sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            schedule = AdaScale(sgd, 10, make, smoothing=0.0)
            schedule.load_state_dict(state)
        schedule.observe(noise(1.0, 1.0), 40)
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    assert found == pytest.approx([1.6, 1.6 * 7 / 8, 1.6 * 5 / 8, 1.6 * 4 / 8])
    assert schedule.progress == pytest.approx(6.4)


def test_averages_are_taken_before_the_ratio_and_a_bad_step_is_left_out() -> None:
    """d = 1/2: (1, 3) then (-1, 1): mu^2 = (0.25 - 0.5) / 0.75 < 0 counts as 0: gain 4."""
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = AdaScale(sgd, 10, smoothing=0.5)
    assert schedule.gain == 1.0
    schedule.observe(noise(1.0, 3.0), 40)
    assert schedule.gain == pytest.approx(4.0 / 1.75)  # (3 + 1) / (3/4 + 1)
    schedule.observe(noise(math.nan, 1.0), 40)
    assert schedule.gain == pytest.approx(4.0 / 1.75)
    schedule.observe(noise(-1.0, 1.0), 40)
    assert sgd.param_groups[0]["lr"] == pytest.approx(2.0)


def test_what_cannot_be() -> None:
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    with pytest.raises(ConfigError, match="reference_batch is 0; it counts samples"):
        AdaScale(sgd, 0)
    with pytest.raises(ConfigError, match="total is 0; it counts updates"):
        AdaScale(sgd, 2, total=0)
    with pytest.raises(ConfigError, match="smoothing is 1.0"):
        AdaScale(sgd, 2, smoothing=1.0)
    with pytest.raises(ConfigError, match="variance of -1.0"):
        adascale_gain(1.0, -1.0, 2)
    assert adascale_gain(0.0, 0.0, 2) == 1.0
    chained = partial(torch.optim.lr_scheduler.MultiplicativeLR, lr_lambda=lambda x: 0.9)
    with pytest.raises(ConfigError, match="MultiplicativeLR makes each rate from the one before"):
        AdaScale(sgd, 2, chained)


def test_torchs_cosine_is_taken_at_the_progress() -> None:
    """Gain 2 (pure noise, 20 of 10 samples): x = 0, 2, of 4: 2 lr (1 + cos(pi x / 4)) / 2."""
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    make = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4)
    schedule = AdaScale(sgd, 10, make, smoothing=0.0)
    for expected in (1.0, 0.5):
        schedule.observe(noise(0.0, 1.0), 20)
        assert sgd.param_groups[0]["lr"] == pytest.approx(expected)
        sgd.step()
        schedule.step()


class Dot(nn.Module):
    """The gradient of a sample x by the mean output is x itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def mean_output(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean()


class Told(Callback):
    """Learning rate of each update, and the progress and gain after it."""

    def __init__(self, leader: NoiseScale) -> None:
        self.leader = leader
        self.rates: list[float] = []
        self.progress: list[float] = []
        self.state: dict[str, Any] = {}

    def on_reduced(self, trainer: Trainer) -> None:
        self.rates.append(trainer.strategy.learning_rate)

    def on_step_end(self, trainer: Trainer) -> None:
        self.progress.append(self.leader.metrics()["adascale_progress"])
        if trainer.step_count == 1:
            self.state = trainer.state_dict()


# Batches of 2 equal samples: (1, 1), (1, -1), in turns. Of two of them |g|^2 = 1, and
# S = (2 * 2 + 2 * 2 - 4 * 1) / 1 = 4, |G|^2 = 1 - 4 / 4 = 0: pure noise, so that steps of 4 samples
# are worth 4 / reference_batch = 2 of the reference batch's.
NOISE = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [1.0, -1.0]], dtype=torch.float64)
# Of equal gradients there is no noise: a step is worth 1.
SIGNAL = torch.ones(4, 2, dtype=torch.float64)


def run(
    link: Link | None, x: Tensor, state: Any = None, growth: Any = None, **options: Any
) -> tuple[list[float], list[float], Tensor, Any]:
    leader = NoiseScale(every=1, grow=growth)
    told = Told(leader)
    decay = partial(WarmupDecay, total=8, decay="linear")
    schedule = partial(
        AdaScale, reference_batch=2, make_scheduler=decay, smoothing=0.0, total=8, leader=leader
    )
    model = Dot()
    with Trainer(
        model,
        mean_output,
        partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=schedule,
        gradient_accumulation_steps=2 if link is None else 1,
        callbacks=[leader, told],
        log_every=1,
        console=False,
        link=link,
        **options,
    ) as trainer:
        if state is not None:
            trainer.load_state_dict(state)
        trainer.fit(DataLoader(TensorDataset(x, x[:, 0]), batch_size=2), max_steps=20)
    return told.rates, told.progress, model.w.detach().clone(), told.state


class TestInTrainer:
    def test_pure_noise_gains_all_and_ends_the_run_by_progress(self) -> None:
        """Gain 2: lr = 2 (1 - x / 8) at x = 0, 2, 4, 6. All ranks go the same way."""
        expected = ([2.0, 1.5, 1.0, 0.5], [2.0, 4.0, 6.0, 8.0])
        alone = run(None, NOISE.repeat(4, 1))
        assert alone[:2] == (pytest.approx(expected[0]), pytest.approx(expected[1]))
        # Steps have the mean gradient (1, 0): w_0 = -(2 + 1.5 + 1 + 0.5).
        assert alone[2].tolist() == pytest.approx([-5.0, 0.0])
        two = World(2).run(lambda link: run(link, NOISE.repeat(4, 1)))
        wire = Wire(latency_seconds=0.0, gigabits_per_second=math.inf)
        cluster = Cluster(Constant(1.0), Topology(nic=Nic(wire)))
        virtual = simulate(lambda link: run(link, NOISE.repeat(4, 1)), cluster, 2).results
        for found in (*two, *virtual):
            assert found[:2] == alone[:2]
            assert torch.equal(found[2], alone[2])

    def test_equal_gradients_gain_nothing(self) -> None:
        rates, progress, *_ = run(None, SIGNAL.repeat(10, 1))
        assert rates == pytest.approx([1 - x / 8 for x in range(8)])
        assert progress == pytest.approx([float(x) for x in range(1, 9)])

    def test_resumed_it_goes_on_exactly(self) -> None:
        mixed = torch.cat([NOISE, SIGNAL, NOISE, SIGNAL, NOISE])
        rates, progress, weights, state = run(None, mixed)
        assert rates[:2] == pytest.approx([2.0, 0.75])  # x = 0, 2 and gains 2, 1
        rest = run(None, mixed, state)
        assert (rest[0], rest[1]) == (rates[1:], progress[1:])
        assert torch.equal(rest[2], weights)

    def test_a_batch_that_grows_has_a_larger_gain(self) -> None:
        """Batches of (1, 1) and (-1, -1) are pure noise: in steps of 4 samples gain 2, of 8 gain 4.

        lr = 4 (1 - x / 8) at x = 0, 4.
        """
        x = NOISE.repeat(6, 1)
        x[:, 0] = x[:, 1]
        assert run(None, x)[0] == pytest.approx([2.0, 1.5, 1.0, 0.5])
        growth = BatchGrowth(max_batch_size=8, min_batch_size=8, lr_scaling="adascale")
        rates, progress, *_ = run(None, x, growth=growth)
        assert (rates, progress) == (pytest.approx([4.0, 2.0]), pytest.approx([4.0, 8.0]))

    @pytest.mark.parametrize(
        ("strategy", "x", "why"),
        [
            (LocalSGD(sync_every=2), NOISE, "under LocalSGD.* do not make the same updates"),
            (None, NOISE[:2], "AdaScale is to follow .* nothing to compare"),
        ],
    )
    def test_without_a_measurement_it_is_refused(
        self, strategy: Strategy | None, x: Tensor, why: str
    ) -> None:
        leader = NoiseScale(every=1)
        with (
            Trainer(
                Dot(),
                mean_output,
                partial(torch.optim.SGD, lr=1.0),
                lr_scheduler=partial(AdaScale, reference_batch=2, leader=leader),
                strategy=strategy,
                callbacks=[leader],
                console=False,
            ) as trainer,
            pytest.raises(ConfigError, match=why),
        ):
            trainer.fit(DataLoader(TensorDataset(x, x[:, 0]), batch_size=2), max_steps=1)
