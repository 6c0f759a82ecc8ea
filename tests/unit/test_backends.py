"""Which backend carries what is on GPUs: NCCL, unless two ranks have the same one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from scaledtrain.comm.process_group import backend_of
from scaledtrain.errors import RendezvousError


def chosen(gpus: list[str], size: int, timeout_seconds: float = 10.0) -> list[str]:
    """By ranks that have these GPUs, of a job of so many."""
    store = dist.HashStore()

    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(uuid=gpus[device.index])

    def choose(rank: int) -> str:
        return backend_of(torch.device("cuda", rank), store, rank, size, timeout_seconds)

    with (
        patch("torch.cuda.get_device_properties", properties),
        ThreadPoolExecutor(len(gpus)) as pool,
    ):
        return list(pool.map(choose, range(len(gpus))))


def test_gpus_of_their_own_meet_over_nccl() -> None:
    assert chosen(["a", "b", "c"], 3) == ["cpu:gloo,cuda:nccl"] * 3


def test_ranks_that_share_one_meet_over_gloo_as_do_all_others() -> None:
    assert chosen(["a", "b", "c", "b"], 4) == ["cpu:gloo,cuda:gloo"] * 4


def test_on_cpus_nobody_waits_for_anybody() -> None:
    assert backend_of(torch.device("cpu"), dist.HashStore(), 0, 2, 10.0) == "gloo"


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(RendezvousError, match="waited 0.2 s for ranks 2, 3 to choose a GPU"):
        chosen(["a", "b"], 4, timeout_seconds=0.2)
