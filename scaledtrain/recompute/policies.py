"""Which activations are computed again instead of kept: the policies that a user chooses from."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.apart import Sample, peak_bytes
from scaledtrain.recompute.blocks import find_blocks, named_blocks
from scaledtrain.recompute.chain import Chain
from scaledtrain.recompute.dear import DEAR, contexts_of
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.measure import measure_chain
from scaledtrain.recompute.plan import Keep, Plan, Recompute, cost, every
from scaledtrain.recompute.solver import fastest_plan, smallest_bytes

__all__ = [
    "CheckpointEvery",
    "CheckpointPolicy",
    "CheckpointSqrt",
    "MemoryBudget",
    "Selective",
    "checkpoint_activations",
]

_ATTEMPTS = 8  # to find a plan whose peak fits when it is measured
_UNITS = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class CheckpointPolicy(ABC):
    """Decides for each block of a model what it keeps for its backward pass."""

    needs_sample: bool = False
    """It has to see a forward and backward pass before it can decide."""

    @abstractmethod
    def install(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample | None
    ) -> Executor:
        """Let the blocks run so, from now on.

        Args:
            model: that has the blocks.
            blocks: in the order in which the model calls them.
            sample: called with the model, gives the loss of a microbatch; needed by a policy that
                ``needs_sample``.
        """


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
        if self.k < 1:
            raise ConfigError(f"k is {self.k}; a group has at least one block")

    def install(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample | None
    ) -> Executor:
        """Checkpoint groups of ``k``."""
        return Executor(blocks, every(self.k, len(blocks)), told=_told_groups(self.k, len(blocks)))


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
        return Executor(blocks, every(k, len(blocks)), told=_told_groups(k, len(blocks)))


@dataclass(frozen=True)
class Selective(CheckpointPolicy):
    """Keep what is dear to compute, and compute the rest of each block again.

    Args:
        operators: names of operators in ``torch.ops.aten`` whose results are kept, as
            ``"addmm"`` or ``"convolution"``; None: matrix products, convolutions and attention.

    Raises:
        ConfigError: there is no such operator.

    References:
        Korthikanti et al. 2022, Reducing activation recomputation in large transformer models
        (arXiv:2205.05198).
    """

    operators: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self._overloads()

    def _overloads(self) -> Sequence[Any]:
        if self.operators is None:
            return DEAR
        found: list[Any] = []
        for name in self.operators:
            packet = getattr(torch.ops.aten, name, None)
            if packet is None:
                raise ConfigError(
                    f"operators has {name!r}, which torch.ops.aten has not; mm, addmm, bmm, "
                    "convolution and _scaled_dot_product_flash_attention_for_cpu are some it has"
                )
            found += [getattr(packet, overload) for overload in packet.overloads()]
        return found

    def install(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample | None
    ) -> Executor:
        """Checkpoint each block by itself, and keep these operators' results."""
        n, contexts = len(blocks), contexts_of(self._overloads())
        told = f"activations: of each of {n} blocks only what is dear to compute is kept"
        return Executor(blocks, (Keep(),) * n, (contexts,), told)


@dataclass(frozen=True)
class MemoryBudget(CheckpointPolicy):
    """The fastest way to run a model whose activations have to fit into so many bytes.

    Each block is measured once, alone: seconds, and bytes that it keeps and needs. Then dynamic
    programming finds which blocks keep everything, which keep only what is dear to compute, and
    which are computed again, together with which others and how often (see `fastest_plan`). The
    plan is tried out before training begins, and another one is made if its peak does not fit; so
    the budget holds for all batches that are not larger than the first one.

    Counted is what operators return between the beginning of the forward and the end of the
    backward pass, on any device: activations, their gradients, the loss. Not counted are
    parameters, their gradients, the batch, what a kernel needs while it runs, and what an allocator
    adds.

    Args:
        size: bytes, as a number or as ``"512MiB"`` or ``"2GiB"``.

    Raises:
        ConfigError: no number of bytes; or, when training begins, no plan fits: it says how much
            is needed at least.

    References:
        Herrmann, Beaumont, Eyraud-Dubois, Hermann, Joly, Shilova 2019, Optimal checkpointing for
        heterogeneous chains (INRIA RR-9302).
    """

    size: str | int
    needs_sample = True

    def __post_init__(self) -> None:
        if self.n_bytes < 1:
            raise ConfigError(f"a memory budget of {self.size} holds nothing")

    @property
    def n_bytes(self) -> int:
        """The budget, in bytes.

        Example:
            >>> MemoryBudget("1.5KiB").n_bytes, MemoryBudget(10_000).n_bytes
            (1536, 10000)
        """
        matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])iB|B?)\s*", str(self.size))
        if matched is None:
            raise ConfigError(
                f"a memory budget of {self.size!r} is not understood; give bytes, as 2147483648, "
                'or with a unit: "512MiB", "2GiB"'
            )
        return int(float(matched[1]) * 2 ** _UNITS[matched[2] or ""])

    def install(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample | None
    ) -> Executor:
        """Measure, plan, and try the plan out."""
        if sample is None:
            raise ConfigError(
                "a memory budget needs a sample: a function that is called with the model and "
                "returns the loss of a microbatch, as large as any"
            )
        ways = [("all", None), ("dear", contexts_of())]
        chain = measure_chain(model, blocks, sample, ways)
        aim = self.n_bytes
        for _ in range(_ATTEMPTS):
            plan = fastest_plan(chain, aim)
            if plan is None:
                break
            executor = Executor(blocks, plan[:-1], [contexts for _, contexts in ways])
            measured = peak_bytes(model, sample)
            if measured <= self.n_bytes:
                executor.told = _told(chain, plan, self.n_bytes, measured)
                return executor
            executor.remove()
            aim -= measured - self.n_bytes
        least = smallest_bytes(chain) + self.n_bytes - aim
        raise ConfigError(
            f"activations do not fit into {self.n_bytes} bytes: however often blocks are computed "
            f"again, {least} bytes ({_mib(least)}) are needed; raise the budget to that, or make "
            "the microbatch smaller and gradient_accumulation_steps larger"
        )


def checkpoint_activations(
    model: nn.Module,
    policy: CheckpointPolicy,
    sample: Sample | None = None,
    *,
    blocks: Sequence[str] | None = None,
) -> Executor:
    """Let a model compute activations again instead of keeping them, in any training loop.

    Args:
        model: that has a chain of blocks: an ``nn.Sequential``, or an ``nn.ModuleList`` whose
            modules it calls one after another, each with the output of the one before as its first
            argument.
        policy: what is kept.
        sample: called with the model, returns the loss of a microbatch; `MemoryBudget` needs it.
        blocks: names of the submodules that are the chain; None: they are found.

    Returns:
        A handle; its ``remove()`` undoes it.

    Raises:
        ConfigError: no blocks are found; see the policies.

    Example:
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(16)))
        >>> x = torch.randn(256, 64)
        >>> handle = checkpoint_activations(
        ...     model, MemoryBudget("900KiB"), lambda called: called(x).square().mean()
        ... )
        >>> peak_bytes(model, lambda called: called(x).square().mean()) <= 900 * 1024
        True
        >>> handle.remove()
    """
    chain = find_blocks(model) if blocks is None else named_blocks(model, blocks)
    return policy.install(model, chain, sample)


def _told_groups(k: int, n: int) -> str:
    return f"activations: {n} blocks are computed again in groups of {k}"


def _told(chain: Chain, plan: Plan, budget: int, measured: int) -> str:
    steps = plan[:-1]
    again = sum(isinstance(step, Recompute) for step in steps)
    by_way = [sum(step == Keep(way) for step in steps) for way in (0, 1)]
    computed = len(chain) - 1 - sum(by_way)
    predicted = cost(chain, plan)
    everything = cost(chain, (Keep(),) * len(chain))
    return (
        f"activations: of {len(chain) - 1} blocks {by_way[0]} keep everything, {by_way[1]} what is "
        f"dear, {computed} are computed again in {again} groups; predicted are "
        f"{_mib(predicted.peak_bytes)} and {predicted.seconds / everything.seconds - 1.0:+.0%} "
        f"time, measured {_mib(measured)} of {_mib(budget)} (everything: "
        f"{_mib(everything.peak_bytes)})"
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
