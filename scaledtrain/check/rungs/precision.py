"""Whether training in 16 bits stays near training in 32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from scaledtrain.check.modules import infinite_module, outputs_by_module
from scaledtrain.check.subject import Recorder, Subject
from scaledtrain.check.verdict import Verdict, failed, passed, skipped, together, warning
from scaledtrain.errors import NonFiniteLossError
from scaledtrain.precision import Precision

__all__ = ["precision"]

_STEPS = 4
_NEAR = 0.05  # of the loss in fp32


@dataclass(frozen=True)
class _Run:
    losses: list[float]
    overflows: int
    ended: str
    """By which error; empty: by none."""


def precision(subject: Subject) -> Verdict:
    """A few steps with each number format, and the largest relative difference of their losses.

    With float16 steps whose gradients overflow are left out, and the loss scale is halved: losses
    are compared up to the first. What overflows in every step has collapsed.
    """
    parameters = [p for p in subject.model().parameters() if p.requires_grad]
    narrow = [p.dtype for p in parameters if p.dtype not in (torch.float32, torch.float64)]
    if narrow:
        return skipped(f"the model's own parameters are {narrow[0]}; none to compare with")
    names = ["bf16-mixed", "fp16-mixed"]
    own = subject.precision
    others = [own if own.name == name else Precision(name) for name in names]  # type: ignore[arg-type]
    if own.name not in ("fp32", *names):
        others.append(own)
    usual = _run(subject, Precision("fp32"))
    if usual.ended:
        return failed(
            f"in fp32, too, the loss is not finite within {_STEPS} steps: {usual.ended}",
            "lower the learning rate or warm it up, or clip gradients (max_grad_norm=1.0)",
        )
    findings: list[Verdict] = []
    told: list[str] = []
    numbers: dict[str, float] = {}
    for other in others:
        run = _run(subject, other)
        findings += _judge(subject, other, usual, run)
        difference = _difference(usual, run)
        numbers[other.name] = difference
        skips = f" ({run.overflows} overflows)" if run.overflows else ""
        told.append(f"{other.name} {difference:.2%}{skips}")
    return together(findings, passed(f"losses differ from fp32 by {', '.join(told)}", **numbers))


def _run(subject: Subject, precision: Precision) -> _Run:
    recorder = Recorder()
    with subject.training(recorder, precision=precision) as (trainer, loader):
        ended = ""
        try:
            trainer.fit(loader, max_steps=_STEPS)
        except NonFiniteLossError as error:
            ended = str(error)
        return _Run(recorder.losses, trainer.scaler.overflows, ended)


def _difference(usual: _Run, other: _Run) -> float:
    """Largest of the steps before the first overflow."""
    scale = max(abs(loss) for loss in usual.losses) if usual.losses else math.nan
    n = 1 if other.overflows else len(usual.losses)
    pairs = list(zip(usual.losses, other.losses, strict=False))[:n]
    return max((abs(a - b) / max(abs(a), 0.1 * scale) for a, b in pairs), default=math.inf)


def _judge(subject: Subject, precision: Precision, usual: _Run, run: _Run) -> Iterator[Verdict]:
    tell = failed if precision.name == subject.precision.name else warning
    name = precision.name
    if run.ended or (run.overflows >= _STEPS and precision.scales_loss):
        place = _overflowing(subject, precision)
        where = f"{place} returns numbers beyond its range" if place else "gradients overflow"
        what = (
            f"all {_STEPS} steps overflow" if run.overflows >= _STEPS else "the loss is not finite"
        )
        yield tell(
            f"{name}: {what}, first where {where}",
            "take bf16-mixed, which has float32's range, normalise the inputs, or compute that "
            "module in float32 (torch.autocast(enabled=False))",
            collapsed=place or "gradients",
        )
    elif (difference := _difference(usual, run)) > _NEAR:
        yield tell(
            f"{name}: losses differ from fp32 by {difference:.1%} within {_STEPS} steps",
            "compute sums, norms and softmax of your own in float32",
        )


@torch.no_grad()
def _overflowing(subject: Subject, precision: Precision) -> str:
    """The first module whose outputs are not finite in this format."""
    model = precision.convert(subject.model())
    (batch,) = subject.batches(1)
    with precision.autocast(subject.device):
        return infinite_module(outputs_by_module(model, lambda: subject.loss(model, batch)))
