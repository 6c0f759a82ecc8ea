"""DeepSpeed as the engine of replicas: what it computes is what plain replicas do."""

from __future__ import annotations

import importlib.util
import json
import os
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
    LocalSGD,
    Mesh,
    ParameterServer,
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
from scaledtrain.strategies import Gossip, Strategy
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.timeout(300),  # each rank imports DeepSpeed, which takes seconds of a core
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
    ),
]

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
ADAMW = partial(torch.optim.AdamW, lr=0.01)
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "sync": Sync,
    "local_sgd": lambda: LocalSGD(sync_every=2),
    "diloco": lambda: DiLoCo(sync_every=2),
    "server": ParameterServer,
    "gossip": Gossip,
}


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))


def data(n: int) -> TensorDataset:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, (x.sum(1) > 0).long())


def large_net(seed: int) -> nn.Module:
    """With 120,000 weights in one tensor, which stage 3 divides; those below 100,000 stay whole."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4000), nn.Tanh(), nn.Linear(4000, 30), nn.Linear(30, 2))
    model[3].weight.requires_grad_(False)
    return model


def trainer(link: Any, strategy: str, model: nn.Module | None = None, **options: Any) -> Trainer:
    make = STRATEGIES[strategy]
    kept = {"optimizer": ADAMW, "strategy": make(), "console": False, "link": link, **options}
    return Trainer(model or net(), F.cross_entropy, **kept)


def whole(model: nn.Module) -> Tensor:
    """All parameters; with stage 3 they are collected from the ranks."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return whole_here(model)
    return whole_here(model)


def whole_here(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().reshape(-1).clone() for p in model.parameters()])


def step_lr(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def run(
    link: Any, strategy: str, local: int, samples: int = 38, **options: Any
) -> tuple[Tensor, float, float, int]:
    with trainer(
        link,
        strategy,
        gradient_accumulation_steps=2,
        max_grad_norm=0.3,
        log_every=1,
        lr_scheduler=step_lr,
        **options,
    ) as t:
        # 38 samples: global batches of 16, 16 and 6; the last lacks some on every rank.
        loader = DataLoader(data(samples), batch_size=local, shuffle=True)
        result = t.fit(loader, max_epochs=2, eval=DataLoader(data(9), batch_size=2))
        norm = float(t.replica.gradient_norm())
        return whole(t.model), result.evaluation.get("loss", 0.0), norm, result.step


ENGINES = [
    DeepSpeed(zero_stage=1),
    DeepSpeed(zero_stage=2),
    DeepSpeed(zero_stage=2, offload="cpu"),
    DeepSpeed(zero_stage=3),
    DeepSpeed(zero_stage=3, offload="cpu", offload_parameters=True),
]
OFFLOADING = [engine for engine in ENGINES if engine.offloads]


TOLERANCES = {"fp32": 1e-6, "bf16-mixed": 5e-3}


def one_replica(folder: str) -> dict[str, Any]:
    """All that is asked of two ranks with one replica, which so import DeepSpeed once."""
    with connect(transport="torch", timeout_seconds=60) as link:
        options = {"local": 4, "mesh": Mesh(shard=2)}
        trained = {
            precision: [
                run(link, "sync", precision=precision, engine=engine, **options)
                for engine in ENGINES
            ]
            for precision in TOLERANCES
        }
        return {
            "trained": trained,
            "details": details(link, folder),
            "saved": {
                stage: saved(
                    link, Path(folder), str(stage), Mesh(shard=2), DeepSpeed(zero_stage=stage)
                )
                for stage in (2, 3)
            },
            "renamed": renamed(link, Path(folder)),
            "renamed on disk": [
                saved(link, Path(folder), name, Mesh(shard=2), engine, unusual_net)
                for name, engine in {
                    "renamed-2": DeepSpeed(zero_stage=2),
                    "renamed-3": DeepSpeed(config=f"{folder}/divided.json"),
                }.items()
            ],
            "borders": other_borders(link, Path(folder)),
            "watched": [
                watched(link, 4, reaction, mesh=Mesh(shard=2), engine=engine)
                for reaction in ("skip", "rollback")
                for engine in ENGINES
            ],
            "steep": [steep(link, 4, mesh=Mesh(shard=2), engine=engine) for engine in ENGINES],
            "sometimes": [
                sometimes(link, 1, mesh=Mesh(shard=2), engine=engine) for engine in ENGINES
            ],
            "gpt2": [gpt2(link, mesh=Mesh(shard=2), engine=engine) for engine in ENGINES],
        }


def steep_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return 100 * F.cross_entropy(outputs, targets)


def steep(link: Any, local: int, **options: Any) -> Tensor:
    sgd = partial(torch.optim.SGD, lr=1e-3)
    with Trainer(net(), steep_loss, sgd, console=False, link=link, **options) as t:
        t.fit(DataLoader(data(16), batch_size=local), max_steps=2)
        return whole(t.model)


class Kernel(nn.Linear):
    """Its weight is saved with its dimensions exchanged, by another name."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "kernel"] = destination.pop(prefix + "weight").T.contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        kernel = state_dict.pop(prefix + "kernel")
        assert kernel.shape == self.weight.T.shape
        state_dict[prefix + "weight"] = kernel.T
        super()._load_from_state_dict(state_dict, prefix, *others)


def double(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook: saves a parameter as it is there, and as the module has it, in float64."""
    assert state[prefix + "weight"].shape == (2, 16)
    state[prefix + "weight"] = state[prefix + "weight"].double()
    state[prefix + "twice"] = 2 * module.weight.detach().double()


def unusual_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(Kernel(3, 16), nn.Tanh(), nn.Linear(16, 2))
    model[2].register_state_dict_post_hook(double)
    model[2].register_load_state_dict_pre_hook(lambda _, state, *__: state.pop("2.twice", None))
    return model


def renamed(link: Any, folder: Path) -> dict[str, Any]:
    """State dicts of a model that makes its own, straight and resumed, and what is in memory."""
    options = {"mesh": Mesh(shard=2), "engine": DeepSpeed(config=folder / "divided.json")}
    loader = DataLoader(data(32), batch_size=4, shuffle=True)

    def at_the_end(t: Trainer) -> tuple[dict[str, Any], Tensor]:
        t.fit(loader, max_steps=4)
        return t.full_state_dict(), whole(t.model)

    with trainer(link, "sync", unusual_net(1), **options) as t:
        t.fit(loader, max_steps=2)
        state = t.state_dict()
        straight = at_the_end(t)
    with trainer(link, "sync", unusual_net(2), **options) as t:
        t.load_state_dict(state)
        return {"straight": straight, "resumed": at_the_end(t)}


def other_borders(link: Any, folder: Path) -> list[str]:
    """What is said to a state of as many sub-groups with other borders, or of other parameters."""
    told = []

    def with_borders(name: str, model: nn.Module | None = None) -> Trainer:
        engine = DeepSpeed(config=folder / f"{name}.json")
        return trainer(link, "sync", model, mesh=Mesh(shard=2), engine=engine)

    with with_borders("early") as t:
        t.fit(DataLoader(data(32), batch_size=4), max_steps=1)
        state = t.state_dict()
    frozen = net()
    frozen[2].bias.requires_grad_(False)
    for name, model in (("late", None), ("early", frozen)):
        with with_borders(name, model) as t, pytest.raises(ConfigError) as caught:
            t.load_state_dict(state)
        told.append(str(caught.value))
    return told


def gpt2(link: Any, **options: Any) -> tuple[dict[str, Tensor], int]:
    """Of Hugging Face, with its own loss; the embedding is the head, too."""
    if not HAS_TRANSFORMERS:
        return {}, 0
    from tests.multiprocess.test_layouts_huggingface import batches, make

    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    with Trainer(make("gpt2", 2), None, sgd, console=False, link=link, **options) as t:
        result = t.fit(batches(), max_epochs=2)
        return t.full_state_dict(), result.step


def watched(link: Any, local: int, reaction: Any, **options: Any) -> tuple[Tensor, int]:
    """Of two epochs of four steps, in the second of which a number is NaN."""
    spoiled = data(32)
    spoiled.tensors[0][9] = float("nan")
    watch = Watch(on_nonfinite=reaction, copy_every=1)
    with trainer(link, "sync", watch=watch, max_grad_norm=0.3, **options) as t:
        result = t.fit(DataLoader(spoiled, batch_size=local), max_epochs=2)
        return whole(t.model), result.step


def saved(
    link: Any,
    folder: Path,
    case: str,
    mesh: Mesh,
    engine: DeepSpeed,
    make: Callable[[int], nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Parameters after 8 steps: at once, and of a run that is resumed after 3."""

    def fit(name: str, steps: int, seed: int = 1) -> Tensor:
        with (
            patch("os.fsync"),
            trainer(
                link,
                "sync",
                (make or large_net)(seed),
                mesh=mesh,
                engine=engine,
                lr_scheduler=step_lr,
                run_dir=folder / name,
                checkpointing=Checkpointing(every_steps=3),
                resume="auto",
            ) as t,
        ):
            t.fit(DataLoader(data(32), batch_size=4, shuffle=True), max_steps=steps)
            return whole(t.model)

    straight = fit(f"straight-{case}", 8)
    fit(f"resumed-{case}", 3)
    return {"straight": straight, "resumed": fit(f"resumed-{case}", 8, seed=2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[dict[str, Any]]:
    for name, content in FILES.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return run_ranks(one_replica, 2, str(folder), timeout_seconds=280)


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
def test_a_hugging_face_model_is_trained_as_a_plain_one(two_ranks: list[dict[str, Any]]) -> None:
    """Five batches in steps of two: the last step of an epoch has one batch.

    float32 sums in another order, as above, through two layers and six steps.
    """
    with connect() as link:
        expected, _ = gpt2(link, gradient_accumulation_steps=2)
    first, second = (of_rank["gpt2"] for of_rank in two_ranks)
    assert [found for found, _ in second] == [{}] * len(ENGINES)
    for found, step in first:
        assert step == 6
        assert list(found) == list(expected)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=0.0, msg=name)


def test_a_gradient_is_clipped_only_if_that_is_said(two_ranks: list[dict[str, Any]]) -> None:
    with connect() as link:
        expected = steep(link, 8)
    # Gradients of norm 1 would go 2 steps x 0.001.
    assert (expected - whole(net())).norm() > 0.02
    for of_rank in two_ranks:
        for found in of_rank["steep"]:
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)


def test_what_a_batch_does_not_use_has_no_gradient(two_ranks: list[dict[str, Any]]) -> None:
    """Neither the last step's, nor, with accumulation, none where an earlier microbatch has one."""
    with connect() as link:
        expected = sometimes(link, 2)
    for of_rank in two_ranks:
        for found in of_rank["sometimes"]:
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("reaction", ["skip", "rollback"])
def test_a_bad_gradient_is_forgotten(reaction: str, two_ranks: list[dict[str, Any]]) -> None:
    """By what takes the next ones, too; as a plain run does it."""
    with connect() as link:
        expected, step = watched(link, 8, reaction)
    assert expected.isfinite().all()
    place = len(ENGINES) * (reaction == "rollback")
    for of_rank in two_ranks:
        for found, its_step in of_rank["watched"][place : place + len(ENGINES)]:
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.0)
            assert its_step == step


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_from_the_disk_with_each_ranks_own_state(
    stage: int, folder: Path, two_ranks: list[dict[str, Any]]
) -> None:
    """Bit for bit, although the model that is resumed had other values, a frozen tensor's too."""
    for of_rank in two_ranks:
        told = of_rank["saved"][stage]
        assert torch.equal(told["resumed"], told["straight"])
    path = folder / f"straight-{stage}" / "checkpoints" / f"step-{8:09d}"
    exported = model_state(CheckpointReader(path))
    model = large_net(3)
    model.load_state_dict(exported)
    assert torch.equal(whole(model), two_ranks[0]["saved"][stage]["straight"])
    with connect() as link, pytest.raises(ConfigError, match=r"1 replicas of 2 .*deepspeed.*of 1"):
        trainer(link, "sync", large_net(1), resume=path)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_every_stage_trains_as_one_process_does(
    precision: str, two_ranks: list[dict[str, Any]]
) -> None:
    """Two ranks with half of each batch; accumulation, clipping, a schedule, an uneven end.

    float32: sums in another order, 2^-24 relative each, in 6 steps: below 1e-6. bfloat16 has 2^-9,
    of which AdamW at lr 0.01 makes at most a few tenths of its step.
    """
    with connect() as link:
        expected, loss, norm, step = run(link, "sync", 8, precision=precision)
    tolerance = TOLERANCES[precision]
    for of_rank in two_ranks:
        for found in of_rank["trained"][precision]:
            torch.testing.assert_close(found[0], expected, atol=tolerance, rtol=0.0)
            assert found[1] == pytest.approx(loss, abs=tolerance)
            assert found[2] == pytest.approx(norm, abs=10 * tolerance)
            assert found[3] == step == 6


class Sometimes(nn.Module):
    """Uses a part of itself for some batches alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.always, self.sometimes = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + (self.sometimes(x) if x[0, 0] > 0 else 0.0)


def sometimes(link: Any, local: int, samples: int = 22, **options: Any) -> Tensor:
    """Of steps of two microbatches that use it: none, both, the first, the second, both, none.

    The fifth has no number, and is left out; the last has one microbatch.
    """
    x = torch.randn(22, 3, generator=torch.Generator().manual_seed(2))
    uses = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0])
    x[:, 0] = uses.repeat_interleave(2)  # alike for all samples of a microbatch
    x[16, 1] = float("nan")
    x = x[:samples]
    sgd = partial(torch.optim.SGD, lr=0.1)
    with Trainer(
        *(Sometimes(), F.cross_entropy, sgd),
        gradient_accumulation_steps=2,
        watch=Watch(on_nonfinite="skip"),
        console=False,
        link=link,
        **options,
    ) as t:
        t.fit(DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=local), max_epochs=2)
        return whole(t.model)


def alone(folder: str) -> dict[str, Any]:
    """One rank, with what it offloads, started without a launcher."""
    with patch.dict(os.environ):
        for name in [name for name in os.environ if name.endswith(("RANK", "WORLD_SIZE"))]:
            del os.environ[name]
        return what_is_offloaded(folder)


def what_is_offloaded(folder: str) -> dict[str, Any]:
    with connect() as link, pytest.raises(ConfigError) as caught:
        trainer(link, "sync", engine=DeepSpeed(zero_stage=2))
    # Their own links, and one for all.
    told: dict[str, Any] = {
        "refused": str(caught.value),
        "own": run(None, "sync", 8, engine=OFFLOADING[0]),
    }
    with connect() as link:
        told["trained"] = {
            precision: [
                run(link, "sync", 8, precision=precision, engine=engine) for engine in OFFLOADING
            ]
            for precision in TOLERANCES
        }
        told["watched"] = [watched(link, 8, "skip", engine=engine) for engine in OFFLOADING]
        told["sometimes"] = [sometimes(link, 2, engine=engine) for engine in OFFLOADING]
        dropping = DropCompute(threshold_seconds=1.0)
        with pytest.raises(ConfigError, match="drop_compute lets .* or an engine"):
            trainer(link, "sync", engine=OFFLOADING[0], drop_compute=dropping)
        told["file"] = run(link, "sync", 8, engine=DeepSpeed(config=f"{folder}/offloads.json"))
        told["saved"] = [
            saved(link, Path(folder), f"alone-{i}", Mesh(), engine)
            for i, engine in enumerate(OFFLOADING)
        ]
    return told


def test_one_rank_alone_offloads(folder: Path) -> None:
    """As above; the first run of each makes its process group, and ends it."""
    (folder / "offloads.json").write_text(json.dumps(FILES["offloads"]))
    (told,) = run_ranks(alone, 1, str(folder), timeout_seconds=120)
    assert "mesh.shard is 1: it has nothing to divide, and offloads nothing" in told["refused"]
    told["trained"]["fp32"] += [told["own"], told["file"]]
    with connect() as link:
        skipped, partly = watched(link, 8, "skip"), sometimes(link, 2)
        for precision, tolerance in TOLERANCES.items():
            expected, *others = run(link, "sync", 8, precision=precision)
            for found in told["trained"][precision]:
                torch.testing.assert_close(found[0], expected, atol=tolerance, rtol=0.0)
                assert list(found[1:]) == pytest.approx(others, abs=10 * tolerance)
    for parameters, step in told["watched"]:
        torch.testing.assert_close(parameters, skipped[0], atol=1e-6, rtol=0.0)
        assert step == skipped[1]
    for parameters in told["sometimes"]:
        torch.testing.assert_close(parameters, partly, atol=1e-6, rtol=0.0)
    for of_engine in told["saved"]:
        assert torch.equal(of_engine["resumed"], of_engine["straight"])


def edge_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Finite; of a target that is 2 or more the gradient is NaN: infinity, of sqrt(0), times 0."""
    nothing = 0 * outputs[targets >= 2]
    return F.cross_entropy(outputs, targets % 2) + nothing.abs().sqrt().sum()


def edge(link: Any, local: int, **options: Any) -> Tensor:
    """Of two epochs of four steps, in the second of which a replica's own gradient is NaN."""
    samples = data(32)
    samples.tensors[1][9] += 2
    watch = None if options["engine"] else Watch(on_nonfinite="skip")
    with Trainer(net(), edge_loss, ADAMW, console=False, link=link, watch=watch, **options) as t:
        t.fit(DataLoader(samples, batch_size=local), max_epochs=2)
        return whole(t.model)


def replicas_rank(mesh: Mesh, local: int, engines: list[DeepSpeed | None]) -> dict[str, Any]:
    with connect(transport="torch", timeout_seconds=60) as link:
        return {
            "trained": [
                [run(link, strategy, local, 34, mesh=mesh, engine=engine) for engine in engines]
                for strategy in ("sync", "local_sgd", "diloco")
            ],
            "edge": [edge(link, local, mesh=mesh, engine=engine) for engine in engines],
            "sometimes": [
                sometimes(link, local // 2, 16, mesh=mesh, engine=engine)
                for engine in engines
                if engine is None or engine.zero_stage < 3
            ],
        }


@pytest.mark.timeout(300)
def test_strategies_keep_replicas_of_two_ranks_together() -> None:
    """Four ranks as two replicas, against two plain replicas with the same samples.

    34 samples are steps of 16, 16 and 2: in the last the second replica has none on either rank.
    Of a gradient that is not finite on one replica none makes an update, as if that was skipped.
    """
    single = run_ranks(replicas_rank, 2, Mesh(), 4, [None, *OFFLOADING], timeout_seconds=100)
    found = run_ranks(replicas_rank, 4, Mesh(shard=2), 2, ENGINES, timeout_seconds=180)
    for rank, of_rank in enumerate(found):
        of_plain = single[rank // 2]
        for of_strategy, ((wanted, loss, norm, step), *of_one) in zip(
            of_rank["trained"], of_plain["trained"], strict=True
        ):
            for parameters, *others in (*of_strategy, *of_one):
                torch.testing.assert_close(parameters, wanted, atol=2e-6, rtol=0.0)
                assert others == [
                    pytest.approx(loss, abs=1e-5),
                    pytest.approx(norm, abs=1e-5),
                    step,
                ]
        for case in ("edge", "sometimes"):
            wanted, *of_one = of_plain[case]
            assert wanted.isfinite().all()
            for parameters in (*of_rank[case], *of_one):
                torch.testing.assert_close(parameters, wanted, atol=2e-6, rtol=0.0)


FILES = {
    "batch": {"train_micro_batch_size_per_gpu": 16},
    "optimizer": {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}},
    "fits": {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.999]}},
        "bf16": {"enabled": "auto"},
    },
    "offloads": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    "divided": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    # Parts of 24, 8, 16 and 1 elements in two sub-groups: 32 and 17, or 48 and 1.
    "early": {"zero_optimization": {"stage": 3, "sub_group_size": 25}},
    "late": {"zero_optimization": {"stage": 3, "sub_group_size": 33}},
}


def details(link: Any, folder: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    loader = DataLoader(data(32), batch_size=4)
    mesh = Mesh(shard=2)

    def fit(t: Trainer, steps: int) -> Tensor:
        t.fit(loader, max_steps=steps)
        return whole(t.model)

    for stage in (2, 3):
        options = {"mesh": mesh, "engine": DeepSpeed(zero_stage=stage), "lr_scheduler": step_lr}
        with trainer(link, "sync", **options) as t:
            fit(t, 3)
            state = t.state_dict()
            straight = fit(t, 8)
        with trainer(link, "sync", **options) as t:
            t.load_state_dict(state)
            told[f"resumed {stage}"] = (fit(t, 8), straight)

    master = Precision("bf16-true", update="master")
    with trainer(link, "sync", mesh=mesh, engine=DeepSpeed(zero_stage=3), precision=master) as t:
        told["bf16-true"] = fit(t, 8)
    with trainer(link, "sync") as t:
        told["plain"] = fit(t, 8)

    def refused(**options: Any) -> str:
        options = {"strategy": "sync", "mesh": mesh, "engine": DeepSpeed(), **options}
        with pytest.raises(ConfigError) as caught, trainer(link, **options) as t:
            t.fit(loader, max_steps=1)
        return str(caught.value)

    told["server"] = refused(strategy="server", mesh=Mesh(shard=2))
    told["gossip"] = refused(strategy="gossip")
    told["fp16"] = refused(precision=Precision("fp16-true"))
    told["batch"] = refused(engine=DeepSpeed(config=f"{folder}/batch.json"))
    told["optimizer"] = refused(engine=DeepSpeed(config=f"{folder}/optimizer.json"))
    with trainer(link, "sync", mesh=mesh, engine=DeepSpeed(config=f"{folder}/fits.json")) as t:
        told["file"] = fit(t, 8)
        assert t.layout.called.zero_optimization_stage() == 3
    return told


def test_state_files_and_refusals(two_ranks: list[dict[str, Any]]) -> None:
    for told in (of_rank["details"] for of_rank in two_ranks):
        for stage in (2, 3):
            resumed, straight = told[f"resumed {stage}"]
            assert torch.equal(resumed, straight)
        torch.testing.assert_close(told["file"], told["plain"], atol=1e-6, rtol=0.0)
        # bfloat16 rounds parameters of up to 1 to 2^-9, and so what forward and backward compute.
        torch.testing.assert_close(told["bf16-true"], told["plain"], atol=2e-2, rtol=0.0)
        assert "engine=fully_shard" in told["server"]
        assert "engine=fully_shard" in told["gossip"]
        assert "not supported on your device" in told["fp16"]
        assert "16" in told["batch"]
        assert "data.local_batch_size=4" in told["batch"]
        assert "optimizer.lr=0.5" in told["optimizer"]
        assert "0.01" in told["optimizer"]


def test_a_model_may_make_its_own_state_dict(two_ranks: list[dict[str, Any]]) -> None:
    """With hooks and methods of its own, from whole parameters; a run goes on from it."""
    (state, values), (resumed, its_values) = (
        two_ranks[0]["renamed"][name] for name in ("straight", "resumed")
    )
    assert [of_rank["renamed"]["straight"][0] for of_rank in two_ranks[1:]] == [{}]
    assert torch.equal(values, its_values)
    assert list(state) == ["0.bias", "0.kernel", "2.weight", "2.bias", "2.twice"]
    assert all(torch.equal(state[name], resumed[name]) for name in state)
    expected = unusual_net(3)
    assert list(expected.state_dict()) == list(state)
    expected.load_state_dict(state)
    assert torch.equal(whole_here(expected), values)
    assert torch.equal(state["2.twice"], 2 * state["2.weight"])
    for of_rank in two_ranks:
        for told in of_rank["renamed on disk"]:
            assert torch.equal(told["resumed"], told["straight"])


def test_a_state_of_other_sub_groups_is_refused(two_ranks: list[dict[str, Any]]) -> None:
    for of_rank in two_ranks:
        borders, parameters = of_rank["borders"]
        assert "exp_avg of 32 elements for sub-group 0, which has 48 here; set " in borders
        # 3 x 16 / 2 + 16 / 2 + 16 x 2 / 2 + 2 / 2 = 49
        assert "of 4 parameters, of which this rank had 49 elements" in parameters
        assert "here they are 3, with 48" in parameters
