"""The memory command: what it prints, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scaledtrain import cli

SMALL = ["model.hidden=[16]", "data.local_batch_size=8"]
# 64 * 16 + 16 + 16 * 10 + 10 numbers of 4 bytes
PARAMETERS = 4 * 1210


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["scaledtrain", "memory", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> Any:
    assert call(monkeypatch, "--json", *SMALL, *arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_a_table_of_policies_and_precisions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = ["precisions=[fp32,bf16-true]", "policies=[none,full]", "memory=1MiB"]
    assert call(monkeypatch, *SMALL, *choices, "precision=bf16-true") == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0][:3] == ["MLP,", "SGD,", "Sync"]
    assert ["fp32", "4.7", "KiB", "4.7", "KiB", "4.7", "KiB", "0", "2.1", "KiB"] in lines
    assert ["activations", "at", "most", "none", "full"] in lines
    assert ["largest", "batch", "in", "1.0", "MiB", "none", "full"] in lines
    assert "In 1.0 MiB with batches of 8, the first policy that fits is none: fp32" in shown
    assert "bf16-true (stochastic), none: at the peak" in shown


def test_json_has_bytes_of_every_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["precisions=[fp32]", "policies=[none]"]
    found = told(monkeypatch, capsys, *only, "strategy=async", "workers=2", "memory=1MiB")
    (cell,) = found["cells"]
    estimate = cell["estimate"]
    assert estimate["batch_size"] == 8
    assert estimate["parameters"] == estimate["gradients"] == PARAMETERS
    # The server has a momentum, and a copy of the parameters; the other worker neither.
    kept = [(rank["optimizer"], rank["strategy"]) for rank in estimate["ranks"]]
    assert kept == [(PARAMETERS, PARAMETERS), (0, 0)]
    assert estimate["peak"] == estimate["ranks"][0]["peak"] > estimate["ranks"][1]["peak"]
    assert cell["largest_batch"] > 8


@pytest.mark.parametrize(("mesh", "expected"), [("replicate", 32), ("shard", 32), ("pipe", 64)])
def test_a_batch_is_shared_by_replicas_and_shards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mesh: str, expected: int
) -> None:
    """Of a step's 64 samples; the stages of a pipeline have all of them."""
    words = ["data.local_batch_size=null", "data.global_batch_size=64", "model.hidden=[16,16]"]
    only = ["precisions=[fp32]", "policies=[none]", "workers=2", f"mesh.{mesh}=2"]
    (cell,) = told(monkeypatch, capsys, *only, *words)["cells"]
    assert cell["estimate"]["batch_size"] == expected


def test_of_an_elastic_job_each_rank_has_its_part_of_the_batches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of 4 batches on 3 ranks one has 2, of 8 samples: 64 numbers of 4 bytes and a label of 8."""
    elastic = ["elastic=true", "data.global_batch_size=32", "checkpointing=steps", "resume=auto"]
    only = ["precisions=[fp32]", "policies=[none]", "workers=3", f"run_dir={tmp_path}"]
    (cell,) = told(monkeypatch, capsys, *only, *elastic)["cells"]
    assert cell["estimate"]["batch"] == 2 * 8 * (64 * 4 + 8)


def test_what_is_offloaded_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a rank half of the parameters, gradients and momentum: 3 * 2420, and no temporaries."""
    shards = ["workers=2", "mesh.shard=2", "engine=fully_shard", "engine.offload=true"]
    assert call(monkeypatch, *SMALL, *shards, "precisions=[fp32]", "policies=[none]") == 0
    shown = capsys.readouterr().out
    assert "are in the host's memory, 7.1 KiB at most for a rank" in shown
    assert "KiB, activations, gradients and what is gathered take most" in shown
    shards[2:] = ["engine=deepspeed"]
    assert call(monkeypatch, *SMALL, *shards) == 2
    assert "only what shards of FullyShard take is estimated" in capsys.readouterr().err


def test_stages_are_told_in_every_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["policies=[none]", "workers=2", "mesh.pipe=2", "model.hidden=[16,16]"]
    cells = told(monkeypatch, capsys, *words)["cells"]
    found = {cell["precision"]: cell["estimate"]["parameters"] for cell in cells}
    full = found["fp32"]
    assert found["bf16-mixed"] == full
    assert 2 * found["bf16-true (stochastic)"] == full


def test_the_ways_of_the_config_take_the_place_of_the_usual_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(
        monkeypatch,
        capsys,
        "precisions=[bf16-true]",
        "policies=[none]",
        "precision=bf16-true",
        "precision.update=kahan",
        "activation_checkpointing=every_k",
        "activation_checkpointing.k=3",
    )
    assert [cell["policy"] for cell in found["cells"]] == ["none", "every_k"]
    assert found["chosen"] == ["bf16-true (kahan)", "every_k"]
    # momentum and compensation, both of 16 bits
    assert found["cells"][0]["estimate"]["ranks"][0]["optimizer"] == PARAMETERS


def test_the_blocks_of_the_config_are_those_of_every_policy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["precisions=[fp32]", "policies=[none,full]", "activation_checkpointing=full"]
    named = "activation_checkpointing.blocks=[layers.0]"
    cells = [told(monkeypatch, capsys, *few, *more)["cells"] for more in ([], [named])]
    assert [len(cell["estimate"]["kept"]["blocks"]) for cell in cells[0]] == [
        3,
        3,
    ]  # linear, relu, linear
    assert [len(cell["estimate"]["kept"]["blocks"]) for cell in cells[1]] == [1, 1]


def test_a_policy_that_does_not_fit_the_model_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    none = ["precisions=[fp32]", "policies=[none]"]
    budget = ["activation_checkpointing=memory_budget", "activation_checkpointing.size=10B"]
    found = told(monkeypatch, capsys, *none, *budget)
    assert found["cells"][1]["estimate"] is None
    assert "do not fit into 10 bytes" in found["cells"][1]["why_not"]
    assert call(monkeypatch, *SMALL, *none, *budget) == 0
    shown = capsys.readouterr().out
    assert "memory_budget: the activations of" in shown


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("memory=much", "error: memory is 'much'; give bytes, or with a unit: 512MiB, 24GiB"),
        ("policies=[]", "error: policies is [], so there is nothing to tell"),
        ("policies=[ful]", "error: policies[0] is 'ful', but must be one of 'none', 'selective'"),
        ("output=xml", "error: output is 'xml', but must be one of 'table', 'json'"),
        ("modle=gpt", "error: there is no key 'modle' (did you mean 'model'?)"),
        ("optimizer.lr=-1", "error: optimizer SGD: Invalid learning rate: -1"),
        ("workers=0", "error: workers is 0"),
        ("model=gpt", "error: model GPT needs sequence_length and vocab_size"),
    ],
)
def test_a_mistake_is_one_line(
    argument: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, argument) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_help_shows_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert "memory=24GiB" in shown
    assert "activation_checkpointing every_k, full" in " ".join(shown.split())
    assert "$" not in shown
