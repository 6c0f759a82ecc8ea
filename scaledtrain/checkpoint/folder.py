"""The folder of a run's checkpoints: which there are, whether they are intact, which go.

    checkpoints/step-000000120/manifest.json            every other file's size and checksum
                               rank-00000.json          the state of rank 0 but for tensors
                               rank-00000.safetensors   tensors that rank 0 wrote
                               rank-00001.json ...
    checkpoints/.writing-...                            unfinished: never read

A checkpoint has its name only when every byte of it is on the disk, and loses it before its first
byte goes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scaledtrain.checkpoint.tensor_file import Written, sha256_of, write_bytes
from scaledtrain.disk import sync_folder
from scaledtrain.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "Manifest",
    "SavedStep",
    "clean",
    "name_of",
    "prune",
    "saved_steps",
    "seal",
    "set_aside",
]

_logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1
_STEP = re.compile(r"step-(\d{9,})")
_FILE = re.compile(r"rank-\d{5,}\.(json|safetensors)")
_MAX_MANIFEST_BYTES = 2**28


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Args:
        step: updates that the parameters had received.
        ranks: that have a state in it.
        files: name -> size and checksum.
        pieces: ranks that each replica has.
        stages: of these, ranks that have different stages of the model.
        evaluation: values of the last evaluation before it.
        facts: for people: what was trained how.
    """

    step: int
    ranks: Sequence[int]
    files: Mapping[str, Written]
    pieces: int = 1
    stages: int = 1
    evaluation: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it beside the files."""
        content = {"format": _FORMAT, **asdict(self)}
        content["files"] = {name: file._asdict() for name, file in self.files.items()}
        text = _canonical(content)
        sealed = {"content": content, "sha256": hashlib.sha256(text).hexdigest()}
        write_bytes(folder / MANIFEST, json.dumps(sealed, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            CheckpointError: there is none, or it is damaged, or names a file that it must not.
        """
        path = folder / MANIFEST
        try:
            if path.is_symlink() or path.stat().st_size > _MAX_MANIFEST_BYTES:
                raise CheckpointError(f"{path} is a link, or larger than any manifest is")
            sealed = json.loads(path.read_bytes())
            content = sealed["content"]
            if sealed["sha256"] != hashlib.sha256(_canonical(content)).hexdigest():
                raise CheckpointError(f"{path} is damaged: its checksum is another one")
            if content["format"] != _FORMAT:
                raise CheckpointError(
                    f"{path} is of format {content['format']}, but this version of scaledtrain "
                    f"reads format {_FORMAT}; read it with the version that wrote it"
                )
            files = {name: Written(**file) for name, file in content["files"].items()}
            strange = [name for name in files if not _FILE.fullmatch(name)]
            if strange:
                raise CheckpointError(f"{path} names {strange[0]!r}, which no checkpoint has")
            return cls(
                int(content["step"]),
                [int(rank) for rank in content["ranks"]],
                files,
                int(content["pieces"]),
                int(content["stages"]),
                dict(content["evaluation"]),
                dict(content["facts"]),
            )
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True, order=True)
class SavedStep:
    """A checkpoint by its name: whether it is intact is not known yet."""

    step: int
    path: Path

    def damage(self, files: slice = slice(None)) -> str | None:
        """What is wrong with it; None: nothing is.

        Args:
            files: which of them to look at, so that several ranks can share them.
        """
        try:
            manifest = Manifest.read(self.path)
        except CheckpointError as error:
            return str(error)
        if manifest.step != self.step:
            return f"{self.path} is named after another step than its own, {manifest.step}"
        for name in sorted(manifest.files)[files]:
            path, expected = self.path / name, manifest.files[name]
            try:
                if path.is_symlink():
                    return f"{path} is a link"
                found = sha256_of(path)
            except OSError as error:
                return f"{path} cannot be read: {error.strerror or error}"
            if found.bytes != expected.bytes:
                return f"{path} has {found.bytes} bytes instead of {expected.bytes}"
            if found.sha256 != expected.sha256:
                return f"{path} is damaged: its SHA-256 is another one than the manifest says"
        return None


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:09d}"


def saved_steps(folder: Path) -> list[SavedStep]:
    """The checkpoints in a folder, the oldest first; none if there is no such folder."""
    if not folder.is_dir():
        return []
    found = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(SavedStep(int(match[1]), path) for match, path in found if match is not None)


def seal(writing: Path, manifest: Manifest) -> Path:
    """Complete a checkpoint and give it its name.

    Args:
        writing: the unfinished folder; its files are on the disk.
        manifest: of these.

    Returns:
        Where it is.
    """
    final = writing.parent / name_of(manifest.step)
    replaced = final.with_name(f".replaced-{final.name}")
    manifest.write(writing)
    sync_folder(writing)
    if final.exists():  # other ranks may have got on since, though this step is the same
        final.rename(replaced)
    writing.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def prune(folder: Path, kept: Callable[[Mapping[int, Mapping[str, float]]], set[int]]) -> None:
    """Remove checkpoints.

    Args:
        folder: where they are.
        kept: says which steps stay, from the evaluation before each.
    """
    evaluations: dict[int, Mapping[str, float]] = {}
    for saved in saved_steps(folder):
        try:
            evaluations[saved.step] = Manifest.read(saved.path).evaluation
        except CheckpointError:  # it is damaged, and for people to look at
            continue
    gone_steps = evaluations.keys() - kept(evaluations)
    for saved in saved_steps(folder):
        if saved.step in gone_steps:
            gone = folder / f".removing-{saved.path.name}"
            saved.path.rename(gone)
            shutil.rmtree(gone)


def clean(folder: Path) -> None:
    """Remove what a run that was killed has left unfinished."""
    for replaced in folder.glob(".replaced-*"):
        final = folder / replaced.name.removeprefix(".replaced-")
        if not final.exists():
            replaced.rename(final)
    for kind in (".writing-*", ".removing-*", ".replaced-*"):
        for path in folder.glob(kind):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path, after: int) -> None:
    """Take their names from checkpoints of later steps: a run that resumes earlier writes others.

    They stay beside, for people.
    """
    for saved in saved_steps(folder):
        if saved.step > after:
            number = 1
            while (aside := folder / f"{saved.path.name}.aside-{number}").exists():
                number += 1
            saved.path.rename(aside)
            _logger.warning("checkpoint %s is not continued; it is now %s", saved.path, aside.name)
