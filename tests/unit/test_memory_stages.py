"""The memory of a pipeline's ranks: what they have of a model, and what is under way on each."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scaledtrain import Mesh, Sync, estimate_memory
from scaledtrain.errors import ConfigError
from scaledtrain.memory.budget import SmallestBudget
from scaledtrain.memory.figures import MemoryEstimate
from scaledtrain.parallel import Pipeline
from scaledtrain.recompute import CheckpointEvery, CheckpointPolicy, MemoryBudget
from scaledtrain.recompute.apart import kept_and_peak_bytes
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.policies import Live


def layers(n: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Tanh()) for _ in range(n))
    )


def estimate(
    schedule: str | None, policy: CheckpointPolicy | None = None, **options: Any
) -> MemoryEstimate:
    """Of eight layers on two ranks with stages, or on one with everything."""
    if schedule is not None:
        stages = {"mesh": Mesh(pipe=2), "workers": 2, "pipeline": Pipeline(schedule, 4)}
        options = {**stages, **options}
    batch = torch.zeros(256, 64), torch.zeros(256, 64)
    mse, sgd = nn.functional.mse_loss, partial(torch.optim.SGD, lr=0.1)
    return estimate_memory(layers(8), mse, batch, sgd, activation_checkpointing=policy, **options)


def test_stages_share_a_model_and_keep_what_their_schedule_has_under_way() -> None:
    whole, everything, few = (estimate(name) for name in (None, "GPipe", "1F1B"))
    assert everything.parameters == few.parameters == whole.parameters / 2
    assert len(everything.ranks) == 2
    # All microbatches of half of the model, against 2 or 1 of the 4.
    assert 0.5 * whole.activations < everything.activations < whole.activations
    assert 0.4 * everything.activations < few.activations < 0.7 * everything.activations
    assert len(estimate("1F1B", workers=4, strategy=Sync).ranks) == 4  # of two replicas
    with pytest.raises(ConfigError, match="sharded stages take is not estimated"):
        estimate("1F1B", workers=4, mesh=Mesh(pipe=2, shard=2))


def test_policies_of_stages_and_the_smallest_budget() -> None:
    policies = (None, CheckpointEvery(1), CheckpointEvery(2), SmallestBudget())
    plain, full, pairs, least = (estimate("GPipe", policy) for policy in policies)
    # A layer keeps two tensors, or its input; two layers one input.
    assert plain.kept.total > 1.9 * full.kept.total > 1.9 * pairs.kept.total
    assert full.activations < plain.activations
    assert least.activations <= min(full.activations, pairs.activations)
    assert [full.looks_at_values, least.looks_at_values] == [False, False]  # a search does
    with pytest.raises(ConfigError, match="leave blocks out"):
        estimate("GPipe", CheckpointEvery(1, blocks=["0"]))


def test_the_budget_that_an_error_asks_for_is_enough() -> None:
    """Of 4 microbatches at once: the last one's peak, what the others keep, and messages: each has
    1000 bytes, and 500 are received ahead. The stage has half of what the rank has."""
    model = layers(6)
    x = torch.ones(16, 64)
    live = Live(4, bytes_each=1000, bytes_once=500, share=0.5)

    def install(n_bytes: int) -> Executor:
        return MemoryBudget(n_bytes).install_on_stage(model, list(model), sample, live)

    def sample(call: Callable[..., Any]) -> Tensor:
        return call(x).square().mean()  # type: ignore[no-any-return]

    with pytest.raises(ConfigError, match="are needed for the rank") as refused:
        install(1024)
    enough = int(re.findall(r"(\d+) bytes \(\S+ MiB\) are needed", str(refused.value))[0])
    executor = install(enough)
    assert "4 microbatches at once" in executor.told
    kept, peak = kept_and_peak_bytes(model, sample)
    assert peak + 3 * kept + 4 * 1000 + 500 <= enough / 2
    executor.remove()
    with pytest.raises(ConfigError, match="are needed for the rank"):
        install(enough - 2)


def test_late_gradients_keep_further_versions_of_weights() -> None:
    """Two stages of 110 numbers, 440 bytes; the first of PipeDream is late by one update, so that
    it has the two versions with which batches under way went forward, besides its own; those of
    2BW both."""
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    batch = torch.zeros(4, 10), torch.zeros(4, 10)
    parameters, batches = {}, {}
    for name in ("GPipe", "PipeDream", "PipeDream-2BW"):
        found = estimate_memory(
            model,
            nn.functional.mse_loss,
            batch,
            torch.optim.SGD,
            mesh=Mesh(pipe=2),
            workers=2,
            pipeline=Pipeline(name, 2, split=["1"]),
            microbatches=3,
        )
        parameters[name], batches[name] = found.parameters, found.batch
        assert found.gradients == 440
    assert parameters == {"GPipe": 440, "PipeDream": 3 * 440, "PipeDream-2BW": 3 * 440}
    assert batches == {"GPipe": 3 * 320, "PipeDream": 6 * 320, "PipeDream-2BW": 6 * 320}
