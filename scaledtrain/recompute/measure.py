"""What the blocks of a model cost, found by running each alone on what it is really given."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.apart import Apart, Sample
from scaledtrain.recompute.blocks import (
    Call,
    Interception,
    check_arguments,
    first_tensor,
    has_hooks,
    is_compiled,
    same_arguments,
)
from scaledtrain.recompute.chain import Block, Chain, Way
from scaledtrain.recompute.dear import MakeContexts
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.kinds import Kind, are_alike, kind_of
from scaledtrain.recompute.live_bytes import LiveBytes, storage_key
from scaledtrain.recompute.offload import Offload, Store, storages, storages_of
from scaledtrain.recompute.plan import ELSEWHERE, Keep, Recompute

__all__ = ["measure_chain", "now"]

_REPEATS = 8  # of what is timed
_SAME = 0.01  # gradients differ by a smaller part
_OFFLOADED_BYTES, _MOST_OFFLOADED = 64 * 2**20, 64  # tensors of a timed offload, together
_CHANGED = ("has been mutated", "in-place operation")  # what is kept, says torch


def measure_chain(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    sample: Sample,
    ways: Mapping[str, MakeContexts],
    store: Store | None = None,
) -> Chain:
    """Measure each block, and what is before and after them.

    Memory is needed for one block at a time, so that also a model can be measured whose activations
    do not fit. Blocks of the same kind, with inputs of the same kind, are measured once.

    Args:
        model: that has them.
        blocks: in the order in which it calls them, each once.
        sample: see `Sample`.
        ways: of running a block beside ``"all"`` and `ELSEWHERE`, by name, and the contexts in
            which it is checkpointed. A block has not those that another one is better than in all.
        store: where inputs of blocks, and all that they save, can be offloaded to; None: they
            cannot.

    Returns:
        The blocks, and one more for what comes after them.

    Raises:
        ConfigError: the model does not call each block once, in this order.
    """
    is_seen_inside = not any(map(is_compiled, blocks))
    measured: dict[Kind, Block] = {}
    chain: list[Block] = []
    offload_seconds: float | None = None  # of a byte
    before: tuple[Any, Any, Any] | None = None  # arguments and output of the last block

    def call(index: int, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal before, offload_seconds
        if index != len(chain):
            raise ConfigError(
                f"the model calls block {index} where block {len(chain)} should come; blocks whose "
                "activations are to be computed again are called once each, in their order"
            )
        check_arguments(blocks[index], args, kwargs)
        kind = kind_of(blocks[index], args, kwargs)
        if kind not in measured:
            with torch.enable_grad():
                own = store if is_seen_inside else None
                found = _measure(forward, args, kwargs, ways, own, storages_of(model))
            same_class = (b for (of, *_), b in measured.items() if of is type(blocks[index]))
            alike = (known for known in same_class if are_alike(known, found))
            measured[kind] = next(alike, found)
        if offload_seconds is None and store is not None:
            offload_seconds = _offload_seconds(store, args[0])
        joins = before is not None and _follows(args, kwargs, *before)
        joins = joins and not has_hooks(blocks[index])
        chain.append(replace(measured[kind], joins=joins))
        output = forward(*args, **kwargs)
        before = args, kwargs, None if has_hooks(blocks[index]) else output
        return output

    interception = Interception(blocks, call)
    try:
        with Apart(model) as apart, torch.no_grad():
            sample(apart)
    finally:
        interception.remove()
        before = None
    if len(chain) < len(blocks):
        raise ConfigError(f"the model called {len(chain)} of its {len(blocks)} blocks")
    ends = _around(model, blocks, sample, store)
    blocks_and_rest = (*chain, ends.rest())
    return Chain(blocks_and_rest, ends.base, offload_seconds, ends.first_input, ends.late)


def _follows(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    args_before: tuple[Any, ...],
    kwargs_before: dict[str, Any],
    output_before: Any,
) -> bool:
    """Whether a block is given what the one before it returned, and the same other arguments."""
    if isinstance(output_before, tuple):
        output_before = output_before[0] if len(output_before) == 1 else None
    others_alike = same_arguments((args[1:], kwargs), (args_before[1:], kwargs_before))
    return args[0] is output_before and others_alike


def _measure(
    forward: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ways: Mapping[str, MakeContexts],
    store: Store | None,
    stays: Collection[int],
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
    plain = _bytes(again, x)
    runs: dict[str, Call] = {"all": run}
    stayed: set[int] = set()
    if store is not None:
        others = [t for t in tree_leaves((args[1:], kwargs)) if isinstance(t, Tensor)]
        with_others = {*stays, *storages(others)}

        def elsewhere(x: Tensor) -> Any:
            nonlocal stayed
            offload = Offload.of_block(store, with_others, x)
            stayed = offload.stayed
            with offload:
                return run(x)

        runs[ELSEWHERE] = elsewhere
    for name, contexts in ways.items():
        runs[name] = _checkpointed(run, contexts)
    counted: dict[str, _Bytes] = {}
    for name, way in runs.items():
        try:
            if name in ways:
                _bytes(way, x)  # from which it knows what is needed
            counted[name] = _bytes(way, x)
        except RuntimeError as error:
            if name == "all" or not any(told in str(error) for told in _CHANGED):
                raise
            # What would be kept is changed in place: the block has this way not.
    if ELSEWHERE in counted and storage_key(x) in stayed:
        counted[ELSEWHERE] = counted[ELSEWHERE]._replace(keeps_input=True)
    if ELSEWHERE in counted and not _same_gradient(run, runs[ELSEWHERE], x):
        del counted[ELSEWHERE]  # what is saved is changed behind autograd's back
    (forward_seconds, with_forward), *seconds = _seconds(
        [again, *(runs[name] for name in counted)], x
    )
    stopped = max(0.0, with_forward - seconds[0][1])
    found = [
        _way(name, *took, stopped if name == "all" else took[0], counted[name])
        for name, took in zip(counted, seconds, strict=True)
    ]
    return Block(_worthwhile(found), plain.output, forward_seconds, plain.forward)


def _way(name: str, ahead: float, back: float, stopped: float, counted: _Bytes) -> Way:
    return Way(
        name,
        ahead,
        back,
        counted.kept,
        counted.forward,
        counted.backward,
        stopped,
        counted.keeps_input,
        counted.keeps_output,
        runs_again=name not in ("all", ELSEWHERE),
        first_pass_only=name == ELSEWHERE,
    )


def _same_gradient(run: Call, other: Call, x: Tensor) -> bool:
    """Of the input, but for what kernels that are not deterministic make of it."""
    if not x.requires_grad:
        return True
    found = []
    for call in (run, other):
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            output = first_tensor(call(x))
            if output.requires_grad:
                with _as_backward(output):
                    torch.autograd.backward(output, torch.ones_like(output))
        found.append(torch.zeros_like(x) if x.grad is None else x.grad)
        x.grad = None
    one, another = found
    return bool((one - another).norm() <= _SAME * one.norm())


def _worthwhile(ways: Sequence[Way]) -> tuple[Way, ...]:
    """Without those that keep no fewer bytes than a faster one."""

    def costs(way: Way) -> tuple[float, ...]:
        seconds = way.forward_seconds + way.backward_seconds
        return seconds, way.kept_bytes, way.forward_bytes, way.backward_bytes

    found: list[Way] = []
    for way in sorted(ways, key=costs):
        like = [
            w
            for w in found
            if (w.runs_again, w.keeps_output) == (way.runs_again, way.keeps_output)
            and w.first_pass_only <= way.first_pass_only
            and w.keeps_input <= way.keeps_input
        ]
        if not any(all(a <= b for a, b in zip(costs(w), costs(way), strict=True)) for w in like):
            found.append(way)
    return tuple(sorted(found, key=lambda way: (way.runs_again, way.first_pass_only)))


def _checkpointed(run: Call, contexts: MakeContexts) -> Call:
    return lambda x: checkpoint(run, x, use_reentrant=False, context_fn=contexts)


class _Bytes(NamedTuple):
    """What is alive when, beside a block's input."""

    forward: int
    """At most, with the output."""
    kept: int
    """Afterwards."""
    backward: int
    """At most, beside the output's gradient."""
    output: int
    keeps_input: bool
    keeps_output: bool
    """``kept`` has it."""


def _bytes(run: Call, x: Tensor) -> _Bytes:
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.update(storages([tensor]))
        return tensor

    torch.clear_autocast_cache()  # casts of parameters count where they are made
    with LiveBytes() as counted:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = first_tensor(run(x))
        forward, with_output = counted.peak, counted.live
        returns_input = storage_key(output) == storage_key(x)
        n_bytes = output.numel() * output.element_size()
        end = _Ones.apply(output) if output.requires_grad else None  # type: ignore[no-untyped-call]
        del output
        kept = counted.live
        counted.peak = kept + n_bytes
        if end is not None:
            with _as_backward(end):
                torch.autograd.backward(end, end.detach())
        backward = counted.peak - n_bytes
    x.grad = None
    keeps_input = returns_input or storage_key(x) in saved
    return _Bytes(forward, kept, backward, n_bytes, keeps_input, with_output == kept)


class _Ones(torch.autograd.Function):
    """The end of a block, whose gradient nobody has but autograd, which gives it up early."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.shape = output.shape
        return output.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.new_ones(ctx.shape)


def _seconds(runs: Sequence[Call], x: Tensor) -> list[tuple[float, float]]:
    """Of forward and backward, the least: whatever else the machine does only adds to it.

    They take turns, so that what else it does adds to all of them.
    """
    found = [(math.inf, math.inf)] * len(runs)
    repeats = 1 if isinstance(x, FakeTensor) else _REPEATS  # fake tensors compute nothing
    for repeat in range(repeats + 1):
        for index, run in enumerate(runs):
            torch.clear_autocast_cache()
            start = now(x)
            output = first_tensor(run(x))
            middle = now(x)
            if output.requires_grad:
                with _as_backward(output):
                    torch.autograd.backward(output, torch.ones_like(output))
            end = now(x)
            x.grad = None
            if repeat > 0:  # the first one warms up
                ahead, back = found[index]
                found[index] = min(ahead, middle - start), min(back, end - middle)
    return found


def _offload_seconds(store: Store, x: Tensor) -> float:
    """Of a byte, there and back; the least.

    Many are there at a time, and come back last first, as in training: a single one would still be
    in the processor's cache.
    """
    n_bytes = max(1, x.numel() * x.element_size())
    filled = torch.ones(n_bytes, dtype=torch.uint8, device=x.device)
    count = max(1, min(_MOST_OFFLOADED, _OFFLOADED_BYTES // n_bytes))
    found = []
    for _ in range(_REPEATS + 1):
        start = now(x)
        written = [store.put(filled) for _ in range(count)]
        while written:
            written.pop()()
        found.append(now(x) - start)
    return min(found) / (count * n_bytes)


def _as_backward(like: Tensor) -> AbstractContextManager[Any]:
    """A backward pass is outside autocast."""
    return torch.autocast(like.device.type, enabled=False)


def now(x: Tensor) -> float:
    """Seconds, when all that the tensor's device was told is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def _around(
    model: nn.Module, blocks: Sequence[nn.Module], sample: Sample, store: Store | None
) -> _Ends:
    """What is around the blocks, of which nothing is kept but inputs, elsewhere if they can be."""
    step = Recompute((Keep(),), offload=store is not None)
    executor = Executor(model, blocks, (step,) * len(blocks), {}, store)
    ends = _Ends(blocks)
    try:
        with Apart(model) as apart, ends.counted:
            loss = sample(apart)
            ends.turn(loss)
            torch.autograd.backward(loss)
    finally:
        executor.remove()
        ends.remove()
    return ends


class _Ends:
    """Looks what is alive where the blocks begin and where they end, in one step.

    Args:
        blocks: of a model that will make it, while ``counted`` is active.

    Attributes:
        base: bytes that are there before the first block, and stay.
        first_input: bytes, if nobody has it but the blocks.
        late: bytes that the backward pass of what comes after the last block leaves until all have
            had theirs: the gradient of a parameter that is used before the first one, too.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.counted = LiveBytes()
        self.base = self.first_input = self.late = 0
        self._after = self._ahead = self._back = 0
        self._ahead_seconds = self._back_seconds = self._since = 0.0
        self._keeps_input = True
        self._hooks = [
            blocks[0].register_forward_pre_hook(self._enter),
            blocks[-1].register_forward_hook(self._leave),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.base = self.counted.live
        self._given = _Memory(args[0])

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if not tensor.requires_grad:
            raise ConfigError(
                "no gradient comes to the last block, so that nothing is kept for one; leave "
                "activation checkpointing out, or train some of the blocks"
            )
        tensor.register_hook(self._come_back)  # type: ignore[no-untyped-call]
        if not self._given.is_there():
            self.first_input = self._given.n_bytes
            self.base -= self.first_input
        self._last_input, self._returned = _Memory(args[0]), _Memory(tensor)
        self.counted.peak = self._after = self.counted.live
        self._since = now(tensor)

    def turn(self, loss: Tensor) -> None:
        """The forward pass is over."""
        if not self._last_input.is_there():  # who calls the block had it until that was over
            self._after -= self._last_input.n_bytes
        self._ahead = self.counted.peak - self._after
        self._keeps_input = self._returned.is_there()
        self._after -= self._returned.n_bytes
        self.counted.peak = self.counted.live
        self._ahead_seconds, self._since = now(loss) - self._since, now(loss)

    def _come_back(self, gradient: Tensor) -> None:
        kept = self._returned.n_bytes
        self._back = self.counted.peak - self._after - (kept if self._keeps_input else 0)
        still = self._after + gradient.untyped_storage().nbytes()
        still += kept if self._returned.is_there() else 0
        self.late = max(0, self.counted.live - still)
        self._back_seconds = now(gradient) - self._since

    def rest(self) -> Block:
        """What comes after the last block: in bytes, beside its input."""
        seconds = self._ahead_seconds
        ahead, back = (max(0, n_bytes - self.late) for n_bytes in (self._ahead, self._back))
        way = Way(
            name="all",
            forward_seconds=seconds,
            backward_seconds=self._back_seconds,
            kept_bytes=0,
            forward_bytes=ahead,
            backward_bytes=back,
            stopped_seconds=seconds,
            keeps_input=self._keeps_input,
        )
        return Block((way,), 0, seconds, ahead)


class _Memory:
    """A tensor's, which may be given up."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.n_bytes = storage.nbytes()
        self._found = weakref.ref(storage)

    def is_there(self) -> bool:
        return self._found() is not None
