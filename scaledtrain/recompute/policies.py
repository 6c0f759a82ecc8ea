"""Which activations are computed again instead of kept: fixed policies, and what all are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.apart import Sample
from scaledtrain.recompute.blocks import is_compiled
from scaledtrain.recompute.dear import DEAR, Inside, contexts_of
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.plan import Keep, every

__all__ = [
    "CheckpointEvery",
    "CheckpointPolicy",
    "CheckpointSqrt",
    "Live",
    "Selective",
]


class Live(NamedTuple):
    """What a pipeline's schedule keeps alive of a stage."""

    microbatches: int
    """Between their forward and their backward pass at the same time, at most."""
    bytes_each: int
    """Of messages, for each of them."""
    bytes_once: int
    """Of messages that are received ahead."""
    share: float
    """Of what the rank has for all of its stages."""


@dataclass(frozen=True)
class CheckpointPolicy(ABC):
    """Decides for each block of a model what it keeps for its backward pass.

    Args:
        blocks: names of the submodules that are the chain, in the order in which the model calls
            them; an ``nn.ModuleList`` stands for its modules. None: they are found. Every policy
            takes it, by name.
    """

    blocks: Sequence[str] | None = field(default=None, kw_only=True)

    @abstractmethod
    def install(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample | None
    ) -> Executor:
        """Let the blocks run so, from now on.

        Args:
            model: that has the blocks.
            blocks: in the order in which the model calls them.
            sample: gives the loss of a microbatch, see `Sample`; None: there is none to look at.
        """

    def install_on_stage(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample, live: Live
    ) -> Executor:
        """The same for a stage of a pipeline, which has several microbatches under way at once.

        Args:
            model: the stage.
            blocks: of it.
            sample: gives a number, of which a backward pass through the stage can be made.
            live: what the schedule keeps alive.
        """
        return self.install(model, blocks, sample)


@dataclass(frozen=True)
class CheckpointEvery(CheckpointPolicy):
    """Keep only every k-th boundary between blocks; in its backward pass each group runs again.

    Of n blocks that keep A bytes each, a of them their output, at most about n/k a + k A bytes are
    alive at once, for one more forward pass of all but the last operators of each group.

    Args:
        k: blocks in a group. 1 checkpoints every block by itself.

    Raises:
        ConfigError: ``k`` is below 1.

    References:
        Chen, Xu, Zhang, Guestrin 2016, Training deep nets with sublinear memory cost
        (arXiv:1604.06174).
    """

    k: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ConfigError(f"k is {self.k}; a group has at least one block")

    def install(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample | None
    ) -> Executor:
        """Checkpoint groups of ``k``."""
        return Executor(
            model, blocks, every(self.k, len(blocks)), told=_told_groups(self.k, len(blocks))
        )


@dataclass(frozen=True)
class CheckpointSqrt(CheckpointPolicy):
    """As `CheckpointEvery`, with groups of about sqrt(n) of the n blocks.

    References:
        Chen, Xu, Zhang, Guestrin 2016, Training deep nets with sublinear memory cost
        (arXiv:1604.06174).
    """

    def install(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample | None
    ) -> Executor:
        """Checkpoint groups of sqrt(n)."""
        k = math.isqrt(len(blocks) - 1) + 1
        return Executor(model, blocks, every(k, len(blocks)), told=_told_groups(k, len(blocks)))


@dataclass(frozen=True)
class Selective(CheckpointPolicy):
    """Keep what is dear to compute, and compute the rest of each block again.

    Args:
        operators: names of operators in ``torch.ops.aten`` whose results are kept, as
            ``"addmm"`` or ``"convolution"``; None: matrix products, convolutions and attention.
            Those that draw random numbers, as attention with dropout, run again in any case.
        modules: names of submodules of the blocks, or their ends (``"attention"``), inside of which
            these results are kept, and nowhere else. None: wherever they are. With ``mesh.pipe``
            each stage has to have one, and a traced model has none.

    Raises:
        ConfigError: there is no such operator or module.

    References:
        Korthikanti et al. 2022, Reducing activation recomputation in large transformer models
        (arXiv:2205.05198).
    """

    operators: Sequence[str] | None = None
    modules: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self._overloads()
        if isinstance(self.modules, str) or (self.modules is not None and not self.modules):
            raise ConfigError(
                f"modules is {self.modules!r}; it is a list of names of submodules, or left out"
            )

    def _overloads(self) -> Sequence[Any]:
        if self.operators is None:
            return DEAR
        found: list[Any] = []
        for name in self.operators:
            packet = getattr(torch.ops.aten, name, None)
            if not isinstance(packet, torch._ops.OpOverloadPacket):
                raise ConfigError(
                    f"operators has {name!r}, which torch.ops.aten has not; mm, addmm, bmm, "
                    "convolution and _scaled_dot_product_flash_attention_for_cpu are some it has"
                )
            overloads: list[str] = packet.overloads()  # type: ignore[no-untyped-call]
            found += [getattr(packet, overload) for overload in overloads]
        return found

    def install(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample | None
    ) -> Executor:
        """Checkpoint each block by itself, and keep these operators' results.

        Raises:
            ConfigError: the blocks are compiled, or have recurrent layers.
        """
        if any(map(is_compiled, blocks)):
            raise ConfigError(
                "operators in compiled blocks are not seen one by one, so that none of their "
                "results can be kept: choose another policy (full, memory_budget), or do not "
                "compile"
            )
        for block in blocks:
            for module in block.modules():
                if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
                    raise ConfigError(
                        f"{type(block).__name__} has a {type(module).__name__}, which changes the "
                        "results of its matrix products in place, so that they cannot be kept: "
                        "choose another policy (full, memory_budget)"
                    )
        inside = None if self.modules is None else Inside(self.modules)
        n, contexts = len(blocks), contexts_of(self._overloads(), inside)
        told = f"activations: of each of {n} blocks only what is dear to compute is kept"
        plan = (Keep("dear"),) * n
        return Executor(model, blocks, plan, {"dear": contexts}, told=told, inside=inside)


def _told_groups(k: int, n: int) -> str:
    return f"activations: {n} blocks are computed again in groups of {k}"
