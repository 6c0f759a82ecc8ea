"""How much memory and time the full run takes."""

from __future__ import annotations

import os
import time
from statistics import median

import torch

from scaledtrain.callbacks import Callback
from scaledtrain.check.subject import Subject
from scaledtrain.check.verdict import Verdict, failed, passed, together, warning
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.environment import cpu
from scaledtrain.errors import ConfigError
from scaledtrain.trainer import Trainer

__all__ = ["cost"]

_STEPS, _WARM_UP = 8, 3
_TIGHT = 0.9  # of the memory there is


class _Clock(Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.link.device.type == "cuda":
            torch.cuda.synchronize(trainer.link.device)
        self.times.append(time.perf_counter())


def cost(subject: Subject) -> Verdict:
    """The estimate of memory, and measured steps times their number, on this machine.

    What ranks tell each other, evaluations and saving are not in the time.
    """
    clock = _Clock()
    with subject.training(clock) as (trainer, loader):
        trainer.fit(loader, max_steps=_STEPS)
    seconds = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)][_WARM_UP - 1 :]
    each = median(seconds) if seconds else float("nan")
    steps = _steps(subject)
    machine = _machine(subject.device)
    numbers = {"step_seconds": each, "steps": steps, "machine": machine}
    told = f"{1 / each:.3g} steps per second"
    if steps is not None:
        told += f", {_duration(steps * each)} for {steps:,} steps"
    limit = subject.plan.max_seconds
    if limit is not None and (steps is None or limit < steps * each):
        told += f", ends after {_duration(limit)}"
        numbers["seconds"] = limit
    elif steps is not None:
        numbers["seconds"] = steps * each
    try:
        needed = subject.estimate().peak
    except ConfigError as error:
        return passed(f"{told}, on {machine}; memory is not known: {error}", **numbers)
    there = _memory(subject.device)
    numbers |= {"memory_bytes": needed, "memory_there_bytes": there}
    told = f"{_size(needed)} of {_size(there)} memory, {told}, on {machine}"
    advice = (
        "take a smaller batch, activation_checkpointing, 16-bit precision or shards "
        "(python -m scaledtrain.memory tells what each is worth)"
    )
    findings = []
    if needed > there:
        findings.append(failed(f"does not fit: {told}", advice))
    elif needed > _TIGHT * there:
        findings.append(warning(f"hardly fits: {told}", advice))
    return together(findings, passed(told, **numbers))


def _steps(subject: Subject) -> int | None:
    plan = subject.plan
    limits = [plan.max_steps] if plan.max_steps is not None else []
    in_epoch = ReplicaLoader(
        subject.loader, replicas=plan.replicas, accumulation=plan.accumulation
    ).steps_per_epoch
    if plan.max_epochs is not None and in_epoch is not None:
        limits.append(plan.max_epochs * in_epoch)
    return min(limits, default=None)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {cpu()}"


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _duration(seconds: float) -> str:
    """In the largest unit of which there is one at least.

    Example:
        >>> _duration(5400.0), _duration(12.0)
        ('1.5 h', '12 s')
    """
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.2g} s"


def _size(n: int) -> str:
    return f"{n / 2**30:.3g} GiB" if n >= 2**28 else f"{n / 2**20:.3g} MiB"
