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

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scaledtrain.checkpoint.folder import Manifest, SavedStep, name_of
from scaledtrain.checkpoint.tensor_file import Written, write_bytes
from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.protocols import Group, Link
from scaledtrain.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from scaledtrain.checkpoint.part import Owner

__all__ = ["Found", "Memory", "neighbours"]

_logger = logging.getLogger(__name__)

_KEPT = 2  # steps: while one is being written the one before is whole
_STEP = re.compile(r"([0-9a-f]+)-step-(\d{9,})")
_PART = re.compile(r"rank-(\d{5,})\.json")


def neighbours(rank: int, size: int) -> list[int]:
    """The ranks that keep each other's parts, that rank among them.

    They are half of all ranks apart, and so on different hosts if there are several.

    Example:
        >>> [neighbours(rank, 5) for rank in range(5)]
        [[0, 2, 4], [1, 3], [0, 2, 4], [1, 3], [0, 2, 4]]
    """
    half = max(size // 2, 1)
    return list(range(rank % half, size, half))


class Found(NamedTuple):
    """A state that was put together from what hosts had in memory."""

    saved: SavedStep
    told: str
    """Whose copies it is from."""


@dataclass(frozen=True)
class _Held:
    """What one holder has of one step."""

    session: str
    holder: int
    manifest: Manifest
    path: Path | None = None  # on this host; None: on another one

    @property
    def key(self) -> tuple[int, str]:
        return self.manifest.step, self.session

    @property
    def parts(self) -> set[int]:
        return {int(match[1]) for name in self.manifest.files if (match := _PART.fullmatch(name))}


class Memory:
    """Keeps copies of the newest states in this host's memory, and finds those of an earlier job.

    Args:
        folder: for all runs of this user on this host; None: in /dev/shm, or where there is none,
            in the system's place for temporary files.
        run: a word that no other run has.
        session: a word that no other job of this run has.
        link: to all ranks.
        owner: of the state: this rank.
        facts: for manifests.

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
            self._folder = own / run
            self._folder.mkdir(exist_ok=True)
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

    # Keeping

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
        final = self._folder / f"{self._session}-{name_of(step)}" / f"holder-{self._owner.rank:05d}"
        writing = self._folder / f".writing-{self._session}-{self._owner.rank}"
        contents: list[Tensor] | None = None
        try:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
            Part(self._owner, state).write(writing)
            contents = [_read(writing / name) for name in _names(self._owner.rank)]
        except OSError as error:
            self._tell(error)
        lengths = torch.tensor([-1, -1] if contents is None else [len(c) for c in contents])
        others = self._exchange(lengths, contents or [])
        try:
            if contents is not None:
                for rank, parts in others.items():
                    for name, part in zip(_names(rank), parts, strict=True):
                        _write(writing / name, part)
                self._seal(writing, final, step, [self._owner.rank, *others], evaluation)
                self._tidy(final)
        except OSError as error:
            self._tell(error)
            shutil.rmtree(writing, ignore_errors=True)

    def _tidy(self, newest: Path) -> None:
        """Remove what is older than the step before, which all ranks have: they are in this one."""
        if len(self._kept) == 1:  # of this session is enough
            for path in self._folder.iterdir():
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
            match = _STEP.fullmatch(path.parent.name)
            if match is not None and int(match[2]) > step:
                _remove(path)
        self._kept = [path for path in self._kept if path.exists()]

    def remove(self) -> None:
        """The run has been saved: no copy is needed any more."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._kept = []

    # Finding

    def newest(self, after: int) -> Found | None:
        """The newest state of which all parts are on some host, as a checkpoint. Collective.

        Args:
            after: only steps later than this are wanted.

        Raises:
            CheckpointError: on some host it cannot be put together.
        """
        group = self._link.group
        own = [held for held in self._here() if held.manifest.step > after]
        told = _gather(group, {"host": self._host(), "held": [_to_json(held) for held in own]})
        held_by = [[_from_json(each) for each in of_rank["held"]] for of_rank in told]
        parts: dict[tuple[int, str], set[int]] = {}
        about: dict[tuple[int, str], Manifest] = {}
        for held in (held for of_rank in held_by for held in of_rank):
            parts.setdefault(held.key, set()).update(held.parts)
            about[held.key] = held.manifest
        whole = [key for key, there in parts.items() if there == set(about[key].ranks)]
        if not whole:
            return None
        key = max(whole)
        mine = [held for held in own if held.key == key]
        theirs = [[held for held in of_rank if held.key == key] for of_rank in held_by]
        hosts = [of_rank["host"] for of_rank in told]
        first = hosts.index(hosts[group.rank])  # of this host: it puts all together
        target = self._folder / f".assembled-{first}"
        problems: list[str] = []

        def put(do: Callable[[], object]) -> None:
            if first == group.rank and not problems:
                try:
                    do()
                except (OSError, CheckpointError) as error:  # told when all have sent theirs
                    problems.append(str(error))

        put(partial(shutil.rmtree, target, ignore_errors=True))
        put(target.mkdir)
        files: dict[str, Written] = {}
        for part in about[key].ranks:
            files |= self._bring(part, target, put, mine, theirs)
        put(lambda: replace(about[key], files=files).write(target))
        found = next((each[0] for each in _gather(group, problems) if each), None)
        if found is not None:
            raise CheckpointError(
                f"the copies in memory of step {key[0]} cannot be put together: {found}; make room "
                "there, or set checkpointing.memory_every_steps=null to go on from the newest "
                "checkpoint on the disk"
            )
        return Found(SavedStep(key[0], target), _whose(theirs, about[key].ranks))

    def _here(self) -> list[_Held]:
        """What is on this host, and intact."""
        found = []
        for folder in sorted(self._folder.glob("*-step-*/holder-*")):
            match = _STEP.fullmatch(folder.parent.name)
            if match is None:
                continue
            damage = SavedStep(int(match[2]), folder).damage()
            if damage is None:
                holder = int(folder.name.removeprefix("holder-"))
                found.append(_Held(match[1], holder, Manifest.read(folder), folder))
            else:
                _logger.warning("a copy in memory is skipped: %s", damage)
        return found

    def _host(self) -> str:
        """A word that ranks have in common if they see the same folder."""
        boot, place = Path("/proc/sys/kernel/random/boot_id"), self._folder.stat()
        machine = boot.read_text().strip() if boot.exists() else os.uname().nodename
        return f"{machine} {place.st_dev} {place.st_ino}"

    def _bring(
        self,
        part: int,
        target: Path,
        put: Callable[[Callable[[], object]], None],
        mine: Sequence[_Held],
        theirs: Sequence[Sequence[_Held]],
    ) -> dict[str, Written]:
        """Bring the files of a part to the target of each host, by `put`; returns them."""
        group = self._link.group
        having = [any(part in held.parts for held in of_rank) for of_rank in theirs]
        source = having.index(True)
        files = next(h.manifest.files for h in theirs[source] if part in h.parts)
        here = next((held.path for held in mine if part in held.parts), None)
        names = _names(part)
        for name in names:
            content = torch.zeros(files[name].bytes, dtype=torch.uint8)
            if not all(having):
                if group.rank == source and here is not None:
                    content = _read(here / name)
                group.broadcast([content], source)
            if here is not None:
                put(partial(_link, here / name, target / name))
            else:
                put(partial(_write_sent, target / name, content, files[name]))
        return {name: files[name] for name in names}


def _link(here: Path, path: Path) -> None:
    try:
        os.link(here, path)
    except OSError:  # not on every file system
        shutil.copyfile(here, path)


def _write_sent(path: Path, content: Tensor, expected: Written) -> None:
    if _write(path, content) != expected:
        raise CheckpointError(f"{path}, sent from another host, came damaged")


def _remove(holder: Path) -> None:
    shutil.rmtree(holder, ignore_errors=True)
    with suppress(OSError):  # others still have something there
        holder.parent.rmdir()


def _whose(theirs: Sequence[Sequence[_Held]], ranks: Sequence[int]) -> str:
    """Say which parts are copies, and whose."""
    holders: dict[int, list[int]] = {}
    for held in (held for of_rank in theirs for held in of_rank):
        for part in held.parts:
            holders.setdefault(part, []).append(held.holder)
    copies = [
        f"rank {holders[part][0]}'s copy of rank {part}"
        for part in ranks
        if part not in holders[part]
    ]
    return ", ".join(copies) or "all ranks' own copies"


def _names(rank: int) -> tuple[str, str]:
    return f"rank-{rank:05d}.json", f"rank-{rank:05d}.safetensors"


def _read(path: Path) -> Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8))


def _write(path: Path, content: Tensor) -> Written:
    return write_bytes(path, content.numpy().data)


def _to_json(held: _Held) -> dict[str, Any]:
    content = asdict(held.manifest)
    content["ranks"] = list(held.manifest.ranks)
    return {"session": held.session, "holder": held.holder, "manifest": content}


def _from_json(told: Mapping[str, Any]) -> _Held:
    content = dict(told["manifest"])
    content["files"] = {name: Written(*file) for name, file in content["files"].items()}
    return _Held(told["session"], told["holder"], Manifest(**content))


def _gather(group: Group, value: Any) -> list[Any]:
    """What every rank tells, by rank."""
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [told[0] for told in group.all_gather([torch.tensor([len(content)])])]
    buffer = torch.zeros(max(int(n) for n in lengths), dtype=torch.uint8)
    buffer[: len(content)] = content
    told = group.all_gather([buffer])
    return [
        json.loads(text[: int(n)].numpy().tobytes())
        for (text,), n in zip(told, lengths, strict=True)
    ]
