"""ZeRO-Infinity: what is in files between steps is what offloading to memory has there."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import (
    Checkpointing,
    DiLoCo,
    DropCompute,
    LayerWatch,
    Mesh,
    Precision,
    Sync,
    Trainer,
    Watch,
    connect,
)
from scaledtrain.checkpoint.export import model_state
from scaledtrain.checkpoint.part import CheckpointReader
from scaledtrain.errors import ConfigError
from scaledtrain.parallel import DeepSpeed
from scaledtrain.parallel.deepspeed import swapping
from tests.ranks import run_ranks

pytestmark = [
    # The first run on a host compiles DeepSpeed's operator, which takes minutes of a core.
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
    ),
]

ADAMW = partial(torch.optim.AdamW, lr=1e-3)
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
MASTER = Precision("bf16-true", update="master")
RECIPES: dict[str, tuple[Callable[..., torch.optim.Optimizer], str | Precision]] = {
    "adamw": (ADAMW, "fp32"),
    "sgd": (SGD, "fp32"),
    "bf16-mixed": (ADAMW, "bf16-mixed"),
    "bf16-true": (ADAMW, MASTER),
}
# Two sub-groups with a matrix each, of 1.03 MiB on each of two ranks, and one below 1 MiB.
SUB_GROUPS = {"stage": 3, "sub_group_size": 270_000}
PIPELINED = {"pipeline_read": True, "pipeline_write": True}
FILES = {
    "memory": {"offload_optimizer": {"device": "cpu"}},
    "optimizer": {"offload_optimizer": {"device": "nvme"}},
    "pipelined": {
        "offload_optimizer": {"device": "nvme", **PIPELINED},
        "offload_param": {"device": "cpu"},
    },
    "everything": {
        "offload_optimizer": {"device": "nvme"},
        "offload_param": {"device": "nvme", "max_in_cpu": 0},
    },
    "parameters": {"offload_param": {"device": "nvme", "max_in_cpu": 0}},
}


COMPARED = {
    "adamw": FILES,
    "sgd": ("memory", "everything"),
    "bf16-mixed": ("memory", "everything"),
    "bf16-true": ("memory", "pipelined", "everything"),
}


def net(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(3, 600), nn.Tanh(), nn.Linear(600, 900), nn.Tanh(), nn.Linear(900, 600)),
        *(nn.Linear(600, 900), nn.Linear(900, 2)),
    )
    model[5].requires_grad_(False)
    return model


def data(n: int) -> TensorDataset:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, (x.sum(1) > 0).long())


def step_lr(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def trainer(link: Any, seed: int = 1, **options: Any) -> Trainer:
    kept = {"optimizer": ADAMW, "strategy": Sync(), "console": False, "link": link, **options}
    return Trainer(net(seed), F.cross_entropy, **kept)


def values(t: Trainer) -> Tensor:
    """All parameters, on the first rank; none on the second."""
    return torch.cat([torch.empty(0), *(v.reshape(-1) for v in t.full_state_dict().values())])


def run(link: Any, recipe: str, local: int, **options: Any) -> tuple[Tensor, float, float]:
    """Accumulation, clipping, a schedule, an uneven end: steps of 16, 16 and 6 samples, twice."""
    optimizer, precision = RECIPES[recipe]
    with trainer(
        link,
        optimizer=optimizer,
        precision=precision,
        gradient_accumulation_steps=2,
        max_grad_norm=0.3,
        lr_scheduler=step_lr,
        **options,
    ) as t:
        loader = DataLoader(data(38), batch_size=local, shuffle=True)
        result = t.fit(loader, max_epochs=2, eval=DataLoader(data(9), batch_size=2))
        assert result.step == 6
        return values(t), result.evaluation["loss"], float(t.replica.gradient_norm())


def saved(link: Any, folder: Path, engine: DeepSpeed, other: DeepSpeed) -> dict[str, Tensor]:
    """Parameters after 8 steps: at once, and of runs that are resumed after 3."""

    def fit(name: str, steps: int, engine: DeepSpeed, seed: int = 1, **options: Any) -> Tensor:
        with (
            patch("os.fsync"),
            trainer(
                link,
                seed,
                mesh=Mesh(shard=2),
                engine=engine,
                lr_scheduler=step_lr,
                run_dir=folder / name,
                checkpointing=Checkpointing(every_steps=3),
                **{"resume": "auto", **options},
            ) as t,
        ):
            t.fit(DataLoader(data(32), batch_size=4, shuffle=True), max_steps=steps)
            return values(t)

    straight = fit("straight", 8, engine)
    fit("resumed", 3, engine)
    third = folder / "resumed" / "checkpoints" / f"step-{3:09d}"
    in_memory = fit("in-memory", 8, other, 2, resume=third)
    return {
        "straight": straight,
        "in memory": in_memory,
        "resumed": fit("resumed", 8, engine, 2),
    }


def watched(link: Any, reaction: Any, engine: DeepSpeed) -> Tensor:
    """Of two epochs of four steps, in each of which a number is NaN, in the second step."""
    spoiled = data(32)
    spoiled.tensors[0][9] = float("nan")
    watch = Watch(on_nonfinite=reaction, copy_every=1)
    with trainer(link, mesh=Mesh(shard=2), engine=engine, watch=watch) as t:
        t.fit(DataLoader(spoiled, batch_size=4), max_epochs=2)
        return values(t)


def refused(link: Any, engine: DeepSpeed, **options: Any) -> str:
    with (
        pytest.raises(ConfigError) as caught,
        trainer(link, mesh=Mesh(shard=2), engine=engine, **options) as t,
    ):
        t.fit(DataLoader(data(8), batch_size=4), max_steps=1)
    return str(caught.value)


def meet(link: Any) -> None:
    """Go on when the other rank is here, too."""
    link.group.all_reduce([torch.zeros(1)], "sum").wait()


def two_jobs(link: Any, disk: Path, engine: DeepSpeed) -> tuple[list[str], bool]:
    """Names of the files of two at once, and whether each has its own values."""
    loader = DataLoader(data(32), batch_size=4)
    with trainer(link, mesh=Mesh(shard=2), engine=engine) as alone:
        alone.fit(loader, max_steps=2)
        expected = values(alone)
    with trainer(link, mesh=Mesh(shard=2), engine=engine) as one:
        one.fit(loader, max_steps=1)
        with trainer(link, 2, mesh=Mesh(shard=2), engine=engine) as other:
            other.fit(loader, max_steps=1)
            meet(link)
            found = sorted(path.name for path in disk.rglob("*.swp"))
            meet(link)
        one.fit(loader, max_steps=2)
        return found, torch.equal(values(one), expected)


def left_by_a_refusal(link: Any, disk: Path, engine: DeepSpeed) -> list[str]:
    """Of what is refused when the files are there already."""
    drop = DropCompute(threshold_seconds=1.0)
    with pytest.raises(ConfigError, match="drop_compute lets each rank") as caught:
        trainer(link, mesh=Mesh(shard=2), engine=engine, drop_compute=drop)
    meet(link)
    found = [path.name for path in disk.iterdir()]
    meet(link)
    del caught  # which has kept alive all that was made
    return found


class Weights(nn.Module):
    """Seven large matrices, of which three are in a list."""

    def __init__(self) -> None:
        super().__init__()
        for n in range(4):
            setattr(self, f"weight_{n}", nn.Parameter(torch.randn(740, 740) / 27))
        self.others = nn.ParameterList(torch.randn(740, 740) / 27 for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for n in range(4):
            x = x @ getattr(self, f"weight_{n}")
        for weight in self.others:
            x = x @ weight
        return x


def deep_net() -> nn.Module:
    """15 matrices of 740 x 740 x 4 / 2 bytes on each of two ranks, which is more than 1 MiB."""
    torch.manual_seed(1)
    layers = [nn.Linear(740, 740) for _ in range(8)]
    return nn.Sequential(nn.Linear(3, 740), *layers, Weights(), nn.Linear(740, 2))


def many(link: Any, folder: Path, engine: DeepSpeed) -> list[Tensor]:
    """Parameters after 4 steps: at once, and of a run that is resumed after 2."""

    def fit(name: str, steps: int) -> Tensor:
        made = Trainer(
            deep_net(),
            F.cross_entropy,
            ADAMW,
            console=False,
            link=link,
            mesh=Mesh(shard=2),
            engine=engine,
            run_dir=folder / name,
            checkpointing=Checkpointing(every_steps=2),
            resume="auto",
        )
        with patch("os.fsync"), made as t:
            evaluated = DataLoader(data(8), batch_size=4)
            t.fit(DataLoader(data(16), batch_size=4), max_steps=steps, eval=evaluated)
            return values(t)

    straight = fit("straight", 4)
    fit("resumed", 2)
    return [straight, fit("resumed", 4)]


# Words of what a host may not have.
LACKING = ("async_io", "O_DIRECT", "page-locked", "needs Linux")


def one_replica(folder: Path) -> dict[str, Any] | str:
    disk = folder / "disk"
    engines = {
        name: DeepSpeed(
            config=folder / f"{name}.json", nvme_path=None if name == "memory" else disk
        )
        for name in FILES
    }
    with connect(transport="torch", timeout_seconds=60) as link:
        mesh = Mesh(shard=2)
        try:
            with trainer(link, mesh=mesh, engine=engines["everything"]):
                pass
        except ConfigError as error:
            if any(word in str(error) for word in LACKING):
                return str(error)
            raise
        memory, everything = engines["memory"], engines["everything"]
        told = {
            "trained": {
                (recipe, name): run(link, recipe, 4, mesh=mesh, engine=engine)
                for recipe in RECIPES
                for name, engine in engines.items()
                if name in COMPARED[recipe]
            },
            "saved": saved(link, folder, everything, memory),
            "watched": {
                reaction: [watched(link, reaction, engine) for engine in (memory, everything)]
                for reaction in ("skip", "rollback")
            },
            "jobs": two_jobs(link, disk, everything),
            "refused": left_by_a_refusal(link, disk, everything),
            "many": [
                many(link, folder / "many-memory", DeepSpeed(zero_stage=3, offload="cpu")),
                many(
                    link,
                    folder / "many-files",
                    DeepSpeed(3, offload="nvme", offload_parameters="nvme", nvme_path=disk),
                ),
            ],
            "diloco": refused(link, engines["optimizer"], strategy=DiLoCo(sync_every=2)),
            "layers": refused(link, engines["optimizer"], callbacks=[LayerWatch()]),
            "sub-groups": refused(
                link,
                DeepSpeed(zero_stage=3, offload="cpu"),
                lr_scheduler=step_lr,
                resume=folder / "straight" / "checkpoints" / f"step-{8:09d}",
            ),
        }
        meet(link)
        return {**told, "left": [path.name for path in disk.iterdir()]}


def alone(folder: Path) -> tuple[list[Any], list[str]]:
    """What one rank trains, and what is left on its disk."""
    disk = folder / "disk"
    engines = [
        DeepSpeed(config=folder / "memory.json"),
        DeepSpeed(config=folder / "everything.json", nvme_path=disk),
    ]
    with connect() as link:
        trained = [run(link, "adamw", 8, engine=engine) for engine in engines]
    return trained, [path.name for path in disk.iterdir()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, Any]]:
    (folder / "disk").mkdir()
    for name, sections in FILES.items():
        content = {"zero_optimization": {**SUB_GROUPS, **sections}}
        (folder / f"{name}.json").write_text(json.dumps(content))
    found = run_ranks(one_replica, 2, folder, timeout_seconds=840)
    if isinstance(found[0], str):
        pytest.skip(found[0])
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_from_files_is_one_from_memory(recipe: str, two_ranks: list[dict[str, Any]]) -> None:
    """Bit for bit, wherever what is."""
    for rank, trained in enumerate(of_rank["trained"] for of_rank in two_ranks):
        expected = trained[recipe, "memory"]
        assert expected[0].numel() == (0 if rank else sum(p.numel() for p in net().parameters()))
        for name in COMPARED[recipe]:
            found = trained[recipe, name]
            assert torch.equal(found[0], expected[0]), name
            assert found[1:] == pytest.approx(expected[1:], rel=1e-6), name


@pytest.mark.parametrize("recipe", ["adamw", "sgd"])
def test_a_step_from_files_is_that_of_one_process(
    recipe: str, two_ranks: list[dict[str, Any]]
) -> None:
    """Sums in another order, as wherever a replica is divided."""
    with connect() as link:
        expected, loss, norm = run(link, recipe, 8)
    found, its_loss, its_norm = two_ranks[0]["trained"][recipe, "everything"]
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0.0)
    assert its_loss == pytest.approx(loss, abs=1e-5)
    assert its_norm == pytest.approx(norm, abs=1e-5)


def test_one_rank_alone_has_all_of_it_in_files(
    folder: Path, two_ranks: list[dict[str, Any]]
) -> None:
    ((expected, found), left), *_ = run_ranks(alone, 1, folder, timeout_seconds=100)
    assert torch.equal(found[0], expected[0])
    assert found[1:] == pytest.approx(expected[1:], rel=1e-6)
    torch.testing.assert_close(
        found[0], two_ranks[0]["trained"]["adamw", "everything"][0], atol=2e-6, rtol=0.0
    )
    assert left == []


def test_a_run_goes_on_from_the_disk(folder: Path, two_ranks: list[dict[str, Any]]) -> None:
    """Bit for bit, in memory as well, although the model had other values, frozen ones, too."""
    first = two_ranks[0]["saved"]
    assert torch.equal(first["resumed"], first["straight"])
    assert torch.equal(first["in memory"], first["straight"])
    path = folder / "straight" / "checkpoints" / f"step-{8:09d}"
    model = net(3)
    model.load_state_dict(model_state(CheckpointReader(path)))
    exported = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert torch.equal(exported, first["straight"])


@pytest.mark.parametrize("reaction", ["skip", "rollback"])
def test_a_bad_gradient_is_forgotten(reaction: str, two_ranks: list[dict[str, Any]]) -> None:
    expected, found = two_ranks[0]["watched"][reaction]
    assert expected.isfinite().all()
    assert torch.equal(found, expected)


def test_two_runs_in_a_folder_have_files_of_their_own_and_leave_none(
    two_ranks: list[dict[str, Any]],
) -> None:
    for of_rank in two_ranks:
        names, equal = of_rank["jobs"]
        # Of each of 2 runs on each of 2 ranks, 2 sub-groups with m and v.
        assert sum(name.startswith("exp_avg") for name in names) == 2 * 2 * 2 * 2
        assert sum("_param" in name for name in names) == 2 * 2 * 3  # one is frozen
        assert not any("gradient" in name for name in names)  # they stay in memory
        assert equal
        assert of_rank["refused"] == of_rank["left"] == []


def test_what_does_not_fit_files_is_refused(two_ranks: list[dict[str, Any]]) -> None:
    for of_rank in two_ranks:
        assert "in 3 sub-groups, but here there are 1" in of_rank["sub-groups"]
        assert "this strategy works on the parameters between updates" in of_rank["diloco"]
        assert "leave layers out" in of_rank["layers"]


def test_a_model_may_have_more_parameters_than_buffers(two_ranks: list[dict[str, Any]]) -> None:
    """Bit for bit, with evaluations between the steps."""
    memory, files = two_ranks[0]["many"]
    assert torch.equal(files[0], memory[0])
    assert torch.equal(files[1], memory[0])
    assert not torch.equal(values_of(deep_net()), memory[0])


def values_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def one_lacks(folder: Path) -> str:
    """The second rank has no folder, and the first compiles for longer than a collective waits."""
    with connect(transport="torch", timeout_seconds=8) as link:
        rank = link.group.rank
        engine = DeepSpeed(zero_stage=3, offload="nvme", nvme_path=folder / f"of-{rank}")
        with (
            patch.object(swapping, "_load_operator", lambda: time.sleep(10 if rank == 0 else 0)),
            pytest.raises(ConfigError) as caught,
        ):
            trainer(link, mesh=Mesh(shard=2), engine=engine)
        return str(caught.value)


def test_what_one_rank_lacks_is_an_error_on_all(tmp_path: Path) -> None:
    (tmp_path / "of-0").mkdir()
    first, second = run_ranks(one_lacks, 2, tmp_path, timeout_seconds=100)
    if any(word in second for word in LACKING if word != "O_DIRECT"):
        pytest.skip(second)
    assert second.startswith(f"engine.nvme_path is {tmp_path / 'of-1'}, which cannot be used")
    assert first == f"rank 1 cannot take part: {second}"
    assert list((tmp_path / "of-0").iterdir()) == []
