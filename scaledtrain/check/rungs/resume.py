"""Whether a run that was saved and resumed is the one that never stopped."""

from __future__ import annotations

import random
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from scaledtrain.check.modules import same
from scaledtrain.check.subject import Recorder, Subject
from scaledtrain.check.verdict import Verdict, failed, named, passed, skipped
from scaledtrain.checkpoint import Checkpointing
from scaledtrain.copies import copied

if TYPE_CHECKING:
    from scaledtrain.trainer import Trainer

__all__ = ["resume"]

_SAVED_AT, _STEPS = 3, 6


class _Attributes(Recorder):
    """Also keeps what modules hold besides parameters and buffers, at one step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step
        self.held: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer) -> None:
        super().on_fit_start(trainer)
        self._look(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        super().on_step_end(trainer)
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if trainer.step_count == self._step:
            self.held = _held(trainer.model)


def resume(subject: Subject) -> Verdict:
    """A few steps, saved, resumed in a new Trainer and a new model, and a few more.

    Parameters and losses must be those of the run that made all steps at once, bit for bit.
    """
    whole, first, second = _Attributes(_SAVED_AT), Recorder(), _Attributes(_SAVED_AT)
    with subject.training(whole) as (trainer, loader):
        trainer.fit(loader, max_steps=_STEPS)
        strategy = trainer.strategy
    with TemporaryDirectory(prefix="scaledtrain-check-") as folder:
        options = Checkpointing(folder=folder, keep_last=1, on_failure="end")
        with subject.training(first, checkpointing=options) as (trainer, loader):
            trainer.fit(loader, max_steps=_SAVED_AT)
        with subject.training(second, checkpointing=options, resume="auto") as (trainer, loader):
            trainer.fit(loader, max_steps=_STEPS)
    losses = [*first.losses, *second.losses]
    if same(whole.ended, second.ended) and same(whole.losses, losses):
        return passed(
            f"{_STEPS} steps, saved and resumed after {_SAVED_AT}, are equal to {_STEPS} steps"
        )
    if strategy.settles_to_save:
        return skipped(
            f"replicas under {strategy} settle to be saved, which changes the course of a run, so "
            "that none which was saved is equal to one that was not; check with strategy=sync"
        )
    return _why(whole, second, losses)


def _why(whole: _Attributes, second: _Attributes, losses: list[float]) -> Verdict:
    lost = [name for name, value in whole.held.items() if not same(value, second.held.get(name))]
    pairs = zip(whole.losses, losses, strict=False)
    step = next((i + 1 for i, (a, b) in enumerate(pairs) if not same(a, b)), _STEPS)
    if lost:
        return failed(
            f"resumed after step {_SAVED_AT} the run is another one from step {step} on: "
            f"{named(lost)} of the model is not in its state dict, so it is not saved",
            "make it a buffer (register_buffer), or give it get_extra_state and set_extra_state",
            lost=lost,
            step=step,
        )
    if not same(whole.batches[_SAVED_AT:], second.batches):
        return failed(
            f"resumed after step {_SAVED_AT} the run gets other batches",
            "draw what transforms draw from the global generators, which are saved; give a loader "
            "of your own state_dict and load_state_dict",
            lost=["batches"],
            step=step,
        )
    return failed(
        f"resumed after step {_SAVED_AT} the run is another one from step {step} on, though it "
        "has the same batches",
        "give what has state (optimizer, callbacks, modules) a state_dict that holds all of it",
        lost=[],
        step=step,
    )


def _held(model: nn.Module) -> dict[str, Any]:
    """Values that modules have as plain attributes, copied."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key.startswith("_") or key == "training" or not _is_value(value):
                continue
            found[f"{name}.{key}" if name else key] = _kept(value)
    return found


def _is_value(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_value, value))
    if isinstance(value, Mapping):
        return all(map(_is_value, value.values()))
    kinds = (int, float, str, Tensor, np.ndarray, torch.Generator, random.Random)
    return value is None or isinstance(value, (*kinds, np.random.Generator))


def _kept(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state().clone()
    if isinstance(value, random.Random):
        return str(value.getstate())
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return copied(value)
