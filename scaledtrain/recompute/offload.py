"""Somewhere else for tensors that are not needed for a while: the host's memory, or a file."""

from __future__ import annotations

import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from mmap import ALLOCATIONGRANULARITY, mmap
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.live_bytes import storage_key

__all__ = [
    "DiskStore",
    "HostStore",
    "Offload",
    "Read",
    "Store",
    "held",
    "storages",
    "storages_of",
]

Read = Callable[[], Tensor]

_ALIGNMENT = 64  # bytes, as of torch's own memory
_DOUBLES_TO = 128 * 2**20  # bytes of a file that grows; then by half of it, or an eighth of all
_CRUMB = 16  # what has so many times fewer bytes than a block's input
_MOST_AROUND = 4  # times the bytes of a saved tensor: larger memory does not go for its sake


class Store(ABC):
    """Takes tensors, and gives equal ones back: the same values, shape and strides."""

    @abstractmethod
    def put(self, tensor: Tensor) -> Read:
        """Write a tensor.

        Returns:
            What reads it, as often as it is called. Once nobody has it any more, its place is free.
        """

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor would go somewhere else."""
        return True


class HostStore(Store):
    """Page-locked memory of the host, for tensors of a GPU."""

    def put(self, tensor: Tensor) -> Read:
        """Copy, in the order of the current stream; nobody waits."""
        if not _is_dense(tensor) or not tensor.is_cuda:
            return held(tensor)
        device = tensor.device
        tensor.record_stream(torch.cuda.current_stream(device))  # it may be given up at once
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        copy.copy_(tensor.detach(), non_blocking=True)
        return lambda: copy.to(device, non_blocking=True)

    def takes(self, tensor: Tensor) -> bool:
        """If a GPU has it."""
        return tensor.is_cuda


class DiskStore(Store):
    """A file that has no name, so that nothing is left of it, whatever ends the process.

    It is mapped into memory, but its pages are no memory of the process's own: as long as there is
    room the operating system keeps them in its cache, and it takes them back when it needs room. A
    place that is free again is taken by as many bytes; the file begins anew when nothing is in it
    any more, as between two steps.

    A full disk is noticed before a tensor is written, where the file system overwrites a file in
    place; on one that does not (btrfs, ZFS) it may end the process (SIGBUS).

    Args:
        folder: in which file system; None: that of temporary files.

    Raises:
        ConfigError: no file can be made or mapped there; or, when a tensor is written, the disk is
            full.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder or tempfile.gettempdir()
        self._file = _File(self._folder)

    def put(self, tensor: Tensor) -> Read:
        """Write; what is not dense in memory is kept as it is."""
        if not _is_dense(tensor) or not tensor.numel():
            return held(tensor)
        if self._file.process != os.getpid():  # it was forked, and the file is the parent's
            self._file = _File(self._folder)
        written = _Written(self._file.take(tensor.numel() * tensor.element_size()), tensor)
        written.there().copy_(tensor.detach())
        return written


class _Place(NamedTuple):
    part: int
    start: int


class _File:
    """A file without a name, which one process writes to.

    It grows by parts, each of which is mapped as a whole, until nothing is in it: then they become
    one. It never becomes smaller. Any thread may take a place in it, or give one back, also while
    another is taken.

    Args:
        folder: in which file system.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.process = os.getpid()
        self._lock = RLock()
        self._parts: list[mmap] = []
        self._n_bytes = 0
        self._n_taken = 0
        self._next = _Place(0, 0)
        self._free: defaultdict[int, list[_Place]] = defaultdict(list)  # by size
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                self.number = os.dup(file.fileno())
            weakref.finalize(self, os.close, self.number)
            self._grow(ALLOCATIONGRANULARITY)
        except OSError as error:
            raise ConfigError(
                f"activations cannot be offloaded to {folder}: {error}; name a folder where files "
                "can be written and mapped, or leave offloading out"
            ) from error

    def take(self, n_bytes: int) -> Tensor:
        """So many bytes of it, which are free again when nobody has them any more."""
        room = -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._n_taken += 1  # first: garbage that is collected meanwhile gives places back
            try:
                if self._n_taken == 1:
                    self._begin_anew()
                free = self._free.get(room)
                place = free.pop() if free else self._behind_all(room)
            except OSError as error:
                self._n_taken -= 1
                raise ConfigError(
                    f"{n_bytes} bytes of activations cannot be offloaded to {self._folder}, after "
                    f"{self._n_bytes} bytes: {error}; make room, name another folder, or leave "
                    "offloading out"
                ) from error
            part = self._parts[place.part]
            memory = torch.frombuffer(part, dtype=torch.uint8, count=n_bytes, offset=place.start)
        given = weakref.finalize(memory.untyped_storage(), self._give_back, room, place)
        given.atexit = False  # a thread may still work with it
        return memory

    def _begin_anew(self) -> None:
        """Nothing is in it, and other sizes may follow, as of longer sequences."""
        self._next = _Place(0, 0)
        self._free.clear()
        if len(self._parts) > 1:  # what does not fit into any of them may fit into one
            self._parts.clear()
            self._parts.append(mmap(self.number, self._n_bytes))

    def _behind_all(self, room: int) -> _Place:
        part, start = self._next
        while part < len(self._parts) and start + room > len(self._parts[part]):
            part, start = part + 1, 0
        if part == len(self._parts):
            self._grow(room)
        self._next = _Place(part, start + room)
        return _Place(part, start)

    def _grow(self, room: int) -> None:
        n_bytes = max(room, min(self._n_bytes, _DOUBLES_TO // 2), self._n_bytes // 8)
        n_bytes = -(-n_bytes // ALLOCATIONGRANULARITY) * ALLOCATIONGRANULARITY
        try:
            _write_zeros(self.number, self._n_bytes, n_bytes)
            self._parts.append(mmap(self.number, n_bytes, offset=self._n_bytes))
        except OSError:
            os.ftruncate(self.number, self._n_bytes)
            raise
        self._n_bytes += n_bytes

    def _give_back(self, room: int, place: _Place) -> None:
        with self._lock:
            self._n_taken -= 1
            self._free[room].append(place)


def _write_zeros(file: int, end: int, n_bytes: int) -> None:
    """Make a file longer, and hold the room: without it, a page would end who touches it."""
    zeros = memoryview(bytes(min(n_bytes, 2**20)))
    written = 0
    while written < n_bytes:
        written += os.pwrite(file, zeros[: n_bytes - written], end + written)


class _Written:
    """A tensor in a file.

    Args:
        memory: the place.
        tensor: that is written there; for its type.
    """

    def __init__(self, memory: Tensor, tensor: Tensor) -> None:
        self.memory = memory
        self._dtype, self._shape, self._stride = tensor.dtype, tensor.shape, tensor.stride()
        self.device = tensor.device

    def there(self) -> Tensor:
        """It, in its place."""
        return self.memory.view(self._dtype).as_strided(self._shape, self._stride)

    def __call__(self) -> Tensor:
        return self.there().to(self.device, copy=True)


def _is_dense(tensor: Tensor) -> bool:
    """Its elements fill its memory, in whatever order."""
    if not _is_plain(tensor):
        return False
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != filled:
                return False
            filled *= size
    return True


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_nested


def held(tensor: Tensor) -> Read:
    """What gives a tensor that stays where it is, unless its values have changed."""
    kept, version = tensor.detach(), tensor._version

    def read() -> Tensor:
        if kept._version != version:
            raise RuntimeError(
                "what is kept of a block was changed by an in-place operation after it was computed"
            )
        return kept

    return read


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Keys of all those that have plain memory."""
    return {storage_key(t) for t in tensors if t.layout == torch.strided and not t.is_nested}


def storages_of(module: nn.Module) -> set[int]:
    """Keys of a module's parameters and buffers, as they are now."""
    return storages((*module.parameters(), *module.buffers()))


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """A context in which what is saved for the backward pass goes to a store meanwhile.

    A piece of memory goes there once, however many of the saved tensors are views of it, and is
    read once for those of them that one backward pass needs at the same time; a small part of
    something large goes by itself. What is changed in place afterwards is read as it was when it
    was saved; of changes behind autograd's back (``tensor.data``) between two saves of the same
    memory nothing is known.

    Args:
        store: where to.
        stays: keys of memory that is there anyway, see `storages`.
        smallest: bytes; memory of fewer than these stays, too.
        lends: a backward pass that does not keep its graph may be given memory of the store's own,
            as nobody writes into what is saved.

    Attributes:
        stayed: keys of memory that was saved and has not gone.
    """

    def __init__(
        self,
        store: Store,
        stays: Collection[int] = (),
        smallest: int = 0,
        lends: bool = False,
    ) -> None:
        self.stayed: set[int] = set()
        # Not a method: this and its hook would be garbage only together.
        pack = _Pack(store, stays, smallest, lends, self.stayed)
        super().__init__(pack, lambda read: read())

    @classmethod
    def of_block(cls, store: Store, stays: Collection[int], x: Tensor) -> Offload:
        """All that a block saves, but for crumbs: memory much smaller than its input.

        They stay whatever the size of a batch is, so that a smaller one needs no more. 16-bit
        copies of weights, which autocast makes, are the block's own, and go.

        Args:
            store: where to.
            stays: keys of parameters, buffers, and arguments beside the first.
            x: the first argument.
        """
        return cls(store, stays, x.numel() * x.element_size() // _CRUMB, lends=True)


class _Pack:
    """What is done with a tensor that is saved; see `Offload`."""

    def __init__(
        self,
        store: Store,
        stays: Collection[int],
        smallest: int,
        lends: bool,
        stayed: set[int],
    ) -> None:
        self._store = store
        self._lends = lends
        self._stays = stays
        self._smallest = smallest
        self._stayed = stayed
        # Whoever may read it has it, and nobody else.
        self._written: WeakValueDictionary[_Key, _WrittenStorage] = WeakValueDictionary()

    def __call__(self, tensor: Tensor) -> Read:
        if not self._goes(tensor):
            self._stayed.update(storages([tensor]))
            return held(tensor)
        key, storage = _key(tensor), tensor.untyped_storage()
        written = self._written.get(key)
        if written is None:
            n_bytes = tensor.numel() * tensor.element_size()
            if storage.nbytes() > _MOST_AROUND * n_bytes and _is_dense(tensor):
                return self._store.put(tensor)
            written = self._write(key, storage)
        return _View(written, tensor)

    def _goes(self, tensor: Tensor) -> bool:
        if not _is_plain(tensor) or tensor.is_conj() or tensor.is_neg() or not tensor.numel():
            return False
        if not self._store.takes(tensor) or storage_key(tensor) in self._stays:
            return False
        return tensor.untyped_storage().nbytes() >= self._smallest

    def _write(self, key: _Key, storage: torch.UntypedStorage) -> _WrittenStorage:
        all_written = self._written

        def given_up(_: object) -> None:
            all_written.pop(key, None)  # other memory may come to have the same key

        read = self._store.put(_elements(storage, torch.uint8))
        source = weakref.ref(storage, given_up)
        all_written[key] = written = _WrittenStorage(read, self._lends, source)
        return written


_Key = tuple[int, ...]


def _key(tensor: Tensor) -> _Key:
    """The same for views of the same memory with the same values.

    What autograd does not know to be a view of something counts changes by itself, as the parts
    do into which a recurrent layer cuts its gates: then also its place is a part of the key.
    """
    of = tensor._base if tensor._base is not None else tensor
    return (storage_key(tensor), tensor._version, of.storage_offset(), *of.shape, *of.stride())


class _WrittenStorage:
    """A piece of memory that is in a store.

    Args:
        read: it as a tensor.
        lends: see `Offload`.
        source: from where; kept for what happens when that is given up.
    """

    def __init__(self, read: Read, lends: bool, source: weakref.ref[torch.UntypedStorage]) -> None:
        self._read = read
        self._source = source
        self._here: tuple[Any, weakref.ref[torch.UntypedStorage]] | None = None
        self._lent: torch.UntypedStorage | None = None
        if lends and isinstance(read, _Written) and read.device.type == "cpu":
            self._lent = read.memory.untyped_storage()
        self._given: list[Tensor] = []

    def view(self, dtype: torch.dtype, *place: Any) -> Tensor:
        """A part of it, for a backward pass."""
        if self._lent is None or torch._C._autograd._get_current_graph_task_keep_graph():
            return _elements(self._copy(), dtype, *place)
        # Held here, too, so that it does not become a parameter's gradient, but a copy of it does.
        self._given.append(_elements(self._lent, dtype, *place))
        return self._given[-1]

    def _copy(self) -> torch.UntypedStorage:
        """For all that the same backward pass does on the same stream.

        For another one it would not do: a gradient may have become of it.
        """
        here, reader = self._here, (torch._C._current_graph_task_id(), _stream())
        storage = here[1]() if here is not None and here[0] == reader else None
        if storage is None:
            storage = self._read().untyped_storage()
            if reader[0] != -1:  # else no backward pass is going on
                self._here = reader, weakref.ref(storage)
        return storage


def _stream() -> Any:
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


class _View:
    """A saved tensor whose memory is in a store."""

    def __init__(self, storage: _WrittenStorage, tensor: Tensor) -> None:
        self._storage = storage
        self._dtype = tensor.dtype
        self._place = tensor.storage_offset(), tensor.shape, tensor.stride()

    def __call__(self) -> Tensor:
        return self._storage.view(self._dtype, *self._place)


def _elements(storage: torch.UntypedStorage, dtype: torch.dtype, *place: Any) -> Tensor:
    """Memory as a tensor: all of it, or offset, shape and strides."""
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, *place)
