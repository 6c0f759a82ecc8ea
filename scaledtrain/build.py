"""Turns a config into objects: the data, and a Trainer of all that it names."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scaledtrain.callbacks import Callback, StopAtTarget
from scaledtrain.checkpoint.weights import load_weights
from scaledtrain.comm.protocols import Link
from scaledtrain.config import BatchSizes, TrainConfig, check
from scaledtrain.data.replica_loader import ReplicaLoader, first_batch
from scaledtrain.errors import ConfigError, ScaledTrainError
from scaledtrain.eval_metrics import make_metrics
from scaledtrain.noise_scale import NoiseScale
from scaledtrain.optim.adascale import AdaScale
from scaledtrain.optim.scaling import decay_groups, norms_and_biases, zero_gamma
from scaledtrain.optim.warmup import units_per_update
from scaledtrain.parallel import Pipeline
from scaledtrain.replica import MakeScheduler
from scaledtrain.schema import Node, class_name, complete, did_you_mean, make
from scaledtrain.seeding import seed_everything
from scaledtrain.strategies import Strategy
from scaledtrain.tasks import Task
from scaledtrain.trainer import Trainer

__all__ = ["Config", "Loader", "batch_sizes", "build", "build_settled", "make_of", "settle"]

Loader = Iterable[Any]
Config = TrainConfig | DictConfig | Mapping[str, Any]

_BATCH_KEYS = [field.name for field in fields(BatchSizes)]
_NAMES_OF_TOTAL = ("T_max", "total_steps", "total_iters")  # as torch's schedules call it


def build(
    config: Config, link: Link, run_dir: Path | None = None
) -> tuple[Trainer, Loader, Loader | None]:
    """Make everything that a config names.

    Returns:
        The trainer, and the loaders to train on and to evaluate on (None: there is nothing to).

    Raises:
        ConfigError: the config's parts do not fit each other.
    """
    return build_settled(*settle(check(config)), link, run_dir)


def settle(config: TrainConfig) -> tuple[TrainConfig, Task]:
    """Load the data, and give the model what follows from it.

    Raises:
        ConfigError: the config's parts do not fit each other.
    """
    source = config.data["_target_"]
    task = make(Node({k: v for k, v in config.data.items() if k not in _BATCH_KEYS}))
    if not isinstance(task, Task):
        raise ConfigError(
            f"data names {source!r}, which returned {_a(task)}; it must return a "
            "scaledtrain.tasks.Task"
        )
    model, lacking = complete(config.model, task.sizes)
    if lacking:
        raise ConfigError(
            f"model {class_name(config.model)} needs {' and '.join(lacking)}, which data "
            f"{class_name(config.data)} does not say (it says: "
            f"{', '.join(task.sizes) or 'nothing'}); choose a model and data that belong "
            f"together, or set model.{lacking[0]}=..."
        )
    sizes = {**task.sizes, **{k: v for k, v in model.items() if isinstance(v, int)}}
    task = replace(task, metrics={**task.metrics, **make_metrics(config.eval_metrics, sizes)})
    metrics, metric = ["loss", *task.metrics], config.target.metric
    if metric is not None and (task.test is None or metric not in metrics):
        there = ", ".join(metrics) if task.test is not None else "nothing, for lack of test data"
        raise ConfigError(
            f"target.metric is {metric!r}{did_you_mean(metric, metrics)}, but data "
            f"{class_name(config.data)} evaluates: {there}"
        )
    return replace(config, model=model), task


def build_settled(
    config: TrainConfig,
    task: Task,
    link: Link,
    run_dir: Path | None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Trainer, Loader, Loader | None]:
    """As `build`, with what `settle` returned, and callbacks besides those of the config."""
    batches = _Batches.of(config, link.group.size)
    train = task.train_loader(batches.size)
    test = task.test_loader(batch_sizes(config).eval_batch_size or batches.size)
    seed_everything(config.seed)
    model = _make_model(config)
    strategy = make(config.strategy)
    noise = None if config.batch is None else make(config.batch)
    optimization = _Optimization(config, model, strategy, batches, train, noise)
    engine = None if config.engine is None else make(config.engine)
    if engine is not None and engine.makes_own_groups and optimization.sets_groups:
        raise ConfigError(
            f"{type(engine).__name__} makes the optimizer before it is known how many gradients "
            "make an update, and divides it by parameter groups of its own; with this engine set "
            "the learning rate yourself, and leave lr_scaling.rule at none and weight_decay_on at "
            "all"
        )
    pipeline = None
    if config.mesh.pipe > 1:
        pipeline = replace(config.pipeline, example=first_batch(train))
    elif config.pipeline != Pipeline():
        pipeline = config.pipeline  # the Trainer says why it is for nothing
    recomputed = config.activation_checkpointing
    trainer = Trainer(
        model,
        task.loss_fn,
        optimization.make_optimizer,
        lr_scheduler=optimization.make_lr_scheduler,
        strategy=strategy,
        mesh=config.mesh,
        engine=engine,
        pipeline=pipeline,
        precision=config.precision,
        activation_checkpointing=None if recomputed is None else make(recomputed),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        batches_per_step=batches.per_step,
        max_grad_norm=config.max_grad_norm,
        drop_compute=config.drop_compute,
        balance=make(config.balance),
        eval_metrics=copy.deepcopy(dict(task.metrics)),  # other ranks here may have the same
        callbacks=[*callbacks, *_make_callbacks(config, noise)],
        seed=config.seed,
        deterministic=config.deterministic,
        compile=config.compile,
        slowdown=config.slowdown,
        run_dir=config.run_dir if config.fast_dev_run else run_dir,
        log_every=config.log_every,
        console=config.console,
        trace=config.trace,
        checkpointing=config.checkpointing,
        watch=config.watch,
        resume=config.resume,
        fast_dev_run=config.fast_dev_run,
        overfit_batches=config.overfit_batches,
        link=link,
    )
    return trainer, train, test


@dataclass(frozen=True)
class _Batches:
    """How the samples of a step are divided.

    Attributes:
        size: samples in a batch of the loader.
        replicas: how many share a step.
        data_ranks: ranks that load batches of their own.
        accumulation: batches of a step on each of these.
        per_step: batches of a step on all of these together, instead; None: so many on each.
    """

    size: int
    replicas: int
    data_ranks: int
    accumulation: int
    per_step: int | None

    @classmethod
    def of(cls, config: TrainConfig, n_ranks: int) -> _Batches:
        sizes, accumulation = batch_sizes(config), config.gradient_accumulation_steps
        replicas = config.mesh.replicas(n_ranks)
        data_ranks = replicas * config.mesh.shard
        return cls(
            sizes.local(data_ranks, accumulation, config.elastic),
            replicas,
            data_ranks,
            accumulation,
            sizes.batches_per_step if config.elastic else None,
        )

    @property
    def of_replica(self) -> float:
        """Batches in a gradient of one replica, on average."""
        if self.per_step is not None:
            return self.per_step / self.replicas
        return self.accumulation * self.data_ranks / self.replicas

    def steps_per_epoch(self, loader: Loader, overfit_batches: int) -> int | None:
        """Of each replica; None: it is not known."""
        steps = ReplicaLoader(
            loader,
            replicas=self.data_ranks,
            accumulation=self.accumulation,
            batches_per_step=self.per_step,
        ).steps_per_epoch
        if not overfit_batches:
            return steps
        few = math.ceil(overfit_batches / (self.per_step or self.data_ranks * self.accumulation))
        return few if steps is None else min(steps, few)


class _Optimization:
    """Makes the optimizer and its schedule, once the strategy that calls it is attached.

    Only then is it known how many gradients make an update, on which learning rates and the length
    of a schedule depend.

    Raises:
        ConfigError: nothing measures what AdaScale follows.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        strategy: Strategy,
        batches: _Batches,
        train: Loader,
        noise: Callback | None,
    ) -> None:
        self._config = config
        self._strategy = strategy
        self._batches = batches
        self._train = train
        self._scaling = config.lr_scaling
        self._exempt = norms_and_biases(model) if config.weight_decay_on == "matrices" else set()
        self._noise: NoiseScale | None = None
        if self._scaling.rule == "adascale":
            if not (isinstance(noise, NoiseScale) and strategy.replicas_equal):
                none = f"{strategy} has none of all replicas"
                raise ConfigError(
                    "lr_scaling.rule=adascale follows the noise of the gradients of each update, "
                    f"but {'nothing measures it' if noise is None else none}; take strategy=sync, "
                    "batch=measured and batch.every=1, or another rule"
                )
            self._noise = noise

    @property
    def sets_groups(self) -> bool:
        """Whether settings depend on the batch or on the parameter."""
        return self._scaling.rule != "none" or bool(self._exempt)

    def make_optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        """Of (name, parameter) pairs."""
        given = decay_groups(parameters, self._exempt) if self._exempt else parameters
        optimizer = cast(Optimizer, make_of("optimizer", self._config.optimizer, given))
        if self._scaling.rule not in ("none", "adascale"):
            self._scaling.apply(optimizer, self._samples_per_update)
        return optimizer

    @property
    def make_lr_scheduler(self) -> MakeScheduler | None:
        """What makes the schedule from the optimizer; None: the rates stay."""
        schedule = None if self._config.lr_scheduler is None else self._make_schedule
        if self._noise is None:
            return schedule
        return partial(
            AdaScale,
            reference_batch=self._scaling.reference_batch,
            make_scheduler=schedule,
            total=self._config.max_steps,
            leader=self._noise,
        )

    @property
    def _samples_per_update(self) -> int:
        gradients = self._strategy.gradients_per_step
        return round(self._batches.size * self._batches.of_replica * gradients)

    def _make_schedule(self, optimizer: Optimizer) -> LRScheduler:
        config, batches, scaling = self._config, self._batches, self._scaling
        assert config.lr_scheduler is not None
        is_adascale = self._noise is not None
        steps = batches.steps_per_epoch(self._train, config.overfit_batches)
        in_epoch = None
        if steps is not None:
            in_epoch = steps * batches.replicas / self._strategy.gradients_per_step
        per_update = self._samples_per_update
        if is_adascale:  # which counts updates with the reference batch
            in_epoch = None if in_epoch is None else in_epoch * per_update / scaling.reference_batch
            per_update = scaling.reference_batch
        limits = [float(config.max_steps)] if config.max_steps is not None else []
        if config.max_epochs is not None and in_epoch is not None and not is_adascale:
            limits.append(config.max_epochs * in_epoch)
        known: dict[str, Any] = {
            "max_lr": [group["lr"] for group in optimizer.param_groups],
            "samples_per_update": per_update,
            "start_factor": min(1.0, 1.0 / scaling.factor(per_update)),
        }
        if in_epoch is not None:
            known["updates_per_epoch"] = in_epoch
        if limits:
            known |= dict.fromkeys(_NAMES_OF_TOTAL, int(min(limits)))
            unit = config.lr_scheduler.get("unit", "steps")
            known["total"] = min(limits) * units_per_update(unit, in_epoch, per_update)
        node, lacking = complete(config.lr_scheduler, known, n_given=1)
        if lacking:
            raise ConfigError(
                f"lr_scheduler {class_name(node)} needs {' and '.join(lacking)}, the number of "
                "updates, which follows from "
                f"{'max_steps' if is_adascale else 'max_steps or max_epochs'}; "
                f"set {'it' if is_adascale else 'one'}, or lr_scheduler.{lacking[0]}"
            )
        return cast(LRScheduler, make_of("lr_scheduler", node, optimizer))


def _make_model(config: TrainConfig) -> nn.Module:
    model = make(config.model)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model names {config.model['_target_']!r}, which returned {_a(model)}; it must return "
            "a torch.nn.Module"
        )
    if config.zero_gamma:
        zero_gamma(model)
    if config.init_from is not None:
        load_weights(model, config.init_from)
    return model


def _make_callbacks(config: TrainConfig, noise: Callback | None) -> list[Callback]:
    callbacks = [] if noise is None else [noise]
    if config.layers is not None:
        callbacks.append(make(config.layers))
    if config.target.metric is not None:
        callbacks.append(StopAtTarget(**asdict(config.target)))
    return callbacks


def batch_sizes(config: TrainConfig) -> BatchSizes:
    """Those of a config's data."""
    return BatchSizes(**{key: config.data.get(key) for key in _BATCH_KEYS})


def make_of(key: str, node: Node, given: Any) -> Any:
    """Call what a part of a config names.

    Args:
        key: of the part, for messages.
        node: the part.
        given: the first argument.

    Raises:
        ConfigError: it refuses its arguments.
    """
    try:
        return make(node, given)
    except ValueError as error:
        if isinstance(error, ScaledTrainError):
            raise
        raise ConfigError(f"{key} {class_name(node)}: {error}") from error


def _a(value: object) -> str:
    return f"a {type(value).__name__}"
