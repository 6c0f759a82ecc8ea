"""What a run that is resumed refuses, says, and keeps: one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from scaledtrain import Callback, Checkpointing, LocalSGD, ParameterServer, Trainer
from scaledtrain.checkpoint.folder import saved_steps
from scaledtrain.checkpoint.memory import neighbours
from scaledtrain.comm.serving.event_log import read_events
from scaledtrain.command_line import compose
from scaledtrain.config import check, to_yaml
from scaledtrain.errors import CheckpointError, ConfigError
from scaledtrain.run_config import write_config
from tests.checkpoints import data, fit, loader, steps, trainer


@pytest.fixture(autouse=True)
def _disks_that_are_fast() -> Iterator[None]:
    with patch("os.fsync"):
        yield


def said(run_dir: Path, max_steps: int = 8, **options: Any) -> list[str]:
    """Lines on the console of a run that goes on."""
    lines: list[str] = []
    with patch("scaledtrain.metrics.Metrics.say", lambda self, text: lines.append(text)):
        fit(run_dir, max_steps, resume="auto", **options)
    return lines


def test_a_run_that_was_stopped_at_its_end_is_evaluated_when_it_goes_on(tmp_path: Path) -> None:
    """It has made and saved its last step; what it did not come to is the evaluation."""
    with trainer(tmp_path) as first:
        first.fit(loader(), max_steps=5)
        expected = first.evaluate(loader())
    with trainer(tmp_path, resume="auto") as again:
        result = again.fit(loader(), max_steps=5, eval=loader(), eval_every=2)
    assert result.step == 5
    assert result.evaluation == expected


# What is refused


def test_a_resume_that_is_no_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume is True; it is 'auto' "):
        trainer(tmp_path, resume=True)


def test_a_misspelt_best_metric_is_refused(tmp_path: Path) -> None:
    best = Checkpointing(keep_best=1, best_metric="acuracy")
    accuracy = {"accuracy": torch.nn.functional.mse_loss}
    message = "best_metric is 'acuracy' .did you mean 'accuracy'.*has: loss, accuracy"
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, best, eval_metrics=accuracy)
    trainer(tmp_path, Checkpointing(best_metric="acuracy")).close()  # it is not asked for


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    """Adam takes AdamW's state as if it were its own, and is neither of them then."""
    fit(tmp_path, 5)
    with (
        patch("tests.checkpoints.ADAMW", partial(torch.optim.Adam, lr=0.1)),
        pytest.raises(ConfigError, match="state is of AdamW, but the optimizer is Adam, which"),
    ):
        trainer(tmp_path, resume="auto")


def test_the_state_of_another_schedule_is_refused(tmp_path: Path) -> None:
    step_lr = partial(torch.optim.lr_scheduler.StepLR, step_size=3)
    fit(tmp_path / "with", 5, lr_scheduler=step_lr)
    with pytest.raises(ConfigError, match="with StepLR as its .* schedule, but here it is none"):
        trainer(tmp_path / "with", resume="auto")
    fit(tmp_path / "without", 5)
    with pytest.raises(ConfigError, match="with none as its .* schedule, but here it is StepLR"):
        trainer(tmp_path / "without", resume="auto", lr_scheduler=step_lr)


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.truncate(0)
file.write("job of host7")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_job_in_the_folder_of_a_run_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, 5)
    lock = tmp_path / "checkpoints" / "lock"
    assert '"pid": ' in lock.read_text()  # nobody holds it: the job has ended
    with subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            patch("scaledtrain.checkpoint.lock._PATIENCE_SECONDS", 0.0),
            pytest.raises(ConfigError, match="another job is at work in .* .job of host7., and"),
        ):
            trainer(tmp_path, resume="auto")
        other.kill()
    fit(tmp_path, 8, resume="auto")  # one that was killed holds nothing
    assert steps(tmp_path) == [5, 8]


# What is said


def test_what_differs_from_the_run_so_far_is_said(tmp_path: Path) -> None:
    fit(tmp_path, 5)
    lines = said(tmp_path, precision="bf16-mixed")
    assert lines[0].startswith("resumed at step 5 from ")
    assert lines[1].startswith("its precision was fp32; from here on it is bf16-mixed, so that ")
    with pytest.raises(ConfigError, match="does not fit this run, a Sequential under LocalSGD"):
        trainer(tmp_path, resume="auto", strategy=LocalSGD(2))


def test_another_period_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, 5, strategy=LocalSGD(3))
    fit(tmp_path, 8, strategy=LocalSGD(4), resume="auto")
    assert "saved with sync_every=3; from here on periods have 4 steps" in caplog.text


def test_data_of_another_size_are_said(tmp_path: Path) -> None:
    """64 samples in batches of 8, then 56."""
    fit(tmp_path, 5)
    lines: list[str] = []
    with (
        patch("scaledtrain.metrics.Metrics.say", lambda self, text: lines.append(text)),
        trainer(tmp_path, resume="auto") as one,
    ):
        one.fit(DataLoader(Subset(data(), range(56)), batch_size=8, shuffle=True), max_steps=8)
    (line,) = (line for line in lines if "another size" in line)
    assert "an epoch had 8 steps, and has 7 from here on" in line


# What is kept


def test_the_log_of_events_of_a_resumed_run_is_another_file(tmp_path: Path) -> None:
    """One worker's pushes: 5 of the first part, 3 of the second, 2 of the third."""
    for end in (5, 8, 10):
        fit(tmp_path, end, strategy=ParameterServer(), resume="auto")
    pushes = [
        sum(event.accepted for event in read_events(tmp_path / name))
        for name in ("events-1.bin", "events-2.bin", "events.bin")
    ]
    assert pushes == [5, 3, 2]


def test_an_earlier_config_is_kept_and_what_differs_is_said(tmp_path: Path) -> None:
    first, second = (
        check(compose([f"optimizer.lr={lr}", *more]))
        for lr, more in ((0.1, []), (0.2, ["resume=auto"]))
    )
    assert write_config(tmp_path, first) is None
    assert write_config(tmp_path, second) == (
        "other settings than in config-1.yaml: optimizer.lr 0.1 -> 0.2"
    )
    assert write_config(tmp_path, second) is None
    assert (tmp_path / "config-1.yaml").read_text() == to_yaml(first)
    assert (tmp_path / "config.yaml").read_text() == to_yaml(second)
    assert len(list(tmp_path.iterdir())) == 2


# Copies in memory


def test_neighbours_are_half_of_all_ranks_apart() -> None:
    assert neighbours(0, 1) == [0]
    for size in range(2, 10):
        groups = {tuple(neighbours(rank, size)) for rank in range(size)}
        assert sorted(rank for group in groups for rank in group) == list(range(size))
        assert all(2 <= len(group) <= 3 for group in groups)


class Crash(Callback):
    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step_count == 8:
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("n_damaged", "found"),
    [(0, "step 7 from memory: all "), (1, "step 6 from memory"), (2, "step 5 ")],
)
def test_a_run_goes_on_from_the_newest_intact_copy(
    n_damaged: int, found: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saved at step 5, copied at 6 and 7; of a crash in step 8 as if it had not been."""
    saved = Checkpointing(every_steps=5, memory_every_steps=1, memory_folder=str(tmp_path))
    whole = fit(tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "parts", saved=saved, callbacks=[Crash()])
    copies = sorted(tmp_path.glob("scaledtrain-*/*/*-step-*/holder-*/*.safetensors"))
    assert len(copies) == 2
    for copy in copies[2 - n_damaged :]:
        copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    lines: list[str] = []
    with (
        patch("scaledtrain.metrics.Metrics.say", lambda self, text: lines.append(text)),
        trainer(tmp_path / "parts", saved, resume="auto") as one,
    ):
        one.fit(loader(), max_steps=12)
    assert lines[0].startswith(f"resumed at {found}")
    assert caplog.text.count("a copy in memory is skipped") == n_damaged
    assert one.replica.sha256() == whole
    assert not list(tmp_path.glob("scaledtrain-*/*"))  # it was saved at its end


def test_copies_of_an_abandoned_course_are_not_taken(tmp_path: Path) -> None:
    saved = Checkpointing(every_steps=5, memory_every_steps=1, memory_folder=str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", saved=saved, callbacks=[Crash()])
    fit(tmp_path / "run", 6, resume="auto")  # by somebody who keeps no copies
    assert [s.step for s in saved_steps(tmp_path / "run" / "checkpoints")] == [5, 6]
    assert fit(tmp_path / "run", saved=saved, resume="auto") == fit(tmp_path / "whole")


def test_a_full_memory_is_said_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = Checkpointing(memory_every_steps=1, memory_folder=str(tmp_path))
    full = patch("scaledtrain.checkpoint.memory.read_file", side_effect=OSError("no space left"))
    with full:
        fit(tmp_path / "run", 6, saved=saved)
    assert caplog.text.count("cannot keep a copy of the state in memory: no space left") == 1
    assert steps(tmp_path / "run") == [6]


def test_copies_that_cannot_be_put_together_are_said_and_stay(tmp_path: Path) -> None:
    """No older checkpoint is taken in silence: with room again the run goes on from step 7."""
    saved = Checkpointing(every_steps=5, memory_every_steps=1, memory_folder=str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", saved=saved, callbacks=[Crash()])
    full = patch("scaledtrain.checkpoint.recall._link", side_effect=OSError("no space left"))
    with full, pytest.raises(CheckpointError, match="step 7 cannot be put together: no space left"):
        trainer(tmp_path / "run", saved, resume="auto")
    with trainer(tmp_path / "run", saved, resume="auto") as one:
        assert one.step_count == 7


def test_a_disk_that_is_full_from_the_start_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither who holds the folder nor the word of the copies can be written."""
    saved = Checkpointing(memory_every_steps=1, memory_folder=str(tmp_path))
    error = OSError("no space left")
    with (
        patch("os.write", side_effect=error),
        patch("scaledtrain.checkpoint.saver.replace_file", side_effect=error),
    ):
        one = trainer(tmp_path / "run", saved)
    with one:
        assert one.fit(loader(), max_steps=2).step == 2
    assert "a later job will not find this one's copies in memory" in caplog.text


def test_copies_of_an_asynchronous_strategy_are_refused(tmp_path: Path) -> None:
    saved = Checkpointing(memory_every_steps=1, memory_folder=str(tmp_path))
    with pytest.raises(ConfigError, match="no step that all ranks make together"):
        trainer(tmp_path, saved, strategy=ParameterServer())
