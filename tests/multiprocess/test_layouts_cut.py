"""Where a model is cut into stages: alike in all replicas and shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from scaledtrain import Mesh, Precision, connect
from scaledtrain.parallel import Pipeline, lay_out
from scaledtrain.parallel.engine import Recipe
from scaledtrain.parallel.pipeline import pipeline as pipelines
from scaledtrain.parallel.pipeline.costs import PartCost
from tests.ranks import run_ranks

SGD = partial(torch.optim.SGD, lr=0.1)
TIMED = {0: [1, 1, 1, 3], 1: [3, 1, 1, 1], 2: [1, 1, 1, 1], 3: [1, 3, 1, 1]}  # by rank


def held(mesh: Mesh, example: Any) -> list[str]:
    """Names of what a rank has, where each rank takes other parts for slow."""
    with connect(transport="torch", timeout_seconds=60) as link:
        costs = [PartCost(float(seconds), 0.0) for seconds in TIMED[link.group.rank]]
        model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
        recipe = Recipe(Precision(), SGD, loss_fn=nn.functional.mse_loss)
        pipeline = Pipeline("1F1B", n_microbatches=2, example=example)
        with patch.object(pipelines, "measure_parts", lambda *_: costs):
            layout = lay_out(model, link, mesh, recipe, pipeline=pipeline)
        return [name for name, _ in layout.named_parameters()]


@pytest.mark.parametrize("mesh", [Mesh(pipe=2), Mesh(pipe=2, shard=2)])
def test_all_replicas_and_shards_are_cut_alike_whatever_their_ranks_measure(mesh: Mesh) -> None:
    """Rank 0 of the job says 1, 1, 1 and 3 s: three parts, and the last one."""
    example = torch.zeros(4, 4), torch.zeros(4, 4)
    first: Sequence[str] = ["0.weight", "1.weight", "2.weight"]
    found = run_ranks(held, 4, mesh, example, timeout_seconds=60)
    ranks_of = [0, 1, 0, 1] if mesh.shard == 1 else [0, 0, 1, 1]  # shards are neighbours
    assert found == [[first, ["3.weight"]][stage] for stage in ranks_of]
