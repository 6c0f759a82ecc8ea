"""Where a model is cut: the smallest slowest stage, against all cuts that there are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from scaledtrain import Precision
from scaledtrain.comm.local import LocalGroup
from scaledtrain.errors import ConfigError
from scaledtrain.models import GPT, next_token_loss
from scaledtrain.parallel import Pipeline
from scaledtrain.parallel.engine import Recipe
from scaledtrain.parallel.pipeline import (
    Cut,
    PartCost,
    describe_cut,
    find_parts,
    given_cut,
    measure_parts,
    partition,
    pipeline,
)

SECONDS = st.integers(0, 9).map(float)
BYTES = st.integers(0, 9)
COSTS = st.lists(st.builds(PartCost, SECONDS, SECONDS, BYTES, BYTES, BYTES, BYTES), min_size=1)


def cuts(n_parts: int, n_stages: int) -> Iterator[Cut]:
    for inner in combinations(range(1, n_parts), n_stages - 1):
        ends = (0, *inner, n_parts)
        yield Cut(tuple(b - a for a, b in pairwise(ends)))


def slowest(costs: list[PartCost], cut: Cut, bandwidth: float) -> float:
    """Of a stage's computing, and of sending an output and its gradient."""
    times = [sum(costs[p].seconds for p in cut.parts_of(stage)) for stage in range(len(cut))]
    ends = [cut.parts_of(stage).stop - 1 for stage in range(len(cut) - 1)]
    return max(times + [2 * costs[end].sent_bytes / bandwidth for end in ends])


def most_bytes(costs: list[PartCost], cut: Cut, live: list[int]) -> int:
    """State, input and activations of each live microbatch, and what the one at work takes."""
    found = []
    for stage, microbatches in enumerate(live):
        own = [costs[part] for part in cut.parts_of(stage)]
        received = costs[cut.parts_of(stage).start - 1].sent_bytes if stage else 0
        kept = received + sum(cost.kept_bytes for cost in own)
        state = sum(cost.state_bytes for cost in own)
        found.append(state + microbatches * kept + max(cost.working_bytes for cost in own))
    return max(found)


@given(COSTS.filter(lambda costs: len(costs) < 9), st.data())
def test_no_cut_is_better(costs: list[PartCost], data: st.DataObject) -> None:
    n_stages = data.draw(st.integers(1, len(costs)))
    live = data.draw(st.lists(st.integers(1, 4), min_size=n_stages, max_size=n_stages))
    bandwidth = data.draw(st.sampled_from([0.5, 2.0, math.inf]))
    limit = data.draw(st.integers(0, 150))
    find = partial(partition, bandwidth=bandwidth, memory_bytes=limit, live_microbatches=live)
    fitting = [c for c in cuts(len(costs), n_stages) if most_bytes(costs, c, live) <= limit]
    if not fitting:
        least = min(most_bytes(costs, cut, live) for cut in cuts(len(costs), n_stages))
        with pytest.raises(ConfigError, match=f"the least is {least}, with"):
            find(costs, n_stages)
        return
    found = find(costs, n_stages)
    assert found in fitting
    best = min(slowest(costs, cut, bandwidth) for cut in fitting)
    assert slowest(costs, found, bandwidth) == best


BLOCK = PartCost(1.0, 2.0, kept_bytes=10, sent_bytes=6)


def test_a_big_head_and_an_embedding_leave_fewer_blocks_to_their_stages() -> None:
    # Of 3 + 8 * 3 + 9 = 36 s a quarter is 9: an embedding and 2 blocks, 3, 3, and the head alone.
    costs = [PartCost(1.0, 2.0), *[BLOCK] * 8, PartCost(3.0, 6.0)]
    cut = partition(costs, 4)
    assert cut.counts == (3, 3, 3, 1)
    assert describe_cut(cut, costs).endswith(
        "stage 3: part 9, 9.000 s, 25 % of the time\nslowest stage: 1.00 times the mean"
    )


def test_the_others_are_even_where_one_part_is_the_slowest() -> None:
    # The head's 30 s are the slowest stage, however the blocks are cut: 12 and 12, not 3 and 21.
    assert partition([*[BLOCK] * 8, PartCost(10.0, 20.0)], 3).counts == (4, 4, 1)


def test_early_stages_of_1f1b_keep_more_microbatches_and_get_fewer_blocks() -> None:
    # Stage i of 3 keeps 3 - i microbatches; 8 blocks, 10 bytes each, and 6 of an input but in the
    # first. (3, 3, 2): 3 * 30 = 90, 2 * (6 + 30) = 72, 6 + 20 = 26. In 85 bytes the first has 2
    # blocks: 60, and the others 3 each: 72 and 36.
    find = partial(partition, [BLOCK] * 8, 3, live_microbatches=[3, 2, 1])
    assert sorted(find(memory_bytes=90).counts) == [2, 3, 3]
    assert find(memory_bytes=85).counts == (2, 3, 3)
    # GPipe keeps all 4 in each: 4 * 30 = 120, and 4 * 36 = 144 in the others.
    with pytest.raises(ConfigError, match="no cut into 3 stages fits into 119 bytes"):
        partition([BLOCK] * 8, 3, live_microbatches=[4] * 3, memory_bytes=119)


def test_a_slow_link_is_where_little_is_sent() -> None:
    # Cut evenly, 100 bytes there and back take 2 * 100 / 20 = 10 s, longer than a stage of 9 s.
    costs = [PartCost(1, 2, sent_bytes=n) for n in (100, 100, 4, 100)]
    assert partition(costs, 2).counts == (2, 2)
    assert partition(costs, 2, bandwidth=20.0).counts == (3, 1)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"5 stages of a model with 4 parts.*at most 4 stages"):
        partition([BLOCK] * 4, 5)
    with pytest.raises(ConfigError, match="2 numbers for 3 stages"):
        partition([BLOCK] * 4, 3, live_microbatches=[1, 1])
    with pytest.raises(ConfigError, match="each stage needs at least one"):
        Cut((2, 0))
    needs = PartCost(1.0, 2.0, kept_bytes=8)
    with pytest.raises(ConfigError, match=r"into 8 bytes.* least is 16.*computed again, which is"):
        partition([needs] * 4, 2, memory_bytes=8)


NAMES = ["embedding", "blocks.0", "blocks.1", "head"]


def test_a_users_split_points() -> None:
    assert given_cut(NAMES, ["blocks.1", "head"], 3).counts == (2, 1, 1)
    assert given_cut(NAMES, [1, 3], 2).counts == (1, 3)
    assert given_cut(NAMES, [], 1).counts == (4,)


@pytest.mark.parametrize(
    ("points", "told"),
    [
        (["blocks.7"], "'blocks.7' is no part of the model; a stage can begin with blocks.0, blo"),
        (["head", "blocks.1"], "in order"),
        (["embedding", "head"], "in order"),
        (["head"], "2 in all"),
        (["blocks.0", 2], "should name the parts"),
        ([2, 2], "2 stages has, 4 together; there are to be 3 stages, of 4 parts"),
        ([2, 1, 2], "5 together"),
        ([4, 0, 0], "each stage needs at least one"),
    ],
)
def test_split_points_that_are_none(points: list[str] | list[int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        given_cut(NAMES, points, 3)


def test_a_gpt_with_a_big_vocabulary() -> None:
    """Its head costs as much as several blocks: here by operations, not by time."""
    vocab, time, n_layers, d = 2048, 16, 8, 64
    parts = find_parts(GPT(vocab, time, n_layers, 2, d))
    # Of a token: two for each weight, and for each key and value that attention looks at.
    block, head = 2 * 12 * d**2 + 4 * time * d, 2 * d * vocab
    assert head / block == 2.56
    operations = [0, *[block] * n_layers, head]
    cut = partition([PartCost(n, 2 * n) for n in operations], 3)
    # 10.56 blocks are 3.52 for each stage. Some stage has 4; the last one has 1 and the head, 3.56,
    # and the embedding's 3: the squares of 3, 4, 3.56 are less than those of 4, 4, 2.56.
    assert cut.counts == (1 + 3, 4, 1 + 1)
    assert [parts.names[cut.parts_of(stage).start] for stage in (1, 2)] == ["blocks.3", "blocks.7"]


def test_measured_costs() -> None:
    batch, vocab, time, d = 3, 32, 8, 16
    model = GPT(vocab_size=vocab, sequence_length=time, n_layers=2, n_heads=2, d_model=d)
    parts = find_parts(model)
    tokens = torch.randint(0, vocab, (batch, time))
    before = torch.get_rng_state()
    costs = measure_parts(
        parts, (tokens, tokens), next_token_loss, partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    activation = batch * time * d * 4
    assert [cost.sent_bytes for cost in costs] == [activation] * 3 + [0]
    # Parameter, gradient and momentum.
    block = 12 * d**2 + 13 * d
    numbers = [vocab * d + time * d, block, block, 2 * d + vocab * d]
    assert [cost.state_bytes for cost in costs] == [3 * 4 * n for n in numbers]
    assert costs[1] == costs[2]  # of one kind, measured once
    assert all(cost.kept_bytes >= activation for cost in costs[:3])
    # Of the logits the loss keeps their logarithms; on the way there are two such.
    assert costs[3].kept_bytes >= batch * time * vocab * 4
    assert all(cost.forward_seconds > 0 and cost.backward_seconds > 0 for cost in costs)


def test_what_autocast_sends_is_measured_in_its_format() -> None:
    parts = find_parts(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    batch = torch.randn(16, 4), torch.randn(16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        costs = measure_parts(parts, batch, nn.functional.mse_loss)
    assert costs[0].sent_bytes == 16 * 8 * 2


def test_parts_are_measured_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU: a loader gives batches on the CPU."""
    given_batches: list[Any] = []

    def measure(parts: Any, batch: Any, *_: Any) -> list[PartCost]:
        given_batches.append(batch)
        return [PartCost(1.0, 2.0)] * len(parts)

    monkeypatch.setattr(pipeline, "measure_parts", measure)
    device = torch.device("meta")
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(device)
    recipe = Recipe(Precision(), torch.optim.SGD, True, loss_fn=nn.functional.mse_loss)
    example = torch.zeros(8, 4), torch.zeros(8, 2)
    asked = Pipeline(n_microbatches=4, example=example)
    asked.own_stages(model, LocalGroup(), recipe, device, LocalGroup())
    ((inputs, targets),) = given_batches
    assert (inputs.device, inputs.shape) == (device, (2, 4))
    assert (targets.device, targets.shape) == (device, (2, 2))
