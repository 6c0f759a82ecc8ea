"""The fastest plan whose activations fit into a number of bytes: measured, found, tried out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from scaledtrain.byte_sizes import parse_bytes
from scaledtrain.errors import ConfigError
from scaledtrain.recompute.apart import Sample, computes, loss_without_gradients, peak_bytes
from scaledtrain.recompute.blocks import is_compiled
from scaledtrain.recompute.chain import Chain
from scaledtrain.recompute.dear import MakeContexts
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.kept import ATTENTION, PRODUCTS, keep_results
from scaledtrain.recompute.measure import measure_chain
from scaledtrain.recompute.offload import DiskStore, HostStore, Store
from scaledtrain.recompute.plan import Keep, Plan, Recompute, cost, depth
from scaledtrain.recompute.policies import CheckpointPolicy
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

    What is kept of blocks that run again can wait somewhere else than in the model's memory. That
    takes time, but mostly less than computing it. Of compiled blocks, parts cannot be kept.

    Counted is what operators return between the beginning of the forward and the end of the
    backward pass, on any device: activations, their gradients, the loss. Not counted are
    parameters, their gradients, the batch, what a kernel needs while it runs, and what an allocator
    adds.

    Args:
        size: bytes, as a number or as ``"512MiB"`` or ``"2GiB"``.
        offload: ``"host"``: from a GPU to page-locked memory of its host. ``"disk"``: to a file,
            which nothing is left of afterwards; most of it stays in the operating system's page
            cache if there is room. None: nowhere.
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
                "a memory budget needs a sample: a function that is called with the model and "
                "returns the loss of a microbatch, as large as any"
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

    Raises:
        ConfigError: the model does not call each block once, in this order.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        sample: Sample,
        store: Store | None = None,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._sample = sample
        self._store = store
        self._ways = {} if any(map(is_compiled, blocks)) else _ways(store)
        self._chain = measure_chain(model, blocks, sample, self._ways, store)
        self._expected = loss_without_gradients(model, sample)

    def fit(self, n_bytes: int) -> Executor | None:
        """Let the blocks run as the fastest plan says that needs at most so many bytes.

        Returns:
            What lets them; None: there is no such plan, and they run as before.
        """
        aim = n_bytes - _SLACK_BYTES
        for _ in range(_ATTEMPTS):
            plan = _plan(self._chain, aim)
            if plan is None:
                return None
            executor = self._executor(plan)
            try:
                measured = peak_bytes(self._model, self._sample)
                differs = not computes(self._model, self._sample, self._expected)
            except BaseException:
                executor.remove()
                raise
            if differs and any(block.joins for block in self._chain.blocks):
                # The model uses what blocks return for more than the next block.
                executor.remove()
                alone = tuple(replace(block, joins=False) for block in self._chain.blocks)
                self._chain = replace(self._chain, blocks=alone)
                continue
            if measured + _SLACK_BYTES <= n_bytes:
                executor.told = _told(self._chain, plan, n_bytes, measured)
                return executor
            executor.remove()
            aim -= measured + _SLACK_BYTES - n_bytes
        return None

    def least(self) -> int:
        """Bytes that can be kept to: those of the smallest plan, tried out."""
        least = smallest_bytes(self._chain)
        while (plan := _plan(self._chain, least)) is None:  # it nests too deep
            least += least // 8
        executor = self._executor(plan)
        try:
            return max(least, peak_bytes(self._model, self._sample)) + _SLACK_BYTES
        finally:
            executor.remove()

    def _executor(self, plan: Plan) -> Executor:
        """The last step is what comes after the blocks, and nobody's matter."""
        return Executor(self._model, self._blocks, plan[:-1], self._ways, self._store)


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


def _told(chain: Chain, plan: Plan, budget: int, measured: int) -> str:
    steps = plan[:-1]
    kept = Counter(step.way for step in steps if isinstance(step, Keep))
    whole = kept.pop("all", 0)
    told = [f"{whole} keep everything", *(f"{n} keep {way}" for way, n in sorted(kept.items()))]
    groups = sum(isinstance(step, Recompute) for step in steps)
    if groups:
        computed = len(chain) - 1 - whole - sum(kept.values())
        told.append(f"{computed} are computed again in {groups} groups")
    offloaded = sum(step.offload for step in steps)
    if offloaded:
        told.append(f"{offloaded} inputs are elsewhere meanwhile")
    predicted = cost(chain, plan)
    everything = cost(chain, (Keep(),) * len(chain))
    return (
        f"activations: of {len(chain) - 1} blocks {', '.join(told)}; predicted are "
        f"{_mib(predicted.peak_bytes)} and {predicted.seconds / everything.seconds - 1.0:+.0%} "
        f"time, measured {_mib(measured)} of {_mib(budget)} (everything: "
        f"{_mib(everything.peak_bytes)})"
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f} MiB"
