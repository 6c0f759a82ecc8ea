"""Parameters of 16 bits: what rounding does to a number, to an optimizer, and to training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaledtrain.optim.narrow import KahanCompensation, MasterWeights, Rounding, StochasticRounding
from scaledtrain.optim.rounding import random_bits, stochastic_round
from scaledtrain.optim.wide_step import WideStep

N = 40_000
ROUNDINGS = [StochasticRounding, KahanCompensation, MasterWeights]
every_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)


def rounded(x: Tensor, seed: int = 0) -> Tensor:
    bits = random_bits(x.numel(), torch.Generator().manual_seed(seed))
    return stochastic_round(x, bits, torch.empty_like(x, dtype=torch.bfloat16))


class TestStochasticRound:
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    @pytest.mark.parametrize("exponent", [-120, -20, 0, 90])
    @pytest.mark.parametrize("eighths", [1, 4, 7])
    def test_expectation_and_spread(self, eighths: int, exponent: int, sign: float) -> None:
        """Between neighbours a gap apart: up with p = eighths / 8, mean p and variance p (1 - p).

        Of the mean of N such draws the standard error is sqrt(p (1 - p) / N), and 4 of them are
        allowed; of the variance it is |1 - 2 p| times that.
        """
        gap, p = 2.0 ** (exponent - 7), eighths / 8
        low = 1.25 * 2.0**exponent
        x = torch.full((N,), sign * (low + p * gap))
        r = rounded(x).double()
        assert set(r.unique().tolist()) == {sign * low, sign * (low + gap)}
        ups = (r.abs() - low) / gap
        error = math.sqrt(p * (1 - p) / N)
        assert abs(ups.mean().item() - p) < 4 * error
        assert abs(ups.var().item() - p * (1 - p)) < 4 * abs(1 - 2 * p) * error + 1e-4

    def test_any_number_goes_to_a_neighbour(self) -> None:
        bits = torch.randint(-(2**31), 2**31, (N,), generator=torch.Generator().manual_seed(1))
        x = bits.to(torch.int32).view(torch.float32)
        x = x[x.isfinite()]
        down = (x.view(torch.int32) & -65536).view(torch.float32)
        up = (down.view(torch.int32) + 65536).view(torch.float32)
        r = rounded(x).float()
        assert ((r == down) | (r == up)).all()
        assert (r == up).float().mean().item() == pytest.approx(0.5, abs=0.02)

    def test_what_is_representable_stays(self) -> None:
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
        r = rounded(every.float())
        numbers = ~every.isnan()
        assert torch.equal(r[numbers].view(torch.int16), every[numbers].view(torch.int16))
        assert r[~numbers].isnan().all()

    def test_nan_with_any_bits_stays_nan(self) -> None:
        x = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
        assert all(rounded(x, seed).isnan().all() for seed in range(20))

    def test_tensors_may_have_any_layout(self) -> None:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        bits = random_bits(24, torch.Generator().manual_seed(0))
        expected = stochastic_round(x, bits, torch.empty(6, 4, dtype=torch.bfloat16))
        out = torch.empty(4, 6, dtype=torch.bfloat16).T
        assert torch.equal(stochastic_round(x.T.contiguous().T, bits, out), expected)

    def test_random_bits_are_fair_and_repeatable(self) -> None:
        """Each of 16 bits, in each of the four numbers of a draw: half of them set."""
        bits = random_bits(4 * N - 1, torch.Generator().manual_seed(0))
        assert bits.shape == (4 * N - 1,)
        for lane in range(4):
            for bit in range(16):
                share = ((bits[lane::4].int() >> bit) & 1).double().mean().item()
                assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(N)
        again = random_bits(4 * N - 1, torch.Generator().manual_seed(0))
        assert torch.equal(bits, again)


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(16, 8), (8,), (1,), (3, 2, 2)]
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [nn.Parameter(value.to(dtype)) for value in values]


def feed(parameters: Sequence[nn.Parameter], step: int) -> None:
    """Gradients that both formats hold."""
    for p, g in zip(parameters, weights(seed=100 + step), strict=True):
        p.grad = (g.detach() / 64).to(p.dtype)


EVERY_OPTIMIZER: list[Callable[..., Optimizer]] = [
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    partial(torch.optim.AdamW, lr=0.01, fused=True),
    partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    partial(torch.optim.NAdam, lr=0.01, foreach=True),
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.ASGD,
    torch.optim.Adafactor,
]


def name_of(make: Any) -> str:
    return getattr(make, "func", make).__name__


@pytest.mark.parametrize("make", EVERY_OPTIMIZER, ids=name_of)
def test_master_weights_are_those_of_float32(make: Callable[..., Optimizer]) -> None:
    """Bit for bit, whichever the optimizer, some parameters at a time or all at once."""
    wide, narrow = weights(), weights(torch.bfloat16)
    plain, master = make(wide), WideStep(make(narrow), MasterWeights(), n_at_once=100)
    for step in range(5):
        feed(wide, step)
        feed(narrow, step)
        plain.step()
        master.step()
    for i, (w, n) in enumerate(zip(wide, narrow, strict=True)):
        assert n.dtype is torch.bfloat16
        assert torch.equal(n, w.bfloat16())
        assert torch.equal(master.state_dict()["masters"][i], w)


@every_rounding
@pytest.mark.parametrize("make", EVERY_OPTIMIZER, ids=name_of)
def test_any_optimizer_comes_to_about_the_same(
    make: Callable[..., Optimizer], rounding: type[Rounding]
) -> None:
    """bfloat16's parameters are exact to 2^-8; 10 steps of about lr each."""
    wide, narrow = weights(), weights(torch.bfloat16)
    plain, optimizer = make(wide), WideStep(make(narrow), rounding(seed=0))
    for step in range(10):
        feed(wide, step)
        feed(narrow, step)
        plain.step()
        optimizer.step()
    for w, n in zip(wide, narrow, strict=True):
        torch.testing.assert_close(n.float(), w, rtol=2**-6, atol=0.02)


@every_rounding
def test_gradients_and_learning_rate_are_the_users(rounding: type[Rounding]) -> None:
    """A missing gradient is no gradient of zero: weight decay leaves the parameter alone."""
    first, second = weights(torch.bfloat16)[:2]
    before = second.detach().clone()
    sgd = torch.optim.SGD([first, second], lr=0.5, weight_decay=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, gamma=0.5)
    gradient = first.grad = torch.ones_like(first)
    WideStep(sgd, rounding()).step()
    schedule.step()
    assert torch.equal(second, before)
    assert first.grad is gradient
    assert gradient.dtype is torch.bfloat16
    assert second.grad is None
    assert sgd.param_groups[0]["lr"] == 0.25


def test_a_parameter_of_32_bits_is_updated_as_usual() -> None:
    narrow, wide = nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.ones(3))
    for p in (narrow, wide):
        p.grad = torch.full_like(p, 0.001)
    WideStep(torch.optim.SGD([narrow, wide], lr=1.0), MasterWeights()).step()
    assert torch.equal(wide, torch.full((3,), 1.0) - 0.001)
    assert torch.equal(narrow, torch.ones(3).bfloat16())  # the gap below 1 is 2^-8 = 0.0039


def test_what_others_write_counts() -> None:
    """As a strategy does that averages parameters; what bfloat16 does not show is kept."""
    p = nn.Parameter(torch.ones(2).bfloat16())
    optimizer = WideStep(torch.optim.SGD([p], lr=1.0), MasterWeights())
    p.grad = torch.full_like(p, -(2.0**-10))
    optimizer.step()
    with torch.no_grad():
        p[0] = 2.0
    optimizer.step()
    master = optimizer.state_dict()["masters"][0]
    assert master.tolist() == [2.0 + 2.0**-10, 1.0 + 2 * 2.0**-10]


def test_kahan_keeps_what_was_rounded_off() -> None:
    """Steps of 2^-10 up from 1, where the gap is 2^-7: p + c is exact, p moves after the fourth."""
    p = nn.Parameter(torch.ones(1).bfloat16())
    optimizer = WideStep(torch.optim.SGD([p], lr=1.0), KahanCompensation())
    values = []
    for _ in range(8):
        p.grad = torch.full_like(p, -(2.0**-10))
        optimizer.step()
        rest = optimizer.state_dict()["compensation"][0]
        assert rest.dtype is torch.bfloat16
        values.append((p.item(), rest.item()))
    assert [value + rest for value, rest in values] == [1 + k * 2.0**-10 for k in range(1, 9)]
    assert [value for value, _ in values] == [1.0] * 4 + [1.0078125] * 4


def test_an_overflow_leaves_a_compensation_that_is_a_number() -> None:
    p = nn.Parameter(torch.full((1,), 6e4).half())
    optimizer = WideStep(torch.optim.SGD([p], lr=1.0), KahanCompensation())
    p.grad = torch.full_like(p, -6e4)
    optimizer.step()
    assert p.item() == math.inf
    assert optimizer.state_dict()["compensation"][0].item() == 0.0


@pytest.mark.parametrize(
    ("rounding", "dtype"),
    [(rounding, torch.bfloat16) for rounding in ROUNDINGS]
    + [(rounding, torch.float16) for rounding in (KahanCompensation, MasterWeights)],
)
def test_saved_and_resumed_is_not_stopping(rounding: type[Rounding], dtype: torch.dtype) -> None:
    def adamw(parameters: list[nn.Parameter]) -> tuple[Optimizer, WideStep]:
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        return optimizer, WideStep(optimizer, rounding(seed=3))

    first, second = weights(dtype), weights(dtype)
    (inner, optimizer), (other_inner, other) = adamw(first), adamw(second)
    for step in range(3):
        feed(first, step)
        optimizer.step()
    of_optimizer, state = copy.deepcopy(inner.state_dict()), optimizer.state_dict()
    with torch.no_grad():
        for p, q in zip(first, second, strict=True):
            q.copy_(p)
    other_inner.load_state_dict(of_optimizer)
    other.load_state_dict(state, of_optimizer)
    for step in range(3, 6):
        for parameters, either in ((first, optimizer), (second, other)):
            feed(parameters, step)
            either.step()
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q)
        assert inner.state[p].keys() == other_inner.state[q].keys()
        for key, value in inner.state[p].items():
            assert torch.equal(value, other_inner.state[q][key])
            assert value.dtype is other_inner.state[q][key].dtype


class TestQuadratic:
    """1/2 |w - t|^2 of 1,000 numbers w that begin at t + 1/4, by 600 steps of lr 0.01.

    All w are between 1.25 and 1.75, where bfloat16's gap is 2^-7 = 0.0078: the first update,
    0.0025, is less than half of it, so that to the nearest nothing ever moves. In float32 the
    distance shrinks by 0.99 a step, to 0.25 * 0.99^600 = 6e-4.
    """

    t = 1.0 + torch.arange(1000) / 2000

    def train(self, rounding: Rounding | None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        w = nn.Parameter((self.t + 0.25).to(dtype))
        optimizer: Any = torch.optim.SGD([w], lr=0.01)
        if rounding is not None:
            optimizer = WideStep(optimizer, rounding)
        for _ in range(600):
            w.grad = (w.detach().float() - self.t).to(dtype)
            optimizer.step()
        return w.detach().float() - self.t

    def test_to_the_nearest_it_stalls_at_once(self) -> None:
        error = self.train(None)
        assert error.mean().item() == pytest.approx(0.25, abs=1e-3)
        exact = self.train(None, torch.float32)
        assert exact.mean().item() == pytest.approx(0.25 * 0.99**600, rel=0.01)

    @pytest.mark.parametrize("rounding", [KahanCompensation, MasterWeights])
    def test_compensated_it_gets_as_near_as_the_format_allows(
        self, rounding: type[Rounding]
    ) -> None:
        """At one of the two neighbours of t, since a gradient is taken of what bfloat16 shows."""
        assert self.train(rounding()).abs().max().item() < 2.0**-7

    def test_rounded_at_random_it_is_right_in_the_mean(self) -> None:
        """At rest a number errs by about half a gap, as sqrt(gap |e| lr / (2 lr |e|)) suggests."""
        error = self.train(StochasticRounding(seed=0))
        assert error.std().item() < 2.0**-7
        assert abs(error.mean().item() - 6e-4) < 4 * 2.0**-8 / math.sqrt(1000)


@every_rounding
def test_tensors_that_are_rounded_as_one_get_what_each_gets_by_itself(
    rounding: type[Rounding], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one: what a GPU does, whose kernels take as long for few numbers as for many."""

    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        layers = nn.Linear(8, 16), nn.Linear(16, 4)
        model = nn.Sequential(*layers).bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = WideStep(optimizer, rounding(seed=0))
        for _ in range(20):
            model(torch.randn(32, 8).bfloat16()).square().mean().backward()
            step.step()
            optimizer.zero_grad()
        state = [value for of in optimizer.state.values() for value in of.values()]
        return [*(p.detach() for p in model.parameters()), *state]

    expected = trained()
    for module in ("narrow", "together"):
        monkeypatch.setattr(
            f"scaledtrain.optim.{module}.rounded_as_one",
            lambda tensors: [[*range(len(tensors))]],
        )
    assert all(map(torch.equal, trained(), expected))
