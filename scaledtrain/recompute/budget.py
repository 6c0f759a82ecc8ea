"""The fastest plan whose activations fit into a number of bytes: measured, found, tried out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from scaledtrain.byte_sizes import parse_bytes
from scaledtrain.errors import ConfigError
from scaledtrain.recompute.apart import (
    Sample,
    computes,
    kept_and_peak_bytes,
    loss_without_gradients,
)
from scaledtrain.recompute.blocks import is_compiled
from scaledtrain.recompute.chain import Chain
from scaledtrain.recompute.dear import MakeContexts
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.kept import ATTENTION, PRODUCTS, keep_results
from scaledtrain.recompute.measure import measure_chain
from scaledtrain.recompute.offload import DiskStore, HostStore, Store
from scaledtrain.recompute.placeholder import UsedElsewhereError
from scaledtrain.recompute.plan import (
    Keep,
    Plan,
    Planned,
    Recompute,
    cost,
    count_blocks,
    depth,
    every,
    kept_bytes,
)
from scaledtrain.recompute.policies import CheckpointPolicy, Live
from scaledtrain.recompute.solver import fastest_plan, smallest_bytes

__all__ = ["MemoryBudget", "PlanSearch"]

_ATTEMPTS = 8  # to find a plan whose peak fits when it is measured
_SLACK_BYTES = 64  # of what a training loop adds: the sum of its losses
_MAX_DEPTH = 64  # of groups in groups: each takes some ten frames of Python's stack


@dataclass(frozen=True)
class MemoryBudget(CheckpointPolicy):
    """The fastest way to run a model whose activations have to fit into so many bytes.

    Each block is measured once, alone: seconds, and bytes that it keeps and needs. Then dynamic
    programming finds which blocks keep everything, which keep only the results of attention, or of
    all matrix products and convolutions, and which are computed again, together with which others
    and how often (see `fastest_plan`). The plan is tried out before training begins, and another
    one is made if its peak does not fit; so the budget holds for all batches that are not larger
    than the first one.

    What is kept can wait somewhere else than in the model's memory: all that a block saves, or what
    is kept of one that runs again. That takes time, but mostly less than computing it. Of compiled
    blocks, parts cannot be kept, nor wait elsewhere, and bytes are those that they need when they
    are not compiled.

    Counted is what operators return between the beginning of the forward and the end of the
    backward pass, on any device: activations, their gradients, the loss. Not counted are
    parameters, their gradients, the batch, what a kernel needs while it runs, what an allocator
    adds, and pages of a file, from which a block's backward pass reads without a copy (one that
    keeps its graph copies what it reads, so that it needs more than was planned).

    Args:
        size: bytes, as a number or as ``"512MiB"`` or ``"2GiB"``.
        offload: ``"host"``: from a GPU to page-locked memory of its host. ``"disk"``: to a file,
            which nothing is left of afterwards; most of it stays in the operating system's page
            cache if there is room, and is as fast as memory then. None: nowhere.
        offload_folder: for that file, on a fast disk; None: where temporary files are.

    Raises:
        ConfigError: no number of bytes, no such place, or a folder without one; or, when training
            begins, no plan fits: it says how much is needed at least.

    References:
        Herrmann, Beaumont, Eyraud-Dubois, Hermann, Joly, Shilova 2019, Optimal checkpointing for
        heterogeneous chains (INRIA RR-9302).
    """

    size: str | int
    offload: str | None = None
    offload_folder: str | None = None

    def __post_init__(self) -> None:
        if self.n_bytes < 1:
            raise ConfigError(f"a memory budget of {self.size} holds nothing")
        if self.offload not in (None, "host", "disk"):
            raise ConfigError(
                f"offload is {self.offload!r}; activations go to 'host' (from a GPU), to 'disk', "
                "or nowhere (None)"
            )
        if self.offload_folder is not None and self.offload != "disk":
            raise ConfigError(
                f"offload_folder is {self.offload_folder!r}, but offload is {self.offload!r}, "
                "which needs none; set offload to 'disk'"
            )

    @property
    def n_bytes(self) -> int:
        """The budget, in bytes.

        Example:
            >>> MemoryBudget("1.5KiB").n_bytes, MemoryBudget(10_000).n_bytes
            (1536, 10000)
        """
        return parse_bytes(self.size, "a memory budget")

    def install(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample | None
    ) -> Executor:
        """Measure, plan, and try the plan out."""
        if sample is None:
            raise ConfigError(
                "a memory budget has to be tried out before training. In a loop of your own it "
                "needs a sample: a function that is called with the model and returns the loss of "
                "a microbatch, as large as any. Stages that are sharded (mesh.pipe and mesh.shard "
                "above 1) run only in a step that all ranks make: choose a policy that measures "
                "nothing (full, selective), or set one of the two to 1"
            )
        search = PlanSearch(model, blocks, sample, self._store(model))
        executor = search.fit(self.n_bytes)
        if executor is not None:
            return executor
        least = search.least()
        raise ConfigError(
            f"the activations of {len(blocks)} blocks ({type(blocks[0]).__name__} and so on) do "
            f"not fit into {self.n_bytes} bytes: however often they are computed again, {least} "
            f"bytes ({_mib(least)}) are needed; raise the budget to that, make the microbatch "
            "smaller and gradient_accumulation_steps larger, name more of the model's blocks"
            + (", or offload to disk" if self.offload is None else "")
        )

    def install_on_stage(
        self, model: nn.Module, blocks: Sequence[nn.Module], sample: Sample, live: Live
    ) -> Executor:
        """Measure, plan for all microbatches that are under way at once, and try it out."""
        n_bytes = int(self.n_bytes * live.share)
        messages = live.microbatches * live.bytes_each + live.bytes_once
        search = PlanSearch(model, blocks, sample, self._store(model), live.microbatches)
        executor = search.fit(n_bytes - messages)
        if executor is not None:
            return executor
        least = int((search.least() + messages) / live.share) + 1
        raise ConfigError(
            f"the activations of a stage with {len(blocks)} blocks, {live.microbatches} "
            f"microbatches at once, and messages of {_mib(messages)} do not fit into {n_bytes} "
            f"bytes ({live.share:.0%} of a budget of {self.n_bytes}): {least} bytes "
            f"({_mib(least)}) are needed for the rank; raise the budget to that, make more and "
            "smaller microbatches (pipeline.n_microbatches), or take a schedule that keeps fewer "
            "(1F1B)"
        )

    def _store(self, model: nn.Module) -> Store | None:
        if self.offload == "host" and not any(p.is_cuda for p in model.parameters()):
            raise ConfigError(
                "offload is 'host', but the model is in the host's memory already; offload to "
                "'disk', or not at all"
            )
        if self.offload == "disk":
            return DiskStore(self.offload_folder)
        return None if self.offload is None else HostStore()


class PlanSearch:
    """The blocks of a model, measured, and plans for them that are tried out.

    Args:
        model: that has the blocks.
        blocks: in the order in which the model calls them.
        sample: see `Sample`.
        store: where to offload to; None: nowhere.
        microbatches: that are between their forward and backward pass at the same time. All but
            one of them keep what a forward pass leaves.

    Raises:
        ConfigError: the model does not call each block once, in this order.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        sample: Sample,
        store: Store | None = None,
        microbatches: int = 1,
    ) -> None:
        self._model = model
        self._others = microbatches - 1
        self._blocks = blocks
        self._sample = sample
        self._store = store
        self._ways = {} if any(map(is_compiled, blocks)) else _ways(store)
        self._chain = measure_chain(model, blocks, sample, self._ways, store)
        self._expected = loss_without_gradients(model, sample)
        self._found_least: tuple[int, Plan, int] | None = None

    def fit(self, n_bytes: int) -> Executor | None:
        """Let the blocks run as the fastest plan says that needs at most so many bytes.

        Returns:
            What lets them; None: there is no such plan, and they run as before.
        """
        if self._others:
            return self._fit_several(n_bytes)
        aim = n_bytes - _SLACK_BYTES
        for _ in range(_ATTEMPTS):
            found = self._try(aim)
            if found is None:
                break
            plan, measured = found
            if measured <= n_bytes:
                return self._told(plan, n_bytes, measured)
            aim = min(aim, cost(self._chain, plan).peak_bytes) - (measured - n_bytes)
        _, plan, measured = self._least()
        return self._told(plan, n_bytes, measured) if measured <= n_bytes else None

    def _fit_several(self, n_bytes: int) -> Executor | None:
        """Of simple plans the fastest that fits: the others keep what a forward pass leaves."""
        aim = n_bytes
        for _ in range(_ATTEMPTS):
            plans = _simple_plans(self._chain)
            fitting = [plan for plan in plans if self._predicted(plan) <= aim]
            if not fitting:
                break
            plan = min(fitting, key=lambda plan: cost(self._chain, plan).seconds)
            measured = self._measured(plan)
            if measured is not None and measured <= n_bytes:
                return self._told(plan, n_bytes, measured)
            if measured is not None:
                aim = min(aim, self._predicted(plan)) - max(1, measured - n_bytes)
        plan, measured = self._smallest()
        return self._told(plan, n_bytes, measured) if measured <= n_bytes else None

    def _smallest(self) -> tuple[Plan, int]:
        """The simple plan that takes least, and what that is: less than predicted, maybe."""
        while True:
            plan = min(_simple_plans(self._chain), key=self._predicted)
            measured = self._measured(plan)
            if measured is not None:
                return plan, measured

    def _predicted(self, plan: Plan) -> int:
        others = self._others * kept_bytes(self._chain, plan)
        return cost(self._chain, plan).peak_bytes + others + _SLACK_BYTES

    def _told(self, plan: Plan, n_bytes: int, measured: int) -> Executor:
        executor = self._executor(plan)
        everything = cost(self._chain, (Keep(),) * len(self._chain))
        executor.planned = Planned(cost(self._chain, plan), everything, measured)
        executor.told = _told(plan[:-1], n_bytes, executor.planned)
        if self._others:
            executor.told += f"; {self._others + 1} microbatches at once"
        return executor

    def least(self) -> int:
        """Bytes that can be kept to: those of the smallest plan, tried out."""
        if self._others:
            return self._smallest()[1]
        aim, _, measured = self._least()
        return max(aim + _SLACK_BYTES, measured)

    def _least(self) -> tuple[int, Plan, int]:
        """The fewest bytes for which there is a plan, the plan, and what it takes."""
        if self._found_least is None:
            least = smallest_bytes(self._chain)
            while (found := self._try(least)) is None:  # it nests too deep
                least += least // 8
            self._found_least = least, *found
        return self._found_least

    def _try(self, aim: int) -> tuple[Plan, int] | None:
        """The fastest plan within so many bytes, and what it takes."""
        while (plan := _plan(self._chain, aim)) is not None:
            measured = self._measured(plan)
            if measured is not None:
                return plan, measured
        return None

    def _measured(self, plan: Plan) -> int | None:
        """What all microbatches take; None: no block runs again together with others any more."""
        executor = self._executor(plan)
        try:
            kept, peak = kept_and_peak_bytes(self._model, self._sample)
            differs = not computes(self._model, self._sample, self._expected)
        except UsedElsewhereError:
            kept, peak, differs = 0, 0, True
        finally:
            executor.remove()
        if not differs or not any(block.joins for block in self._chain.blocks):
            return peak + self._others * kept + _SLACK_BYTES
        # The model uses what blocks return, or does something, in between.
        alone = tuple(replace(block, joins=False) for block in self._chain.blocks)
        self._chain = replace(self._chain, blocks=alone)
        return None

    def _executor(self, plan: Plan) -> Executor:
        """The last step is what comes after the blocks, and nobody's matter."""
        return Executor(self._model, self._blocks, plan[:-1], self._ways, self._store)


def _simple_plans(chain: Chain) -> list[Plan]:
    """The first blocks are computed again in groups of one size, the others keep what they do.

    A plan that is best for one microbatch lets the last block keep everything, whose turn is next;
    of several that are under way all would.
    """
    n = len(chain) - 1  # the last step is what comes after the blocks
    blocks = chain.blocks[:n]
    ways = sorted({way.name for block in blocks for way in block.ways})
    plans: list[Plan] = []
    for name in ways:
        kept = [
            Keep(name if any(way.name == name for way in block.ways) else "all") for block in blocks
        ]
        for size in range(1, n + 1):
            if size > 1 and not all(block.joins for block in blocks[1:]):
                break
            for again in [*range(0, n, size), n]:
                plans.append((*every(size, again), *kept[again:], Keep()))
    return plans


def _ways(store: Store | None) -> dict[str, MakeContexts]:
    ways = {"attention": keep_results(ATTENTION), "products": keep_results(PRODUCTS)}
    if store is not None:
        ways["attention elsewhere"] = keep_results(ATTENTION, store)
        ways["products elsewhere"] = keep_results(PRODUCTS, store)
    return ways


def _plan(chain: Chain, peak_bytes: int) -> Plan | None:
    everything = (Keep(),) * len(chain)
    if cost(chain, everything).peak_bytes <= peak_bytes:
        return everything
    plan = fastest_plan(chain, peak_bytes)
    return None if plan is None or depth(plan) > _MAX_DEPTH else plan


def _told(plan: Plan, budget: int, planned: Planned) -> str:
    kept = Counter(step.way for step in plan if isinstance(step, Keep))
    whole = kept.pop("all", 0)
    told = [f"{whole} keep everything", *(f"{n} keep {way}" for way, n in sorted(kept.items()))]
    groups = sum(isinstance(step, Recompute) for step in plan)
    if groups:
        computed = count_blocks(plan) - whole - sum(kept.values())
        told.append(f"{computed} are computed again in {groups} groups")
    offloaded = sum(step.offload for step in plan)
    if offloaded:
        told.append(f"{offloaded} inputs are elsewhere meanwhile")
    return (
        f"activations: of {count_blocks(plan)} blocks {', '.join(told)}; predicted are "
        f"{_mib(planned.predicted.peak_bytes)} and {planned.predicted_more:+.0%} time, measured "
        f"{_mib(planned.measured_bytes)} of {_mib(budget)} (everything: "
        f"{_mib(planned.everything.peak_bytes)})"
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
