"""Checkpoints of one process: what is written, what is read, what is refused."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Callback, CheckpointError, Checkpointing, ConfigError, Preempted, Trainer
from scaledtrain.checkpoint.folder import MANIFEST, Manifest, clean, prune, saved_steps
from scaledtrain.checkpoint.part import CheckpointReader, Owner, Part, load_rank
from scaledtrain.checkpoint.tensor_file import DTYPES, write_tensors
from scaledtrain.checkpoint.tree import flatten, restore
from scaledtrain.launching import Interrupted

ADAMW = partial(torch.optim.AdamW, lr=0.1)


@pytest.fixture(autouse=True)
def _disks_that_are_fast() -> Iterator[None]:
    with patch("os.fsync"):
        yield


def data() -> TensorDataset:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, x.sum(1, keepdim=True))


def loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=8, shuffle=True)


def trainer(run_dir: Path, saved: Checkpointing | None = None, **options: Any) -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    return Trainer(
        model,
        F.mse_loss,
        ADAMW,
        console=False,
        run_dir=run_dir,
        checkpointing=saved or Checkpointing(every_steps=5),
        **options,
    )


def fit(run_dir: Path, max_steps: int = 12, **options: Any) -> str:
    """Of the parameters at the end."""
    with trainer(run_dir, **options) as one:
        one.fit(loader(), max_steps=max_steps)
        return one.replica.sha256()


def steps(run_dir: Path) -> list[int]:
    return [saved.step for saved in saved_steps(run_dir / "checkpoints")]


# What a state may hold, and how it is written


def test_a_state_comes_back_as_it_was() -> None:
    state = {
        "numbers": [1, -(2**70), 0.1, float("nan"), float("-inf"), True, None],
        3: ("a tuple", {"a", "set"}),
        "counter": Counter({4: 2}),
        "python": random.Random(0).getstate(),
        "numpy": np.random.RandomState(0).get_state(legacy=False),
        "tensors": {"half": torch.ones(2, dtype=torch.bfloat16), "scalar": torch.tensor(5)},
        "a/b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
    }
    skeleton, tensors = flatten(state)
    back = restore(json.loads(json.dumps(skeleton)), tensors)
    assert str(back["numbers"]) == str(state["numbers"])
    assert back[3] == state[3]
    assert isinstance(back["counter"], Counter)
    assert random.Random(0).getstate() == back["python"]
    assert back["numpy"]["state"]["key"].tolist() == state["numpy"]["state"]["key"].tolist()  # type: ignore[index,call-overload]
    assert back["tensors"]["half"].dtype is torch.bfloat16
    assert (back["a/b"].item(), back["a"]["b"].item()) == (0.0, 1.0)


def test_what_only_pickle_could_save_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"a function at strategy/0, which cannot be saved"):
        flatten({"strategy": [flatten]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_type_are_read_by_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "file"
    bits = torch.tensor([0, 1, 1, 0], dtype=torch.uint8)
    tensors = [("a", bits.to(dtype).reshape(2, 2)), ("scalar", bits.to(dtype)[1])]
    written = write_tensors(path, [*tensors, ("none", torch.empty(0, 3))])
    assert written.bytes == path.stat().st_size
    with safe_open(str(path), framework="pt") as file:
        for name, tensor in tensors:
            read = file.get_tensor(name)
            assert read.dtype is dtype
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (read, tensor)))
        assert file.get_tensor("none").shape == (0, 3)


def test_an_optimizers_state_is_stored_by_the_parameters_names(tmp_path: Path) -> None:
    """So that it can be found by ranks whose parameters have other numbers."""
    fit(tmp_path, 5)
    reader = CheckpointReader(saved_steps(tmp_path / "checkpoints")[-1].path)
    assert "strategy/updater/optimizer/state/0.weight/exp_avg" in reader.tensors
    assert reader.tensors["model/2.bias"].size == (1,)


def test_what_all_ranks_have_is_written_once(tmp_path: Path) -> None:
    """Of 4 + 3 + 1 numbers of 4 bytes, one rank has the first, the other the rest."""
    state = {"model": {"a": torch.ones(4), "b": torch.ones(3), "c": torch.ones(1)}}
    for rank in (0, 1):
        own = {**state, "own": torch.full((2,), float(rank))}
        owner = Owner(rank, 2, rank, parameters=state["model"], is_equal=True)
        Part(owner, own).write(tmp_path)
    keys = []
    for rank in (0, 1):
        with safe_open(str(tmp_path / f"rank-0000{rank}.safetensors"), framework="pt") as file:
            keys.append(sorted(key.partition("@")[0] for key in file.keys()))  # noqa: SIM118
    assert keys == [["model/a", "rank-00000/own"], ["model/b", "model/c", "rank-00001/own"]]


def test_dcp_loads_a_checkpoint(tmp_path: Path) -> None:
    with trainer(tmp_path) as one:
        one.fit(loader(), max_steps=5)
    weights = {"model/0.weight": torch.zeros(4, 2)}
    reader = CheckpointReader(saved_steps(tmp_path / "checkpoints")[-1].path)
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load(weights, storage_reader=reader)
    assert torch.equal(weights["model/0.weight"], one.model.state_dict()["0.weight"])


# When, and what is kept


def test_newest_and_best_are_kept() -> None:
    options = Checkpointing(keep_last=1, keep_best=2, best_metric="accuracy", best_is="highest")
    values = {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.7, 5: 0.6}
    evaluations = {step: {"accuracy": value} for step, value in values.items()}
    assert options.kept(evaluations) == {2, 4, 5}
    assert options.kept({1: {}, 2: {}}) == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "every_steps is 0"),
        ({"every_minutes": float("nan")}, "every_minutes is nan"),
        ({"keep_last": 0}, "keep_last is 0"),
        ({"best_is": "largest"}, "best_is is 'largest'; it is lowest or highest"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Checkpointing(**options)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_is_saved_every_so_many_steps_and_at_its_end(
    asynchronous: bool, tmp_path: Path
) -> None:
    fit(tmp_path, saved=Checkpointing(every_steps=5, keep_last=9, asynchronous=asynchronous))
    assert steps(tmp_path) == [5, 10, 12]
    assert all(saved.damage() is None for saved in saved_steps(tmp_path / "checkpoints"))


def test_a_run_is_saved_after_a_time(tmp_path: Path) -> None:
    fit(tmp_path, 3, saved=Checkpointing(every_minutes=1e-9, keep_last=9))
    assert steps(tmp_path) == [1, 2, 3]


def test_training_goes_on_while_it_is_written(tmp_path: Path) -> None:
    """What is written is the state as it was, though the parameters have changed since."""
    begun: list[dict[str, Any]] = []

    class Watch(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            begun.append(trainer.state_dict()["model"])

    options = Checkpointing(every_steps=5, keep_last=9, asynchronous=True)
    fit(tmp_path, saved=options, callbacks=[Watch()])
    for saved in saved_steps(tmp_path / "checkpoints"):
        state = load_rank(CheckpointReader(saved.path), 0)
        for name, value in begun[saved.step - 1].items():
            assert torch.equal(state["model"][name], value)


# Resuming


@pytest.mark.parametrize("stopped", range(1, 12))
def test_a_run_stopped_anywhere_goes_on_as_if_it_had_not(stopped: int, tmp_path: Path) -> None:
    """Eight steps an epoch: also before, at and after its end."""
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "parts", stopped)
    assert fit(tmp_path / "parts", resume="auto") == whole


def test_records_of_steps_that_are_made_again_are_not_there_twice(tmp_path: Path) -> None:
    fit(tmp_path, 12, log_every=1)
    fit(tmp_path, 14, log_every=1, resume=tmp_path / "checkpoints" / "step-000000010")
    lines = (tmp_path / "metrics-rank0.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, 15))
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    assert steps(tmp_path) == [10, 14]
    assert (tmp_path / "checkpoints" / "step-000000012.aside-1").is_dir()


def test_tensorboard_shows_no_step_twice(tmp_path: Path) -> None:
    fit(tmp_path, 12, log_every=1)
    fit(tmp_path, 14, log_every=1, resume=tmp_path / "checkpoints" / "step-000000010")
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == list(range(1, 15))


def test_a_run_that_died_before_it_was_saved_begins_again(tmp_path: Path) -> None:
    die = patch("scaledtrain.trainer.FitLoop.run", side_effect=ZeroDivisionError)
    with die, pytest.raises(ZeroDivisionError):
        fit(tmp_path)
    (tmp_path / "metrics-rank0.jsonl").write_text('{"step": 3}\n')
    fit(tmp_path, 2, log_every=1, resume="auto")
    lines = (tmp_path / "metrics-rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


class Counting:
    """A loader that keeps its place, and draws at random while it reads."""

    def __init__(self) -> None:
        self.at = 0
        self.read = 0

    def __iter__(self) -> Any:
        while self.at < 6:
            self.at += 1
            self.read += 1
            yield torch.rand(4, 2), torch.rand(4, 1)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def test_a_loader_that_keeps_its_place_is_not_read_again(tmp_path: Path) -> None:
    with trainer(tmp_path / "whole") as one:
        one.fit(Counting(), max_steps=9)
        whole = one.replica.sha256()
    with trainer(tmp_path / "parts") as one:
        one.fit(Counting(), max_steps=4)
    again = Counting()
    with trainer(tmp_path / "parts", resume="auto") as one:
        one.fit(again, max_steps=9)
    assert one.replica.sha256() == whole
    assert again.read <= 6  # two of the first epoch, three of the second, one to see the end


def test_skipped_batches_draw_nothing_that_counts(tmp_path: Path) -> None:
    """An iterable has to be read up to the place; dropout then goes on where it was."""
    batches = [(torch.full((4, 2), float(i)), torch.ones(4, 1)) for i in range(6)]
    drawn = DataLoader(batches, batch_size=None)
    results = []
    for name, limits in {"whole": [9], "parts": [4, 9]}.items():
        for limit in limits:
            with trainer(tmp_path / name, resume="auto") as one:
                one.fit(list(drawn), max_steps=limit)
        results.append(one.replica.sha256())
    assert results[0] == results[1]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, 5)
    with (
        pytest.raises(ConfigError, match="saved after 5 steps of an epoch, of 8 samples each"),
        trainer(tmp_path, resume="auto") as one,
    ):
        one.fit(DataLoader(data(), batch_size=16), max_steps=9)
    with pytest.raises(ConfigError, match="run with seed 0, this one has 1"):
        trainer(tmp_path, resume="auto", seed=1)
    with pytest.raises(ConfigError, match="holds the checkpoints of a run already"):
        trainer(tmp_path)
    fit(tmp_path / "other", 5)
    with pytest.raises(ConfigError, match="holds the checkpoints of a run already"):
        trainer(tmp_path, resume=tmp_path / "other")  # they would be taken for its own
    with pytest.raises(ConfigError, match="where there is no checkpoint"):
        trainer(tmp_path / "third", resume=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="checkpointing needs a folder"):
        Trainer(nn.Linear(1, 1), F.mse_loss, ADAMW, checkpointing=Checkpointing())


# Damage, and malice


def newest(run_dir: Path) -> Path:
    return saved_steps(run_dir / "checkpoints")[-1].path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit of a tensor": lambda path: flip_a_bit(path / "rank-00000.safetensors"),
    "a flipped bit of the state": lambda path: flip_a_bit(path / "rank-00000.json"),
    "a flipped bit of the manifest": lambda path: flip_a_bit(path / MANIFEST),
    "a file cut off": lambda path: os.truncate(path / "rank-00000.safetensors", 100),
    "a manifest cut off": lambda path: os.truncate(path / MANIFEST, 100),
    "an empty manifest": lambda path: os.truncate(path / MANIFEST, 0),
    "a missing file": lambda path: (path / "rank-00000.json").unlink(),
    "a missing manifest": lambda path: (path / MANIFEST).unlink(),
    "another step's name": lambda path: path.rename(path.with_name("step-000000013")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_skipped(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path)
    DAMAGES[damage](newest(tmp_path))
    with caplog.at_level(logging.WARNING), trainer(tmp_path, resume="auto") as resumed:
        pass
    assert resumed.step_count == 10
    assert str(tmp_path) in caplog.records[0].message
    assert "is skipped" in caplog.records[0].message


def test_a_run_that_begins_again_keeps_what_it_saves(tmp_path: Path) -> None:
    """Damaged ones of later steps do not take the places of the newest."""
    fit(tmp_path)
    for saved in saved_steps(tmp_path / "checkpoints"):
        flip_a_bit(saved.path / "rank-00000.safetensors")
    fit(tmp_path, 6, resume="auto")
    assert steps(tmp_path) == [5, 6]
    assert len(list((tmp_path / "checkpoints").glob("*.aside-1"))) == 2


def test_a_damaged_one_that_is_asked_for_is_an_error(tmp_path: Path) -> None:
    fit(tmp_path)
    flip_a_bit(newest(tmp_path) / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256 is another one"):
        trainer(tmp_path, resume=newest(tmp_path))
    for saved in saved_steps(tmp_path / "checkpoints"):
        (saved.path / "rank-00000.json").write_text("")
    with pytest.raises(CheckpointError, match="all 2 checkpoints in .* are damaged"):
        trainer(tmp_path, resume=tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def seal_again(path: Path, name: str | None = None, content: bytes | None = None) -> None:
    """What a malicious author can do: all checksums are right."""
    manifest = Manifest.read(path)
    files = dict(manifest.files)
    if name is not None and content is not None:
        (path / name).unlink(missing_ok=True)
        from scaledtrain.checkpoint.tensor_file import write_bytes

        files[name] = write_bytes(path / name, content)
    (path / MANIFEST).unlink()
    Manifest(manifest.step, manifest.ranks, files).write(path)


@pytest.mark.parametrize("name", ["rank-00000.json", "rank-00000.safetensors"])
def test_a_pickle_is_never_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path)
    seal_again(newest(tmp_path), name, pickle.dumps(Bomb()))
    with (
        patch("pickle.load") as load,
        patch("pickle.loads") as loads,
        patch("torch.load") as torch_load,
        pytest.raises(CheckpointError, match="damaged"),
    ):
        trainer(tmp_path, resume=newest(tmp_path))
    assert not (load.called)
    assert not (loads.called)
    assert not (torch_load.called)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "name", ["../../secret.json", "/etc/passwd", "rank-00000.json/..", "rank-00000.pt", "a\0b"]
)
def test_a_manifest_cannot_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    fit(tmp_path)
    path = newest(tmp_path)
    manifest = Manifest.read(path)
    (path / MANIFEST).unlink()
    stolen = {**manifest.files, name: manifest.files["rank-00000.json"]}
    Manifest(manifest.step, manifest.ranks, stolen).write(path)
    with pytest.raises(CheckpointError, match="names .*, which no checkpoint has"):
        Manifest.read(path)


def test_links_are_not_followed(tmp_path: Path) -> None:
    fit(tmp_path)
    path = newest(tmp_path)
    (path / "rank-00000.json").rename(tmp_path / "elsewhere.json")
    (path / "rank-00000.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="is a link"):
        trainer(tmp_path, resume=path)


@pytest.mark.parametrize(
    "state",
    [
        {"tensor": "../../../etc/passwd"},
        {"eval": "print()"},
        {"list": 3},
        {"dict": [[1]]},
        {"tensor": "a", "list": []},
        {},
        "[" * 100_000,
    ],
    ids=lambda state: str(state)[:30],
)
def test_a_state_that_is_none_is_refused(state: Any, tmp_path: Path) -> None:
    fit(tmp_path)
    path = newest(tmp_path)
    index = json.loads((path / "rank-00000.json").read_text())
    text = state if isinstance(state, str) else json.dumps({**index, "state": state})
    seal_again(path, "rank-00000.json", text.encode())
    with pytest.raises(CheckpointError):
        trainer(tmp_path, resume=path)


# Disks that are full, processes that are killed


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_what_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = fit(tmp_path / "whole")
    with trainer(tmp_path / "run") as one:
        one.fit(loader(), max_steps=5)
        with patch("scaledtrain.checkpoint.part.write_tensors", full):
            one.fit(loader(), max_steps=12)
    assert one.replica.sha256() == whole
    assert "No space left on device" in caplog.text
    assert "training goes on" in caplog.text
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "step-000000005"
    ]
    assert fit(tmp_path / "run", resume="auto") == whole


def test_a_full_disk_can_end_the_run(tmp_path: Path) -> None:
    options = Checkpointing(every_steps=5, on_failure="end")
    write = patch("scaledtrain.checkpoint.part.write_tensors", full)
    with write, pytest.raises(CheckpointError, match="step 5 could not be written"):
        fit(tmp_path, saved=options)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    fit(tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / ".writing-abc-3").mkdir()
    newest(tmp_path).rename(folder / ".replaced-step-000000012")  # between two renames
    clean(folder)
    assert steps(tmp_path) == [10, 12]
    assert not list(folder.glob(".*"))


def test_what_is_removed_loses_its_name_first(tmp_path: Path) -> None:
    fit(tmp_path)
    with (
        patch("scaledtrain.checkpoint.folder.shutil.rmtree", full),
        pytest.raises(OSError, match="No space"),
    ):
        prune(tmp_path / "checkpoints", lambda _: {12})
    assert steps(tmp_path) == [12]


# Signals


class SendAt(Callback):
    def __init__(self, step: int, number: signal.Signals) -> None:
        self._step, self._number = step, number

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step_count == self._step:
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends(number: signal.Signals, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Preempted) as caught:
        fit(tmp_path / "parts", callbacks=[SendAt(7, number)])
    assert (caught.value.code, caught.value.step) == (75, 7)
    assert signal.getsignal(number) is before
    assert steps(tmp_path / "parts") == [5, 7]
    assert fit(tmp_path / "parts", resume="auto") == whole


def test_ctrl_c_says_where_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"saved at step 7 in .*step-000000007; resume with"):
        fit(tmp_path, callbacks=[SendAt(7, signal.SIGINT)])
