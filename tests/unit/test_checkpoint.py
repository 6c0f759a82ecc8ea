"""Checkpoints of one process: what is written, what is read, what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
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
from torch.utils.data import DataLoader

from scaledtrain import Callback, Checkpointing, LocalSGD, ParameterServer, Sync, Trainer
from scaledtrain.checkpoint import Preempted
from scaledtrain.checkpoint.folder import saved_steps
from scaledtrain.checkpoint.part import CheckpointReader, Owner, Part, load_rank
from scaledtrain.checkpoint.tensor_file import DTYPES, write_tensors
from scaledtrain.checkpoint.tree import flatten, restore
from scaledtrain.comm.compress import FP16, Codec, Sign, TopK
from scaledtrain.errors import ConfigError
from scaledtrain.launching import Interrupted
from scaledtrain.server import Dana
from scaledtrain.strategies import Strategy
from tests.checkpoints import ADAMW, data, fit, loader, steps, trainer


@pytest.fixture(autouse=True)
def _disks_that_are_fast() -> Iterator[None]:
    with patch("os.fsync"):
        yield


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


class Renamed(nn.Linear):
    """Its weight has another name in state dicts."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "kernel"] = destination.pop(prefix + "weight")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel")
        super()._load_from_state_dict(state_dict, prefix, *others)


@pytest.mark.parametrize("strategy", [Sync, partial(LocalSGD, 2), ParameterServer])
def test_a_model_may_save_its_parameters_by_other_names(
    strategy: Callable[[], Strategy], tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", first=Renamed, strategy=strategy())
    fit(tmp_path / "parts", 7, first=Renamed, strategy=strategy())
    assert fit(tmp_path / "parts", resume="auto", first=Renamed, strategy=strategy()) == whole


def test_the_momentum_of_workers_goes_on_where_they_settle(tmp_path: Path) -> None:
    """To save, and between two fits, they only end a run, and are back for the next one."""

    def trained(name: str, max_steps: int = 12, **options: Any) -> str:
        server = ParameterServer(correction=Dana(0.9))
        return fit(tmp_path / name, max_steps, strategy=server, **options)

    whole = trained("whole", saved=Checkpointing(every_steps=99))
    assert trained("often", saved=Checkpointing(every_steps=5)) == whole
    trained("parts", 7)
    assert trained("parts", resume="auto") == whole
    with trainer(tmp_path / "fits", strategy=ParameterServer(correction=Dana(0.9))) as one:
        for max_steps in (7, 12):
            one.fit(loader(), max_steps=max_steps)
        assert one.replica.sha256() == whole


@pytest.mark.parametrize("codec", [TopK(0.25), Sign(), FP16()], ids=str)
def test_what_a_worker_has_not_sent_yet_is_saved(codec: Codec, tmp_path: Path) -> None:
    def trained(name: str, max_steps: int = 12, **options: Any) -> str:
        server = ParameterServer(compression=codec)
        return fit(tmp_path / name, max_steps, strategy=server, **options)

    whole = trained("whole")
    trained("parts", 7)
    assert trained("parts", resume="auto") == whole


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
    time.sleep(1)  # TensorBoard orders the files of a folder by the second at which they began
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
