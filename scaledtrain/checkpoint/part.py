"""What one rank writes into a checkpoint, and the reader with which torch's DCP loads it anywhere.

The tensors of a rank are planned by ``torch.distributed.checkpoint``: of a DTensor a rank writes
its own chunk, and who reads takes from all chunks what its own layout needs. Of DCP's two formats
the one would be pickle; here a rank's tensors are safetensors, and all else is JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor
from torch.futures import Future

from scaledtrain.checkpoint.folder import Manifest
from scaledtrain.checkpoint.tensor_file import DTYPES, Written, write_bytes, write_tensors
from scaledtrain.checkpoint.tree import flatten, restore, tensor_names
from scaledtrain.errors import CheckpointError

__all__ = ["CheckpointReader", "Owner", "Part", "files_of", "load_rank", "read_tensors"]

_MODEL, _UPDATER = "model/", "strategy/updater/"
_OPTIMIZER_STATE = "strategy/updater/optimizer/state/"

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def _stem(rank: int) -> str:
    return f"rank-{rank:05d}"


class Owner(NamedTuple):
    """Whose state it is, and what others have the same.

    Args:
        rank: of all.
        ranks: how many there are.
        replica: of this rank.
        pieces: ranks that a replica has.
        stages: of these, ranks that have different stages of the model.
        parameters: the model's, by name.
        is_equal: whether all replicas have the same parameters and optimizer.
        elsewhere: names of parameters that another rank of the replica has as well, and writes.
        whole: from the name of a parameter and a tensor that is divided as it is to a DTensor.
    """

    rank: int = 0
    ranks: int = 1
    replica: int = 0
    pieces: int = 1
    stages: int = 1
    parameters: Mapping[str, Tensor] = MappingProxyType({})
    is_equal: bool = False
    whole: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    elsewhere: Collection[str] = ()

    def is_elsewhere(self, name: str) -> bool:
        """Whether a tensor is, or belongs to, a parameter that another rank writes."""
        return _parameter_in(name) in self.elsewhere

    def placed(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the state as a part of a whole one, if it is one."""
        parameter = _parameter_of(name)
        return tensor if parameter is None else self.whole(parameter, tensor)

    def shares(self, name: str, tensor: Tensor) -> bool:
        """Whether all replicas have the same, of which this rank has all or a chunk."""
        if not self.is_equal:
            return False
        if name.startswith(_MODEL):
            return name.removeprefix(_MODEL) in self.parameters
        if self.pieces == 1:
            return name.startswith(_UPDATER)
        parameter = _parameter_of(name)
        if parameter is None:
            return False
        is_divided = isinstance(self.parameters.get(parameter), DTensor)
        return not is_divided or isinstance(tensor, DTensor) or tensor.dim() == 0

    def part(self, parameter: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Memory for this rank's part of a tensor of that size; None: it is not divided."""
        whole = self.parameters[parameter]
        if not isinstance(whole, DTensor) or whole.shape != size:
            return None
        return self.whole(parameter, torch.empty_like(whole.to_local(), dtype=dtype))

    def name(self, name: str, tensor: Tensor) -> str:
        """Under which it is written."""
        if self.shares(name, tensor):
            return name
        if isinstance(tensor, DTensor):  # a chunk of what the ranks of this replica have together
            return f"replica-{self.replica:05d}/{name}"
        return f"{_stem(self.rank)}/{name}"


def _parameter_of(name: str) -> str | None:
    """Of which a tensor is the state, in the optimizer on the replica."""
    if not name.startswith(_OPTIMIZER_STATE):
        return None
    return name.removeprefix(_OPTIMIZER_STATE).rpartition("/")[0]


class Part:
    """The state of one rank, ready to be written by any thread.

    Args:
        owner: whose it is.
        state: its tensors must not change any more.
    """

    def __init__(self, owner: Owner, state: Any) -> None:
        self._rank = owner.rank
        self._skeleton, flat = flatten(state)
        tensors = {name: owner.placed(name, tensor) for name, tensor in flat.items()}
        shared = {name for name, tensor in tensors.items() if owner.shares(name, tensor)}
        plain = {name for name in shared if not isinstance(tensors[name], DTensor)}
        # What a rank has whole, those have, too, that have the same piece of other replicas.
        sizes = {name: tensors[name].nbytes for name in plain if not owner.is_elsewhere(name)}
        kept = _share_out(sizes, owner.ranks // owner.pieces)[owner.replica]
        if owner.replica == 0:  # of what is divided its ranks have all chunks
            kept |= shared - plain
        names = {name: owner.name(name, tensor) for name, tensor in tensors.items()}
        _rename(self._skeleton, names)
        self._tensors = {
            names[name]: tensor
            for name, tensor in tensors.items()
            if name not in shared or name in kept
        }

    def write(self, folder: Path) -> None:
        """Write two files; they are on the disk when this returns.

        Raises:
            OSError: the disk is full, or the folder is not there.
        """
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(self._tensors, is_coordinator=True)
        items = planner.create_local_plan().items
        table: dict[str, Any] = {}
        chunks: list[tuple[str, Tensor]] = []
        for item in items:
            about, name = item.tensor_data, item.index.fqn
            assert about is not None
            key = f"{name}@{len(chunks)}"
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor)
            entry = {"dtype": DTYPES.get(value.dtype), "shape": list(about.size), "chunks": []}
            place = [list(about.chunk.offsets), list(about.chunk.sizes), key]
            table.setdefault(name, entry)["chunks"].append(place)
            chunks.append((key, value.contiguous()))
        chunks.sort(key=lambda chunk: -chunk[1].element_size())  # so that each is aligned
        file = f"{_stem(self._rank)}.safetensors"
        written = write_tensors(folder / file, chunks)
        index = {
            "files": {file: written._asdict()},
            "state": self._skeleton,
            "tensors": table,
        }
        write_bytes(folder / f"{_stem(self._rank)}.json", json.dumps(index).encode())


def _share_out(sizes: Mapping[str, int], ranks: int) -> list[set[str]]:
    """Who writes what of that which all have: the largest first, to who has least."""
    loads, shares = [0] * ranks, [set[str]() for _ in range(ranks)]
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        rank = loads.index(min(loads))
        loads[rank] += size
        shares[rank].add(name)
    return shares


def _rename(skeleton: Any, names: Mapping[str, str]) -> None:
    if isinstance(skeleton, dict):
        for kind, content in skeleton.items():
            if kind in ("tensor", "array"):
                skeleton[kind] = names[content]
            else:
                _rename(content, names)
    elif isinstance(skeleton, list):
        for item in skeleton:
            _rename(item, names)


def files_of(folder: Path, rank: int) -> dict[str, Written]:
    """What `Part.write` wrote for that rank."""
    path = folder / f"{_stem(rank)}.json"
    content = path.read_bytes()
    files = {name: Written(**file) for name, file in json.loads(content)["files"].items()}
    return {**files, path.name: Written(len(content), hashlib.sha256(content).hexdigest())}


class _Place(NamedTuple):
    file: str
    key: str


class CheckpointReader(dcp.StorageReader):
    """Lets ``torch.distributed.checkpoint.load`` read a checkpoint, into any layout of the tensors.

    Nothing in it is unpickled, and no name in it is used as that of a file.

    Args:
        path: of the checkpoint, the folder of one step.

    Raises:
        CheckpointError: it is damaged.

    Example: the parameters of a model, sharded or not::

        weights = {f"model/{name}": p for name, p in model.state_dict().items()}
        dcp.load(weights, storage_reader=CheckpointReader("runs/mine/checkpoints/step-000000120"))
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self.manifest = Manifest.read(self._path)
        self._places: dict[MetadataIndex, _Place] = {}
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self._skeletons: dict[int, Any] = {}
        for rank in self.manifest.ranks:
            file = self._path / f"{_stem(rank)}.json"
            try:
                index = json.loads(file.read_bytes())
                self._skeletons[rank] = index["state"]
                for name, entry in index["tensors"].items():
                    self._add(name, entry, f"{_stem(rank)}.safetensors")
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from error
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"{file} is damaged: {error!r}") from error

    def _add(self, name: str, entry: Mapping[str, Any], file: str) -> None:
        size = torch.Size(entry["shape"])
        about = self.tensors.setdefault(
            name, TensorStorageMetadata(TensorProperties(_DTYPES[entry["dtype"]]), size, [])
        )
        for offsets, sizes, key in entry["chunks"]:
            about.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            self._places[MetadataIndex(name, offsets)] = _Place(file, key)

    def skeleton(self, rank: int) -> Any:
        """Of the state of that rank, or of the first one if that took no part."""
        return self._skeletons.get(rank, self._skeletons[self.manifest.ranks[0]])

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do: a reader is of one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Names, shapes and chunks of all tensors."""
        return Metadata(dict(self.tensors))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether it is a folder."""
        return Path(checkpoint_id).is_dir()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what is asked for out of the files."""
        with ExitStack() as stack:
            open_files: dict[str, Any] = {}
            for item in plan.items:
                file, key = self._places[item.storage_index]
                try:
                    if file not in open_files:
                        opened = safe_open(str(self._path / file), framework="pt")
                        open_files[file] = stack.enter_context(opened)
                    if item.lengths:
                        box = zip(item.storage_offsets, item.lengths, strict=True)
                        part = open_files[file].get_slice(key)[
                            tuple(slice(at, at + n) for at, n in box)
                        ]
                    else:
                        part = open_files[file].get_tensor(key)
                except (OSError, SafetensorError) as error:
                    raise CheckpointError(f"{self._path / file} is damaged: {error}") from error
                planner.resolve_tensor(item).detach().copy_(part)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def read_tensors(
    reader: CheckpointReader, names: Sequence[str], owner: Owner | None = None
) -> dict[str, Tensor]:
    """Tensors by name: whole, or the chunks that a rank has of them in its layout.

    Args:
        reader: of the checkpoint.
        names: as they were written.
        owner: whose layout it is; None: all tensors are whole.

    Raises:
        CheckpointError: there is no such tensor, or a file is damaged.
    """
    lacking = [name for name in names if name not in reader.tensors]
    if lacking:
        raise CheckpointError(f"the checkpoint has no tensor {lacking[0]!r}")
    into: dict[str, Tensor] = {}
    for name in names:
        about = reader.tensors[name]
        parameter = _parameter_in(name)
        part = None
        if owner is not None and parameter is not None and parameter in owner.parameters:
            part = owner.part(parameter, about.size, about.properties.dtype)
        into[name] = torch.empty(about.size, dtype=about.properties.dtype) if part is None else part
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(into, reader.read_metadata(), is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return into


def load_rank(reader: CheckpointReader, rank: int, owner: Owner | None = None) -> Any:
    """The state that a rank saved; of one that took no part, the first rank's.

    Args:
        reader: of the checkpoint.
        rank: that saved it.
        owner: in whose layout its tensors are wanted; None: all are whole.
    """
    skeleton = reader.skeleton(rank)
    tensors = read_tensors(reader, tensor_names(skeleton), owner)
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and _OPTIMIZER_STATE in name:
            tensors[name] = tensor.to_local()  # as the optimizer of this rank has it
    return restore(skeleton, tensors)


def _parameter_in(name: str) -> str | None:
    """The parameter that a tensor in a file is, or that it is divided like."""
    for prefix in (_MODEL, _OPTIMIZER_STATE):
        _, found, rest = name.partition(prefix)
        if found:
            return rest if prefix == _MODEL else rest.rpartition("/")[0]
    return None
