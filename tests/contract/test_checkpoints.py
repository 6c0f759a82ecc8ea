"""A run saved to the disk and resumed, of every strategy, on two replicas."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from scaledtrain import Checkpointing, Trainer, connect
from scaledtrain.checkpoint.folder import saved_steps
from scaledtrain.comm.protocols import Link
from scaledtrain.connection import Transport
from scaledtrain.sim import simulate
from tests.contract.cases import CASES, Case
from tests.contract.test_replicas import REAL, UNEVEN, WORLDS, World
from tests.contract.training import ADAMW, data, flat
from tests.ranks import run_ranks

RANKS = 2
SAMPLES = 4 * 2 * 5 + 2  # 11 batches: 6 steps of two replicas, or 11 of single ones
EPOCHS = 2
AT = 5  # in the first epoch, inside a period of three, after the learning rate's first drop


class Outcome(NamedTuple):
    """What one replica saw of one strategy."""

    straight: Tensor
    resumed: Tensor
    steps: tuple[int, int]
    """At the end: of the straight run, of the resumed one."""
    saved: tuple[int, int]
    """Step of the checkpoint, and after it was resumed."""
    place: tuple[int, int]
    """Epoch and steps in it after it was resumed."""


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)
    )


def trainer(case: Case, link: Link, run_dir: Path, **options: Any) -> Trainer:
    """Everything that a state has to hold: dropout, shuffling, a schedule, a scale of the loss."""
    strategy = case.make(link.group.size)
    return Trainer(
        net(),
        F.cross_entropy,
        ADAMW,
        lr_scheduler=partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[4, 9]),
        strategy=strategy,
        # An overflow makes no update: where they are counted there is none.
        precision="fp32" if strategy.settles_to_save else "fp16-mixed",
        run_dir=run_dir,
        console=False,
        link=link,
        **options,
    )


def loader() -> DataLoader[Any]:
    return DataLoader(data(SAMPLES), batch_size=4, shuffle=True)


def observe(case: Case, link: Link, folder: Path) -> Outcome:
    run_dir, other = folder / case.name, folder / f"{case.name}-resumed"
    saved_often = Checkpointing(every_steps=AT, keep_last=99)
    straight = trainer(case, link, run_dir, checkpointing=saved_often)
    steps = straight.fit(loader(), max_epochs=EPOCHS).step
    straight._release()  # its link goes on
    first = saved_steps(run_dir / "checkpoints")[0]
    if link.group.rank == 0:
        (other / "checkpoints").mkdir(parents=True)
        shutil.copytree(first.path, other / "checkpoints" / first.path.name)
    link.group.all_reduce([torch.zeros(1)]).wait()
    torch.manual_seed(99)
    resumed = trainer(case, link, other, resume="auto")
    saved = (first.step, resumed.step_count)
    place = (resumed.epoch, resumed.steps_in_epoch)
    again = resumed.fit(loader(), max_epochs=EPOCHS).step
    resumed._release()
    return Outcome(flat(straight.model), flat(resumed.model), (steps, again), saved, place)


def every_case(link: Link, folder: Path) -> dict[str, Outcome]:
    with patch("os.fsync"):  # a hundred checkpoints: 10 to 50 ms each time
        return {case.name: observe(case, link, folder) for case in CASES}


def over(transport: Transport, folder: Path) -> dict[str, Outcome]:
    with connect(transport=transport, timeout_seconds=60) as link:
        return every_case(link, folder)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[World, list[dict[str, Outcome]]]:
    folders = {world: tmp_path_factory.mktemp(world) for world in WORLDS}
    real: dict[World, list[dict[str, Outcome]]] = {
        t: run_ranks(over, RANKS, t, folders[t], timeout_seconds=100) for t in REAL
    }
    virtual = simulate(partial(every_case, folder=folders["simulated"]), UNEVEN, RANKS).results
    return {**real, "simulated": virtual}


def in_lockstep(case: Case) -> bool:
    return not case.make(RANKS).settles_to_save


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    case: Case, world: World, outcomes: dict[World, list[dict[str, Outcome]]]
) -> None:
    zero, one = (rank[case.name] for rank in outcomes[world])
    for outcome in (zero, one):
        assert torch.equal(outcome.resumed, zero.resumed)
        if in_lockstep(case):
            assert torch.equal(outcome.resumed, outcome.straight)
            assert outcome.saved == (AT, AT)
            assert outcome.place == (0, AT)
            assert outcome.steps == (EPOCHS * 6, EPOCHS * 6)
    assert zero.saved[0] == zero.saved[1] >= AT


EVERY_GRADIENT_ONCE = ["server_asynchronous", "server_stale_synchronous", "server_shards"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", EVERY_GRADIENT_ONCE)
def test_no_gradient_is_lost_nor_made_twice(
    name: str, world: World, outcomes: dict[World, list[dict[str, Outcome]]]
) -> None:
    """11 batches twice make 22 updates, also if the run was saved and resumed among them.

    Of the first epoch's batches the first replica has 6, of the second's 5; the other one 5 and 6.
    """
    zero, one = (rank[name] for rank in outcomes[world])
    assert zero.steps == one.steps == (22, 22)
    # What the server had at the checkpoint is what the workers had given it.
    made = [0, 6, 11][zero.place[0]] + zero.place[1] + [0, 5, 11][one.place[0]] + one.place[1]
    assert made == zero.saved[0]
