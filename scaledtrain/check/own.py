"""The ladder for a model, data and loss of one's own, without a config."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaledtrain.callbacks import Callback
from scaledtrain.check.ladder import climb
from scaledtrain.check.subject import Plan, Subject
from scaledtrain.check.verdict import Verdict
from scaledtrain.checkpoint import Checkpointing
from scaledtrain.comm.protocols import Link
from scaledtrain.data.steps import Weigh
from scaledtrain.errors import ConfigError
from scaledtrain.memory.estimate import estimate_memory
from scaledtrain.memory.figures import MemoryEstimate
from scaledtrain.precision import Precision, PrecisionName
from scaledtrain.replica import MakeOptimizer
from scaledtrain.schedule import LossFn
from scaledtrain.schema import did_you_mean
from scaledtrain.seeding import seed_everything
from scaledtrain.trainer import Trainer

__all__ = ["check"]

_OURS = (
    *("link", "mesh", "engine", "pipeline", "run_dir", "console", "log_every"),
    *("checkpointing", "resume", "fast_dev_run", "overfit_batches"),
)
_ALSO_OF_CHECK = ("model", "loss_fn", "optimizer", "loss_weight", "precision", "seed", "callbacks")


def check(
    model: nn.Module | Callable[[], nn.Module],
    loss_fn: LossFn | None,
    loader: Iterable[Any],
    optimizer: MakeOptimizer,
    *,
    loss_weight: Weigh | None = None,
    precision: Precision | PrecisionName = "fp32",
    seed: int = 0,
    plan: Plan | None = None,
    trainer: Mapping[str, Any] | None = None,
    callbacks: Callable[[], Sequence[Callback]] = tuple,
    only: Sequence[str] | None = None,
    samples: int = 16,
    steps: int = 200,
    frozen: Sequence[str] = (),
    predict: Callable[[nn.Module, Any], Any] | None = None,
    is_trained: bool = False,
    device: torch.device | str | None = None,
    told: Callable[[Verdict], None] = print,
) -> list[Verdict]:
    """Climb the ladder with a model, a loss and data.

    Nothing is kept: the model is copied for each rung, and what is written is written to a
    temporary folder.

    Args:
        model: one, or what makes one: then its initial values are checked against the seed, too.
        loss_fn: as that of the `Trainer`, as for ``loader``, ``optimizer``, ``loss_weight``,
            ``precision`` and ``seed``.
        loader: of batches to train on; can be read several times.
        optimizer: a factory.
        loss_weight: of how many terms the loss is the mean.
        precision: of the full run.
        seed: of data and training.
        plan: how long the full run is.
        trainer: further arguments of the `Trainer`, by name, that are one rank's.
        callbacks: makes those of a run.
        only: names of rungs; None: all.
        samples: the most of a batch that rungs take which need no whole batch.
        steps: the most in which one batch is to be learnt.
        frozen: beginnings of names of parameters that are not to be trained.
        predict: your own way to predict, ``predict(model, inputs)``; None: the model's method of
            that name, if it has one.
        is_trained: the model begins with weights that know something.
        device: where it computes; None: a GPU if there is one.
        told: called with each verdict.

    Returns:
        A verdict for each rung.

    Raises:
        ConfigError: something asked for cannot be.

    Example:
        A layer that gets no gradient.

        >>> from functools import partial
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        ...     def forward(self, x):
        ...         return self.head(self.hidden(x).detach())
        >>> batches = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(4)]
        >>> (found,) = check(Net, nn.functional.cross_entropy, batches,
        ...                  partial(torch.optim.SGD, lr=0.1), only=["gradients"],
        ...                  told=lambda verdict: None)
        >>> found.status, found.found
        ('failed', 'no gradient for hidden.weight, hidden.bias')
    """
    options = dict(trainer or {})
    _check_options(options)
    precision = Precision(precision) if isinstance(precision, str) else precision
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def make_model() -> nn.Module:
        return copy.deepcopy(model) if isinstance(model, nn.Module) else model()

    def make_trainer(
        link: Link,
        *,
        callbacks: Sequence[Callback] = (),
        precision: Precision | None = None,
        checkpointing: Checkpointing | None = None,
        resume: str | Path | None = None,
    ) -> tuple[Trainer, Iterable[Any]]:
        seed_everything(seed)
        made = Trainer(
            make_model(),
            loss_fn,
            optimizer,
            loss_weight=loss_weight,
            precision=precision or subject.precision,
            seed=seed,
            callbacks=[*own_callbacks(), *callbacks],
            console=False,
            log_every=1,
            checkpointing=checkpointing,
            resume=resume,
            link=link,
            **copy.deepcopy(options),  # a strategy is of one Trainer
        )
        return made, loader

    def estimate() -> MemoryEstimate:
        return estimate_memory(
            make_model(),
            loss_fn,
            subject.batches(1)[0],
            optimizer,
            precision=subject.precision,
            activation_checkpointing=options.get("activation_checkpointing"),
            microbatches=options.get("gradient_accumulation_steps", 1),
            device=where,
        )

    own_callbacks = callbacks
    subject = Subject(
        make_model,
        loss_fn,
        loader,
        optimizer,
        make_trainer,
        estimate,
        where,
        precision,
        plan or Plan(),
        seed,
        samples,
        steps,
        frozen,
        predict,
        loss_weight,
        is_trained,
    )
    return climb(subject, only, told)


def _check_options(names: Iterable[str]) -> None:
    known = inspect.signature(Trainer).parameters
    for name in names:
        if name in _OURS:
            raise ConfigError(
                f"trainer has {name}, which the check sets itself: it trains on one rank, and "
                "keeps nothing; leave it out"
            )
        if name in _ALSO_OF_CHECK:
            raise ConfigError(
                f"trainer has {name}, which other rungs need, too; give it to check itself: "
                f"check(..., {name}=...)"
            )
        if name not in known:
            raise ConfigError(
                f"trainer has {name!r}{did_you_mean(name, known)}, which Trainer does not take"
            )
