"""AdaScale: gains of known gradients, and progress in steps of the reference batch."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from scaledtrain import ConfigError
from scaledtrain.optim import AdaScale, WarmupDecay, adascale_gain


def estimates(gradients: Tensor) -> tuple[float, float]:
    """mu^2 and sigma^2 from n batches' gradients, as the paper estimates them.

    sigma^2 = (sum |g_i|^2 - n |g|^2) / (n - 1),   mu^2 = |g|^2 - sigma^2 / n
    """
    n, mean = len(gradients), gradients.mean(0)
    variance = (gradients.square().sum() - n * mean.square().sum()) / (n - 1)
    return (mean.square().sum() - variance / n).item(), variance.item()


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
    schedule = AdaScale(sgd, 4, make, smoothing=0.0)
    found = []
    for step in range(4):
        if step == 2:
            state = schedule.state_dict()
            sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            schedule = AdaScale(sgd, 4, make, smoothing=0.0)
            schedule.load_state_dict(state)
        schedule.observe(1.0, 1.0)
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    assert found == pytest.approx([1.6, 1.6 * 7 / 8, 1.6 * 5 / 8, 1.6 * 4 / 8])
    assert schedule.progress == pytest.approx(6.4)


def test_averages_are_taken_before_the_ratio_and_a_bad_step_is_left_out() -> None:
    """d = 1/2: (1, 3) then (-1, 1): mu^2 = (0.25 - 0.5) / 0.75 < 0 counts as 0: gain 4."""
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = AdaScale(sgd, 4, smoothing=0.5)
    assert schedule.gain == 1.0
    schedule.observe(1.0, 3.0)
    assert schedule.gain == pytest.approx(4.0 / 1.75)  # (3 + 1) / (3/4 + 1)
    schedule.observe(math.nan, 1.0)
    assert schedule.gain == pytest.approx(4.0 / 1.75)
    schedule.observe(-1.0, 1.0)
    assert sgd.param_groups[0]["lr"] == pytest.approx(2.0)


def test_what_cannot_be() -> None:
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    with pytest.raises(ConfigError, match="scale is 0; it is batch over"):
        AdaScale(sgd, 0)
    with pytest.raises(ConfigError, match="smoothing is 1.0"):
        AdaScale(sgd, 2, smoothing=1.0)
    with pytest.raises(ConfigError, match="variance of -1.0"):
        adascale_gain(1.0, -1.0, 2)
    assert adascale_gain(0.0, 0.0, 2) == 1.0
