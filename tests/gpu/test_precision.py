"""Lower precision on a GPU: torch's own loops give the same, and rounding at random is right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain import Precision, Trainer, connect
from scaledtrain.loss_scale import LossScale
from scaledtrain.optim.rounding import random_bits, stochastic_round

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
ADAMW = partial(torch.optim.AdamW, lr=3e-3, fused=True)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
    )


def batches(n: int = 40) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(n):
        x = torch.randn(32, 8, generator=generator)
        yield x, x[:, :4].argmax(1)


def trained(precision: Precision) -> Trainer:
    link = connect(device=DEVICE)
    trainer = Trainer(net(), F.cross_entropy, ADAMW, precision=precision, console=False, link=link)
    with link, trainer:
        trainer.fit(list(batches()), max_epochs=1)
    return trainer


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().reshape(-1) for p in model.parameters()])


def loss_of(model: nn.Module) -> float:
    """Of samples that it has not seen."""
    x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    with torch.no_grad():
        out = model.to(DEVICE)(x.to(next(model.parameters()).dtype)).float()
    return F.cross_entropy(out, x[:, :4].argmax(1)).item()


def by_hand(dtype: torch.dtype | None, scale: LossScale | None = None) -> Tensor:
    model = net().to(DEVICE)
    optimizer = ADAMW(model.parameters())
    options = {} if scale is None else {"init_scale": scale.initial, "growth_interval": 3}
    scaler = torch.amp.GradScaler(DEVICE, enabled=scale is not None, **options)
    for x, y in batches():
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(x.to(DEVICE)), y.to(DEVICE))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return flat(model)


def test_float32_and_bf16_mixed_are_the_loop_by_hand() -> None:
    """Bit for bit: the same kernels in the same order."""
    assert torch.equal(flat(trained(Precision()).model), by_hand(None))
    assert torch.equal(flat(trained(Precision("bf16-mixed")).model), by_hand(torch.bfloat16))


def test_fp16_mixed_skips_the_steps_that_torchs_scaler_skips() -> None:
    """The first scale, 2^24, is too large for float16, whose largest number is 65504."""
    scale = LossScale(initial=2.0**24, growth_interval=3)
    trainer = trained(Precision("fp16-mixed", loss_scale=scale))
    assert trainer.scaler.overflows > 1
    torch.testing.assert_close(
        flat(trainer.model), by_hand(torch.float16, scale), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "precision",
    [
        Precision("bf16-true", "stochastic"),
        Precision("bf16-true", "kahan"),
        Precision("bf16-true", "master"),
        Precision("fp16-true", "master"),
        Precision("fp16-true", "kahan"),
    ],
    ids=str,
)
def test_parameters_of_16_bits_learn_as_much(precision: Precision) -> None:
    """Held-out losses after 40 steps, which without training is log 4 = 1.39."""
    wide, narrow = trained(Precision()), trained(precision)
    assert next(narrow.model.parameters()).dtype.itemsize == 2
    assert loss_of(wide.model) < 0.8
    assert loss_of(narrow.model) == pytest.approx(loss_of(wide.model), abs=0.05)


def test_rounding_at_random_is_right_in_the_mean() -> None:
    """1 + k / 8 of the gap 2^-7 to the next bfloat16 goes up k times of 8; of 100,000 draws the
    mean has a standard error of sqrt(p (1 - p) / 100,000), and 4 of them are allowed."""
    n, gap = 100_000, 2.0**-7
    generator = torch.Generator(DEVICE).manual_seed(0)
    for eighths in (1, 4, 7):
        p = eighths / 8
        x = torch.full((n,), 1.0 + p * gap, device=DEVICE)
        out = torch.empty(n, dtype=torch.bfloat16, device=DEVICE)
        rounded = stochastic_round(x, random_bits(n, generator), out).double()
        assert set(rounded.unique().tolist()) == {1.0, 1.0 + gap}
        share = ((rounded - 1.0) / gap).mean().item()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)
