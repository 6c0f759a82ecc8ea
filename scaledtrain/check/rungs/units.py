"""Whether units are dead, or outputs the same for all samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scaledtrain.check.modules import take_small_steps
from scaledtrain.check.subject import Subject, logits_of
from scaledtrain.check.verdict import Verdict, failed, named, passed, together, warning
from scaledtrain.layers.units import Units

__all__ = ["units"]

_STEPS = 3
_BATCHES = 4
_MANY = 0.5  # of the units of a layer
_RECTIFIERS = {  # what is zero for all inputs below zero
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
    torch.ops.aten.hardtanh.default,
    torch.ops.aten.hardtanh_.default,
    torch.ops.aten.threshold.default,
}


def units(subject: Subject) -> Verdict:
    """Counts units of rectifiers that are zero for every sample of the first batches.

    What a unit is, `Units` says. It is looked at after a few small steps, when layers that begin at
    zero no longer are.
    """
    model = subject.model()
    few = subject.batches(_STEPS, subject.samples)
    take_small_steps(model, (subject.loss(model, batch)[1] for batch in islice(cycle(few), _STEPS)))
    model.eval()
    watch = _Rectified(model)
    constant = True
    first: Tensor | None = None
    with torch.no_grad():
        for batch in subject.batches(_BATCHES):
            with watch:
                made = logits_of(subject.loss(model, batch)[0])
            if made is None:
                constant = False
                continue
            first = made[:1] if first is None else first
            constant = (
                constant and made.shape[1:] == first.shape[1:] and bool((made == first).all())
            )
    counts = {name: (int((~alive).sum()), alive.numel()) for name, alive in watch.alive.items()}
    dead, total = (
        (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0)
    )
    return together(
        [*_dead(counts), *_constant(constant)],
        passed(
            f"{dead} of {total} rectified units are zero for all samples"
            if counts
            else "the model has no rectifiers; its outputs differ between samples",
            dead=dead,
            units=total,
        ),
    )


def _dead(counts: Mapping[str, tuple[int, int]]) -> Iterator[Verdict]:
    told = {name: f"{name} ({dead} of {n})" for name, (dead, n) in counts.items()}
    advice = (
        "begin with biases at 0, lower the learning rate, normalise the inputs, or use a rectifier "
        "with a slope below 0"
    )
    if whole := [told[name] for name, (dead, n) in counts.items() if dead == n]:
        yield failed(f"units that are zero for all samples: {named(whole)}", advice)
    many = [told[name] for name, (dead, n) in counts.items() if _MANY * n < dead < n]
    if many:
        yield warning(f"many units that are zero for all samples: {named(many)}", advice)


def _constant(constant: bool) -> Iterator[Verdict]:
    if constant:
        yield failed(
            "the outputs are the same for all samples, whatever the inputs",
            "look for a layer of zeros, units that are all dead, or inputs that are not used",
        )


class _Rectified(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which units were ever not zero, by the module in which they were rectified."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[str, Tensor] = {}
        self._model = model
        self._inside: list[str] = []
        self._hooks: list[Any] = []
        self._calls: dict[str, int] = {}
        self._units = Units()

    def __enter__(self) -> _Rectified:
        self._calls, self._units = {}, Units()
        for name, module in self._model.named_modules():

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                self._inside.append(name or "the model itself")

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                self._inside.pop()
                self._units.passed(module)

            self._hooks += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave, always_call=True),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _RECTIFIERS and isinstance(output, Tensor) and output.dim() > 1:
            self._saw(output)
        return output

    def _saw(self, output: Tensor) -> None:
        place = self._inside[-1] if self._inside else "outside of the modules"
        self._calls[place] = number = self._calls.get(place, 0) + 1
        if number > 1:  # one of several in the same module
            place = f"{place}, number {number}"
        alive = self._units.active(output != 0)
        known = self.alive.get(place)
        self.alive[place] = alive if known is None or known.shape != alive.shape else known | alive
