"""The check command on what is shipped, and what it tells other programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scaledtrain.check import LADDER
from scaledtrain.check.command import CheckConfig, subject_of
from scaledtrain.cli import main
from scaledtrain.command_line import compose, config_folder
from scaledtrain.config import check
from scaledtrain.errors import ConfigError

EXPERIMENTS = sorted(file.stem for file in (config_folder() / "experiment").glob("*.yaml"))
SMALLER = {  # the same models with less to compute
    "digits_convnet": ["data.local_batch_size=8"],
    "digits_large_batch": ["data.global_batch_size=16"],
    "stdlib_gpt": [
        *("model.d_model=64", "model.n_layers=1"),
        *("data.sequence_length=16", "data.max_train_bytes=65536", "data.max_test_bytes=8192"),
    ],
}


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["scaledtrain", "check", *words])
    main()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_shipped_experiment_passes(
    experiment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, f"experiment={experiment}", *SMALLER.get(experiment, []))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["passed", r.name] for r in LADDER]
    assert lines[-1] == "12 rungs: 12 passed"


@pytest.mark.parametrize(
    "words",
    [
        *(["strategy=async"], ["strategy=diloco"], ["strategy=gossip"]),
        ["mesh.pipe=2", "pipeline.schedule=GPipe"],
    ],
    ids=" ".join,
)
def test_strategies_and_stages_are_asked_on_one_rank(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, *words, "workers=2", "check.only=[seed,resume,cost]")
    assert "3 rungs: 3 passed" in capsys.readouterr().out


def test_what_no_run_may_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "engine=fully_shard", "check.only=[seed]")
    assert ended.value.code == 2
    assert "nothing to divide, and offloads nothing" in capsys.readouterr().err


def test_a_failure_is_the_exit_status_and_numbers_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "there" / "check.json"
    words = ["model=tests.planted.Detached", "data=tests.planted.task", "data.local_batch_size=16"]
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *words, "check.only=[shapes,gradients]", f"check.json={written}")
    assert ended.value.code == 1
    assert "2 rungs: 1 failed, 1 passed" in capsys.readouterr().out
    shapes, gradients = json.loads(written.read_text())
    assert (shapes["rung"], shapes["status"], shapes["measured"]["samples"]) == (
        "shapes",
        "passed",
        16,
    )
    assert gradients["measured"]["without_gradients"] == ["branch.weight", "branch.bias"]


def test_the_length_of_the_full_run_is_that_of_its_ranks() -> None:
    training = check(compose(["workers=4", "max_epochs=3", "data.global_batch_size=64"]))
    subject = subject_of(training, CheckConfig(None, None, [], 16, 200))
    assert (subject.plan.max_epochs, subject.plan.replicas) == (3, 4)
    # 1,437 images in batches of 64 / 4
    assert len(subject.batches(1)[0][0]) == 16


def test_a_file_that_cannot_be_written_is_told_before_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, "check.only=[shapes]", f"check.json={tmp_path}")
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert "which cannot be written" in told.err
    assert "shapes" not in told.out


def test_values_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"check\.samples is 1; it is >= 2"):
        subject_of(check(compose([])), CheckConfig(None, None, [], 1, 200))
