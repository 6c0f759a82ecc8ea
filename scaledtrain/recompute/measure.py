"""What the blocks of a model cost, found by running each alone on what it is really given."""

from __future__ import annotations

import statistics
import time
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.apart import Apart, Sample
from scaledtrain.recompute.blocks import Call, Interception, check_arguments, first_tensor
from scaledtrain.recompute.chain import Block, Chain, Way
from scaledtrain.recompute.dear import MakeContexts
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.live_bytes import LiveBytes
from scaledtrain.recompute.plan import every

__all__ = ["measure_chain"]

_REPEATS = 3  # of what is timed


def measure_chain(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    sample: Sample,
    ways: Sequence[tuple[str, MakeContexts | None]],
) -> Chain:
    """Measure each block, and what is before and after them.

    Memory is needed for one block at a time, so that also a model can be measured whose activations
    do not fit. Blocks of the same kind, with inputs of the same kind, are measured once.

    Args:
        model: that has them.
        blocks: in the order in which it calls them, each once.
        sample: see `Sample`.
        ways: of running a block: name, and the contexts in which it is checkpointed.

    Returns:
        The blocks, and one more for what comes after them.

    Raises:
        ConfigError: the model does not call each block once, in this order.
    """
    measured: dict[Hashable, Block] = {}
    chain: list[Block] = []

    def call(index: int, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index != len(chain):
            raise ConfigError(
                f"the model calls block {index} where block {len(chain)} should come; blocks whose "
                "activations are to be computed again are called once each, in their order"
            )
        check_arguments(blocks[index], args, kwargs)
        kind = _kind(blocks[index], args, kwargs)
        if kind not in measured:
            with torch.enable_grad():
                measured[kind] = _measure(forward, args, kwargs, ways)
        chain.append(measured[kind])
        return forward(*args, **kwargs)

    interception = Interception(blocks, call)
    try:
        with Apart(model) as apart, torch.no_grad():
            sample(apart)
    finally:
        interception.remove()
    if len(chain) < len(blocks):
        raise ConfigError(f"the model called {len(chain)} of its {len(blocks)} blocks")
    base, rest = _around(model, blocks, sample)
    return Chain((*chain, rest), base)


def _kind(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """Equal for blocks that cost the same."""
    inside = [(type(m).__name__, m.extra_repr(), m.training) for m in block.modules()]
    held = [(p.shape, p.dtype, p.requires_grad) for p in block.parameters()]
    return type(block), tuple(inside), tuple(held), _shape(args), _shape(kwargs)


def _shape(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_shape, value))
    if isinstance(value, dict):
        return tuple((key, _shape(inside)) for key, inside in value.items())
    return repr(value)


def _measure(
    forward: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ways: Sequence[tuple[str, MakeContexts | None]],
) -> Block:
    """One block, by itself."""

    def run(x: Tensor) -> Any:
        return forward(x, *args[1:], **kwargs)

    def again(x: Tensor) -> Any:
        return checkpoint(run, x, use_reentrant=False)

    x = args[0].detach()
    version = x._version
    with torch.no_grad():
        run(x)
    if x._version != version:
        raise ConfigError(
            "a block changes its input in place, so that it cannot be computed again from it; make "
            "it without (nn.ReLU(inplace=False)), or let the block begin before it"
        )
    if x.is_floating_point():
        x.requires_grad_()
    forward_bytes, output_bytes, _, _ = _bytes(again, x)
    forward_seconds, with_forward = _seconds(again, x)
    found: list[Way] = []
    for name, contexts in ways:
        way = run if contexts is None else _checkpointed(run, contexts)
        most, kept, backward, returned = _bytes(way, x)
        ahead, back = _seconds(way, x)
        stopped_seconds, stopped_bytes = ahead, kept
        if contexts is None:
            stopped_seconds = max(0.0, with_forward - back)
            stopped_bytes = kept - (0 if returned else output_bytes)
        found.append(Way(name, ahead, back, kept, most, backward, stopped_seconds, stopped_bytes))
    return Block(tuple(found), output_bytes, forward_seconds, forward_bytes)


def _checkpointed(run: Call, contexts: MakeContexts) -> Call:
    return lambda x: checkpoint(run, x, use_reentrant=False, context_fn=contexts)


def _bytes(run: Call, x: Tensor) -> tuple[int, int, int, bool]:
    """What is alive when, and whether the output is kept for the backward pass.

    Bytes: most during forward; after it; most during backward, beside the output's gradient.
    """
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage()._cdata)
        return tensor

    with LiveBytes() as counted:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = first_tensor(run(x))
        most, kept = counted.peak, counted.live
        is_saved = output.untyped_storage()._cdata in saved
        gradient = torch.ones_like(output)
        output_bytes = gradient.untyped_storage().nbytes()
        edge = get_gradient_edge(output) if output.requires_grad else None
        del output
        counted.peak = counted.live
        if edge is not None:
            torch.autograd.backward(edge, gradient)
        backward = counted.peak - output_bytes
    x.grad = None
    return most, kept, backward, is_saved


def _seconds(run: Call, x: Tensor) -> tuple[float, float]:
    """Of forward and backward, medians."""
    ahead, back = [], []
    for repeat in range(_REPEATS + 1):
        start = _now(x)
        output = first_tensor(run(x))
        middle = _now(x)
        if output.requires_grad:
            torch.autograd.backward(output, torch.ones_like(output))
        end = _now(x)
        x.grad = None
        if repeat > 0:  # the first one warms up
            ahead.append(middle - start)
            back.append(end - middle)
    return statistics.median(ahead), statistics.median(back)


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _around(model: nn.Module, blocks: Sequence[nn.Module], sample: Sample) -> tuple[int, Block]:
    """What is there before the first block, and what comes after the last one."""
    executor = Executor(blocks, every(1, len(blocks)))
    counted = LiveBytes()
    base = after = most = 0
    start = middle = end = 0.0

    def entered(module: nn.Module, args: Any) -> None:
        nonlocal base
        base = counted.live

    def left(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal after, start
        tensor = first_tensor(output)
        counted.peak = after = counted.live
        start = _now(tensor)
        tensor.register_hook(came_back)  # type: ignore[no-untyped-call]

    def came_back(gradient: Tensor) -> None:
        nonlocal most, end
        most, end = counted.peak - after, _now(gradient)

    hooks = [
        blocks[0].register_forward_pre_hook(entered),
        blocks[-1].register_forward_hook(left),
    ]
    try:
        with Apart(model) as apart, counted:
            loss = sample(apart)
            middle = _now(loss)
            torch.autograd.backward(loss)
    finally:
        executor.remove()
        for hook in hooks:
            hook.remove()
    way = Way("all", middle - start, end - middle, 0, most, most, middle - start, 0)
    return base, Block((way,), 0, middle - start, most)
