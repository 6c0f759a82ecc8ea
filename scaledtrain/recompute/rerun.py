"""What is different when blocks run again for their backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from scaledtrain.recompute.dear import MakeContexts

__all__ = ["Rerun"]


class Rerun:
    """One forward pass of some blocks that is made again.

    Buffers that the first pass changed, as the running statistics of a batch norm, are not changed
    by the second one: it works on copies.

    Args:
        blocks: that run.
        contexts: further ones, for the first pass and the second.

    Attributes:
        again: it is the second pass.
    """

    def __init__(self, blocks: Sequence[nn.Module], contexts: MakeContexts | None = None) -> None:
        self.again = False
        modules = [module for block in blocks for module in block.modules() if module._buffers]
        self._modules = modules
        self._changed: list[nn.Module] = []
        self._own: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self._contexts = contexts

    def contexts(self) -> tuple[Any, Any]:
        """For ``torch.utils.checkpoint.checkpoint(context_fn=...)``."""
        further = (nullcontext(), nullcontext()) if self._contexts is None else self._contexts()
        return _FirstPass(self, further[0]), _SecondPass(self, further[1])

    def begin_first(self) -> list[list[int]]:
        """Versions of the buffers."""
        return [_versions(module) for module in self._modules]

    def end_first(self, versions: Sequence[list[int]]) -> None:
        """Note which modules have changed buffers since."""
        pairs = zip(self._modules, versions, strict=True)
        # The kernels of these change the running statistics without a new version.
        self._changed = [
            module
            for module, before in pairs
            if isinstance(module, _NormBase) or _versions(module) != before
        ]

    def begin_second(self) -> None:
        """Let the blocks change copies."""
        self.again = True
        self._own = [(module, dict(module._buffers)) for module in self._changed]
        for module, buffers in self._own:
            for name, buffer in buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    def end_second(self) -> None:
        """Give them back what is theirs."""
        for module, buffers in self._own:
            module._buffers.update(buffers)
        self._own = []


def _versions(module: nn.Module) -> list[int]:
    return [buffer._version for buffer in module._buffers.values() if buffer is not None]


class _FirstPass(AbstractContextManager[None]):
    def __init__(self, rerun: Rerun, further: AbstractContextManager[Any]) -> None:
        self._rerun = rerun
        self._further = further
        self._versions: list[list[int]] = []

    def __enter__(self) -> None:
        self._versions = self._rerun.begin_first()
        self._further.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._further.__exit__(kind, error, traceback)
        self._rerun.end_first(self._versions)


class _SecondPass(AbstractContextManager[None]):
    def __init__(self, rerun: Rerun, further: AbstractContextManager[Any]) -> None:
        self._rerun = rerun
        self._further = further
        self._entered = ExitStack()

    def __enter__(self) -> None:
        self._rerun.begin_second()
        self._entered.callback(self._rerun.end_second)
        self._entered.enter_context(self._further)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered.close()  # also when it ends early, with an exception of torch's own
