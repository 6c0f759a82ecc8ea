"""Bytes of the tensors that are alive, counted as they are made and given up; on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "storage_key"]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, whatever operators return is counted, until nobody refers to it any more.

    Views count with what they are views of, once; what was made outside does not count. Left out is
    what an operator needs only while it runs, inside a kernel, what an allocator rounds up, sparse
    tensors, and where tensors go that are offloaded: page-locked memory of the host, and the
    operating system's pages of a file.

    Attributes:
        live: bytes that are alive now.
        peak: most that have been, since the beginning or since it was last set.

    Example:
        >>> with LiveBytes() as counted:
        ...     a = torch.ones(100)  # 400 bytes
        ...     b = a.view(10, 10) + a.sum()  # 400 more; the sum, 4, is given up again
        ...     del a
        >>> counted.live, counted.peak
        (400, 804)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._counted: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage_key(t) for t in tree_leaves((args, kwargs)) if _has_storage(t)}
        for tensor in tree_leaves(result):
            if _has_storage(tensor) and storage_key(tensor) not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._counted or _is_page_locked(storage):
            return
        n_bytes = storage.nbytes()

        def given_up(_: object) -> None:
            self.live -= n_bytes
            del self._counted[key]

        self._counted[key] = weakref.ref(storage, given_up)
        self.live += n_bytes
        self.peak = max(self.peak, self.live)


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _is_page_locked(storage: torch.UntypedStorage) -> bool:
    if storage.device.type != "cpu" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return bool(storage.is_pinned())


def storage_key(tensor: Tensor) -> int:
    """The same for views of the same memory, as long as that is there."""
    key: int = tensor.untyped_storage()._cdata
    return key
