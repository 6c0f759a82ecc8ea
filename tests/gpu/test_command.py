"""The commands on a GPU, which they find by themselves, and the memory that they estimate."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from scaledtrain import Precision, Trainer, connect, estimate_memory
from scaledtrain.models import GPT, next_token_loss
from scaledtrain.precision import PrecisionName
from scaledtrain.recompute import CheckpointEvery, CheckpointPolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
ADAMW = partial(torch.optim.AdamW, fused=True)


def command(*words: str) -> str:
    ran = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def test_train_learns_and_says_on_what(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = command(
        "scaledtrain.train", "experiment=digits_mlp", "precision=bf16-mixed", f"run_dir={run}"
    )
    assert "accuracy" in said
    result = json.loads((run / "result.json").read_text("utf-8"))
    assert result["environment"]["device"] == torch.cuda.get_device_name()
    assert result["result"]["evaluation"]["accuracy"] >= 0.95


def test_parts_are_timed_and_trained_in_stages(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("experiment=digits_mlp", "workers=2", "mesh.pipe=2", "max_steps=2", f"run_dir={run}")
    said = command("scaledtrain.train", *words)
    assert "stage 1: layers." in said
    assert "on cuda over" in said


def test_check_passes_the_shipped_models() -> None:
    said = command("scaledtrain.check", "experiment=stdlib_gpt")
    assert "FAILED" not in said


@pytest.mark.parametrize("name", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize("policy", [None, CheckpointEvery()], ids=str)
def test_memory_is_estimated_as_allocated(
    name: PrecisionName, policy: CheckpointPolicy | None
) -> None:
    """No less than is allocated, but for 2 %; kernels and rounding take up to a tenth more."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "sequence_length": 256, "n_layers": 8, "n_heads": 4, "d_model": 256}
    tokens = torch.randint(256, (16, 256))
    expected = estimate_memory(
        GPT(**sizes),
        next_token_loss,
        (tokens, tokens),
        ADAMW,
        precision=name,
        activation_checkpointing=policy,
        device=DEVICE,
    ).peak
    layer = torch.nn.Linear(8, 8, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):  # cuBLAS takes memory of its own, for good
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            layer(torch.ones(8, 8, device=DEVICE)).sum().backward()
    before = torch.cuda.memory_allocated()
    with (
        connect(device=DEVICE) as link,
        Trainer(
            GPT(**sizes),
            next_token_loss,
            ADAMW,
            precision=Precision(name),
            activation_checkpointing=policy,
            console=False,
            link=link,
        ) as trainer,
    ):
        trainer.fit([(tokens, tokens)], max_steps=2)
        torch.cuda.reset_peak_memory_stats()
        trainer.fit([(tokens, tokens)], max_steps=4)
        allocated = torch.cuda.max_memory_allocated() - before
    assert 0.98 * expected < allocated < 1.1 * expected
