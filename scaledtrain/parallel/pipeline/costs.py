"""What the parts of a model cost, found by running each alone on what it is really given."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from scaledtrain.memory.fake import Fakes, bytes_of, copied
from scaledtrain.memory.measure import update_bytes
from scaledtrain.parallel.pipeline.parts import ModelParts, spread
from scaledtrain.parallel.pipeline.trace import model_arguments
from scaledtrain.recompute.apart import Apart
from scaledtrain.recompute.kinds import kind_of
from scaledtrain.recompute.live_bytes import LiveBytes
from scaledtrain.recompute.measure import now
from scaledtrain.replica import MakeOptimizer, Replica
from scaledtrain.schedule import LossFn, call_model

__all__ = ["PartCost", "measure_parts"]

_REPEATS = 5  # of what is timed

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class PartCost:
    """Of one part of a model, for one microbatch."""

    forward_seconds: float
    """Of the forward pass."""
    backward_seconds: float
    """Of the backward pass, both parts of it."""
    kept_bytes: int = 0
    """Activations, from the end of the forward pass to the backward pass, its output included."""
    working_bytes: int = 0
    """Activations and their gradients that are alive at once beside ``kept_bytes``, at most."""
    state_bytes: int = 0
    """Parameters, their gradients, buffers and what the optimizer keeps for them."""
    sent_bytes: int = 0
    """Of the output, if the next part is in another stage; as many come back."""

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds


def measure_parts(
    parts: ModelParts,
    batch: Any,
    loss_fn: LossFn | None = None,
    optimizer: MakeOptimizer | None = None,
) -> list[PartCost]:
    """Run each part by itself, with the activations of one part in memory at a time.

    Parts of the same kind with inputs of the same kind are measured once. The loss is of the last
    part. Parameters, buffers, gradients and random numbers stay as they are. Times differ from rank
    to rank and from run to run: measure on one rank, and let that one's cut be everybody's.

    Call it in the autocast context of training. Memory does not know of activations that are
    computed again.

    Args:
        parts: of a model in training mode, on its device.
        batch: a microbatch, (inputs, targets); without ``loss_fn`` what the model computes its loss
            of.
        loss_fn: of outputs and targets; None: the model's own, which the last part returns.
        optimizer: makes the optimizer, whose state is counted; None: it has none.

    Returns:
        For each part its seconds and bytes.

    Example:
        >>> from scaledtrain.parallel.pipeline import find_parts
        >>> parts = find_parts(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
        >>> batch = torch.randn(16, 4), torch.randn(16, 2)
        >>> costs = measure_parts(parts, batch, nn.functional.mse_loss)
        >>> [cost.sent_bytes for cost in costs]  # 16 * 8 numbers of 4 bytes
        [512, 0]
        >>> [cost.state_bytes for cost in costs]  # 4 * 2 * 40 and 4 * 2 * 18
        [320, 144]
    """
    inputs, targets = (batch, None) if loss_fn is None else batch
    given: _Arguments = model_arguments(inputs, own_loss=loss_fn is None)
    measured: dict[Hashable, PartCost] = {}
    costs = []
    for index, part in enumerate(parts.modules):
        is_last = index == len(parts) - 1
        run = _Run(part, is_last, loss_fn, targets)
        kind = is_last, kind_of(part, *given)
        if kind not in measured:
            measured[kind] = run.measure(given, optimizer)
        costs.append(measured[kind])
        if not is_last:
            with Apart(part) as call:
                given = tree_map_only(Tensor, _received, spread(call(*given[0], **given[1]))), {}
    return costs


class _Run:
    """Forward and backward pass of a part."""

    def __init__(
        self, part: nn.Module, is_last: bool, loss_fn: LossFn | None, targets: Any
    ) -> None:
        self._part = part
        self._is_last = is_last
        self._loss_fn = loss_fn
        self._targets = targets

    def measure(self, given: _Arguments, optimizer: MakeOptimizer | None) -> PartCost:
        """What they cost."""
        times = []
        with Apart(self._part) as call, torch.enable_grad():
            sent, kept, working = self._bytes(call, given)
            for _ in range(_REPEATS + 1):
                times.append(self._seconds(call, given))
        # The first one warms up. Whatever else the machine does only adds to the others.
        ahead, back = map(min, zip(*times[1:], strict=True))
        state = _state_bytes(self._part, optimizer)
        return PartCost(ahead, back, kept, working, state, sent)

    def _forward(self, call: Callable[..., Any], given: _Arguments) -> list[Tensor]:
        torch.clear_autocast_cache()
        args, kwargs = tree_map_only(Tensor, _received, given)
        outputs = call(*args, **kwargs)
        if self._is_last:
            made = outputs
            batch = (None, self._targets) if self._loss_fn is not None else ()
            outputs = call_model(lambda *_: made, batch, self._loss_fn)[1]
        return [tensor for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)]

    def _bytes(self, call: Callable[..., Any], given: _Arguments) -> tuple[int, int, int]:
        """Of the output, kept, and at most beside that."""
        with LiveBytes() as counted:
            outputs = self._forward(call, given)
            kept, most = counted.live, counted.peak
            sent = 0 if self._is_last else sum(t.numel() * t.element_size() for t in outputs)
            counted.peak = counted.live
            _backward(outputs)
            most = max(most, counted.peak)
        return sent, kept, most - kept

    def _seconds(self, call: Callable[..., Any], given: _Arguments) -> tuple[float, float]:
        device = next(t for t in tree_leaves(given) if isinstance(t, Tensor))
        start = now(device)
        outputs = self._forward(call, given)
        middle = now(device)
        _backward(outputs)
        return middle - start, now(device) - middle


def _received(tensor: Tensor) -> Tensor:
    """As it comes from another rank: a leaf of a graph of its own."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _backward(outputs: Sequence[Tensor]) -> None:
    roots = [output for output in outputs if output.requires_grad]
    if roots:
        with torch.autocast(roots[0].device.type, enabled=False):
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])


def _state_bytes(part: nn.Module, optimizer: MakeOptimizer | None) -> int:
    named = list(part.named_parameters())
    found = bytes_of([*part.parameters(), *part.buffers()])
    trained = [(name, p) for name, p in named if p.requires_grad]
    found += bytes_of([p for _, p in trained])  # gradients
    if optimizer is None or not trained:
        return found
    alone = nn.Module()
    for name, parameter in trained:
        alone.register_parameter(name.replace(".", "_"), parameter)
    with Fakes() as fakes, fakes.explained("the optimizer"):
        found += update_bytes(Replica(copied(alone, trained[0][1].device), optimizer)).state
    return found
