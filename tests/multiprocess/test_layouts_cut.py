"""Where a model is cut into stages: alike in all replicas and shards, and in a run that goes on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from scaledtrain import Checkpointing, LocalSGD, Mesh, Precision, Sync, Trainer, connect
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
        recipe = Recipe(Precision(), SGD, True, loss_fn=nn.functional.mse_loss)
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


class Gone(NamedTuple):
    held: list[str]
    parameters: dict[str, Tensor]
    told: str


def go_on(folder: Path, strategy: str, steps: Sequence[int], slow: Sequence[int]) -> Gone:
    """Fits up to so many steps; the Trainer of each takes another part for slow."""
    data = [(torch.full((4, 4), i / 9), torch.full((4, 4), -i / 9)) for i in range(4)]
    told = io.StringIO()
    with connect(transport="torch", timeout_seconds=60) as link, redirect_stderr(told):
        for last, part in zip(steps, slow, strict=True):
            torch.manual_seed(1)
            layers = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3)]
            costs = [PartCost(5.0 if i == part else 1.0, 0.0) for i in range(4)]
            with (
                patch.object(pipelines, "measure_parts", lambda *_, costs=costs: costs),
                Trainer(
                    nn.Sequential(*layers, nn.Linear(4, 4)),
                    nn.functional.mse_loss,
                    partial(torch.optim.SGD, lr=0.1, momentum=0.9),
                    strategy=Sync() if strategy == "sync" else LocalSGD(sync_every=3),
                    mesh=Mesh(pipe=2),
                    pipeline=Pipeline("1F1B", n_microbatches=2, example=data[0]),
                    checkpointing=Checkpointing(every_steps=100),
                    resume="auto",
                    run_dir=folder,
                    link=link,
                ) as trainer,
            ):
                trainer.fit(data, max_steps=last)
                parameters = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        return Gone(list(parameters), parameters, told.getvalue())


@pytest.mark.parametrize("strategy", ["sync", "local_sgd"])
def test_a_run_goes_on_with_the_cut_that_it_had_whatever_is_measured(
    strategy: str, tmp_path: Path
) -> None:
    """Where part 0 is slow, it is a stage by itself; where part 3 is, that is. Dropout draws from
    the generators of ranks, which another cut could not take over."""
    expected = run_ranks(go_on, 2, tmp_path / "whole", strategy, [5], [0], timeout_seconds=60)
    found = run_ranks(go_on, 2, tmp_path / "parts", strategy, [2, 5], [0, 3], timeout_seconds=60)
    assert expected[0].held == found[0].held == ["0.0.weight", "0.0.bias"]
    for got, wanted in zip(found, expected, strict=True):
        for name, value in wanted.parameters.items():
            assert torch.equal(got.parameters[name], value), name
    assert "stages have [1, 3] parts, as they had before" in found[0].told
