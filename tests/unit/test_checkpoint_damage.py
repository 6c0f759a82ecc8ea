"""Checkpoints that are damaged, hostile, or could not be written whole."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from scaledtrain import Checkpointing
from scaledtrain.checkpoint.folder import MANIFEST, Manifest, clean, prune, saved_steps
from scaledtrain.errors import CheckpointError
from tests.checkpoints import fit, loader, steps, trainer


@pytest.fixture(autouse=True)
def _disks_that_are_fast() -> Iterator[None]:
    with patch("os.fsync"):
        yield


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
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "lock",
        "step-000000005",
    ]
    assert fit(tmp_path / "run", resume="auto") == whole


def test_a_full_disk_can_end_the_run(tmp_path: Path) -> None:
    options = Checkpointing(every_steps=5, on_failure="end")
    write = patch("scaledtrain.checkpoint.part.write_tensors", full)
    with write, pytest.raises(CheckpointError, match="step 5 could not be written"):
        fit(tmp_path, saved=options)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["lock"]


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
