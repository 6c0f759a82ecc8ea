"""LARS and LAMB: steps by hand, against NumPy as the papers are written, and on shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scaledtrain.errors import ConfigError
from scaledtrain.optim import LAMB, LARS, KahanCompensation, MasterWeights, WideStep, layerwise
from tests.worlds import World

Make = Callable[..., torch.optim.Optimizer]
Arrays = list[np.ndarray[Any, Any]]
SHAPES = [(40, 500), (3, 5), (7,), (2, 3, 4), ()]  # the first is more than one stretch


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors of a test are more than one stretch, too."""
    monkeypatch.setattr(layerwise, "_CACHED", 2**12)


def numpy_lars(
    w: Arrays,
    gradients: list[Arrays],
    lr: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    nesterov: bool = False,
    adapt: str = "matrices",
    clip: bool = False,
    momentum_correction: bool = False,
    maximize: bool = False,
) -> Arrays:
    v = [np.zeros_like(x) for x in w]
    for gs in gradients:
        for i, g in enumerate(gs):
            g = -g if maximize else g
            trust = 1.0
            adapted = {"matrices": w[i].ndim > 1, "all": True, "decayed": weight_decay != 0}[adapt]
            if adapted and (w[i] != 0).any() and (g != 0).any():
                weight, gradient = np.sqrt((w[i] ** 2).sum()), np.sqrt((g**2).sum())
                trust = trust_coefficient * weight / (gradient + weight_decay * weight + eps)
            inside = 1.0 if momentum_correction else lr
            rate = min(lr, trust) if clip and adapted else inside * trust
            step = rate * (g + weight_decay * w[i])
            v[i] = momentum * v[i] + step
            moved = momentum * v[i] + step if nesterov else v[i]
            w[i] = w[i] - (lr if momentum_correction else 1.0) * moved
    return w


def numpy_lamb(
    w: Arrays,
    gradients: list[Arrays],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    weight_norm_range: tuple[float, float] = (0.0, math.inf),
    max_grad_norm: float | None = None,
    adapt: str = "matrices",
    decay_in_trust_ratio: bool = True,
    maximize: bool = False,
) -> Arrays:
    m, v = ([np.zeros_like(x) for x in w] for _ in range(2))
    for t, gs in enumerate(gradients, start=1):
        norm = np.sqrt(sum((g**2).sum() for g in gs))
        clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / norm)
        for i, g in enumerate(gs):
            g = -g * clip if maximize else g * clip
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g**2
            m_hat = m[i] / (1 - betas[0] ** t) if bias_correction else m[i]
            v_hat = v[i] / (1 - betas[1] ** t) if bias_correction else v[i]
            u = m_hat / (np.sqrt(v_hat) + eps)
            decay = weight_decay * w[i]
            if decay_in_trust_ratio:
                u, decay = u + decay, 0.0 * decay
            ratio = 1.0
            adapted = {"matrices": w[i].ndim > 1, "all": True, "decayed": weight_decay != 0}[adapt]
            if adapted:
                weight = np.clip(np.sqrt((w[i] ** 2).sum()), *weight_norm_range)
                length = np.sqrt((u**2).sum())
                ratio = weight / length if weight and length else 1.0
            w[i] = w[i] - lr * (ratio * u + decay)
    return w


LARS_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "nesterov": True, "eps": 0.5, "trust_coefficient": 0.1, "lr": 0.3},
    {"adapt": "all", "momentum": 0.0, "maximize": True, "weight_decay": 0.1},
    {"adapt": "decayed", "clip": True, "lr": 1e-4, "weight_decay": 0.1},
    {"adapt": "decayed", "clip": True, "lr": 1.0},
    {"momentum_correction": True, "lr": 0.3, "weight_decay": 0.1},
    {"momentum_correction": True, "lr": 0.3, "nesterov": True, "maximize": True},
]
LAMB_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "lr": 0.02},
    {"bias_correction": False, "adapt": "all", "betas": (0.5, 0.9), "weight_decay": 0.1},
    {"weight_norm_range": (0.1, 2.0), "max_grad_norm": 1.0, "eps": 0.01},
    {"decay_in_trust_ratio": False, "weight_decay": 0.1, "adapt": "decayed", "maximize": True},
    {"adapt": "decayed", "lr": 0.1},
]
CASES = [(LARS, numpy_lars, o) for o in LARS_OPTIONS] + [
    (LAMB, numpy_lamb, o) for o in LAMB_OPTIONS
]


def data(
    dtype: torch.dtype = torch.float64, steps: int = 4
) -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    weights = [draw(shape).to(dtype) for shape in SHAPES]
    return weights, [[draw(shape).to(dtype) for shape in SHAPES] for _ in range(steps)]


def trained(
    make: Make, weights: list[Tensor], gradients: list[list[Tensor]], **options: Any
) -> list[Tensor]:
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = make(parameters, **options)
    for gs in gradients:
        for p, g in zip(parameters, gs, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for p, g in zip(parameters, gs, strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, g)  # left as they are
    return [p.detach() for p in parameters]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize(("make", "oracle", "options"), CASES)
def test_steps_are_those_of_the_formula(
    make: Make,
    oracle: Callable[..., Arrays],
    options: dict[str, Any],
    foreach: bool | None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    weights, gradients = data(dtype)
    got = trained(make, weights, gradients, foreach=foreach, **options)
    expected = oracle(
        [w.double().numpy() for w in weights],
        [[g.double().numpy() for g in gs] for gs in gradients],
        **options,
    )
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=tolerance, atol=tolerance)


def test_two_steps_of_lars_by_hand() -> None:
    """eta = 0.1, beta = 0.5, m = 0.5, gamma = 2; w = (3, 4), |w| = 5.

    1: g = (0, 7.5): lambda = 0.1 * 5 / (7.5 + 0.5 * 5) = 0.05; g + w / 2 = (1.5, 9.5);
       v = 2 * 0.05 * (1.5, 9.5) = (0.15, 0.95); w = (2.85, 3.05)
    2: g = 0: lambda = 1; v = (0.075, 0.475) + 2 * (1.425, 1.525) = (2.925, 3.525);
       w = (-0.075, -0.475)
    A bias, not adapted, beside it: 1 - 2 * (0.25 + 0.5) = -0.5.
    """
    w, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.ones(1))
    options = {"momentum": 0.5, "weight_decay": 0.5, "trust_coefficient": 0.1}
    optimizer = LARS([("w", w), ("bias", bias)], lr=2.0, **options)
    w.grad, bias.grad = torch.tensor([[0.0, 7.5]]), torch.tensor([0.25])
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([[2.85, 3.05]]))
    assert bias.item() == -0.5
    w.grad, bias.grad = torch.zeros(1, 2), None
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([[-0.075, -0.475]]))
    assert bias.item() == -0.5


def test_a_step_of_lamb_by_hand() -> None:
    """The first step's m^ / sqrt(v^) is the gradient's sign: u = (1, -1) + 0.5 (3, 4) = (2.5, 1).

    |w| = 5, clipped to 2; |u| = sqrt(7.25) = 2.692582; w = (3, 4) - 0.1 * 2 / 2.692582 * (2.5, 1)
      = (3, 4) - (0.185695, 0.074278)
    """
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = LAMB([w], lr=0.1, eps=0.0, weight_decay=0.5, weight_norm_range=(0.0, 2.0))
    w.grad = torch.tensor([[0.01, -20.0]])
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([[2.814305, 3.925722]]))


def test_momentum_correction_is_the_rescaled_velocity() -> None:
    """Goyal's remark 3: v *= lr_new / lr_old where lr is in the velocity, nothing where it is not.

    The latter is torch's SGD, too, which needs no correction.
    """
    rates = [0.1, 0.4, 0.4, 0.05]
    weights, gradients = data()

    def train(make: Make, rescale: bool) -> list[Tensor]:
        parameters = [nn.Parameter(w.clone()) for w in weights]
        optimizer = make(parameters)
        for step, (rate, gs) in enumerate(zip(rates, gradients, strict=True)):
            optimizer.param_groups[0]["lr"] = rate
            for p, g in zip(parameters, gs, strict=True):
                p.grad = g
                if rescale and step:
                    optimizer.state[p]["momentum_buffer"] *= rate / rates[step - 1]
            optimizer.step()
        return [p.detach() for p in parameters]

    for adapt in ("matrices", "decayed"):  # the latter: of none, plain SGD
        inside = train(partial(LARS, adapt=adapt), rescale=True)
        outside = train(partial(LARS, adapt=adapt, momentum_correction=True), rescale=False)
        torch.testing.assert_close(inside, outside, rtol=1e-12, atol=1e-12)
        wrong = train(partial(LARS, adapt=adapt), rescale=False)
        assert not torch.allclose(wrong[0], inside[0], rtol=1e-6)
    plain = train(partial(torch.optim.SGD, momentum=0.9), rescale=False)
    torch.testing.assert_close(plain, outside, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [LARS, partial(LAMB, weight_decay=0.1)])
def test_saved_and_loaded_in_the_middle(make: Make) -> None:
    weights, gradients = data(torch.float32, steps=4)
    whole = trained(make, weights, gradients)
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = make(parameters)
    for step, gs in enumerate(gradients):
        if step == 2:
            state = optimizer.state_dict()
            optimizer = make(parameters, lr=77.0)
            optimizer.load_state_dict(state)
        for p, g in zip(parameters, gs, strict=True):
            p.grad = g
        optimizer.step()
    assert all(map(torch.equal, [p.detach() for p in parameters], whole))


def test_odd_tensors() -> None:
    """None at all, no gradient, one of zeros, weights of zeros, columns first in memory."""
    empty, none, zeros = (
        nn.Parameter(torch.zeros(0, 3)),
        nn.Parameter(torch.ones(2, 2)),
        nn.Parameter(torch.zeros(2, 2)),
    )
    turned = nn.Parameter(torch.ones(300, 200).t())
    for make in (LARS, LAMB):
        for foreach in (None, True):
            tensors = [nn.Parameter(p.detach().clone()) for p in (empty, none, zeros, turned)]
            optimizer = make(tensors, lr=0.5, foreach=foreach)
            for i in (0, 2, 3):
                tensors[i].grad = torch.ones_like(tensors[i])
            optimizer.step()
            assert torch.equal(tensors[1], none)
            # |w| = 0: a ratio of 1: SGD's, or the first step of Adam
            torch.testing.assert_close(tensors[2].detach(), torch.full((2, 2), -0.5))
            # LARS: 1 - 0.5 * 0.001 |w| / |g| = 0.9995; LAMB: 1 - 0.5 |w| / |u| = 0.5
            left = 0.9995 if make is LARS else 0.5
            torch.testing.assert_close(tensors[3].detach(), torch.full((200, 300), left))


def test_norms_of_bfloat16_are_taken_in_float32() -> None:
    """2^20 ones: |w| = 2^10; a running sum of 8 bits would stop at 2^8, a norm of 2^4."""
    w = nn.Parameter(torch.ones(1024, 1024, dtype=torch.bfloat16))
    for foreach in (None, True):
        optimizer = LARS([w], lr=500.0, momentum=0.0, foreach=foreach)
        w.data.fill_(1.0)
        w.grad = torch.full_like(w, 2.0**-6)
        optimizer.step()  # lambda = 0.001 * 2^10 / 2^4 = 0.064: 1 - 500 * 0.064 / 64 = 0.5
        assert (w == 0.5).all()


@pytest.mark.parametrize("rounding", [KahanCompensation, MasterWeights])
def test_parameters_of_16_bits_follow_those_of_32(rounding: type) -> None:
    """As portions of two tensors, but all at once where they share a clipped norm."""
    weights, gradients = data(torch.bfloat16)
    wide = [w.float() for w in weights]
    for make in (partial(LARS, lr=0.1), partial(LAMB, lr=0.01, max_grad_norm=1.0)):
        parameters = [nn.Parameter(w.clone()) for w in weights]
        optimizer = WideStep(make(parameters), rounding(), n_at_once=20_010)
        for gs in gradients:
            for p, g in zip(parameters, gs, strict=True):
                p.grad = g
            optimizer.step()
        expected = trained(make, wide, [[g.float() for g in gs] for gs in gradients])
        for p, e in zip(parameters, expected, strict=True):
            # The nearest of 8 bits is within 2^-9 of it; with Kahan's the state has 8 bits, too, of
            # which the biases, which move by 0.1 times a momentum of up to 6, show 2^-8 of that.
            torch.testing.assert_close(p.detach().float(), e, rtol=2.0**-8, atol=5e-3)


@pytest.mark.parametrize(
    "make", [partial(LARS, weight_decay=0.1), partial(LAMB, max_grad_norm=1.0)]
)
def test_shards_with_norms_of_the_whole(make: Make) -> None:
    """Rows over three ranks, which leaves the third nothing of the smaller tensors."""
    weights, gradients = data()
    weights, gradients = weights[:4], [gs[:4] for gs in gradients]
    expected = trained(make, weights, gradients)
    world = World(3)

    def shard(tensor: Tensor, rank: int) -> Tensor:
        rows = math.ceil(len(tensor) / 3)
        return tensor[rank * rows : (rank + 1) * rows]

    def on_rank(link: Any) -> list[Tensor]:
        rank, calls = link.group.rank, []
        parameters = [nn.Parameter(shard(w, rank).clone()) for w in weights]
        optimizer = make(parameters)

        def sum_squares(squares: Tensor) -> None:
            calls.append(squares.shape)
            link.group.all_reduce([squares], "sum").wait()

        optimizer.sum_shards(sum_squares)
        for gs in gradients:
            for p, g in zip(parameters, gs, strict=True):
                p.grad = shard(g, rank)
            optimizer.step()
        # One for the norms of all tensors; one more, before it, for the norm that is clipped.
        assert len(calls) == len(gradients) * (2 if isinstance(optimizer, LAMB) else 1)
        return [p.detach() for p in parameters]

    ranks = world.run(on_rank)
    for got, whole in zip(zip(*ranks, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(got), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (LARS, {"lr": -1.0}, "lr is -1.0"),
        (LARS, {"momentum": 1.0}, "momentum is 1.0"),
        (LARS, {"trust_coefficient": 0.0}, "trust_coefficient is 0.0; it is > 0"),
        (LARS, {"adapt": "biases"}, "adapt is 'biases'; it is 'matrices'"),
        (LARS, {"momentum": 0.0, "nesterov": True}, "but momentum is 0"),
        (LARS, {"clip": True, "momentum_correction": True}, "leave clip or"),
        (LAMB, {"betas": (0.9, 1.0)}, r"betas are .0.9, 1.0.; each is in"),
        (LAMB, {"weight_norm_range": (2.0, 1.0)}, "0 <= low <= high"),
        (LAMB, {"max_grad_norm": 0.0}, "max_grad_norm is 0.0; it is > 0"),
        (LAMB, {"eps": math.nan}, "eps is nan"),
    ],
)
def test_outside_its_range(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make([nn.Parameter(torch.ones(1))], **options)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="LAMB takes no sparse gradients"):
        LAMB(embedding.parameters()).step()
