"""The newest states in the memory of the hosts, so that a crash loses no more than a step.

    <memory_folder>/scaledtrain-<user>/<run>/       on each host of a run; /dev/shm, if it has that
        <session>-step-000000012/holder-00001/      what rank 1 keeps
            manifest.json                           of all parts of that step, and of the files here
            rank-00001.json, .safetensors           its own part
            rank-00003.json, .safetensors           its neighbour's, of another host
        .writing-...                                unfinished: never read

It is outside of the processes, so that it is there when they are started again. A step counts if
all its parts are there, on any of the hosts: they make up a checkpoint, for any layout.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scaledtrain.checkpoint.folder import Manifest, name_of
from scaledtrain.checkpoint.tensor_file import Written, write_bytes
from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.protocols import Group, Link
from scaledtrain.errors import ConfigError

if TYPE_CHECKING:
    from scaledtrain.checkpoint.part import Owner

__all__ = ["COPY", "Memory", "files_of_part", "neighbours", "read_file", "write_file"]

_logger = logging.getLogger(__name__)

_KEPT = 2  # steps: while one is being written the one before is whole
COPY = re.compile(r"([0-9a-f]+)-step-(\d{9,})")  # session and step, in the name of a copy


def neighbours(rank: int, size: int) -> list[int]:
    """The ranks that keep each other's parts, that rank among them.

    They are half of all ranks apart, and so on different hosts if there are several.

    Example:
        >>> [neighbours(rank, 5) for rank in range(5)]
        [[0, 2, 4], [1, 3], [0, 2, 4], [1, 3], [0, 2, 4]]
    """
    half = max(size // 2, 1)
    return list(range(rank % half, size, half))


class Memory:
    """Keeps copies of the newest states in this host's memory; `recall` finds them again.

    Args:
        folder: for all runs of this user on this host; None: in /dev/shm, or where there is none,
            in the system's place for temporary files.
        run: a word that no other run has.
        session: a word that no other job of this run has.
        link: to all ranks.
        owner: of the state: this rank.
        facts: for manifests.

    Attributes:
        folder: of this run's copies.

    Raises:
        ConfigError: the folder cannot be made, or is somebody else's.
    """

    def __init__(
        self,
        folder: str | None,
        run: str,
        session: str,
        link: Link,
        owner: Owner,
        facts: Mapping[str, Any],
    ) -> None:
        shared = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
        own = Path(folder or shared) / f"scaledtrain-{os.getuid()}"
        try:
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
            if own.is_symlink() or own.stat().st_uid != os.getuid():
                raise PermissionError(f"{own} belongs to another user")
            self.folder = own / run
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"copies of the state cannot be kept in memory: {error}; set "
                "checkpointing.memory_folder to a place in memory that can be written"
            ) from error
        self._session = session
        self._link = link
        self._owner = owner
        self._facts = facts
        self._members = neighbours(owner.rank, owner.ranks)
        self._group: Group | None = None
        self._kept: list[Path] = []
        self._is_told = False

    def keep(self, step: int, state: Any, evaluation: Mapping[str, float]) -> None:
        """Keep a copy of this state here and with the neighbours. Collective.

        Args:
            step: the same on all ranks.
            state: of this rank.
            evaluation: the last one's values.
        """
        from scaledtrain.checkpoint.part import Part  # DCP takes a second to import

        if self._group is None:
            self._group = LocalGroup()
            if len(self._members) > 1:
                name = f"memory/{self._members[0]}"
                self._group = self._link.part(name, self._members).group
        final = self.folder / f"{self._session}-{name_of(step)}" / f"holder-{self._owner.rank:05d}"
        writing = self.folder / f".writing-{self._session}-{self._owner.rank}"
        contents: list[Tensor] | None = None
        try:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
            Part(self._owner, state).write(writing)
            contents = [read_file(writing / name) for name in files_of_part(self._owner.rank)]
        except OSError as error:
            self._tell(error)
        lengths = torch.tensor([-1, -1] if contents is None else [len(c) for c in contents])
        others = self._exchange(lengths, contents or [])
        try:
            if contents is not None:
                for rank, parts in others.items():
                    for name, part in zip(files_of_part(rank), parts, strict=True):
                        write_file(writing / name, part)
                self._seal(writing, final, step, [self._owner.rank, *others], evaluation)
                self._tidy(final)
        except OSError as error:
            self._tell(error)
            shutil.rmtree(writing, ignore_errors=True)

    def _tidy(self, newest: Path) -> None:
        """Remove what is older than the step before, which all ranks have: they are in this one."""
        if len(self._kept) == 1:  # of this session is enough
            for path in self.folder.iterdir():
                if not path.name.removeprefix(".writing-").startswith(self._session):
                    shutil.rmtree(path, ignore_errors=True)
        self._kept.append(newest)
        for old in self._kept[:-_KEPT]:
            _remove(old)
        self._kept = self._kept[-_KEPT:]

    def _exchange(self, lengths: Tensor, contents: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """The neighbours' files, of those that have some."""
        group = self._group
        assert group is not None
        # All ranks, so that none gets ahead by more steps than are kept.
        everyone = self._link.group.all_gather([lengths])
        all_lengths = [everyone[rank][0].tolist() for rank in self._members]
        if group.size == 1:
            return {}
        most = max(sum(told) for told in all_lengths)
        if most <= 0:
            return {}
        buffer = torch.zeros(most, dtype=torch.uint8)
        if contents:
            torch.cat(list(contents), out=buffer[: int(lengths.sum())])
        found = {}
        gathered = group.all_gather([buffer])
        for rank, told, (content,) in zip(self._members, all_lengths, gathered, strict=True):
            if rank != self._owner.rank and min(told) >= 0:
                found[rank] = list(torch.split(content[: sum(told)], told))
        return found

    def _seal(
        self,
        writing: Path,
        final: Path,
        step: int,
        parts: Sequence[int],
        evaluation: Mapping[str, float],
    ) -> None:
        from scaledtrain.checkpoint.part import files_of

        files = {name: file for rank in parts for name, file in files_of(writing, rank).items()}
        owner = self._owner
        Manifest(
            step,
            list(range(owner.ranks)),
            files,
            owner.pieces,
            owner.stages,
            evaluation,
            self._facts,
        ).write(writing)
        final.parent.mkdir(exist_ok=True)
        shutil.rmtree(final, ignore_errors=True)  # the same step once more, after a fit that ended
        writing.rename(final)

    def _tell(self, error: OSError) -> None:
        if not self._is_told:
            self._is_told = True
            _logger.error(
                "rank %d cannot keep a copy of the state in memory: %s; training goes on, and "
                "checkpoints on the disk are as before",
                self._owner.rank,
                error,
            )

    def forget_after(self, step: int) -> None:
        """The run is at this step again: copies of later ones are of a way that it has left."""
        for path in self._kept:
            match = COPY.fullmatch(path.parent.name)
            if match is not None and int(match[2]) > step:
                _remove(path)
        self._kept = [path for path in self._kept if path.exists()]

    def remove(self) -> None:
        """The run has been saved: no copy is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._kept = []


def _remove(holder: Path) -> None:
    shutil.rmtree(holder, ignore_errors=True)
    with suppress(OSError):  # others still have something there
        holder.parent.rmdir()


def files_of_part(rank: int) -> tuple[str, str]:
    """Names of the files of a rank's part."""
    return f"rank-{rank:05d}.json", f"rank-{rank:05d}.safetensors"


def read_file(path: Path) -> Tensor:
    """The bytes of a file."""
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8))


def write_file(path: Path, content: Tensor) -> Written:
    """Write a new file of these bytes."""
    return write_bytes(path, content.numpy().data)
