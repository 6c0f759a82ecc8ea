"""What the config of a training run holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scaledtrain.checkpoint import Checkpointing
from scaledtrain.drop_compute import DropCompute
from scaledtrain.errors import ConfigError
from scaledtrain.mesh import Mesh
from scaledtrain.optim.scaling import LearningRateScaling
from scaledtrain.parallel.pipeline.pipeline import Pipeline
from scaledtrain.precision import Precision
from scaledtrain.schedule import Slowdown
from scaledtrain.schema import Kind, Misfit, Node, parse
from scaledtrain.watch import Watch

__all__ = ["BatchSizes", "Target", "TrainConfig", "check", "to_yaml"]


@dataclass(frozen=True)
class BatchSizes:
    """Samples in a batch: keys of ``data``, beside the arguments of the task.

    Args:
        local_batch_size: samples in each batch of each replica.
        global_batch_size: samples in one step of all replicas together; instead of the local one.
        eval_batch_size: samples in a batch of an evaluation; None: the local one.
    """

    local_batch_size: int | None = None
    global_batch_size: int | None = None
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} is {value}; it counts samples, >= 1")

    @property
    def batches_per_step(self) -> int:
        """Of the local size, in a step of the global one, however many replicas there are.

        Raises:
            ConfigError: one of the sizes is missing, or they do not divide.
        """
        if self.global_batch_size is None or self.local_batch_size is None:
            raise ConfigError(
                "elastic keeps the samples of a step when ranks die or come, which takes both "
                "sizes: set data.global_batch_size (samples in a step of all replicas) and "
                "data.local_batch_size (samples that one replica computes with at once)"
            )
        batches, rest = divmod(self.global_batch_size, self.local_batch_size)
        if rest:
            raise ConfigError(
                f"data.global_batch_size is {self.global_batch_size}, which does not divide into "
                f"batches of data.local_batch_size {self.local_batch_size}; with elastic it must"
            )
        return batches

    def local(self, replicas: int, accumulation: int, elastic: bool = False) -> int:
        """Samples in each batch of each replica.

        Args:
            replicas: how many share a step.
            accumulation: batches of a step on each of them.
            elastic: a step has ``batches_per_step`` instead, whatever they are.

        Raises:
            ConfigError: the global size does not divide, contradicts the local one, or both are
                missing.
        """
        if elastic and self.batches_per_step and self.local_batch_size is not None:
            return self.local_batch_size
        if self.global_batch_size is None:
            if self.local_batch_size is None:
                raise ConfigError(
                    "no batch size; set data.local_batch_size (of each replica) or "
                    "data.global_batch_size (of all together)"
                )
            return self.local_batch_size
        batches = replicas * accumulation
        local, rest = divmod(self.global_batch_size, batches)
        if rest:
            nearest = [n for n in (local * batches, (local + 1) * batches) if n]
            raise ConfigError(
                f"data.global_batch_size is {self.global_batch_size}, which does not divide by "
                f"{batches} ({replicas} replica{'s' if replicas > 1 else ''} x {accumulation} "
                f"gradient_accumulation_steps); take {' or '.join(map(str, nearest))}"
            )
        if self.local_batch_size not in (None, local):
            raise ConfigError(
                f"data.local_batch_size {self.local_batch_size} x {batches} ({replicas} replicas x "
                f"{accumulation} gradient_accumulation_steps) is not data.global_batch_size "
                f"{self.global_batch_size}; give one of them and set the other to null"
            )
        return local


@dataclass(frozen=True)
class Target:
    """What a run is for: it ends when an evaluated metric is good enough."""

    metric: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.metric is None and (self.at_least, self.at_most) != (None, None):
            raise ConfigError(
                "target has a value but no metric; set target.metric (loss, accuracy)"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on; ``configs/train.yaml`` says what each key means."""

    name: str | None
    strategy: Node
    model: Annotated[Node, Kind(incomplete=True)]
    data: Annotated[Node, Kind(besides=BatchSizes)]
    optimizer: Annotated[Node, Kind(n_given=1)]
    lr_scheduler: Annotated[Node, Kind(n_given=1, incomplete=True)] | None
    precision: Precision
    activation_checkpointing: Node | None
    mesh: Mesh
    engine: Node | None
    pipeline: Pipeline
    max_steps: int | None
    max_epochs: int | None
    max_seconds: float | None
    eval_every: int | None
    target: Target
    gradient_accumulation_steps: int
    max_grad_norm: float | None
    drop_compute: DropCompute
    balance: Node
    seed: int
    deterministic: bool
    compile: str | None
    slowdown: Slowdown
    workers: int | None
    device: str | None
    transport: str
    timeout_seconds: float
    run_dir: str | None
    log_every: int
    console: bool
    trace: bool
    elastic: bool = False
    batch: Node | None = None
    layers: Node | None = None
    init_from: str | None = None
    checkpointing: Checkpointing | None = None
    watch: Watch | None = None
    resume: str | None = None
    lr_scaling: LearningRateScaling = field(default_factory=LearningRateScaling)
    weight_decay_on: Literal["all", "matrices"] = "all"
    zero_gamma: bool = False

    def __post_init__(self) -> None:
        if not self.elastic:
            return
        needed = {"run_dir": self.run_dir, "checkpointing": self.checkpointing}
        lacking = [key for key, value in needed.items() if value is None]
        if self.resume != "auto" or lacking:
            raise ConfigError(
                "elastic lets a run go on when its ranks are started again, which takes "
                "run_dir=FOLDER (that all hosts see), checkpointing=steps (or minutes), and "
                f"resume=auto; {' and '.join(lacking) or 'resume'} is not so"
            )
        if self.gradient_accumulation_steps != 1:
            raise ConfigError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, but with "
                "elastic it follows from data.global_batch_size, data.local_batch_size and the "
                "number of ranks; leave it out"
            )


def check(config: TrainConfig | DictConfig | Mapping[str, Any]) -> TrainConfig:
    """Parse a config.

    Args:
        config: composed by Hydra, a mapping, or a `TrainConfig` made in Python.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type, a class that cannot be
            imported; the message says what there is.
    """
    written: Any = asdict(config) if is_dataclass(config) else config
    values = written
    if isinstance(config, DictConfig):
        written = OmegaConf.to_container(config, resolve=False)
        try:
            values = OmegaConf.to_container(config, resolve=True)
        except OmegaConfBaseException as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"{error.full_key or 'the config'}: {why}") from error
    try:
        parsed: TrainConfig = parse("", values, TrainConfig)
    except Misfit as misfit:
        source = _at(written, misfit.key)
        if "${" in str(source):
            raise ConfigError(f"{misfit} (it follows {source}: set that, or this)") from None
        raise
    return parsed


def to_yaml(config: TrainConfig) -> str:
    """The config as a YAML text, which `check` parses to the same."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(config))))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values
