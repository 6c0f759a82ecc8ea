"""The config that DeepSpeed is given: a user's own file, and our words, which must not disagree."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from scaledtrain.errors import ConfigError
from scaledtrain.schema import did_you_mean

if TYPE_CHECKING:
    from scaledtrain.data.steps import StepBatch
    from scaledtrain.parallel.engine import Recipe
    from scaledtrain.precision import Precision

__all__ = ["BatchCheck", "check_optimizer", "ds_config", "file_offloads", "read_file"]

_PASSED_ON = {
    *("activation_checkpointing", "aio", "comms_logger", "communication_data_type"),
    *("csv_monitor", "dump_state", "flops_profiler", "gradient_predivide_factor", "log_level"),
    *("memory_breakdown", "prescale_gradients", "steps_per_print", "tensorboard", "wandb"),
    *("wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
}
_CHECKED = {
    *("bf16", "fp16", "gradient_accumulation_steps", "gradient_clipping", "optimizer"),
    *("scheduler", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu"),
    "zero_optimization",
}
_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.AdamW, "sgd": torch.optim.SGD}
_LARGEST_BUCKET = 500_000_000  # elements: DeepSpeed's own default
_AUTO = "auto"  # Hugging Face's word for: as the rest of the program has it


def read_file(path: Path) -> dict[str, Any]:
    """A user's own config.

    Raises:
        ConfigError: it cannot be read, or holds something that cannot be honoured here.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"engine.config is {path}, which cannot be read as JSON: {error}"
        ) from error
    if not isinstance(read, dict):
        raise ConfigError(f"engine.config is {path}, which holds no JSON object but {read!r}")
    known = [*_PASSED_ON, *_CHECKED]
    for key in read:
        if key not in known:
            raise ConfigError(
                f"{path} has {key!r}{did_you_mean(key, known)}, which has no effect here; remove "
                f"it. Understood are: {', '.join(sorted(known))}"
            )
    if read.get("scheduler"):
        raise ConfigError(
            f"{path} has a scheduler, but learning rates follow lr_scheduler here (Trainer("
            "lr_scheduler=...)), which advances once per update; say it there, and remove it"
        )
    return read


def file_offloads(path: Path) -> bool:
    """Whether a user's own config does.

    Raises:
        ConfigError: as `read_file`.
    """
    zero = read_file(path).get("zero_optimization") or {}
    sections = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    return any(own.get("device") not in (None, "none", _AUTO) for own in sections)


def ds_config(
    source: Path | None,
    recipe: Recipe,
    *,
    n_elements: int,
    largest_part: int,
    zero_stage: int | None,
    offload: str | None,
    offload_parameters: bool | str,
    nvme_path: Path | str | None,
) -> dict[str, Any]:
    """Make what ``deepspeed.initialize`` is given.

    Args:
        source: the user's file; None: our words say everything.
        recipe: of the training.
        n_elements: of all parameters that are trained. DeepSpeed allocates a whole bucket (with
            stages 1 and 2 in each step): one larger than they are would only take memory.
        largest_part: elements of the largest parameter that a rank has with stage 3, for the
            buffers through which it goes to a file.
        zero_stage: None: the file's, else 2.
        offload: ``"cpu"`` or ``"nvme"``; None: the file's, else none.
        offload_parameters: True or ``"cpu"``: to the host, ``"nvme"``: to files; False: as the
            file says.
        nvme_path: None: the file's.

    Raises:
        ConfigError: the file and our words disagree, or something cannot be done.
    """
    config = {} if source is None else read_file(source)
    where = _Disagreement(source)
    config["gradient_accumulation_steps"] = where.same(
        config.get("gradient_accumulation_steps"),
        "gradient_accumulation_steps",
        recipe.gradient_accumulation_steps,
    )
    where.same(config.get("gradient_clipping") or None, "max_grad_norm", recipe.max_grad_norm)
    zero = dict(config.get("zero_optimization", {}))
    zero["stage"] = where.same(zero.get("stage"), "engine.zero_stage", zero_stage)
    if zero["stage"] is None:
        zero["stage"] = 2
    if zero["stage"] not in (1, 2, 3):
        raise ConfigError(
            f"engine.zero_stage is {zero['stage']!r}; it can be 1 (the optimizer's state is "
            "divided among the ranks), 2 (gradients, too) or 3 (parameters, too)"
        )
    _check_zero(zero, source)
    zero.setdefault("reduce_bucket_size", max(1, min(n_elements, _LARGEST_BUCKET)))
    to = "cpu" if offload_parameters is True else offload_parameters or None
    devices = [
        _offload(zero, "offload_optimizer", where, ("engine.offload", offload), nvme_path),
        _offload(zero, "offload_param", where, ("engine.offload_parameters", to), nvme_path),
    ]
    if nvme_path is not None and "nvme" not in devices:
        raise ConfigError(
            f"engine.nvme_path is {nvme_path}, but nothing is offloaded to it; say "
            "engine.offload=nvme or engine.offload_parameters=nvme, or leave it out"
        )
    if devices[1] == "nvme":
        zero["offload_param"].setdefault("buffer_size", largest_part)
        # There are buffers for what one module computes with, none for what is read before, or kept
        # for another.
        zero.setdefault("stage3_max_reuse_distance", 0)
        zero.setdefault("stage3_prefetch_bucket_size", 0)
    if to == "nvme":  # in a file alone as many stay in memory as DeepSpeed's own default says
        zero["offload_param"].setdefault("max_in_cpu", 0)
    formats = _formats(recipe.precision)
    for key in ("fp16", "bf16", "torch_autocast"):
        _check_format(config.get(key), key, formats, recipe.precision, where)
    kept = {k: v for k, v in config.items() if k in _PASSED_ON and v != _AUTO}
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **kept,
        **formats,
        "zero_optimization": zero,
        # We tell it which microbatch is a step's last, weigh the losses, and clip: it would to 1.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
    }


class _Disagreement:
    def __init__(self, source: Path | None) -> None:
        self._source = source

    def same(self, of_file: Any, word: str, ours: Any) -> Any:
        """Either's value, the file's if there is one."""
        if of_file is None or of_file == _AUTO:
            return ours
        if ours is not None and of_file != ours:
            self.refuse(repr(of_file), word, repr(ours))
        # A step is clipped and accumulated by the Trainer, which does not know the file.
        if ours is None and word == "max_grad_norm":
            self.refuse(repr(of_file), word, "null")
        return of_file

    def refuse(self, of_file: str, word: str, ours: str) -> None:
        raise ConfigError(
            f"{self._source} says {of_file} for what {word}={ours} says here; make them equal, or "
            "remove it there"
        )


def _check_zero(zero: dict[str, Any], source: Path | None) -> None:
    for key in ("mics_shard_size", "zero_hpz_partition_size"):
        if zero.get(key, 1) not in (-1, 1):
            raise ConfigError(
                f"{source} sets zero_optimization.{key}, by which DeepSpeed itself divides its "
                "ranks into groups; say mesh.shard instead, and remove it"
            )
    if zero.get("round_robin_gradients") and zero["stage"] < 3:
        raise ConfigError(
            f"{source} sets zero_optimization.round_robin_gradients, with which parameters are not "
            "where DeepSpeed says that they are; remove it"
        )
    for key, word in (("cpu_offload", "optimizer"), ("cpu_offload_param", "param")):
        if zero.get(key):
            raise ConfigError(
                f"{source} sets zero_optimization.{key}, which DeepSpeed has given up; say "
                f'"offload_{word}": {{"device": "cpu"}} there instead'
            )
    for key in [key for key, value in zero.items() if value == _AUTO]:
        del zero[key]


def _offload(
    zero: dict[str, Any],
    section: str,
    where: _Disagreement,
    word: tuple[str, str | None],
    nvme_path: Path | str | None,
) -> str | None:
    """Where to a section and our word (its name, its value) say; both are in the section then."""
    own = {k: v for k, v in (zero.pop(section, None) or {}).items() if v is not None}
    of_file = own.pop("device", None)
    if of_file == "none" and word[1] is not None:
        where.refuse(repr(of_file), word[0], repr(word[1]))
    device: str | None = where.same(None if of_file == "none" else of_file, *word)
    if device is None:
        return None
    if device not in ("cpu", "nvme"):
        raise ConfigError(f"{word[0]} is {device!r}; it can be cpu, or nvme (files)")
    if zero["stage"] != 3 and section == "offload_param":
        raise ConfigError(
            f"parameters are offloaded (engine.offload_parameters), but engine.zero_stage is "
            f"{zero['stage']}, in which every rank computes with all of them; take stage 3"
        )
    zero[section] = {**own, "device": device}
    if device == "nvme":
        if zero["stage"] != 3:
            raise ConfigError(
                f"{word[0]} is nvme, but engine.zero_stage is {zero['stage']}, of which DeepSpeed "
                "keeps nothing in files; take stage 3, or engine.offload=cpu"
            )
        path = None if nvme_path is None else str(nvme_path)
        path = where.same(own.get("nvme_path"), "engine.nvme_path", path)
        if path is None:
            raise ConfigError(
                f"{word[0]} is nvme, but not into which folder; set engine.nvme_path to one on a "
                "fast disk of each host"
            )
        zero[section]["nvme_path"] = path
    return device


def _formats(precision: Precision) -> dict[str, Any]:
    """The number formats in DeepSpeed's words."""
    if precision.name == "fp32":
        return {}
    if precision.name == "bf16-mixed":
        # No module's gradients are sent in 16 bits.
        return {
            "torch_autocast": {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }
        }
    if precision.name == "fp16-mixed":
        raise ConfigError(
            "precision is fp16-mixed, but DeepSpeed keeps parameters in float16 with float32 "
            "masters, and scales the loss by itself: that is precision=fp16-true; or take "
            "bf16-mixed, or engine=fully_shard"
        )
    if str(precision) != f"{precision.name} (master)":
        raise ConfigError(
            f"precision is {precision}, but DeepSpeed updates a float32 copy of 16-bit parameters: "
            "say precision.update=master, or take engine=fully_shard"
        )
    if precision.name == "bf16-true":
        return {"bf16": {"enabled": True}}
    return {"fp16": {"enabled": True, **_loss_scale(precision)}}


def _loss_scale(precision: Precision) -> dict[str, Any]:
    scale = precision.loss_scale
    if scale is None:
        return {"initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}
    power = math.log2(scale.initial)
    if power != int(power) or (scale.growth_factor, scale.backoff_factor) != (2.0, 0.5):
        raise ConfigError(
            f"DeepSpeed's loss scale is a power of two, doubled and halved, but precision has "
            f"{scale}; take growth_factor 2, backoff_factor 0.5 and such an initial scale"
        )
    return {
        "initial_scale_power": int(power),
        "loss_scale_window": scale.growth_interval,
        "min_loss_scale": scale.minimum,
        "hysteresis": 1,
    }


def _check_format(
    of_file: Mapping[str, Any] | None,
    key: str,
    formats: Mapping[str, Any],
    precision: Precision,
    where: _Disagreement,
) -> None:
    if of_file is None or of_file.get("enabled", _AUTO) == _AUTO:
        return
    if bool(of_file["enabled"]) != (key in formats):
        where.refuse(f"{key}.enabled={of_file['enabled']}", "precision", str(precision))
    for name, value in of_file.items():
        ours = formats.get(key, {}).get(name)
        if of_file["enabled"] and name != "enabled" and value not in (_AUTO, ours):
            where.refuse(f"{key}.{name}={value}", "precision", f"{precision} ({name}={ours})")


class BatchCheck:
    """Compares the batch sizes in a file with those of the first full step.

    Args:
        source: the file; None: there is nothing to compare.
        recipe: of the training.
    """

    def __init__(self, source: Path | None, recipe: Recipe) -> None:
        read = {} if source is None else read_file(source)
        names = ("train_micro_batch_size_per_gpu", "train_batch_size")
        self._wanted = {k: read[k] for k in names if read.get(k, _AUTO) != _AUTO}
        self._source = source
        self._accumulation = recipe.gradient_accumulation_steps

    def __call__(self, batch: StepBatch, ranks: int) -> None:
        """Look at a step.

        Args:
            batch: of this rank.
            ranks: how many have such a batch.

        Raises:
            ConfigError: the file has others.
        """
        if not self._wanted or batch.weight != 1.0:
            return
        micro = max(batch.sizes)
        ours = {
            "train_micro_batch_size_per_gpu": ("data.local_batch_size", micro),
            "train_batch_size": ("data.global_batch_size", micro * self._accumulation * ranks),
        }
        where = _Disagreement(self._source)
        for key, value in self._wanted.items():
            where.same(value, *ours[key])
        self._wanted = {}


def check_optimizer(source: Path | None, optimizer: Optimizer) -> None:
    """Compare a file's optimizer with the one that our words have made.

    Raises:
        ConfigError: they are not the same.
    """
    section = read_file(source).get("optimizer") if source is not None else None
    if not section:
        return
    name, params = str(section.get("type", _AUTO)), dict(section.get("params", {}))
    kind = _OPTIMIZERS.get(name.lower())
    if name.lower() == "adam" and not params.pop("adam_w_mode", True):
        kind = torch.optim.Adam
    ours = type(optimizer).__name__
    if name != _AUTO and kind is not type(optimizer):
        _Disagreement(source).refuse(f"optimizer.type={name}", "optimizer", ours)
    for key, value in params.items():
        if value == _AUTO or key in ("torch_adam", "fused"):
            continue
        made = optimizer.defaults.get(key)
        same = tuple(value) == tuple(made or ()) if isinstance(value, list) else value == made
        if not same:
            _Disagreement(source).refuse(f"optimizer.{key}={value}", f"optimizer.{key}", str(made))
