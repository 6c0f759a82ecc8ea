"""What is checked, as every rung sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scaledtrain.callbacks import Callback
from scaledtrain.checkpoint import Checkpointing
from scaledtrain.comm.protocols import Link
from scaledtrain.connection import connect
from scaledtrain.data.cut import count_samples, cut, to_device
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.data.steps import StepBatch, Weigh
from scaledtrain.errors import ConfigError
from scaledtrain.memory.figures import MemoryEstimate
from scaledtrain.precision import Precision
from scaledtrain.replica import MakeOptimizer
from scaledtrain.schedule import LossFn, call_model, inputs_and_targets
from scaledtrain.seeding import seed_everything
from scaledtrain.trainer import Trainer

__all__ = ["MakeTrainer", "Plan", "Recorder", "Subject", "logits_of"]


class MakeTrainer(Protocol):
    """Makes a Trainer as the full run has it, but for one rank, and what it trains on."""

    def __call__(
        self,
        link: Link,
        *,
        callbacks: Sequence[Callback] = (),
        precision: Precision | None = None,
        checkpointing: Checkpointing | None = None,
        resume: str | Path | None = None,
    ) -> tuple[Trainer, Iterable[Any]]:
        """Args are the Trainer's; a precision of None is that of the full run."""


@dataclass(frozen=True)
class Plan:
    """How long the full run is, and on how many ranks."""

    max_steps: int | None = None
    max_epochs: int | None = None
    max_seconds: float | None = None
    replicas: int = 1
    accumulation: int = 1


@dataclass(frozen=True)
class Subject:
    """A model with its data, its loss and its training.

    Args:
        make_model: makes a fresh one.
        loss_fn: as that of the Trainer.
        loader: of batches to train on.
        make_optimizer: as that of the Trainer.
        make_trainer: makes a Trainer of all of them.
        estimate: tells the memory that the full run takes.
        device: where the rungs compute.
        precision: of the full run.
        plan: its length.
        seed: of model, data and training.
        samples: the most of a batch that rungs take which need no whole batch.
        steps: the most in which one batch is to be learnt.
        frozen: beginnings of names of parameters that are not to be trained.
        predict: the user's own way to predict, ``predict(model, inputs)``; None: the model's method
            of that name, if it has one.
        loss_weight: as that of the Trainer.
        is_trained: whether the model begins with weights that know something already.
    """

    make_model: Callable[[], nn.Module]
    loss_fn: LossFn | None
    loader: Iterable[Any]
    make_optimizer: MakeOptimizer
    make_trainer: MakeTrainer
    estimate: Callable[[], MemoryEstimate]
    device: torch.device
    precision: Precision = field(default_factory=Precision)
    plan: Plan = field(default_factory=Plan)
    seed: int = 0
    samples: int = 16
    steps: int = 200
    frozen: Sequence[str] = ()
    predict: Callable[[nn.Module, Any], Any] | None = None
    loss_weight: Weigh | None = None
    is_trained: bool = False

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"check.{name} is {getattr(self, name)}; it is >= {least}")
        if isinstance(self.loader, Iterator):
            raise ConfigError(
                f"the loader is a {type(self.loader).__name__}, which can be read only once, but "
                "the check reads the same batches again and again; give a list or a DataLoader"
            )

    def model(self) -> nn.Module:
        """A fresh one, the same each time, in train mode."""
        seed_everything(self.seed)
        return self.make_model().to(self.device).train()

    def batches(self, n: int, samples: int | None = None) -> list[Any]:
        """The first of the first epoch, fewer if it has fewer.

        Args:
            n: how many batches.
            samples: the most of each; None: all.
        """
        seed_everything(self.seed)
        found: list[Any] = []
        with closing(ReplicaLoader(self.loader, seed=self.seed).epoch(0)) as steps:
            for step in steps:
                found += step.microbatches
                if len(found) >= n:
                    break
        if samples is not None:
            found = [cut(batch, 0, min(samples, count_samples(batch))) for batch in found]
        return [to_device(batch, self.device) for batch in found[:n]]

    def loss(self, model: Callable[..., Any], batch: Any) -> tuple[Any, Tensor]:
        """Outputs and loss of a batch."""
        return call_model(model, batch, self.loss_fn)

    def inputs(self, batch: Any) -> Any:
        """What the model is called with: of a batch with a ``loss_fn`` the first of two."""
        return batch if self.loss_fn is None else inputs_and_targets(batch)[0]

    def targets(self, batch: Any) -> Any:
        """What its outputs are compared with; None: the model knows."""
        return None if self.loss_fn is None else inputs_and_targets(batch)[1]

    @contextmanager
    def training(self, *callbacks: Callback, **changes: Any) -> Iterator[tuple[Trainer, Any]]:
        """A Trainer on this rank alone, and its loader.

        Args:
            callbacks: of the Trainer, besides the run's own.
            changes: as `MakeTrainer` takes them.
        """
        with connect(device=self.device) as link:
            trainer, loader = self.make_trainer(link, callbacks=callbacks, **changes)
            with trainer:
                yield trainer, loader


def logits_of(outputs: Any) -> Tensor | None:
    """The tensor of a model's outputs that a loss compares with targets; None: there is none."""
    if isinstance(outputs, Tensor):
        return outputs if outputs.dim() else None
    if isinstance(outputs, (tuple, list)):
        return next((t for o in outputs if (t := logits_of(o)) is not None), None)
    found = getattr(outputs, "logits", None)
    return found if isinstance(found, Tensor) and found.dim() else None


class Recorder(Callback):
    """Keeps what a short run did: parameters at the start, batches, losses, parameters at the end.

    Attributes:
        begun: by name.
        batches: of each step.
        losses: of each step.
        ended: by name.
    """

    def __init__(self) -> None:
        self.begun: dict[str, Tensor] = {}
        self.batches: list[list[Any]] = []
        self.losses: list[float] = []
        self.ended: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer) -> None:
        """Keep the parameters."""
        self.begun = _state(trainer.model)

    def needs_own_gradients(self, trainer: Trainer, batch: StepBatch) -> bool:
        """Keep the batches; they are not changed."""
        self.batches.append(batch.microbatches)
        return False

    def on_step_end(self, trainer: Trainer) -> None:
        """Keep the loss."""
        self.losses.append(trainer.metrics.last_loss)

    def on_fit_end(self, trainer: Trainer) -> None:
        """Keep the parameters."""
        self.ended = _state(trainer.model)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}
