"""Checkpoints of several ranks: other layouts when they are resumed, and a rank that is killed."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from scaledtrain import Callback, Checkpointing, Mesh, Trainer, connect
from scaledtrain.checkpoint import Preempted
from scaledtrain.checkpoint.export import model_state
from scaledtrain.checkpoint.folder import saved_steps
from scaledtrain.checkpoint.part import CheckpointReader, read_tensors
from scaledtrain.checkpoint.tensor_file import Written, write_tensors
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import PeerLostError
from scaledtrain.parallel import Pipeline
from tests.contract.training import data
from tests.ranks import run_ranks

GLOBAL_BATCH, STEPS = 8, 12  # seven steps an epoch, the last of two samples
SAVED = 5


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 2))


def train(
    run_dir: Path, link: Link | None, data_ranks: int, max_steps: int, **options: Any
) -> dict[str, Tensor]:
    """The parameters at the end, whole."""
    with patch("os.fsync"):
        trainer = Trainer(
            net(),
            F.cross_entropy,
            partial(torch.optim.AdamW, lr=0.05),
            run_dir=run_dir,
            checkpointing=Checkpointing(every_steps=SAVED, keep_last=9),
            console=False,
            link=link,
            **options,
        )
        try:
            loader = DataLoader(data(50), batch_size=GLOBAL_BATCH // data_ranks, shuffle=True)
            trainer.fit(loader, max_steps=max_steps)
            state = trainer.model.state_dict()
        finally:
            trainer._release()
    return {k: v.full_tensor() if isinstance(v, DTensor) else v.clone() for k, v in state.items()}


MESHES = {"replicate": Mesh(replicate=2), "shard": Mesh(shard=2), "pipe": Mesh(pipe=2)}


def two_ranks(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Saved and resumed under each of three layouts, from each of four."""
    ends = {}
    with connect(transport="torch", timeout_seconds=60) as link:

        def run(name: str, mesh: Mesh, **options: Any) -> None:
            data_ranks = mesh.replicas(2) * mesh.shard
            run_dir = folder / name.replace(" ", "-")
            ends[name] = train(run_dir, link, data_ranks, STEPS, mesh=mesh, **options)

        for name, mesh in MESHES.items():
            run(name, mesh)
        for name, mesh in MESHES.items():
            for source in ("one", *MESHES):
                path = folder / source / "checkpoints" / f"step-{SAVED:09d}"
                run(f"{source} to {name}", mesh, resume=path)
        run("drained", MESHES["pipe"], pipeline=Pipeline("PipeDream", n_microbatches=1))
    return ends


def test_a_run_goes_on_under_any_layout(tmp_path: Path) -> None:
    """With the same global batches: bit for bit under the same layout, else up to rounding."""
    one = train(tmp_path / "one", None, 1, STEPS)
    first, last = run_ranks(two_ranks, 2, tmp_path, timeout_seconds=100)
    # Of a pipeline each rank has a stage; else both have all.
    ends = {name: end | last[name] for name, end in first.items()}
    drained = ends.pop("drained")  # gradients that were under way made updates after the last step
    reader = CheckpointReader(tmp_path / "drained" / "checkpoints" / f"step-{STEPS:09d}")
    for name, value in read_tensors(reader, [f"model/{key}" for key in drained]).items():
        assert torch.equal(value, drained[name.removeprefix("model/")])
    for source in MESHES:
        path = tmp_path / source / "checkpoints" / f"step-{SAVED:09d}"
        ends[f"{source} to one"] = train(tmp_path / f"{source}-one", None, 1, STEPS, resume=path)
        exported = model_state(CheckpointReader(path.with_name(f"step-{STEPS:09d}")))
        assert all(torch.equal(value, ends[source][key]) for key, value in exported.items())
        assert exported.keys() == one.keys()
    assert len(ends) == 3 + 3 * 4 + 3
    for name, end in ends.items():
        source, _, target = name.partition(" to ")
        assert end.keys() == one.keys()
        for key, value in end.items():
            if source == target:
                assert torch.equal(value, ends[source][key]), name
            # 12 steps of AdamW; its quotient makes 1e-7 of a gradient about 1e-5 of a step.
            torch.testing.assert_close(value, one[key], rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


class KillAtSave:
    """Kills this process in the middle of writing its n-th file of tensors."""

    def __init__(self, n: int) -> None:
        self._left = n

    def __call__(self, path: Path, tensors: Any) -> Written:
        self._left -= 1
        path.write_bytes(b"half of it")
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        path.unlink()
        return write_tensors(path, tensors)


def killed_while_saving(folder: Path) -> str:
    link = connect(timeout_seconds=60)
    kill = KillAtSave(2 if link.group.rank == 1 else 99)
    with patch("scaledtrain.checkpoint.part.write_tensors", kill), pytest.raises(PeerLostError):
        train(folder, link, 2, STEPS)
    link.abandon()
    return "survived"


def straight_and_resumed(folder: Path) -> list[dict[str, Tensor]]:
    with connect(timeout_seconds=60) as link:
        resumed = train(folder / "killed", link, 2, STEPS, resume="auto")
        return [train(folder / "straight", link, 2, STEPS), resumed]


def test_a_kill_during_saving_leaves_the_last_one(tmp_path: Path) -> None:
    run_ranks(killed_while_saving, 2, tmp_path / "killed", timeout_seconds=100, killed=[1])
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert [saved.step for saved in saved_steps(checkpoints)] == [SAVED]
    for straight, resumed in run_ranks(straight_and_resumed, 2, tmp_path, timeout_seconds=100):
        assert all(torch.equal(resumed[key], value) for key, value in straight.items())
    assert not list(checkpoints.glob(".*"))


class SendAt(Callback):
    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step_count == 8:
            os.kill(os.getpid(), signal.SIGTERM)


def preempted(folder: Path) -> tuple[object, int]:
    """The signal comes to one rank only; all save and end."""
    link = connect(timeout_seconds=60)
    callbacks = [SendAt()] if link.group.rank == 1 else []
    with pytest.raises(Preempted) as caught:
        train(folder, link, 2, 10_000, callbacks=callbacks)
    link.abandon()
    return caught.value.code, caught.value.step


def test_a_signal_to_one_rank_saves_all(tmp_path: Path) -> None:
    (code, step), other = run_ranks(preempted, 2, tmp_path, timeout_seconds=100)
    assert (code, step) == other
    assert code == 75
    assert saved_steps(tmp_path / "checkpoints")[-1].step == step >= 8
