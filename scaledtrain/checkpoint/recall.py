"""The newest state of which the hosts of a run have all parts in memory, as a checkpoint."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scaledtrain.checkpoint.folder import Manifest, SavedStep
from scaledtrain.checkpoint.memory import COPY, files_of_part, read_file, write_file
from scaledtrain.checkpoint.tensor_file import Written
from scaledtrain.comm.protocols import Group
from scaledtrain.errors import CheckpointError

__all__ = ["Found", "recall"]

_logger = logging.getLogger(__name__)

_PART = re.compile(r"rank-(\d{5,})\.json")


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


def recall(folder: Path, group: Group, after: int) -> Found | None:
    """The newest state of which all parts are on some host, as a checkpoint. Collective.

    Args:
        folder: of the run's copies on this host.
        group: all ranks.
        after: only steps later than this are wanted.

    Raises:
        CheckpointError: on some host it cannot be put together.
    """
    own = [held for held in _here(folder) if held.manifest.step > after]
    told = _gather(group, {"host": _host(folder), "held": [_to_json(held) for held in own]})
    held_by = [[_from_json(each) for each in of_rank["held"]] for of_rank in told]
    if (newest := _newest_whole([held for of_rank in held_by for held in of_rank])) is None:
        return None
    key, about = newest.key, newest.manifest
    mine = [held for held in own if held.key == key]
    theirs = [[held for held in of_rank if held.key == key] for of_rank in held_by]
    hosts = [of_rank["host"] for of_rank in told]
    first = hosts.index(hosts[group.rank])  # of this host: it puts all together
    target = folder / f".assembled-{first}"
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
    for part in about.ranks:
        files |= _bring(group, part, target, put, mine, theirs)
    put(lambda: replace(about, files=files).write(target))
    found = next((each[0] for each in _gather(group, problems) if each), None)
    if found is not None:
        raise CheckpointError(
            f"the copies in memory of step {key[0]} cannot be put together: {found}; make room "
            "there, or set checkpointing.memory_every_steps=null to go on from the newest "
            "checkpoint on the disk"
        )
    return Found(SavedStep(key[0], target), _whose(theirs, about.ranks))


def _newest_whole(copies: Sequence[_Held]) -> _Held | None:
    """One of the copies of the newest step of which there are all parts; None: there is none."""
    parts: dict[tuple[int, str], set[int]] = {}
    for held in copies:
        parts.setdefault(held.key, set()).update(held.parts)
    whole = (held for held in copies if parts[held.key] == set(held.manifest.ranks))
    return max(whole, key=lambda held: held.key, default=None)


def _here(folder: Path) -> list[_Held]:
    """What is on this host, and intact."""
    found = []
    for path in sorted(folder.glob("*-step-*/holder-*")):
        match = COPY.fullmatch(path.parent.name)
        if match is None:
            continue
        damage = SavedStep(int(match[2]), path).damage()
        if damage is None:
            holder = int(path.name.removeprefix("holder-"))
            found.append(_Held(match[1], holder, Manifest.read(path), path))
        else:
            _logger.warning("a copy in memory is skipped: %s", damage)
    return found


def _host(folder: Path) -> str:
    """A word that ranks have in common if they see the same folder."""
    boot, place = Path("/proc/sys/kernel/random/boot_id"), folder.stat()
    machine = boot.read_text().strip() if boot.exists() else os.uname().nodename
    return f"{machine} {place.st_dev} {place.st_ino}"


def _bring(
    group: Group,
    part: int,
    target: Path,
    put: Callable[[Callable[[], object]], None],
    mine: Sequence[_Held],
    theirs: Sequence[Sequence[_Held]],
) -> dict[str, Written]:
    """Bring the files of a part to the target of each host, by `put`; returns them."""
    having = [any(part in held.parts for held in of_rank) for of_rank in theirs]
    source = having.index(True)
    files = next(h.manifest.files for h in theirs[source] if part in h.parts)
    here = next((held.path for held in mine if part in held.parts), None)
    names = files_of_part(part)
    for name in names:
        content = torch.zeros(files[name].bytes, dtype=torch.uint8)
        if not all(having):
            if group.rank == source and here is not None:
                content = read_file(here / name)
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
    if write_file(path, content) != expected:
        raise CheckpointError(f"{path}, sent from another host, came damaged")


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
