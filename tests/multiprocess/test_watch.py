"""A rank whose process is stopped: the others, stuck in a collective, name it and end."""

from __future__ import annotations

import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scaledtrain import Callback, Trainer, Watch, connect
from tests.ranks import RankFailed, run_ranks

BATCHES = [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))] * 8


class StopProcess(Callback):
    """SIGSTOP, as Ctrl-Z, a debugger, or a host that swaps; at its fifth step."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._step = 0

    def on_gradients(self, trainer: Trainer) -> None:
        self._step += 1
        if (trainer.link.group.rank, self._step) == (self._rank, 5):
            os.kill(os.getpid(), signal.SIGSTOP)


def train(run_dir: Path, stopped: int) -> None:
    with connect(transport="torch", timeout_seconds=60) as link:
        trainer = Trainer(
            nn.Linear(3, 2), F.cross_entropy, partial(torch.optim.SGD, lr=0.1),
            callbacks=[StopProcess(stopped)], watch=Watch(step_seconds=4.0), run_dir=run_dir,
            console=False, link=link,
        )  # fmt: skip
        trainer.fit(BATCHES, max_epochs=100)


@pytest.mark.parametrize(("stopped", "size"), [(1, 2), (0, 2)])  # rank 0 has the job's store
def test_a_stopped_process_is_named_and_the_others_end(
    tmp_path: Path, stopped: int, size: int
) -> None:
    with pytest.raises(RankFailed, match="exit code 70"):
        run_ranks(train, size, tmp_path, stopped, timeout_seconds=90)
    texts = [path.read_text() for path in tmp_path.glob("stuck-*.txt")]
    assert texts
    for text in texts:
        assert re.search(rf"rank {stopped}\b.* does not answer", text)
        assert "in reduce_gradients" in text  # in the stack of one that waits
