"""Activation checkpointing where something goes wrong, or is unusual."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaledtrain.errors import ConfigError
from scaledtrain.recompute import (
    CheckpointEvery,
    CheckpointPolicy,
    MemoryBudget,
    Selective,
    checkpoint_activations,
)
from scaledtrain.recompute.offload import DiskStore

ROWS = torch.linspace(-1, 1, 64).view(4, 16)


class Chain(nn.Module):
    """Blocks, before one of which it can fail."""

    def __init__(self, shared: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(shared or nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
            for _ in range(6)
        )
        self.fails_before: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i == self.fails_before:
                raise KeyboardInterrupt
            x = block(x)
        return x


def sample(called: Callable[..., Any]) -> Tensor:
    loss: Tensor = called(ROWS).square().mean()
    return loss


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    sample(model).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in model.parameters())
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_after_a_forward_pass_that_was_broken_off_the_next_one_is_as_any() -> None:
    model = Chain()
    expected = gradients(model)
    checkpoint_activations(model, CheckpointEvery(3))
    for _ in range(2):
        model.fails_before = 1  # blocks 0 to 2 have run together, 1 and 2 are never called
        with pytest.raises(KeyboardInterrupt):
            model(ROWS)
        model.fails_before = None
        with torch.no_grad():
            model(ROWS)
        assert all(map(torch.equal, gradients(model), expected))


@pytest.mark.parametrize("policy", [CheckpointEvery(2), MemoryBudget(2**20)])
def test_a_sample_that_fails_leaves_nothing_behind(policy: CheckpointPolicy) -> None:
    model = Chain()
    calls = 0
    while True:
        left = calls

        def failing(called: Callable[..., Any]) -> Tensor:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return sample(called)

        try:
            checkpoint_activations(model, policy, failing)
        except KeyboardInterrupt:
            assert not any("forward" in vars(block) for block in model.blocks)
            assert not model._forward_hooks
            assert not model._forward_pre_hooks
            calls += 1
        else:
            break
    assert calls >= 2  # before and with the policy


def test_a_module_that_is_in_several_blocks_is_still_trained() -> None:
    shared = nn.Linear(16, 16)
    model = Chain(shared)
    weight, expected = shared.weight, gradients(model)
    for policy in (CheckpointEvery(2), MemoryBudget(2**20), MemoryBudget(4_000)):
        handle = checkpoint_activations(model, policy, sample)
        assert shared.weight is weight  # the optimizer has this one
        assert all(map(torch.equal, gradients(model), expected))
        handle.remove()


def test_a_loss_that_is_not_a_number_is_not_put_down_to_the_policy() -> None:
    def nan(called: Callable[..., Any]) -> Tensor:
        return sample(called) * float("nan")

    told = [checkpoint_activations(Chain(), MemoryBudget(2_600), s).told for s in (sample, nan)]
    assert all("groups" in text for text in told)
    checkpoint_activations(Chain(), CheckpointEvery(2), nan)


def test_a_batch_without_samples_is_measured() -> None:
    model = Chain()
    handle = checkpoint_activations(
        model, MemoryBudget("1MiB", offload="disk"), lambda called: called(ROWS[:0]).sum()
    )
    assert "6 keep everything" in handle.told


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x[None])[0][0]
        return out


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_what_recurrent_layers_change_in_place_is_not_kept(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Recurrent(kind(16, 16)) for _ in range(4)))
    expected = gradients(model)
    with pytest.raises(ConfigError, match=f"Recurrent has a {kind.__name__}, which changes"):
        checkpoint_activations(model, Selective())
    checkpoint_activations(model, CheckpointEvery(2))
    assert all(map(torch.equal, gradients(model), expected))


def test_a_process_that_was_forked_offloads_to_a_file_of_its_own() -> None:
    store = DiskStore()
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()

    def child() -> None:
        read = store.put(ROWS + 1)
        there.send("written")
        there.recv()
        there.send((read() - ROWS).tolist())

    process = fork.Process(target=child)
    process.start()
    assert here.poll(30)
    here.recv()
    read = store.put(ROWS + 2)  # to the place that the child took for its own, if it is one file
    here.send("written")
    assert here.poll(30)
    assert torch.tensor(here.recv()).allclose(torch.ones(4, 16))
    assert torch.equal(read(), ROWS + 2)
    process.join()
    here.close()
    there.close()
