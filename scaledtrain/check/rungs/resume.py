"""Whether a run that was saved and resumed is the one that never stopped."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from scaledtrain.check.modules import same
from scaledtrain.check.subject import Recorder, Subject
from scaledtrain.check.verdict import Verdict, failed, named, passed
from scaledtrain.checkpoint import Checkpointing
from scaledtrain.checkpoint.folder import saved_steps
from scaledtrain.copies import copied

if TYPE_CHECKING:
    from scaledtrain.trainer import Trainer

__all__ = ["resume"]

_EVERY, _STEPS = 3, 6


class _Attributes(Recorder):
    """Also keeps what modules hold besides parameters and buffers, as a run begins with it.

    Of one that is saved it is what they hold then, the first time.

    Attributes:
        held: by name.
        steps: made until then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Any] = {}
        self.steps = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Keep them."""
        super().on_fit_start(trainer)
        self._model = trainer.model
        self.held = _held(self._model)

    def state_dict(self) -> dict[str, Any]:
        """The run is saved."""
        if self.steps == 0:
            self.steps = len(self.losses)
            self.held = _held(self._model)
        return {}


def resume(subject: Subject) -> Verdict:
    """A few steps, saved half way; from there again, in a new Trainer and a new model.

    Parameters and losses must be those of the run that went on, bit for bit. When it is saved
    depends on the strategy: a worker of a server knows of an update when it pulls the next time.
    """
    whole, second = _Attributes(), _Attributes()
    with TemporaryDirectory(prefix="scaledtrain-check-") as folder:
        options = Checkpointing(
            folder=folder, every_steps=_EVERY, keep_last=_STEPS, on_failure="end"
        )
        with subject.training(whole, checkpointing=options) as (trainer, loader):
            trainer.fit(loader, max_steps=_STEPS)
        saved = saved_steps(Path(folder))[0].path
        with subject.training(second, resume=saved) as (trainer, loader):
            trainer.fit(loader, max_steps=_STEPS)
    n = len(whole.losses)
    if same(whole.ended, second.ended) and same(whole.losses[whole.steps :], second.losses):
        return passed(f"{n} steps, saved and resumed after {whole.steps}, are equal to {n} steps")
    return _why(whole, second)


def _why(whole: _Attributes, second: _Attributes) -> Verdict:
    lost = [name for name, value in whole.held.items() if not same(value, second.held.get(name))]
    saved, n = whole.steps, len(whole.losses)
    pairs = zip(whole.losses[saved:], second.losses, strict=False)
    step = next((saved + i for i, (a, b) in enumerate(pairs, 1) if not same(a, b)), n)
    if lost:
        return failed(
            f"resumed after step {saved} the run is another one from step {step} on: "
            f"{named(lost)} of the model is not in its state dict, so it is not saved",
            "make it a buffer (register_buffer), or give it get_extra_state and set_extra_state",
            lost=lost,
            step=step,
        )
    if not same(whole.batches[saved:], second.batches):
        return failed(
            f"resumed after step {saved} the run gets other batches",
            "draw what transforms draw from the global generators, which are saved; give a loader "
            "of your own state_dict and load_state_dict",
            lost=["batches"],
            step=step,
        )
    return failed(
        f"resumed after step {saved} the run is another one from step {step} on, though it "
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
