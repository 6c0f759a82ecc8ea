"""The training command: turns a config into objects, and runs them.

```
python -m scaledtrain.train workers=4 strategy=async
torchrun --nproc-per-node 4 -m scaledtrain.train strategy=async
```
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scaledtrain.callbacks import Callback, StopAtTarget
from scaledtrain.checkpoint.weights import load_weights
from scaledtrain.comm.protocols import Link
from scaledtrain.command_line import read_command_line
from scaledtrain.config import BatchSizes, TrainConfig, check, to_yaml
from scaledtrain.data.replica_loader import ReplicaLoader, first_batch
from scaledtrain.environment import environment
from scaledtrain.errors import ConfigError, ScaledTrainError
from scaledtrain.eval_metrics import make_metrics
from scaledtrain.launching import Interrupted, guarded, workers_to_start
from scaledtrain.local_job import SAVE_SECONDS, UNWIND_SECONDS, start_workers
from scaledtrain.noise_scale import NoiseScale
from scaledtrain.optim.adascale import AdaScale
from scaledtrain.optim.scaling import decay_groups, norms_and_biases, zero_gamma
from scaledtrain.optim.warmup import units_per_update
from scaledtrain.parallel.accelerate import with_accelerate
from scaledtrain.parallel.deepspeed import DeepSpeed
from scaledtrain.records import write_file
from scaledtrain.rendezvous import Connection, Transport, connect
from scaledtrain.run_config import write_config
from scaledtrain.schema import Node, complete, did_you_mean, make
from scaledtrain.seeding import seed_everything
from scaledtrain.tasks import Task
from scaledtrain.trainer import FitResult, Trainer

__all__ = [
    "batch_sizes",
    "build",
    "build_settled",
    "choose_run_dir",
    "join",
    "launch",
    "main",
    "make_of",
    "make_run_dir",
    "report_result",
    "run",
    "run_settled",
    "settle",
]

Loader = Iterable[Any]
Config = TrainConfig | DictConfig | Mapping[str, Any]

_BATCH_KEYS = [field.name for field in fields(BatchSizes)]
_MULTIRUN = ("-m", "--multirun")
_NAMES_OF_TOTAL = ("T_max", "total_steps", "total_iters")  # as torch's schedules call it


def main() -> None:
    """Train as the command line says."""
    guarded(lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    given = [argument for argument in arguments if argument not in _MULTIRUN]
    if len(given) == len(arguments):
        launch(arguments, "scaledtrain.train")
    else:
        from scaledtrain.multirun import multirun

        multirun(given)


def launch(arguments: Sequence[str], module: str, callbacks: Sequence[Callback] = ()) -> None:
    """Train as a command line says: in this process, or in new ones for ``workers=n``.

    Args:
        arguments: of the command line.
        module: this is called by its ``main``, which the new processes call, too.
        callbacks: called beside those that the config asks for.
    """
    arguments = with_accelerate(list(arguments))
    composed = read_command_line(arguments, "train", "scaledtrain train")
    if composed is None:
        return
    config = check(composed)
    if workers := workers_to_start(config.workers):
        config.mesh.check(workers)  # rather here, once, than on every rank
        data_ranks = config.mesh.replicas(workers) * config.mesh.shard
        batch_sizes(config).local(data_ranks, config.gradient_accumulation_steps, config.elastic)
        seconds = SAVE_SECONDS if config.checkpointing is not None else UNWIND_SECONDS
        start_workers(module, arguments, workers, seconds)
        return
    with join(config) as link:
        run_dir = None if config.fast_dev_run else choose_run_dir(config, link)
        try:
            result = run(config, link, run_dir, callbacks)
        except BaseException:
            if run_dir is not None:
                with suppress(OSError):  # nothing was written: leave no empty folder
                    run_dir.rmdir()
            raise
        if link.group.rank == 0:
            report_result(result, run_dir)


def report_result(result: FitResult, run_dir: Path | None) -> None:
    """Print how a run ended, and where everything is."""
    values = "  ".join(f"{name} {value:.4f}" for name, value in result.evaluation.items())
    print(f"ended at step {result.step} after {result.seconds:.1f} s: {result.stopped_by}")
    print(f"last evaluation: {values or 'none'}")
    if run_dir is None:
        print("nothing was kept (fast_dev_run)")
    else:
        print(f"config, result, metrics and TensorBoard events: {run_dir}")


@contextmanager
def join(config: TrainConfig) -> Iterator[Connection]:
    """The connection that a config asks for.

    After an error it stays open: the ranks agree over the job's store on who tells it, and the
    process ends anyway.
    """
    link = connect(
        device=config.device,
        transport=cast(Transport, config.transport),
        timeout_seconds=config.timeout_seconds,
    )
    yield link
    link.close()


def choose_run_dir(config: TrainConfig, link: Connection) -> Path:
    """The folder of this run, the same on every rank; it exists when this returns."""
    path = ""
    if link.group.rank == 0:
        path = str(make_run_dir(config).resolve())
        if link.store is not None:
            link.store.set("run_dir", path)
    elif link.store is not None:
        path = link.store.get("run_dir").decode()
    return Path(path)


def make_run_dir(config: TrainConfig) -> Path:
    """Make the folder of a run: the one that is asked for, or a new one.

    Raises:
        ConfigError: it holds a run already, or cannot be made.
    """
    try:
        return _make_run_dir(config)
    except OSError as error:
        raise ConfigError(
            f"the folder of the run cannot be made: {error}; set run_dir to one that can"
        ) from error


def _make_run_dir(config: TrainConfig) -> Path:
    if config.run_dir is not None:
        path = Path(config.run_dir)
        if config.resume is None and any(path.glob("metrics-rank*.jsonl")):
            raise ConfigError(
                f"run_dir {path} holds a run already, and two runs in one folder cannot be told "
                "apart; go on with it (resume=auto), give another run_dir, or remove it"
            )
        path.mkdir(parents=True, exist_ok=True)
        return path
    stem = f"{config.name or 'train'}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        path = Path("runs", stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another run began in the same second
            continue
        return path
    raise AssertionError


def run(
    config: Config, link: Link, run_dir: Path | None = None, callbacks: Sequence[Callback] = ()
) -> FitResult:
    """Train; every rank calls this.

    Args:
        config: as `check` takes it.
        link: to the other ranks.
        run_dir: where ``config.yaml`` (complete: it can be run again), metrics and ``result.json``
            go; None writes nothing.
        callbacks: called beside those that the config asks for.

    Raises:
        ConfigError: the config's parts do not fit each other.
        Interrupted: Ctrl-C.
    """
    return run_settled(*settle(check(config)), link, run_dir, callbacks)


def run_settled(
    config: TrainConfig,
    task: Task,
    link: Link,
    run_dir: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """As `run`, with what `settle` returned: so that many ranks of one process load data once."""
    trainer, train, test = build_settled(config, task, link, run_dir, callbacks)
    writes = run_dir is not None and link.group.rank == 0
    if run_dir is not None and writes:
        changed = write_config(run_dir, config)
        if changed is not None:
            trainer.metrics.say(changed)
    with trainer:
        try:
            result = trainer.fit(
                train,
                max_steps=config.max_steps,
                max_epochs=config.max_epochs,
                max_seconds=config.max_seconds,
                eval=test,
                eval_every=config.eval_every,
            )
        except Interrupted:  # which says what has been saved
            raise
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted at step {trainer.step_count}") from None
    if run_dir is not None and writes:
        told = {
            "result": asdict(result),
            # Of rank 0's trainable parameters at the end, in their order, as `Replica.sha256`.
            "parameters_sha256": trainer.replica.sha256(),
            "config_sha256": hashlib.sha256(to_yaml(config).encode()).hexdigest(),
            "data": task.facts,
            "environment": environment(link),
        }
        write_file(run_dir / "result.json", f"{json.dumps(told, indent=2)}\n")
    return result


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
            f"model {_class(config.model)} needs {' and '.join(lacking)}, which data "
            f"{_class(config.data)} does not say (it says: {', '.join(task.sizes) or 'nothing'}); "
            f"choose a model and data that belong together, or set model.{lacking[0]}=..."
        )
    sizes = {**task.sizes, **{k: v for k, v in model.items() if isinstance(v, int)}}
    task = replace(task, metrics={**task.metrics, **make_metrics(config.eval_metrics, sizes)})
    metrics, metric = ["loss", *task.metrics], config.target.metric
    if metric is not None and (task.test is None or metric not in metrics):
        there = ", ".join(metrics) if task.test is not None else "nothing, for lack of test data"
        raise ConfigError(
            f"target.metric is {metric!r}{did_you_mean(metric, metrics)}, but data "
            f"{_class(config.data)} evaluates: {there}"
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
    sizes = batch_sizes(config)
    replicas, accumulation = (
        config.mesh.replicas(link.group.size),
        config.gradient_accumulation_steps,
    )
    data_ranks = replicas * config.mesh.shard
    batch_size = sizes.local(data_ranks, accumulation, config.elastic)
    batches_per_step = sizes.batches_per_step if config.elastic else None
    train = task.train_loader(batch_size)
    test = task.test_loader(sizes.eval_batch_size or batch_size)
    seed_everything(config.seed)
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
    exempt = norms_and_biases(model) if config.weight_decay_on == "matrices" else set()
    strategy = make(config.strategy)
    engine = None if config.engine is None else make(config.engine)
    scaling = config.lr_scaling
    if isinstance(engine, DeepSpeed) and (scaling.rule != "none" or exempt):
        raise ConfigError(
            "DeepSpeed makes the optimizer before it is known how many gradients make an update, "
            "and divides it by parameter groups of its own; with engine=deepspeed set the learning "
            "rate yourself, and leave lr_scaling.rule at none and weight_decay_on at all"
        )
    callbacks = list(callbacks)
    noise = None if config.batch is None else make(config.batch)
    if noise is not None:
        callbacks.append(noise)
    if config.layers is not None:
        callbacks.append(make(config.layers))
    is_adascale = scaling.rule == "adascale"
    if is_adascale and not (isinstance(noise, NoiseScale) and strategy.replicas_equal):
        raise ConfigError(
            "lr_scaling.rule=adascale follows the noise of the gradients of each update, but "
            f"{'nothing measures it' if noise is None else f'{strategy} has none of all replicas'}"
            "; take strategy=sync, batch=measured and batch.every=1, or another rule"
        )
    if config.target.metric is not None:
        callbacks.append(StopAtTarget(**asdict(config.target)))

    def samples_per_update() -> int:
        """Known once the strategy is attached."""
        batches: float = accumulation * config.mesh.shard  # of a gradient
        if batches_per_step is not None:  # replicas need not have equally many
            batches = batches_per_step / replicas
        samples: float = batch_size * batches * strategy.gradients_per_step
        return round(samples)

    def make_optimizer(parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        given = decay_groups(parameters, exempt) if exempt else parameters
        optimizer = cast(Optimizer, make_of("optimizer", config.optimizer, given))
        if scaling.rule not in ("none", "adascale"):
            scaling.apply(optimizer, samples_per_update())
        return optimizer

    def make_scheduler(optimizer: Optimizer) -> LRScheduler:
        """Called once the strategy is attached, and so knows how many gradients make an update."""
        assert config.lr_scheduler is not None
        steps = ReplicaLoader(
            train,
            replicas=data_ranks,
            accumulation=accumulation,
            batches_per_step=batches_per_step,
        ).steps_per_epoch
        if config.overfit_batches:
            few = math.ceil(
                config.overfit_batches / (batches_per_step or data_ranks * accumulation)
            )
            steps = few if steps is None else min(steps, few)
        in_epoch = None if steps is None else steps * replicas / strategy.gradients_per_step
        per_update = samples_per_update()
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
                f"lr_scheduler {_class(node)} needs {' and '.join(lacking)}, the number of "
                "updates, which follows from "
                f"{'max_steps' if is_adascale else 'max_steps or max_epochs'}; "
                f"set {'it' if is_adascale else 'one'}, or lr_scheduler.{lacking[0]}"
            )
        return cast(LRScheduler, make_of("lr_scheduler", node, optimizer))

    make_schedule = make_scheduler if config.lr_scheduler is not None else None

    def make_adascale(optimizer: Optimizer) -> LRScheduler:
        total, reference = config.max_steps, scaling.reference_batch
        return AdaScale(optimizer, reference, make_schedule, total=total, leader=noise)

    trainer = Trainer(
        model,
        task.loss_fn,
        make_optimizer,
        lr_scheduler=make_adascale if is_adascale else make_schedule,
        strategy=strategy,
        mesh=config.mesh,
        engine=engine,
        pipeline=None
        if config.mesh.pipe == 1
        else replace(config.pipeline, example=first_batch(train)),
        precision=config.precision,
        activation_checkpointing=(
            None
            if config.activation_checkpointing is None
            else make(config.activation_checkpointing)
        ),
        gradient_accumulation_steps=accumulation,
        batches_per_step=batches_per_step,
        max_grad_norm=config.max_grad_norm,
        drop_compute=config.drop_compute,
        balance=make(config.balance),
        eval_metrics=copy.deepcopy(dict(task.metrics)),  # other ranks here may have the same
        callbacks=callbacks,
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
        raise ConfigError(f"{key} {_class(node)}: {error}") from error


def _class(node: Node) -> str:
    return str(node["_target_"]).rpartition(".")[2]


def _a(value: object) -> str:
    return f"a {type(value).__name__}"


if __name__ == "__main__":
    main()
