"""The loss scale: torch's numbers, gradients in units of the loss, and what an overflow does."""

from __future__ import annotations

import math
import random
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scaledtrain import Replica
from scaledtrain.errors import ConfigError, NonFiniteLossError
from scaledtrain.loss_scale import DynamicScaler, LossScale
from scaledtrain.recompute.live_bytes import LiveBytes


def scaler_of(model: nn.Module, **options: float) -> tuple[Replica, DynamicScaler]:
    replica = Replica(model, partial(torch.optim.SGD, lr=0.0))
    return replica, DynamicScaler(LossScale(**options), replica.parameters)  # type: ignore[arg-type]


def one_weight(value: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, value)
    return model


def test_usual_numbers_are_those_of_torch() -> None:
    usual, torchs = LossScale(), torch.amp.GradScaler("cpu")
    assert usual.initial == torchs.get_scale() == 65536.0
    assert usual.growth_interval == torchs.get_growth_interval() == 2000
    assert usual.growth_factor == torchs.get_growth_factor() == 2.0
    assert usual.backoff_factor == torchs.get_backoff_factor() == 0.5


def test_scale_follows_overflows_as_torchs_does() -> None:
    model = one_weight()
    replica, ours = scaler_of(model, initial=1024.0, growth_interval=3)
    torchs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    optimizer = torch.optim.SGD(one_weight().parameters(), lr=0.0)
    parameter = optimizer.param_groups[0]["params"][0]
    draw = random.Random(0)
    overflows, scales = 0, set()
    for _ in range(60):
        factor = math.inf if draw.random() < 0.2 else 1.0
        overflows += factor == math.inf
        replica.zero_grad()
        ours.backward(model.weight.sum() * factor)
        assert ours.check_and_clip(replica, None, False)[0] == (factor == 1.0)
        optimizer.zero_grad()
        torchs.scale(parameter.sum() * factor).backward()
        torchs.step(optimizer)
        torchs.update()
        assert ours.scale == torchs.get_scale()
        scales.add(ours.scale)
    assert ours.overflows == overflows
    assert len(scales) >= 5


def test_an_overflow_halves_and_counts_from_zero() -> None:
    """Two clean steps, an overflow, two clean steps: not three in a row, so no growth."""
    model = one_weight()
    replica, scaler = scaler_of(model, initial=8.0, growth_interval=3)
    scales = []
    for factor in (1.0, 1.0, math.nan, 1.0, 1.0, 1.0):
        replica.zero_grad()
        scaler.backward(model.weight.sum() * factor)
        scaler.check_and_clip(replica, None, False)
        scales.append(scaler.scale)
    assert scales == [8.0, 8.0, 4.0, 4.0, 4.0, 8.0]
    assert scaler.metrics() == {"loss_scale": 8.0, "overflows": 1}


def test_gradients_are_in_units_of_the_loss_as_they_arrive() -> None:
    """Also for a hook that waits for finished gradients, and when several add up."""
    model = one_weight(3.0)
    seen = []
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.item()))
    _, scaler = scaler_of(model, initial=1024.0)
    scaler.backward(model.weight.sum() * 2.0)
    scaler.scale = 512.0
    scaler.backward(model.weight.sum() * 5.0)
    assert seen == [2.0, 7.0]
    model.weight.sum().backward()  # the user's own, not scaled
    assert seen[-1] == 8.0


class Counting(TorchDispatchMode):
    """Counts the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.of[func] += 1
        return func(*args, **(kwargs or {}))


def two_microbatches(dtype: torch.dtype, watched: bool) -> tuple[list[list[Tensor]], list[int]]:
    """Gradients after each of two, and how many were unscaled one by one meanwhile."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=dtype) for _ in range(10)))
    model[9].weight = model[3].weight  # 19 parameters
    _, scaler = scaler_of(model, initial=3000.0)  # so that dividing rounds
    if watched:
        model[5].bias.register_post_accumulate_grad_hook(lambda p: None)
    found, one_by_one = [], []
    for seed in (1, 2):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
        loss = model(x).float().square().mean()
        with Counting() as counted:
            scaler.backward(loss)
        # Beside the loss times S, and the derivative of the square.
        one_by_one.append(counted.of[torch.ops.aten.mul.Tensor] - 3)
        found.append([p.grad.clone() for p in model.parameters()])
    return found, one_by_one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unscaled_together_gradients_have_the_bits_of_those_unscaled_alone(
    dtype: torch.dtype,
) -> None:
    """Of the first microbatch, where nothing is there yet, and nobody looks."""
    (together, some), (alone, all_) = (
        two_microbatches(dtype, watched) for watched in (False, True)
    )
    assert (some, all_) == ([0, 19], [19, 19])
    for got, expected in zip(together, alone, strict=True):
        assert all(g.dtype is torch.float32 for g in got)
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_gradients_that_share_memory_are_unscaled_once() -> None:
    """A sum's terms may get views of one gradient."""
    a, b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(4))
    scaler = DynamicScaler(LossScale(initial=1024.0), [a, b])
    scaler.backward(((a.view(-1) + b.view(4)) * torch.arange(4.0)).sum())
    assert a.grad.tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert b.grad.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_hook_of_ones_own_sees_units_of_the_loss() -> None:
    model, seen = one_weight(), []
    _, scaler = scaler_of(model, initial=1024.0)
    model.weight.register_hook(lambda gradient: seen.append(gradient.item()))
    scaler.backward(model.weight.sum() * 3.0)
    assert seen == [3.0]


class Breaks(torch.autograd.Function):
    """Its backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("broken")


@pytest.mark.parametrize("before", [False, True])
def test_a_backward_pass_that_fails_leaves_no_scaled_gradient(before: bool) -> None:
    """The second weight's has come by then; the first one's, if there was one, stays."""
    first, second = one_weight(), one_weight()
    scaler = DynamicScaler(LossScale(initial=1024.0), [*first.parameters(), *second.parameters()])
    if before:
        scaler.backward(first.weight.sum() * 7.0)
    with pytest.raises(RuntimeError, match="broken"):
        scaler.backward((Breaks.apply(first.weight) * second.weight).sum() * 2.0)
    assert second.weight.grad.item() == 2.0
    assert (first.weight.grad is not None) == before
    assert not before or first.weight.grad.item() == 7.0
    second.weight.sum().backward()  # the user's own, not scaled
    assert second.weight.grad.item() == 3.0


def test_sparse_gradients_are_unscaled() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    scaler = DynamicScaler(LossScale(initial=1024.0), [table.weight])
    for times in (1.0, 2.0):  # the second one is added to the first
        scaler.backward(table(torch.tensor([1, 3, 1])).sum())
        assert table.weight.grad.is_sparse
        assert table.weight.grad.to_dense()[:, 0].tolist() == [0, 2 * times, 0, times, 0]


def test_small_gradients_survive_float16() -> None:
    """The chain rule multiplies 1e-5 by 1e-4 in float16, whose smallest number is 6e-8."""

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return ((weight * 1e-5) * 1e-4).float().sum()

    model = one_weight(dtype=torch.float16)
    loss(model.weight).backward()
    assert model.weight.grad.item() == 0.0
    model.weight.grad = None
    _, scaler = scaler_of(model, initial=1024.0)
    scaler.backward(loss(model.weight))
    assert model.weight.grad.dtype is torch.float32
    assert model.weight.grad.item() == pytest.approx(1e-9, rel=0.02)


def test_gradients_that_are_handed_over_are_unscaled_where_they_are() -> None:
    """Those of 16 bits alone need other memory, of 4 bytes for each of 2 numbers."""
    weights = [nn.Parameter(torch.zeros(2, dtype=t)) for t in (torch.float32, torch.float16)]
    scaler = DynamicScaler(LossScale(initial=1024.0), weights)
    gradients = [torch.full((2,), 3072.0), torch.full((2,), 5.0, dtype=torch.float16)]
    with LiveBytes() as counted:
        scaler.hand_over(weights, gradients)
        assert counted.peak == 8
    assert weights[0].grad is gradients[0]
    assert [w.grad.tolist() for w in weights] == [[3.0] * 2, [5.0 / 1024.0] * 2]
    assert [w.grad.dtype for w in weights] == [torch.float32] * 2
    scaler.hand_over(weights[:1], [torch.full((2,), 1024.0)])
    assert weights[0].grad.tolist() == [4.0] * 2
    scaler.hand_over([], [])  # of a step without samples


def test_clipping_is_of_unscaled_gradients() -> None:
    """A gradient of 3, clipped to 1, with its norm before."""
    model = one_weight()
    replica, scaler = scaler_of(model, initial=1024.0)
    scaler.backward(model.weight.sum() * 3.0)
    finite, norm = scaler.check_and_clip(replica, 1.0, False)
    assert finite
    assert norm is not None
    assert norm.item() == 3.0
    assert model.weight.grad.item() == pytest.approx(1.0, rel=1e-5)


def test_a_second_scaler_of_the_same_parameters_does_not_meddle() -> None:
    model = one_weight()
    _, first = scaler_of(model, initial=16.0)
    _, second = scaler_of(model, initial=64.0)
    first.backward(model.weight.sum())
    second.backward(model.weight.sum())
    assert model.weight.grad.item() == 2.0
    assert len(model.weight._backward_hooks) == 2
    del first, second
    assert len(model.weight._backward_hooks) == 0


def test_an_overflow_at_the_smallest_scale_ends_the_run() -> None:
    model = one_weight()
    replica, scaler = scaler_of(model, initial=3.0, minimum=1.0)
    for expected in (1.5, 1.0):
        scaler.backward(model.weight.sum() * math.inf)
        assert scaler.check_and_clip(replica, None, False) == (False, None)
        assert scaler.scale == expected
    with pytest.raises(NonFiniteLossError, match=r"down to 1\.0.*precision=bf16-mixed"):
        scaler.check_and_clip(replica, None, False)


def test_state_is_restored() -> None:
    model = one_weight()
    replica, scaler = scaler_of(model, initial=8.0, growth_interval=2)
    for factor in (math.inf, 1.0):
        replica.zero_grad()
        scaler.backward(model.weight.sum() * factor)
        scaler.check_and_clip(replica, None, False)
    other_replica, other = scaler_of(one_weight(), initial=8.0, growth_interval=2)
    other.load_state_dict(scaler.state_dict())
    assert other.metrics() == {"loss_scale": 4.0, "overflows": 1}
    other.check_and_clip(other_replica, None, False)  # the second clean step
    assert other.scale == 8.0


def test_a_smaller_growth_interval_may_follow() -> None:
    """Saved after 3 of 4 clean steps, resumed with an interval of 2: the next one is enough."""
    model = one_weight()
    replica, scaler = scaler_of(model, initial=8.0, growth_interval=4)
    for _ in range(3):
        scaler.check_and_clip(replica, None, False)
    replica, other = scaler_of(model, initial=8.0, growth_interval=2)
    other.load_state_dict(scaler.state_dict())
    scales = []
    for _ in range(3):
        other.check_and_clip(replica, None, False)
        scales.append(other.scale)
    assert scales == [16.0, 16.0, 32.0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"initial": 0.5}, r"initial is 0\.5; it is >= minimum 1\.0"),
        ({"initial": math.inf}, "initial is inf"),
        ({"minimum": 0.0}, r"minimum is 0\.0; it is a scale > 0"),
        ({"growth_interval": 0}, "growth_interval is 0; it is a number of steps, >= 1"),
        ({"growth_factor": 1.0}, r"growth_factor is 1\.0; it is > 1"),
        ({"backoff_factor": 1.0}, r"backoff_factor is 1\.0; it is between 0 and 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_options(options: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LossScale(**options)  # type: ignore[arg-type]
