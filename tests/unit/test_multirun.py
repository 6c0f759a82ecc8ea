"""Trainings for combinations of values; processes are replaced by trainings in this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import scaledtrain.multirun as multirun_module
from scaledtrain.ablate import command as ablate_module
from scaledtrain.errors import ConfigError
from scaledtrain.jobs import arguments_for, hold_folder, last_lines, places_for
from scaledtrain.multirun import multirun
from scaledtrain.train import launch

SIGNS = ("data=tests.tasks.signs", "data.local_batch_size=32", "device=cpu", "console=false")


def train_here(jobs: Any, places: Any, ended: Any, keep_open: Any) -> None:
    for job in jobs:
        launch(job.arguments, job.module)
        ended(job, 0)


def test_each_combination_is_trained_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(multirun_module, "run_jobs", train_here)
    place = arguments_for(tmp_path / "it's")[0]
    multirun([*SIGNS, "max_steps=2", place, "seed=0,1", "optimizer.lr=0.1,0.2"])
    found = {}
    for folder in (tmp_path / "it's").iterdir():
        if folder.is_dir():
            lines = (folder / "config.yaml").read_text().splitlines()
            assert (folder / "result.json").exists()
            found[folder.name] = [s.strip() for s in lines if s.strip().startswith(("seed", "lr:"))]
    assert {name: sorted(lines) for name, lines in found.items()} == {
        "0": ["lr: 0.1", "seed: 0"], "1": ["lr: 0.2", "seed: 0"],
        "2": ["lr: 0.1", "seed: 1"], "3": ["lr: 0.2", "seed: 1"],
    }  # fmt: skip
    assert "[2/4] seed=0 optimizer.lr=0.2" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="would be written over"):
        multirun([*SIGNS, "max_steps=2", place, "seed=2,3"])


def test_one_that_fails_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def fail(jobs: Any, places: Any, ended: Any, keep_open: Any) -> None:
        for job in jobs:
            ended(job, int(job.name == "1"))

    monkeypatch.setattr(multirun_module, "run_jobs", fail)
    with pytest.raises(SystemExit):
        multirun([f"run_dir={tmp_path}/a", "seed=range(3)"])
    assert "1 of 3 failed: 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["seed=0"], "no argument has several"),
        (["seed=interval(0,1)"], "write them out"),
        (["seed=range(3,3)"], "no value"),
        (["optimizer.lr=0.1,x"], "optimizer.lr is 'x'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(arguments: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        multirun(arguments)


def test_an_ablation_measures_real_trainings(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(ablate_module, "run_jobs", train_here)
    ablate_module._main(
        [
            *SIGNS,
            "max_steps=10",
            f"run_dir={tmp_path}/a",
            "ablate.seeds=[0]",
            "ablate.only=[momentum,train]",
            "ablate.without.train=[optimizer.lr=0.0]",
        ]
    )  # as configs/train.yaml
    full, momentum, train = ablate_module.measure(ablate_module.Plan.load(tmp_path / "a"))
    assert (full.without, momentum.without, train.without) == ("full", "momentum", "train")
    assert full.quality is not None
    assert len({full.quality, momentum.quality, train.quality}) == 3
    config = (tmp_path / "a/runs/train-seed0/config.yaml").read_text()
    assert "  lr: 0.0\n" in config
    assert min(full.samples_per_second, full.memory_bytes) > 0
    assert "momentum: one seed gives no error bar" in capsys.readouterr().out


class TestPlaces:
    def test_trainings_at_the_same_time_share_cores_and_have_gpus_of_their_own(
        self, monkeypatch: Any
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5,7")
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert places_for(1, 4, "cpu") == [{}]  # alone: as it would be without this command
        visible = [place["CUDA_VISIBLE_DEVICES"] for place in places_for(None, 2, None)]
        assert visible == ["0,3", "5,7"]  # four are enough for two of two ranks
        assert places_for(None, 2, None)[0]["OMP_NUM_THREADS"] == "2"
        assert places_for(2, 1, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 2
        assert places_for(1, 1, None) == [{}]
        with pytest.raises(ConfigError, match="at_once is 0"):
            places_for(0, 1, "cpu")

    def test_a_launcher_is_refused(self, monkeypatch: Any) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="start it plainly"):
            places_for(1, 1, "cpu")


def test_two_commands_are_not_in_one_folder(tmp_path: Path) -> None:
    with (
        hold_folder(tmp_path),
        pytest.raises(ConfigError, match="at work in"),
        hold_folder(tmp_path, patience_seconds=0.0),
    ):
        pass
    with hold_folder(tmp_path, patience_seconds=0.0):  # it is free again
        pass


def test_what_a_job_said_last(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_lines(log) == "    (it said nothing)"
    log.write_text("".join(f"{n}\n\n" for n in range(9)))
    assert last_lines(log).split() == ["3", "4", "5", "6", "7", "8"]
