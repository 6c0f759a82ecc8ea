"""A model's forward and backward pass apart from its training, to see what they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scaledtrain.recompute.blocks import Call
from scaledtrain.recompute.live_bytes import LiveBytes

__all__ = [
    "Apart",
    "Sample",
    "computes",
    "kept_and_peak_bytes",
    "loss_without_gradients",
    "peak_bytes",
]

Sample = Callable[[Call], Tensor]
"""Called with what runs the model's ``forward``, returns the loss of one microbatch."""


class Apart:
    """The model with parameters and buffers that share memory with its own, or are copies.

    Gradients are given up as soon as they are there; random numbers, buffers and the model's own
    gradients are as before at the end.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own: dict[Tensor, Tensor] = {}
        for parameter in model.parameters():
            own = parameter.detach().requires_grad_(parameter.requires_grad)
            if own.requires_grad:
                own.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
            self._own[parameter] = own
        for buffer in model.buffers():
            self._own[buffer] = buffer.clone()
        devices = {p.get_device() for p in model.parameters() if p.is_cuda}
        self._random = torch.random.fork_rng(devices=sorted(devices))

    def __enter__(self) -> Call:
        self._random.__enter__()
        return self._call

    def __exit__(self, *error: Any) -> None:
        self._random.__exit__(*error)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        with self._swapped():
            return self._model(*args, **kwargs)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        # torch's functional_call leaves its own tensors behind in a module that is in two places.
        held: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module in self._model.modules():
            tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            held += [(place, dict(place)) for place in tensors if place]
        try:
            for place, before in held:
                place.update({n: self._own.get(t, t) for n, t in before.items() if t is not None})
            yield
        finally:
            for place, before in held:
                place.update(before)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def loss_without_gradients(model: nn.Module, sample: Sample) -> float:
    """Of a forward pass that is not recorded; no plan has a part in it."""
    with Apart(model) as apart, torch.no_grad():
        return sample(apart).item()


def computes(model: nn.Module, sample: Sample, expected: float) -> bool:
    """Whether a forward pass that a backward pass could follow has this loss, but for rounding."""
    with Apart(model) as apart, torch.enable_grad():
        found = sample(apart).item()
    if math.isnan(expected):  # whatever is wrong with the model, it is not what runs again
        return math.isnan(found)
    return math.isclose(expected, found, rel_tol=1e-4, abs_tol=1e-12)


def peak_bytes(model: nn.Module, sample: Sample) -> int:
    """Activations that are alive at once in a forward and backward pass, at most.

    The model's parameters, gradients and buffers stay as they are, and no hook of theirs is called.

    Args:
        model: with or without a plan.
        sample: see `Sample`.
    """
    return kept_and_peak_bytes(model, sample)[1]


def kept_and_peak_bytes(model: nn.Module, sample: Sample) -> tuple[int, int]:
    """Activations between forward and backward pass, and as `peak_bytes` has them."""
    with Apart(model) as apart, LiveBytes() as counted:
        loss = sample(apart)
        kept: int = counted.live
        torch.autograd.backward(loss)
    peak: int = counted.peak
    return kept, peak
