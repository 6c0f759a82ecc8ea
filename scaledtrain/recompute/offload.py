"""Somewhere else for tensors that are not needed for a while: the host's memory, or a file."""

from __future__ import annotations

import ctypes
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from threading import RLock
from typing import Any
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

    What is written stays in the operating system's page cache as long as there is room; it is not
    memory of the process. A place that is free again is taken by as many bytes; the file begins
    anew when nothing is in it any more, as between two steps.

    Args:
        folder: in which file system; None: that of temporary files.

    Raises:
        ConfigError: no file can be made there; or, when a tensor is written, the disk is full.
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
        file = self._file
        host = tensor.detach().cpu()
        n_bytes = host.numel() * host.element_size()
        place = file.places.take(n_bytes)
        written = _Written(file, place, tensor)
        weakref.finalize(written, file.places.give_back, n_bytes, place)
        try:
            _all_of(os.pwrite, file.number, _memory(host), place)
        except OSError as error:
            raise ConfigError(
                f"{n_bytes} bytes of activations cannot be offloaded to {self._folder}, after "
                f"{place} bytes: {error}; make room, name another folder, or leave offloading "
                "out"
            ) from error
        return written


class _Places:
    """Which parts of a file are free. Any thread may give one back, also while another is taken."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._taken = 0
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # by size

    def take(self, n_bytes: int) -> int:
        """Where so many bytes can be written to."""
        with self._lock:
            self._taken += 1
            if free := self._free.get(n_bytes):
                return free.pop()
            place, self._end = self._end, self._end + n_bytes
            return place

    def give_back(self, n_bytes: int, place: int) -> None:
        """Nobody reads it any more."""
        with self._lock:
            self._taken -= 1
            self._free[n_bytes].append(place)
            if not self._taken:  # other sizes may follow, as of longer sequences
                self._end = 0
                self._free.clear()


class _File:
    """A file without a name, which is there as long as this is, and one process writes to."""

    def __init__(self, folder: str) -> None:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                self.number = os.dup(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"activations cannot be offloaded to {folder}: {error}; name a folder that can be "
                "written to, or leave offloading out"
            ) from error
        weakref.finalize(self, os.close, self.number)
        self.places = _Places()
        self.process = os.getpid()


class _Written:
    """A tensor in a file."""

    def __init__(self, file: _File, place: int, tensor: Tensor) -> None:
        self._file = file
        self._place = place
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._dtype, self._device = tensor.dtype, tensor.device

    def __call__(self) -> Tensor:
        host = torch.empty_strided(self._shape, self._stride, dtype=self._dtype, device="cpu")
        _all_of(_read, self._file.number, _memory(host), self._place)
        return host.to(self._device)


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


def _memory(tensor: Tensor) -> memoryview:
    n_bytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * n_bytes).from_address(tensor.data_ptr())).cast("B")


def _read(file: int, into: memoryview, place: int) -> int:
    return os.preadv(file, [into], place)


def _all_of(
    move: Callable[[int, memoryview, int], int], file: int, memory: memoryview, place: int
) -> None:
    """System calls move 2 GiB at most, and less if they like."""
    while memory:
        moved = move(file, memory, place)
        if moved == 0:
            raise OSError(f"the file ends at {place}")
        memory, place = memory[moved:], place + moved


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

    Attributes:
        stayed: keys of memory that was saved and has not gone.
    """

    def __init__(self, store: Store, stays: Collection[int] = (), smallest: int = 0) -> None:
        self.stayed: set[int] = set()
        # Not a method: this and its hook would be garbage only together.
        super().__init__(_Pack(store, stays, smallest, self.stayed), lambda read: read())

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
        return cls(store, stays, x.numel() * x.element_size() // _CRUMB)


class _Pack:
    """What is done with a tensor that is saved; see `Offload`."""

    def __init__(
        self, store: Store, stays: Collection[int], smallest: int, stayed: set[int]
    ) -> None:
        self._store = store
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
        all_written[key] = written = _WrittenStorage(read, weakref.ref(storage, given_up))
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
        source: from where; kept for what happens when that is given up.
    """

    def __init__(self, read: Read, source: weakref.ref[torch.UntypedStorage]) -> None:
        self._read = read
        self._source = source
        self._here: tuple[Any, weakref.ref[torch.UntypedStorage]] | None = None

    def __call__(self) -> torch.UntypedStorage:
        """The memory, for all that the same backward pass does on the same stream.

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
        return _elements(self._storage(), self._dtype, *self._place)


def _elements(storage: torch.UntypedStorage, dtype: torch.dtype, *place: Any) -> Tensor:
    """Memory as a tensor: all of it, or offset, shape and strides."""
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, *place)
