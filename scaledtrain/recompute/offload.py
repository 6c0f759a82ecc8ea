"""Somewhere else for tensors that are not needed for a while: the host's memory, or a file."""

from __future__ import annotations

import ctypes
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scaledtrain.errors import ConfigError

__all__ = ["DiskStore", "HostStore", "Offload", "Read", "Store", "held", "storage_key"]

Read = Callable[[], Tensor]

_SMALL_BYTES = 2**14  # the way there and back takes as long as for twenty times as many


class Store(ABC):
    """Takes tensors, and gives equal ones back: the same values, shape and strides."""

    @abstractmethod
    def put(self, tensor: Tensor) -> Read:
        """Write a tensor.

        Returns:
            What reads it, as often as it is called. Once nobody has it any more, its place is free.
        """


class HostStore(Store):
    """Page-locked memory of the host, for tensors of a GPU."""

    def put(self, tensor: Tensor) -> Read:
        """Copy, in the order of the current stream; nobody waits."""
        if not _is_dense(tensor) or not tensor.is_cuda:
            return lambda: tensor
        device = tensor.device
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        copy.copy_(tensor.detach(), non_blocking=True)
        return lambda: copy.to(device, non_blocking=True)


class DiskStore(Store):
    """A file that has no name, so that nothing is left of it, whatever ends the process.

    What is written stays in the operating system's page cache as long as there is room; it is not
    memory of the process.

    Args:
        folder: in which file system; None: that of temporary files.

    Raises:
        ConfigError: no file can be made there; or, when a tensor is written, the disk is full.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder or tempfile.gettempdir()
        try:
            self._file = _File(self._folder)
        except OSError as error:
            raise ConfigError(
                f"activations cannot be offloaded to {self._folder}: {error}; name a folder that "
                "can be written to, or leave offloading out"
            ) from error
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # places by size
        self._process = os.getpid()

    def put(self, tensor: Tensor) -> Read:
        """Write; what is not dense in memory is kept as it is."""
        if not _is_dense(tensor) or not tensor.numel():
            return lambda: tensor
        if self._process != os.getpid():  # it was forked, and the file is the parent's
            self.__init__(self._folder)  # type: ignore[misc]
        host = tensor.detach().cpu()
        n_bytes = host.numel() * host.element_size()
        if self._free[n_bytes]:
            place = self._free[n_bytes].pop()
        else:
            place, self._end = self._end, self._end + n_bytes
        written = _Written(self._file, place, tensor)
        weakref.finalize(written, self._free[n_bytes].append, place)
        try:
            _all_of(os.pwrite, self._file.number, _memory(host), place)
        except OSError as error:
            raise ConfigError(
                f"{n_bytes} bytes of activations cannot be offloaded to {self._folder}, after "
                f"{self._end} bytes: {error}; make room, name another folder, or leave offloading "
                "out"
            ) from error
        return written


class _File:
    """A file without a name, which is there as long as this is."""

    def __init__(self, folder: str) -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            self.number = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.number)


class _Written:
    """A tensor in a file."""

    def __init__(self, file: _File, place: int, tensor: Tensor) -> None:
        self._file = file
        self._place = place
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._dtype, self._device = tensor.dtype, tensor.device

    def __call__(self) -> Tensor:
        host = torch.empty_strided(self._shape, self._stride, dtype=self._dtype)
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
    return type(tensor) is Tensor and tensor.layout == torch.strided


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


def storage_key(tensor: Tensor) -> int:
    """The same for views of the same memory, as long as that is there."""
    key: int = tensor.untyped_storage()._cdata
    return key


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """A context in which what is saved for the backward pass goes to a store meanwhile.

    A piece of memory goes there once, as a whole, however many of the saved tensors are views of
    it, and is read once for those of them that are needed at the same time.

    Args:
        store: where to.
        stays: tensors that are there anyway; nor do views of them go.
        smallest: bytes; fewer than these stay, too.

    Attributes:
        held: what was saved and does not go, by `storage_key`.
    """

    def __init__(self, store: Store, stays: Iterable[Tensor] = (), smallest: int = 0) -> None:
        super().__init__(self._pack, lambda read: read())
        self._store = store
        self._stays = {storage_key(t) for t in stays}
        self._smallest = smallest
        self._written: dict[tuple[int, int], _WrittenStorage] = {}
        self.held: set[int] = set()

    @classmethod
    def of_block(cls, store: Store, block: nn.Module, others: Iterable[Tensor]) -> Offload:
        """What a block saves, but for parameters, buffers, arguments beside the first, and crumbs.

        Args:
            store: where to.
            block: whose forward pass runs inside.
            others: those arguments.
        """
        return cls(store, (*block.parameters(), *block.buffers(), *others), _SMALL_BYTES)

    def _pack(self, tensor: Tensor) -> Read:
        if not self._goes(tensor):
            self.held.add(storage_key(tensor))
            return held(tensor)
        key = storage_key(tensor), tensor._version
        if key not in self._written:
            storage = tensor.untyped_storage()
            self._written[key] = _WrittenStorage(self._store.put(_elements(storage, torch.uint8)))
            # Another storage may come to have its place in memory.
            self._written[key].source = weakref.ref(storage, lambda _: self._written.pop(key, None))
        return _View(self._written[key], tensor)

    def _goes(self, tensor: Tensor) -> bool:
        if not _is_plain(tensor) or tensor.is_conj() or tensor.is_neg():
            return False
        is_small = tensor.untyped_storage().nbytes() < self._smallest
        return not is_small and storage_key(tensor) not in self._stays


class _WrittenStorage:
    """A piece of memory that is in a store.

    Attributes:
        source: from where; held for what happens when it is given up.
    """

    def __init__(self, read: Read) -> None:
        self.source: weakref.ref[torch.UntypedStorage] | None = None
        self._read = read
        self._here: weakref.ref[torch.UntypedStorage] | None = None

    def __call__(self) -> torch.UntypedStorage:
        storage = None if self._here is None else self._here()
        if storage is None:
            storage = self._read().untyped_storage()
            self._here = weakref.ref(storage)
        return storage


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
