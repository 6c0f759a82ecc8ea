"""Pipeline schedules as data: for each rank the list of what it computes, in order.

The same list is run (`execute.py`), checked and simulated (`simulate.py`), and drawn
(`pictures.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from scaledtrain.errors import ConfigError
from scaledtrain.schema import did_you_mean

__all__ = ["SCHEDULES", "Action", "Kind", "PipelineOrder", "breadth_first", "pipeline_order"]

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """A pass of one microbatch through one stage.

    Printed as torch.distributed.pipelining does, ``<stage><kind><microbatch>``.
    """

    kind: Kind
    """``"F"`` forward; ``"B"`` backward; or backward in two parts, ``"I"`` for the gradient of the
    stage's inputs, and later ``"W"`` for those of its parameters."""
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class PipelineOrder:
    """What each rank of a pipeline computes, in order.

    Args:
        name: of the schedule.
        ranks: for each rank its actions.

    Raises:
        ConfigError: there is no action, or two ranks have the same stage.

    Example:
        >>> print(pipeline_order("1F1B", n_ranks=2, n_microbatches=3))
        1F1B
        rank 0: 0F0 0F1 0B0 0F2 0B1 0B2
        rank 1: 1F0 1B0 1F1 1B1 1F2 1B2
    """

    name: str
    ranks: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        if not any(self.ranks):
            raise ConfigError(f"the pipeline schedule {self.name} has no action")
        for stage in range(self.n_stages):
            holders = [r for r, actions in enumerate(self.ranks) if stage in _stages(actions)]
            if len(holders) != 1:
                raise ConfigError(
                    f"stage {stage} of the pipeline schedule {self.name} is on ranks {holders}; "
                    "each stage is on one rank"
                )

    def __str__(self) -> str:
        lines = [f"rank {r}: {' '.join(map(str, own))}" for r, own in enumerate(self.ranks)]
        return "\n".join([self.name, *lines])

    @cached_property
    def n_stages(self) -> int:
        """Parts that the model is cut into."""
        return 1 + max(action.stage for actions in self.ranks for action in actions)

    @cached_property
    def n_microbatches(self) -> int:
        """In one step."""
        return 1 + max(action.microbatch for actions in self.ranks for action in actions)

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """Of each stage its rank."""
        places = {a.stage: rank for rank, actions in enumerate(self.ranks) for a in actions}
        return tuple(places[stage] for stage in range(self.n_stages))

    def stages(self, rank: int) -> list[int]:
        """The stages on a rank, in the order of the model."""
        return sorted(_stages(self.ranks[rank]))


def _stages(actions: Iterable[Action]) -> set[int]:
    return {action.stage for action in actions}


class _Kind(NamedTuple):
    """What is to be known of a schedule before it is made."""

    torch_class: str | None
    """In torch.distributed.pipelining; None: made here."""
    stages_per_rank: int
    """By default."""
    fixed: bool
    """No other number is possible."""


SCHEDULES: dict[str, _Kind] = {
    "GPipe": _Kind(None, 1, True),
    "1F1B": _Kind(None, 1, True),
    "Interleaved1F1B": _Kind("ScheduleInterleaved1F1B", 2, False),
    "InterleavedZeroBubble": _Kind("ScheduleInterleavedZeroBubble", 2, False),
    "ZBVZeroBubble": _Kind("ScheduleZBVZeroBubble", 2, True),
    "DualPipeV": _Kind("ScheduleDualPipeV", 2, True),
}
"""Name -> how a synchronous schedule is made."""


def pipeline_order(
    name: str, n_ranks: int, n_microbatches: int, stages_per_rank: int | None = None
) -> PipelineOrder:
    """The order of a schedule, as torch.distributed.pipelining has it.

    | name                    | stages per rank | microbatches                 | idle share     |
    |-------------------------|-----------------|------------------------------|----------------|
    | `GPipe`                 | 1               | any                          | (p-1)/(m+p-1)  |
    | `1F1B`                  | 1               | any                          | (p-1)/(m+p-1)  |
    | `Interleaved1F1B`       | 2 or more (v)   | a multiple of max(1, m // p) | (p-1)/(vm+p-1) |
    | `InterleavedZeroBubble` | 2 or more (v)   | a multiple of max(1, m // p) | (p-1)/(3vm+p-1) |
    | `ZBVZeroBubble`         | 2, as a V       | any; at least 2p to be good  | (p-1)/(6m+p-1) |
    | `DualPipeV`             | 2, as a V       | at least 2p                  | (p-1)/(6m+p-1) |

    p ranks, m microbatches. The idle share is that of equal stages whose F, I and W take equally
    long, and B = I + W. `GPipe` keeps the activations of all m microbatches, `1F1B` on rank r those
    of p - r. In a V the last rank has the two stages in the middle, and the first rank the first
    and the last stage. Backward passes are in two parts in the last three. What `DualPipeV` means
    to overlap runs one after the other, as in torch.

    Args:
        name: of the schedule, as in the table.
        n_ranks: of the pipeline.
        n_microbatches: in a step.
        stages_per_rank: None: as few as possible.

    Raises:
        ConfigError: an unknown name, or numbers that do not fit it.

    References:
        Huang et al. 2019, GPipe, arXiv 1811.06965; Narayanan et al. 2021, Megatron-LM,
        arXiv 2104.04473 (1F1B, interleaved); Qi et al. 2024, Zero Bubble Pipeline Parallelism,
        arXiv 2401.10241; DeepSeek-AI 2024, DeepSeek-V3, arXiv 2412.19437 (DualPipe).
    """
    kind = SCHEDULES.get(name)
    if kind is None:
        raise ConfigError(f"unknown pipeline schedule {name!r}{did_you_mean(name, SCHEDULES)}")
    if n_ranks < 1 or n_microbatches < 1:
        raise ConfigError(
            f"a pipeline of {n_ranks} ranks and {n_microbatches} microbatches was asked for; both "
            "are >= 1"
        )
    v = kind.stages_per_rank if stages_per_rank is None else stages_per_rank
    if v != kind.stages_per_rank and (kind.fixed or v < 2):
        several = [other for other, k in SCHEDULES.items() if not k.fixed]
        raise ConfigError(
            f"{name} has {kind.stages_per_rank}{'' if kind.fixed else ' or more'} "
            f"stage{'s' if kind.stages_per_rank > 1 else ''} per rank, not {v}; "
            f"for another number choose {' or '.join(several)}"
        )
    if name == "GPipe":
        ranks = [_gpipe(r, n_microbatches) for r in range(n_ranks)]
    elif name == "1F1B":
        ranks = [_one_forward_one_backward(r, n_ranks, n_microbatches) for r in range(n_ranks)]
    else:
        ranks = _from_torch(name, kind, n_ranks, n_microbatches, v)
    return PipelineOrder(name, tuple(map(tuple, ranks)))


def breadth_first(
    rank_of: Sequence[int], n_microbatches: int, backward: bool = True
) -> PipelineOrder:
    """All forwards, then all backwards: an order for any placement of stages on ranks.

    For evaluation, and for the last steps of an epoch, in which there may be fewer microbatches
    than a schedule needs.

    Args:
        rank_of: of each stage its rank.
        n_microbatches: in a step.
        backward: whether there are backwards.

    Example:
        >>> print(breadth_first([0, 1, 1, 0], 2))
        breadth first
        rank 0: 0F0 0F1 3F0 3F1 3B0 3B1 0B0 0B1
        rank 1: 1F0 1F1 2F0 2F1 2B0 2B1 1B0 1B1
    """
    microbatches = range(n_microbatches)
    ranks: list[list[Action]] = [[] for _ in range(1 + max(rank_of))]
    for stage, rank in enumerate(rank_of):
        ranks[rank] += [Action("F", stage, i) for i in microbatches]
    for stage, rank in reversed(list(enumerate(rank_of)) if backward else []):
        ranks[rank] += [Action("B", stage, i) for i in microbatches]
    return PipelineOrder("breadth first", tuple(map(tuple, ranks)))


def _gpipe(rank: int, n_microbatches: int) -> list[Action]:
    kinds: tuple[Kind, Kind] = ("F", "B")
    return [Action(kind, rank, i) for kind in kinds for i in range(n_microbatches)]


def _one_forward_one_backward(rank: int, n_ranks: int, n_microbatches: int) -> list[Action]:
    """Also for fewer microbatches than ranks, where torch has none.

    (The order that torch 2.13 publishes for its last rank lacks F0; what it runs is this.)
    """
    ahead = min(n_ranks - 1 - rank, n_microbatches)
    actions = [Action("F", rank, i) for i in range(ahead)]
    for i in range(n_microbatches):
        if i + ahead < n_microbatches:
            actions.append(Action("F", rank, i + ahead))
        actions.append(Action("B", rank, i))
    return actions


def _from_torch(
    name: str, kind: _Kind, n_ranks: int, n_microbatches: int, stages_per_rank: int
) -> list[list[Action]]:
    """What the constructor of torch's schedule makes, which looks at no more of a stage."""
    from torch.distributed.pipelining import schedules

    stage = SimpleNamespace(
        group_rank=0, group_size=n_ranks, num_stages=n_ranks * stages_per_rank, submod=None
    )
    make = getattr(schedules, str(kind.torch_class))
    try:
        order = make([stage] * stages_per_rank, n_microbatches).pipeline_order
    except ValueError as error:
        fitting = 2 * n_ranks if kind.fixed else n_microbatches // n_ranks * n_ranks
        raise ConfigError(
            f"{name} on {n_ranks} ranks with {stages_per_rank} stages each cannot have "
            f"{n_microbatches} microbatches ({error}) Choose {fitting} microbatches, or "
            "GPipe or 1F1B, which take any number"
        ) from None
    return [list(_flat(order[rank])) for rank in range(n_ranks)]


def _flat(actions: Iterable[Any]) -> Iterator[Action]:
    """Torch's actions as ours, without idle moments and without reductions."""
    for action in actions:
        if action is None:
            continue
        if action.sub_actions is not None:
            yield from _flat(action.sub_actions)
        elif action.computation_type.value in ("F", "B", "I", "W"):
            yield Action(action.computation_type.value, action.stage_index, action.microbatch_index)
