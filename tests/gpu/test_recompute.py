"""Activations that are computed again on a GPU: the same bits, within the budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scaledtrain.models import GPT
from scaledtrain.recompute import (
    CheckpointEvery,
    CheckpointPolicy,
    CheckpointSqrt,
    MemoryBudget,
    Selective,
    checkpoint_activations,
)
from scaledtrain.recompute.live_bytes import LiveBytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
TOKENS = torch.arange(8 * 128).view(8, 128) % 61


def gpt() -> nn.Module:
    """With dropout, whose random numbers a GPU has of its own."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "sequence_length": 128, "n_layers": 12, "n_heads": 4, "d_model": 128}
    return GPT(**sizes, dropout=0.1).to(DEVICE)


def sample(model: nn.Module) -> Tensor:
    loss: Tensor = model(TOKENS.to(DEVICE)).logsumexp(-1).mean()
    return loss


def step(model: nn.Module) -> tuple[list[Tensor], int, int]:
    """Gradients and the next random number; bytes alive at once, by operators and allocator."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sample(model).backward()  # type: ignore[no-untyped-call]
    torch.manual_seed(3)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.zero_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sample(model).backward()  # type: ignore[no-untyped-call]
    allocated = torch.cuda.max_memory_allocated() - before
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    following = torch.rand(1, device=DEVICE)
    with LiveBytes() as counted:
        sample(model).backward()  # type: ignore[no-untyped-call]
    return [*gradients, following], counted.peak, allocated


@pytest.mark.parametrize(
    "policy", [CheckpointEvery(), CheckpointEvery(3), CheckpointSqrt(), Selective()], ids=str
)
def test_the_same_bits_in_fewer_bytes(policy: CheckpointPolicy) -> None:
    expected, everything, allocated = step(gpt())
    model = gpt()
    checkpoint_activations(model, policy)
    found, peak, allocated_now = step(model)
    assert all(map(torch.equal, expected, found))
    assert peak < 0.8 * everything
    assert allocated_now < 0.85 * allocated


@pytest.mark.parametrize("offload", [None, "host", "disk"])
@pytest.mark.parametrize("part", [3, 8])
def test_a_budget_is_kept_by_the_allocator_too(part: int, offload: str | None) -> None:
    """Which rounds each tensor up to 512 bytes, and has what kernels need while they run."""
    expected, everything, _ = step(gpt())
    model = gpt()
    budget = MemoryBudget(everything // part, offload=offload)
    checkpoint_activations(model, budget, sample)
    found, peak, allocated = step(model)
    assert all(map(torch.equal, expected, found))
    assert peak <= budget.n_bytes
    assert allocated <= 1.1 * budget.n_bytes
