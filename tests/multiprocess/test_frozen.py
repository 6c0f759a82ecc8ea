"""A worker that neither moves nor dies, as if its machine were gone, and is owed an answer."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from scaledtrain import ParameterServer, Replica, connect
from scaledtrain.connection import Transport
from scaledtrain.server import StaleSynchronous
from tests.ranks import run_ranks


def wait_until_frozen(pid: int) -> None:
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


def freeze(transport: Transport) -> tuple[int, float]:
    """Rank 2 is frozen while it waits for the others, who then set it free, to no avail."""
    link = connect(transport=transport, timeout_seconds=6)
    rank = link.group.rank
    pids = [pid.item() for (pid,) in link.group.all_gather([torch.tensor([os.getpid()])])]
    model = nn.Linear(300, 300, bias=False)  # what is sent does not fit where it is buffered
    nn.init.zeros_(model.weight)
    strategy = ParameterServer(StaleSynchronous(0), shards=2)  # of ranks 0 and 1
    strategy.attach(Replica(model, partial(torch.optim.SGD, lr=1.0)), link)
    strategy.start(None)
    for step in range(4):
        assert strategy.before_forward()
        if rank != 2 and step == 0:
            wait_until_frozen(int(pids[2]))
        model.weight.grad = torch.ones(300, 300)
        strategy.apply_gradients()
        strategy.after_step()
        if rank == 2:  # while it waits in its next pull
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    strategy.settle()
    weight = model.weight.detach().clone()
    if rank == 0:
        os.kill(int(pids[2]), signal.SIGKILL)
    link.close()
    assert torch.equal(weight, weight[0, 0].expand(300, 300))
    return strategy.step, weight[0, 0].item()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
@pytest.mark.parametrize("transport", ["shared_memory", "torch"])
def test_a_frozen_worker_that_is_owed_an_answer_does_not_stop_the_others(
    transport: Transport,
) -> None:
    """4 gradients of each of the others, and one that it had pushed before: 2 x 4 + 1 updates."""
    zero, one, frozen = run_ranks(freeze, 3, transport, killed=[2])
    assert zero == one == (9, -9.0)
    assert frozen is None
