"""Delayed Nesterov: hand-computed traces, and what it is for one worker and for equal gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scaledtrain.errors import ConfigError
from scaledtrain.optim import DelayedNesterov


def trace(gradients: list[list[float]], start: list[float], **options: Any) -> list[list[float]]:
    theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = DelayedNesterov([theta], **options)
    values = []
    for gradient in gradients:
        theta.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        values.append(theta.tolist())
    return values


def test_two_gradients_a_momentum() -> None:
    """eps = 1, beta = 1/2, N = 2, c = 0; every gradient moves by g/2, every second one by m/2, too.

    g:     (4, 0)    (0, 8)                 (2, 2)     (2, 6)
    m:     0         0 + (4, 8)/2 = (2, 4)  (2, 4)     (1, 2) + (4, 8)/2 = (3, 6)
    theta: (0, 0) - (2, 0)            = (-2, 0)
           (-2, 0) - (0, 4) - (1, 2)  = (-3, -6)
           (-3, -6) - (1, 1)          = (-4, -7)
           (-4, -7) - (1, 3) - (1.5, 3) = (-6.5, -13)
    """
    gradients = [[4.0, 0.0], [0.0, 8.0], [2.0, 2.0], [2.0, 6.0]]
    assert trace(gradients, [0.0, 0.0], lr=1.0, momentum=0.5, delay=2) == [
        [-2.0, 0.0],
        [-3.0, -6.0],
        [-4.0, -7.0],
        [-6.5, -13.0],
    ]


def test_activation_shares_the_momentum_out() -> None:
    """As above with c = 1/4: every first one uses c, every second one 1 - c N + c = 3/4 of m/2.

    theta: -2 (m = 0);  -2 - 0 - 3/4 * 1 = -2.75  (m = 2);
           -2.75 - 1 - 1/4 * 1 = -4;  -4 - 1 - 3/4 * 1.5 = -6.125  (m = 3)
    """
    gradients = [[4.0], [0.0], [2.0], [2.0]]
    got = trace(gradients, [0.0], lr=1.0, momentum=0.5, delay=2, activation=0.25)
    assert got == [[-2.0], [-2.75], [-4.0], [-6.125]]


def test_delay_of_one_is_nesterov_momentum() -> None:
    gradients = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, torchs = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    a = DelayedNesterov([ours], lr=0.3, momentum=0.9)
    b = torch.optim.SGD([torchs], lr=0.3, momentum=0.9, nesterov=True)
    for gradient in gradients:
        ours.grad, torchs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
        # The two terms are added one after the other here, as one sum there: rounding, 2^-53.
        torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("activation", [0.0, 0.1, 0.25])
def test_n_gradients_move_as_one_nesterov_step_with_their_mean(activation: float) -> None:
    """With c > 0 the first round uses a momentum of 0 where the step does that of the mean.

    So only the sum of the shares, (N - 1) c + (1 - c N + c) = 1, is the same: shown by a momentum
    that stays what it is, for all gradients equal to (1 - beta) m after a first step without lr.
    """
    n, beta = 4, 0.5
    theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = DelayedNesterov([theta], lr=1.0, momentum=beta, delay=n, activation=activation)
    optimizer.state[theta] = {
        "step": 0,
        "sum": torch.zeros_like(theta),
        "momentum_buffer": torch.full_like(theta, 2.0),
    }
    for _ in range(n):
        theta.grad = torch.ones_like(theta)  # m <- 0.5 * 2 + 1 = 2
        optimizer.step()
    # One step: theta - (g + beta m) = 0 - (1 + 0.5 * 2) = -2
    assert theta.item() == pytest.approx(-2.0, abs=1e-15)


def test_saved_in_the_middle_of_a_round() -> None:
    gradients = [[float(g)] for g in (4, 0, 2, 2, 5)]
    whole = trace(gradients, [0.0], lr=1.0, momentum=0.5, delay=2)
    theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = DelayedNesterov([theta], lr=1.0, momentum=0.5, delay=2)
    for i, gradient in enumerate(gradients):
        if i == 3:  # one gradient of the second round is in the sum
            state = optimizer.state_dict()
            optimizer = DelayedNesterov([theta], lr=9.0, momentum=0.1, delay=7)
            optimizer.load_state_dict(state)
        theta.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        assert theta.tolist() == whole[i]


def test_what_has_no_gradient_is_left_alone() -> None:
    a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = DelayedNesterov([("a", a), ("b", b)], lr=1.0)
    a.grad = torch.ones(1)
    optimizer.step()
    assert (a.item(), b.item()) == (pytest.approx(1 - 1.9), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"momentum": 1.0}, "momentum is 1.0; it is in"),
        ({"delay": 0}, "delay is 0; it counts gradients"),
        ({"delay": 4, "activation": 0.5}, "activation is 0.5; .* here .0, 0.25."),
    ],
)
def test_outside_its_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DelayedNesterov([nn.Parameter(torch.ones(1))], **options)
