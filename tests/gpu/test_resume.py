"""A run on a GPU that is saved and resumed has the bits of one that went on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scaledtrain import Checkpointing, connect
from tests.checkpoints import loader, trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"


def fit(run_dir: Path, max_steps: int, background: bool, precision: str, resume: bool) -> str:
    saved = Checkpointing(every_steps=5, asynchronous=background)
    with (
        connect(device=DEVICE) as link,
        trainer(
            run_dir, saved, precision=precision, resume="auto" if resume else None, link=link
        ) as one,
    ):
        one.fit(loader(), max_steps=max_steps)
        return one.replica.sha256()


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed", "bf16-true"])
@pytest.mark.parametrize("background", [False, True])
def test_a_run_that_stopped_goes_on_bit_for_bit(
    tmp_path: Path, background: bool, precision: str
) -> None:
    """Dropout draws from the GPU's own generator. 7 steps, in the middle of an epoch, then 5."""
    expected = fit(tmp_path / "whole", 12, background, precision, resume=False)
    fit(tmp_path / "parts", 7, background, precision, resume=False)
    assert fit(tmp_path / "parts", 12, background, precision, resume=True) == expected
