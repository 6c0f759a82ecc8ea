"""Somewhere else for tensors that are not needed for a while: the host's memory, or a file."""

from __future__ import annotations

import ctypes
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from scaledtrain.errors import ConfigError

__all__ = ["DiskStore", "HostStore", "Offload", "Store"]


class Store(ABC):
    """Takes tensors, and gives equal ones back: the same values, shape and strides."""

    @abstractmethod
    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Write a tensor.

        Returns:
            What reads it, as often as it is called. Once nobody has it any more, its place is free.
        """


class HostStore(Store):
    """Page-locked memory of the host, for tensors of a GPU."""

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
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

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
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
    if type(tensor) is not Tensor or tensor.layout != torch.strided:
        return False
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


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


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """A context in which what is saved for the backward pass goes to a store meanwhile."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.put, lambda read: read())
