"""What an evaluation adds up on each rank, and what that comes to over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from scaledtrain.comm.protocols import Group
from scaledtrain.errors import ConfigError

__all__ = ["Accumulator", "Measures", "Metric", "gather_unequal"]

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
_MAX_DIMS = 8


@runtime_checkable
class Accumulator(Protocol):
    """A metric with a state, as those of torchmetrics are: of all samples, not a mean of batches.

    Its ``dist_sync_fn`` and ``distributed_available_fn`` are torchmetrics' own words.
    """

    dist_sync_fn: Any
    distributed_available_fn: Any

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch."""

    def compute(self) -> Any:
        """The value, over what all ranks have added."""

    def reset(self) -> None:
        """Forget all batches."""

    def sync(self, dist_sync_fn: Any) -> None:
        """Take part where others compute."""

    def unsync(self) -> None:
        """Have the state of this rank again."""

    def to(self, device: torch.device) -> Any:
        """Keep the state there."""


Metric = Callable[[Any, Any], Tensor] | Accumulator
"""``metric(outputs, targets)``, the mean over the samples of a batch; or one with a state."""


class Measures:
    """The loss and the metrics of one evaluation on one rank.

    A mean is summed up with the number of samples, so that batches may differ in size. An
    `Accumulator` is given the outputs as floats, and where the targets are whole numbers, so
    classes, their log-softmax: torchmetrics takes what lies between 0 and 1 in a batch for
    probabilities and all else for logits, and logits may happen to.

    Args:
        metrics: name -> metric.
        device: where batches are.

    Raises:
        ConfigError: a metric has a state that cannot be joined over ranks.

    Example:
        >>> right = lambda outputs, targets: (outputs == targets).double().mean()
        >>> measures = Measures({"right": right}, torch.device("cpu"))
        >>> measures.add(torch.tensor(2.0), torch.tensor([1, 2]), torch.tensor([1, 3]), 2)
        >>> measures.add(torch.tensor(5.0), torch.tensor([4]), torch.tensor([4]), 1)
        >>> {name: round(v.item(), 3) for name, v in measures.values([]).items()}
        {'loss': 3.0, 'right': 0.667}
    """

    def __init__(self, metrics: Mapping[str, Metric], device: torch.device) -> None:
        self._names = ["loss", *metrics]
        self._states = {n: m for n, m in metrics.items() if isinstance(m, Accumulator)}
        self._means = {n: m for n, m in metrics.items() if not isinstance(m, Accumulator)}
        for name, state in self._states.items():
            state.reset()
            _check_states(name, state)
            state.to(device)
        self._sums = torch.zeros(len(self._means) + 2, dtype=torch.float64, device=device)
        self._has_added = False

    def add(self, loss: Tensor, outputs: Any, targets: Any, size: int) -> None:
        """Add a batch of so many samples, whose mean loss is given.

        One that counts nothing is left out: a mean of it may be NaN, and where ranks share a model
        it may be one that has been added, only to keep others company.
        """
        if not size:
            return
        values = [loss, *(_number(n, m(outputs, targets)) for n, m in self._means.items())]
        self._sums[:-1] += torch.stack([v.to(self._sums) for v in values]) * size
        self._sums[-1] += size
        if self._states:
            for_states = _for_states(outputs, targets)
            for state in self._states.values():
                state.update(*for_states)
        self._has_added = True

    def values(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The value of each, over the ranks of all groups together. Collective.

        Args:
            groups: each rank's samples are its own alone in one group after the other, as those of
                the rows and the columns of a mesh.

        Raises:
            ConfigError: a metric has something else than one tensor as its value, or no sample
                was added on any rank.
        """
        for group in groups:
            group.all_reduce([self._sums], "sum").wait()
        if self._states and not self._sums[-1]:
            raise ConfigError(
                f"no sample was evaluated, so that {', '.join(self._states)} have no value; see "
                "that the data to evaluate on can be read"
            )
        means = self._sums[:-1] / self._sums[-1]
        found = dict(zip(["loss", *self._means], means, strict=True))
        found |= {name: self._value(name, groups) for name in self._states}
        return {name: found[name] for name in self._names}

    def _value(self, name: str, groups: Sequence[Group]) -> Tensor:
        """Computed where there have been batches, the same on each such rank, and sent to all."""
        state = self._states[name]
        before = state.dist_sync_fn, state.distributed_available_fn
        state.dist_sync_fn = partial(self._of_all, groups)
        state.distributed_available_fn = lambda: True
        value: Any = self._sums.new_zeros(0)
        try:
            if self._has_added:
                value = state.compute()
            else:
                state.sync(state.dist_sync_fn)
                state.unsync()
        finally:
            state.dist_sync_fn, state.distributed_available_fn = before
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"metric {name!r} ({type(state).__name__}) has a {type(value).__name__} as its "
                "value; take one whose value is one tensor"
            )
        return self._of_all(groups, value)[0]

    def _of_all(self, groups: Sequence[Group], tensor: Tensor, group: Any = None) -> list[Tensor]:
        """That of each rank that has had a batch; ``group`` is torch's, which there need not be."""
        has = torch.tensor([self._has_added], device=tensor.device)
        flags, tensors = [has], [tensor]
        for each in groups:
            flags = [got for own in flags for got in gather_unequal(own, each)]
            tensors = [got for own in tensors for got in gather_unequal(own, each)]
        return [t for t, has_added in zip(tensors, flags, strict=True) if has_added.item()]


def _check_states(name: str, state: Accumulator) -> None:
    """Refuse what torchmetrics itself would gather tensor by tensor, or let others gather."""
    reductions: Mapping[str, Any] = getattr(state, "_reductions", {})
    lists = [k for k, v in reductions.items() if v is None and isinstance(getattr(state, k), list)]
    if lists:
        raise ConfigError(
            f"metric {name!r} ({type(state).__name__}) keeps {', '.join(lists)} as lists that "
            "cannot be joined over ranks; call it on the outputs of trainer.predict instead"
        )
    parts = list(state.modules())[1:] if isinstance(state, nn.Module) else []
    inner = [type(part).__name__ for part in parts if isinstance(part, Accumulator)]
    if inner:
        raise ConfigError(
            f"metric {name!r} ({type(state).__name__}) is made of others ({', '.join(inner)}), "
            "each of which would be that of one rank alone; give those as metrics of their own"
        )


def _number(name: str, value: Any) -> Tensor:
    if isinstance(value, (int, float)):
        return torch.tensor(value)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"metric {name!r} made {what} of a batch; it must be one number, the mean over the "
            "samples; those of a MetricCollection are given one by one"
        )
    return value.reshape(())


def _for_states(outputs: Any, targets: Any) -> tuple[Any, Any]:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return outputs, targets
    if outputs.is_floating_point():
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if targets.is_floating_point():
        return outputs, targets.to(torch.promote_types(targets.dtype, torch.float32))
    if outputs.is_floating_point() and outputs.dim() == targets.dim() + 1:
        outputs = outputs.log_softmax(-1 if outputs.shape[:-1] == targets.shape else 1)
    return outputs, targets.long()


def gather_unequal(tensor: Tensor, group: Group) -> list[Tensor]:
    """Every rank's tensor, by rank; shapes and dtypes may differ. Collective."""
    if group.size == 1:
        return [tensor]
    if tensor.dim() > _MAX_DIMS:
        raise ConfigError(f"a metric has a state of {tensor.dim()} dims; {_MAX_DIMS} can be sent")
    shape = [*tensor.shape, *[-1] * (_MAX_DIMS - tensor.dim())]
    head = torch.tensor([_DTYPES.index(tensor.dtype), *shape], device=tensor.device)
    heads = [of_rank[0].tolist() for of_rank in group.all_gather([head])]
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    shapes = [[length for length in head[1:] if length >= 0] for head in heads]
    dtypes = [_DTYPES[head[0]] for head in heads]
    sizes = [
        torch.Size(shape).numel() * dtype.itemsize
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    padded = content.new_zeros(max(*sizes, 1))
    padded[: len(content)] = content
    gathered = [of_rank[0] for of_rank in group.all_gather([padded])]
    return [
        got[:size].view(dtype).view(shape)
        for got, size, dtype, shape in zip(gathered, sizes, dtypes, shapes, strict=True)
    ]
