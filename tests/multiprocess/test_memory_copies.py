"""Copies of the newest state in the memory of hosts: what is left when some of them are gone."""

from __future__ import annotations

import shutil
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

from scaledtrain import Callback, Checkpointing, LocalSGD, Mesh, Trainer, connect
from scaledtrain.comm.protocols import Link
from tests.contract.training import data
from tests.ranks import run_ranks

STEPS, CRASH = 9, 7  # the newest checkpoint is of step 4 then


class Crash(Callback):
    """After the 7th step, before that is saved anywhere: its copies are of step 6."""

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step_count == CRASH:
            raise ZeroDivisionError


def train(folder: Path, name: str, link: Link, **options: Any) -> tuple[list[str], Tensor]:
    """Lines that were said, and all parameters at the end; each rank is a host of its own."""
    torch.manual_seed(1)
    chance = 0.0 if "shards" in name else 0.2  # other layouts draw otherwise
    model = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Dropout(chance), nn.Linear(9, 2))
    saved = Checkpointing(
        every_steps=4, memory_every_steps=1, memory_folder=str(folder / f"host-{link.group.rank}")
    )
    said: list[str] = []
    with (
        patch("os.fsync"),
        patch("scaledtrain.metrics.Metrics.say", lambda self, text: said.append(text)),
    ):
        trainer = Trainer(
            model,
            F.cross_entropy,
            partial(torch.optim.AdamW, lr=0.05),
            run_dir=folder / name,
            checkpointing=saved,
            resume="auto",
            console=False,
            link=link,
            batches_per_step=4 if options.get("strategy") is None else None,
            **options,
        )
        try:
            trainer.fit(DataLoader(data(50), batch_size=2, shuffle=True), max_steps=STEPS)
        finally:
            trainer._release()
    state = trainer.model.state_dict()
    whole = [v.full_tensor() if isinstance(v, DTensor) else v for v in state.values()]
    return said, torch.cat([value.flatten() for value in whole])


KINDS: dict[str, dict[str, Any]] = {
    "equal": {},
    "shards": {"mesh": Mesh(shard=2)},
    "own states": {"strategy": partial(LocalSGD, 5)},
}


def made(kind: str) -> dict[str, Any]:
    options = dict(KINDS[kind])
    if "strategy" in options:
        options["strategy"] = options["strategy"]()
    return options


def crashed(folder: Path) -> dict[str, Tensor]:
    """Straight runs, and others that crash."""
    straight = {}
    with connect(transport="torch", timeout_seconds=60) as link:
        for kind in KINDS:
            straight[kind] = train(folder, f"straight {kind}", link, **made(kind))[1]
            with pytest.raises(ZeroDivisionError):
                train(folder, kind, link, **made(kind), callbacks=[Crash()])
    return straight


def resumed(folder: Path) -> dict[str, tuple[list[str], Tensor]]:
    with connect(transport="torch", timeout_seconds=60) as link:
        return {kind: train(folder, kind, link, **made(kind)) for kind in KINDS}


def test_a_host_dies_and_one_step_is_lost(tmp_path: Path) -> None:
    """Host 1 comes back empty: rank 0's copies of rank 1 are all that there is of it."""
    straight, _ = run_ranks(crashed, 2, tmp_path, timeout_seconds=100)
    left = sorted(
        str(p.relative_to(tmp_path / "host-0")) for p in tmp_path.glob("host-0/*/*/*-step-*")
    )
    assert [name[-9:] for name in left] == ["000000005", "000000006"] * 3
    shutil.rmtree(tmp_path / "host-1")
    shutil.copytree(tmp_path, other := tmp_path.with_name("other"))
    first, second = run_ranks(resumed, 2, tmp_path, timeout_seconds=100)
    for kind in KINDS:
        assert first[kind][0][0] == (
            "resumed at step 6 from memory: rank 0's copy of rank 1 (the newest checkpoint is of "
            "step 4)"
        )
        for _, end in (first[kind], second[kind]):
            assert torch.equal(end, straight[kind]), kind
    assert not list(tmp_path.glob("host-*/*/*"))  # the runs have ended well
    with connect() as link:  # one rank is left, and has the other's part as well
        said, end = train(other, "shards", link)
    assert "rank 0's copy of rank 1" in said[0]
    torch.testing.assert_close(end, straight["shards"], rtol=1e-4, atol=1e-5)
