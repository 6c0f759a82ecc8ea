"""Whether one batch can be learnt by heart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scaledtrain.check.expected import uninformed
from scaledtrain.check.modules import dropout_off
from scaledtrain.check.subject import Subject
from scaledtrain.check.verdict import Verdict, failed, passed, warning
from scaledtrain.data.cut import count_samples
from scaledtrain.replica import MakeOptimizer

__all__ = ["overfit"]

_ENOUGH = 0.05  # of the loss of a model that knows nothing
_FACTORS = (1.0, 0.1, 10.0)  # of the learning rate
_SEQUENCES = 4  # each has many terms of the loss
_CONTROL_LR = 1e-3


@dataclass(frozen=True)
class _Attempt:
    how: str
    loss: float
    steps: int


def overfit(subject: Subject) -> Verdict:
    """One batch, again and again, to a twentieth of the loss of a model that knows nothing.

    With the run's own optimizer, without weight decay, dropout and schedule; if that fails with a
    tenth and ten times of its learning rate, and at last with Adam, so that a wrong learning rate
    is told from a model that cannot learn.
    """
    (batch,) = subject.batches(1, subject.samples)
    if _is_text(subject, batch):
        (batch,) = subject.batches(1, min(_SEQUENCES, subject.samples))
    with torch.no_grad():
        outputs, first = subject.loss(subject.model(), batch)
        known = uninformed(subject, outputs, batch)
    start = float(first) if known is None else known.loss
    enough = _ENOUGH * abs(start)
    adam: MakeOptimizer = lambda named: torch.optim.Adam(named, lr=_CONTROL_LR)  # noqa: E731
    ways: list[tuple[MakeOptimizer, float]] = [(subject.make_optimizer, f) for f in _FACTORS]
    attempts: list[_Attempt] = []
    for make, factor in [*ways, (adam, 1.0)]:
        attempts.append(_attempt(subject, batch, make, factor, enough))
        if attempts[-1].loss <= enough:
            break
    best = min(attempts, key=lambda attempt: attempt.loss)
    n = count_samples(batch)
    told = f"one batch of {n} samples: loss {start:.4g} to {best.loss:.2g} in {best.steps} steps"
    numbers: dict[str, Any] = {"loss": best.loss, "enough": enough, "steps": best.steps}
    numbers["with"] = best.how
    if best.loss <= enough and len(attempts) == 1:
        return passed(told, **numbers)
    first_try = attempts[0]
    if best.loss <= enough:
        return warning(
            f"{told} with {best.how}, but only to {first_try.loss:.4g} with {first_try.how}",
            "change the learning rate towards it",
            **numbers,
        )
    tried = ", ".join(f"{a.how}: {a.loss:.4g}" for a in attempts)
    return failed(
        f"one batch of {n} samples cannot be learnt by heart: loss {start:.4g}, to at most "
        f"{enough:.2g} wanted, came to {tried}",
        "look at what the loss compares, for gradients that do not arrive, for targets that do not "
        "belong to their inputs, or take a larger model (more steps: check.steps)",
        **numbers,
    )


def _is_text(subject: Subject, batch: Any) -> bool:
    inputs = subject.inputs(batch)
    if isinstance(inputs, Mapping):
        inputs = inputs.get("input_ids")
    return isinstance(inputs, torch.Tensor) and not inputs.is_floating_point() and inputs.dim() == 2


def _attempt(
    subject: Subject, batch: Any, make: MakeOptimizer, factor: float, enough: float
) -> _Attempt:
    model = subject.model()
    optimizer = make([(name, p) for name, p in model.named_parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor  # a tensor is that of the next optimizer, too
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
    lr = optimizer.param_groups[0]["lr"]
    how = f"{type(optimizer).__name__} at {float(lr):.3g}"
    loss, steps = _descend(subject, model, optimizer, batch, enough)
    return _Attempt(how, loss, steps)


def _descend(
    subject: Subject, model: nn.Module, optimizer: Any, batch: Any, enough: float
) -> tuple[float, int]:
    """The loss where it ended, infinite if it left all numbers; and after how many steps."""
    value = math.inf
    with dropout_off(model):
        for step in range(subject.steps + 1):
            loss = subject.loss(model, batch)[1]
            value = float(loss.detach())
            if not math.isfinite(value):
                return math.inf, step
            if value <= enough or step == subject.steps or not loss.requires_grad:
                return value, step
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return value, subject.steps
