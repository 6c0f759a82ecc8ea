"""Where NaN and infinities begin: planted in a forward pass, and in a backward pass alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain import Trainer, Watch
from scaledtrain.errors import ConfigError
from scaledtrain.models import GPT
from scaledtrain.models.gpt import next_token_loss
from scaledtrain.recompute import CheckpointSqrt
from scaledtrain.watch import find_nonfinite, load_batch


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def ones(width: int = 2) -> nn.Linear:
    """x, as it is."""
    layer = nn.Linear(width, width, bias=False)
    nn.init.eye_(layer.weight)
    return layer


class Between(nn.Module):
    """A logarithm between two layers, in no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ones(), ones()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).log())  # type: ignore[no-any-return]


class Twice(nn.Module):
    """Two branches of the same tensor: the root of 0 has a gradient of infinity, 2 x has not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice, self.root = ones(), Do(lambda x: 2 * x), Do(torch.sqrt)

    def forward(self, x: Tensor) -> Tensor:
        same = self.a(x)
        return self.twice(same) + self.root(same)  # type: ignore[no-any-return]


X = torch.tensor([[0.0, 4.0], [-1.0, 1.0]])
POSITIVE = X.abs()


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        # log(-1) is NaN.
        (nn.Sequential(ones(), Do(torch.log), ones()), X, "the output of 1 (Do)"),
        # 1 / 0 is infinite.
        (nn.Sequential(ones(), Do(torch.reciprocal)), POSITIVE, "the output of 1 (Do)"),
        (nn.Sequential(ones(), Between()), X, "what 1.b (Linear) is given, made between modules"),
        # The root of 0 is 0, its derivative 1 / (2 sqrt(0)); the layers behind it are in order.
        (
            nn.Sequential(ones(), Do(torch.square), nn.Sequential(Do(torch.sqrt), ones())),
            X,
            "the backward pass of 2.0 (Do)",
        ),
        (
            nn.Sequential(ones(), nn.LeakyReLU(inplace=True), Do(lambda x: x.square().sqrt())),
            X,
            "the backward pass of 2 (Do)",
        ),
        (Twice(), POSITIVE, "the backward pass of root (Do)"),
    ],
)
def test_the_first_module_is_named(model: nn.Module, inputs: Tensor, expected: str) -> None:
    found = find_nonfinite(model, [(inputs, torch.zeros(2, 2))], F.mse_loss)
    assert (found.where or "").startswith(expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_relu_stops_does_no_harm() -> None:
    """Its gradient at 0 is 0, whatever it is given."""
    model = nn.Sequential(ones(), nn.ReLU(), Do(torch.sqrt))
    assert not find_nonfinite(model, [(X, torch.zeros(2, 2))], F.mse_loss)


def test_a_failed_look_leaves_the_model_as_it_was() -> None:
    """The running mean has seen the batch when the loss fails."""

    def fails(*_: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    model = nn.BatchNorm1d(2)
    with pytest.raises(RuntimeError, match="out of memory"):
        find_nonfinite(model, [(X, X)], fails)
    assert model.running_mean is not None
    assert model.running_mean.tolist() == [0.0, 0.0]
    assert not model._forward_hooks


def test_a_model_that_does_not_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no parameter with requires_grad=True"):
        find_nonfinite(ones().requires_grad_(False), [(X, X)], F.mse_loss)


def test_a_loss_that_is_at_fault_is_named() -> None:
    """The root of a mean of 0 is 0; its gradient is infinity times 0."""

    def root_mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets).sqrt()

    found = find_nonfinite(nn.Sequential(ones()), [(X, X)], root_mean_square)
    assert found == ("the backward pass of the loss", ["0.weight"], 0.0)


def test_a_gradient_too_large_is_named_by_its_parameter() -> None:
    """1e30 1e30 is more than float32 holds; what goes on to the inputs, which need none, is not."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[0].weight, 1e-30)
    batch = torch.full((1, 1), 1e30), torch.zeros(1, 1)
    found = find_nonfinite(model, [batch], lambda outputs, _: 1e30 * outputs.mean())
    assert found.where == "the gradient of 0.weight"


def test_masks_may_be_infinite() -> None:
    """And a GPT in order has nothing to tell, also with blocks that are computed again together."""
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(3)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, src_mask=mask)  # type: ignore[no-any-return]

    batch = torch.randn(2, 3, 4), torch.zeros(2, 3, 4)
    assert not find_nonfinite(Masked(), [batch], F.mse_loss)


@pytest.mark.parametrize("bad", [None, "log", "sqrt"])
def test_a_run_with_recomputed_blocks_names_it_too(
    bad: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 4 blocks the third has a fault with a sample of zeros; blocks run two together."""
    torch.manual_seed(0)
    faults = {"log": torch.log, "sqrt": torch.sqrt, None: torch.square}
    blocks = [nn.Sequential(ones(), nn.ReLU()) for _ in range(4)]
    blocks[2] = nn.Sequential(ones(), Do(torch.square), Do(faults[bad]))
    model = nn.Sequential(*blocks)
    given = [(torch.ones(2, 2), torch.zeros(2, 2)) for _ in range(3)]
    given[1][0][0] = 0.0
    sgd = partial(torch.optim.SGD, lr=0.0)
    watch = Watch(on_nonfinite="skip", dump=True)
    with Trainer(
        model, F.mse_loss, sgd, watch=watch, run_dir=tmp_path, console=False,
        activation_checkpointing=CheckpointSqrt(),
    ) as trainer:  # fmt: skip
        trainer.fit(given, max_epochs=1)
    if bad is None:
        assert not caplog.messages
        return
    where = {"log": "the output of 2.2 (Do)", "sqrt": "the backward pass of 2.2 (Do)"}[bad]
    (message,) = caplog.messages
    assert f"first not finite: {where}" in message
    (path,) = (tmp_path / "troubles").iterdir()
    assert find_nonfinite(model, load_batch(path).microbatches, F.mse_loss).where == where


def test_the_run_after_it_is_as_before() -> None:
    """No hook, no gradient and no generator has changed; autocast counts."""
    model = GPT(11, sequence_length=6, n_layers=2, n_heads=2, d_model=8, dropout=0.5)
    tokens = torch.randint(11, (2, 7))
    before = torch.get_rng_state()
    assert not find_nonfinite(model, [(tokens[:, :-1], tokens[:, 1:])], next_token_loss)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
