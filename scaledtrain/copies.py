"""Copies of a state that lie in the same memory again and again.

New memory is the larger part of a copy: the system clears every page of it when it is first
touched, which takes several times as long as copying into pages that are there.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Copies", "Uncopied", "copied"]


class Copies:
    """Memory for copies of one state at a time.

    Inside ``with copies:`` what `copied` returns lies in it; what it returned the last time is
    overwritten. A tensor on a GPU is copied by that into page-locked memory of the host.

    Example:
        >>> weight, copies = torch.ones(2), Copies()
        >>> with copies:
        ...     first = copied({"weight": weight, "step": 3})
        >>> weight.zero_()
        tensor([0., 0.])
        >>> first
        {'weight': tensor([1., 1.]), 'step': 3}
        >>> with copies:
        ...     second = copied([weight])
        >>> first["weight"]
        tensor([0., 0.])
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[int, bool], list[Tensor]] = defaultdict(list)  # by bytes
        self._n_taken: dict[tuple[int, bool], int] = defaultdict(int)
        self._devices: set[torch.device] = set()

    def __enter__(self) -> Copies:
        self._n_taken.clear()
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)
        for device in self._devices:  # before anybody changes what is copied
            torch.cuda.synchronize(device)
        self._devices.clear()

    def take(self, tensor: Tensor) -> Tensor:
        """A copy on the host; contiguous."""
        kind = (tensor.nbytes, tensor.is_cuda)
        if self._n_taken[kind] == len(self._memory[kind]):
            memory = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=tensor.is_cuda)
            self._memory[kind].append(memory)
        taken = self._memory[kind][self._n_taken[kind]].view(tensor.dtype).view(tensor.shape)
        self._n_taken[kind] += 1
        if tensor.is_cuda:
            self._devices.add(tensor.device)
        return taken.copy_(tensor.detach(), non_blocking=True)


class Uncopied:
    """Inside, `copied` returns the tensors as they are: whoever asks is done before they change."""

    def __enter__(self) -> Uncopied:
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor.detach()


_current: ContextVar[Copies | Uncopied | None] = ContextVar("copies", default=None)


def copied(state: Any) -> Any:
    """A copy as ``copy.deepcopy`` makes it; inside a `Copies` in its memory, in `Uncopied` none.

    Tensors that are the same memory are copied once.
    """
    copies = _current.get()
    return copy.deepcopy(state) if copies is None else _copied(state, copies, {})


def _copied(value: Any, copies: Copies | Uncopied, seen: dict[Any, Tensor]) -> Any:
    if type(value) in (dict, OrderedDict):
        return {key: _copied(item, copies, seen) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item, copies, seen) for item in value)
    if type(value) in (Tensor, nn.Parameter):
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if place not in seen:
            seen[place] = copies.take(value)
        return seen[place]
    if isinstance(value, Tensor):
        return _copied_subclass(value, copies, seen)
    return copy.deepcopy(value)


def _copied_subclass(value: Tensor, copies: Copies | Uncopied, seen: dict[Any, Tensor]) -> Tensor:
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor) or value.is_cuda:  # whose chunk is where its mesh is
        return copy.deepcopy(value)
    return DTensor.from_local(
        _copied(value.to_local().detach(), copies, seen),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )
