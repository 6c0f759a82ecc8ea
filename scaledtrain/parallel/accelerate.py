"""What ``accelerate launch`` and ``accelerate config`` say, in the words of our own configs.

Needs no Accelerate: the one leaves variables in the environment of the processes that it starts,
the other writes a YAML file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from scaledtrain.errors import ConfigError

__all__ = ["with_accelerate", "words_of_environment", "words_of_file"]

_KEY = "accelerate="

# How one of Accelerate's settings is said here; [] where ours does what it asks for anyway.
Words = list[str]
Translate = Callable[[str], Words]


def with_accelerate(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> list[str]:
    """A command line with what Accelerate's launcher and its config file say added to it.

    ``accelerate=FILE`` names a file that ``accelerate config`` wrote. What the command line says
    itself counts more than that, as under ``accelerate launch``; a group that it chooses counts
    with all its keys.

    Args:
        arguments: of the command, ``accelerate=FILE`` perhaps among them.
        env: where the launcher leaves its settings.

    Raises:
        ConfigError: the file cannot be read, or a setting has no counterpart here.

    Example:
        >>> with_accelerate(["max_steps=9"], {"ACCELERATE_MIXED_PRECISION": "bf16"})
        ['precision=bf16-mixed', 'max_steps=9']
        >>> with_accelerate(["precision=fp32"], {"ACCELERATE_MIXED_PRECISION": "bf16"})
        ['precision=fp32']
    """
    files = [a.removeprefix(_KEY) for a in arguments if a.startswith(_KEY)]
    own = [a for a in arguments if not a.startswith(_KEY)]
    if len(files) > 1:
        raise ConfigError(f"accelerate= is given {len(files)} times: {', '.join(files)}; give one")
    words = words_of_environment(env)
    if files:
        # A launcher has started the processes by its own number of them.
        launched = "RANK" in env and "WORLD_SIZE" in env
        of_file = words_of_file(Path(files[0]))
        words += [w for w in of_file if not (launched and w.startswith("workers="))]
    said = {a.partition("=")[0] for a in own}
    added: dict[str, str] = {}
    for word in words:
        key = word.partition("=")[0]
        if not {key, key.partition(".")[0]} & said:
            added.setdefault(key, word)
    return [*added.values(), *own]


def words_of_environment(env: Mapping[str, str]) -> Words:
    """What ``accelerate launch`` has told the process that it started.

    Raises:
        ConfigError: a setting has no counterpart here.
    """
    words = _translate(
        {key: env[key] for key in _ENVIRONMENT if key in env}, _ENVIRONMENT, "accelerate launch"
    )
    if _is_true(env.get("ACCELERATE_USE_FSDP", "false")):
        settings = {k.lower(): v for k, v in env.items() if k.startswith("FSDP_")}
        words += _fully_shard(settings, env.get("WORLD_SIZE", "1"))
    if _is_true(env.get("ACCELERATE_USE_DEEPSPEED", "false")):
        settings = {name: env[key] for key, name in _DEEPSPEED_VARIABLES.items() if key in env}
        words += _deepspeed(settings, env.get("WORLD_SIZE", "1"))
    return words


def words_of_file(path: Path) -> Words:
    """What a file says that ``accelerate config`` wrote.

    Raises:
        ConfigError: it cannot be read, or a setting in it has no counterpart here.
    """
    try:
        read: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, YAMLError, ValueError) as error:
        raise ConfigError(f"accelerate={path}: the file cannot be read ({error})") from error
    if not isinstance(read, dict) or "distributed_type" not in read:
        raise ConfigError(
            f"accelerate={path}: this is no file of `accelerate config`, which would have a "
            "distributed_type; to begin one, run: accelerate config --config_file FILE"
        )
    settings = {str(key): value for key, value in read.items() if value not in (None, "", {}, [])}
    ranks = str(settings.get("num_processes", 1))
    kind = str(settings.pop("distributed_type"))
    parts = {name: settings.pop(f"{name}_config", {}) for name in ("deepspeed", "fsdp", "dynamo")}
    words = _translate(settings, _FILE, f"accelerate={path}")
    words += _translate(parts["dynamo"], _DYNAMO, f"accelerate={path}: dynamo_config")
    if kind == "FSDP":
        words += _fully_shard(parts["fsdp"], ranks)
    elif kind == "DEEPSPEED":
        words += _deepspeed(parts["deepspeed"], ranks)
    elif kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ConfigError(
            f"accelerate={path}: distributed_type is {kind}, which has no counterpart here; there "
            "are NO, MULTI_CPU, MULTI_GPU, FSDP and DEEPSPEED"
        )
    return words


def _translate(settings: Mapping[str, Any], table: Mapping[str, Translate], source: str) -> Words:
    words: Words = []
    for name, value in settings.items():
        if name not in table:
            raise ConfigError(
                f"{source}: {name} is {value!r}, which has no counterpart here; remove it, and see "
                "python -m scaledtrain.train --help for what there is"
            )
        try:
            words += table[name](str(value))
        except _Refused as refused:
            raise ConfigError(f"{source}: {name} is {value!r}: {refused}") from None
    return words


class _Refused(Exception):
    """A value of a setting that cannot be."""


def _nothing(value: str) -> Words:
    return []


def _only(*fits: str, instead: str) -> Translate:
    """A setting that may have values which change nothing, and no others."""

    def translate(value: str) -> Words:
        if value.lower() not in fits:
            raise _Refused(instead)
        return []

    return translate


def _chosen(choices: Mapping[str, Words], instead: str) -> Translate:
    def translate(value: str) -> Words:
        if value.lower() not in choices:
            raise _Refused(f"{instead}; it can be: {', '.join(choices)}")
        return choices[value.lower()]

    return translate


def _is_true(value: str) -> bool:
    return value.lower() in ("true", "1", "yes")


def _flag(word: str) -> Translate:
    return lambda value: [word] if _is_true(value) else []


def _as(key: str) -> Translate:
    return lambda value: [] if value.lower() in ("auto", "none") else [f"{key}={value}"]


_precision = _chosen(
    {"no": [], "bf16": ["precision=bf16-mixed"], "fp16": ["precision=fp16-mixed"]},
    "there are no kernels for it here",
)


def _compile(value: str) -> Words:
    return [] if value.lower() == "no" else [f"compile={value.lower()}"]


_HOSTS = "on several hosts start it with accelerate launch, torchrun or srun, not with accelerate="
_DYNAMO: dict[str, Translate] = {
    "dynamo_backend": _compile,
    "dynamo_mode": _only("default", instead="torch.compile runs in its default mode here"),
    "dynamo_use_fullgraph": _only("false", instead="graphs may break here; set it to false"),
    "dynamo_use_dynamic": _only("false", instead="torch.compile finds that out here; leave it"),
    "dynamo_use_regional_compilation": _nothing,  # with recomputation each block is compiled alone
}
_ENVIRONMENT: dict[str, Translate] = {
    "ACCELERATE_MIXED_PRECISION": _precision,
    "ACCELERATE_USE_CPU": _flag("device=cpu"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _as("gradient_accumulation_steps"),
    "ACCELERATE_USE_MEGATRON_LM": _only("false", instead="Megatron-LM is no engine here"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": _only("false", instead="set mesh.shard and mesh.pipe"),
    **{f"ACCELERATE_{name.upper()}": translate for name, translate in _DYNAMO.items()},
}
_FILE: dict[str, Translate] = {
    "compute_environment": _only("local_machine", instead="only LOCAL_MACHINE can be"),
    "num_processes": _as("workers"),
    "num_machines": _only("1", instead=_HOSTS),
    "machine_rank": _only("0", instead=_HOSTS),
    "mixed_precision": _precision,
    "use_cpu": _flag("device=cpu"),
    "gpu_ids": _only("all", instead="choose devices with CUDA_VISIBLE_DEVICES"),
    "enable_cpu_affinity": _only("false", instead="processes are not bound to cores here"),
    "downcast_bf16": _only("no", "false", instead="that is for TPUs"),
    "tpu_use_cluster": _only("false", instead="there is no TPU support"),
    "tpu_use_sudo": _only("false", instead="there is no TPU support"),
    "debug": _only("false", instead="what ranks send is always checked; set it to false"),
    # How Accelerate's own launcher meets and what it calls; workers of one host find each other.
    **dict.fromkeys(
        ("rdzv_backend", "same_network", "main_training_function", "main_process_ip"), _nothing
    ),
    "main_process_port": _nothing,
}
_FSDP: dict[str, Translate] = {
    "fsdp_version": _only("1", "2", instead="there are 1 and 2"),
    "fsdp_sharding_strategy": _chosen(
        {
            "full_shard": [],
            "1": [],
            "shard_grad_op": ["engine.reshard_after_forward=false"],
            "2": ["engine.reshard_after_forward=false"],
        },
        "for replicas of several ranks each set mesh.shard on the command line",
    ),
    "fsdp_reshard_after_forward": _chosen(
        {
            "true": [],
            "full_shard": [],
            "false": ["engine.reshard_after_forward=false"],
            "shard_grad_op": ["engine.reshard_after_forward=false"],
        },
        "for replicas of several ranks each set mesh.shard on the command line",
    ),
    "fsdp_offload_params": _flag("engine.offload=true"),
    "fsdp_transformer_cls_to_wrap": lambda value: [f"engine.block_classes=[{value}]"],
    "fsdp_transformer_layer_cls_to_wrap": lambda value: [f"engine.block_classes=[{value}]"],
    "fsdp_auto_wrap_policy": _only(
        "transformer_based_wrap", "no_wrap", instead="blocks are found by their classes here"
    ),
    "fsdp_activation_checkpointing": _flag("activation_checkpointing=full"),
    "fsdp_activation_checkpointing_offload": _only(
        "false", instead="set activation_checkpointing.offload=host on the command line"
    ),
    "fsdp_cpu_ram_efficient_loading": _nothing,  # rank 0's values are everybody's in any case
    "fsdp_sync_module_states": _nothing,
    "fsdp_state_dict_type": _nothing,
    "fsdp_use_orig_params": _nothing,
    "fsdp_backward_prefetch": _nothing,
    "fsdp_forward_prefetch": _nothing,
    "fsdp_min_num_params": _only("0", "100000000", instead="blocks are found by their classes"),
}
_DEEPSPEED: dict[str, Translate] = {
    "zero_stage": _as("engine.zero_stage"),
    "gradient_accumulation_steps": _as("gradient_accumulation_steps"),
    "gradient_clipping": _as("max_grad_norm"),
    "offload_optimizer_device": _chosen(
        {"none": [], "cpu": ["engine.offload=cpu"], "nvme": ["engine.offload=nvme"]},
        "there is no such place",
    ),
    "offload_param_device": _chosen(
        {
            "none": [],
            "cpu": ["engine.offload_parameters=true"],
            "nvme": ["engine.offload_parameters=nvme"],
        },
        "there is no such place",
    ),
    "offload_optimizer_nvme_path": _as("engine.nvme_path"),
    "offload_param_nvme_path": _as("engine.nvme_path"),
    "deepspeed_config_file": _as("engine.config"),
    "deepspeed_multinode_launcher": _nothing,
    "zero3_save_16bit_model": _nothing,
    "zero3_init_flag": _only("false", instead="a model is made whole here; set it to false"),
}
_DEEPSPEED_VARIABLES = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": "offload_optimizer_nvme_path",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "offload_param_nvme_path",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "deepspeed_config_file",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
}


def _fully_shard(settings: Mapping[str, Any], ranks: str) -> Words:
    return [
        f"mesh.shard={ranks}",
        "engine=fully_shard",
        *_translate(settings, _FSDP, "Accelerate's fsdp_config"),
    ]


def _deepspeed(settings: Mapping[str, Any], ranks: str) -> Words:
    words = _translate(settings, _DEEPSPEED, "Accelerate's deepspeed_config")
    folders = {word for word in words if word.startswith("engine.nvme_path=")}
    if len(folders) > 1:
        raise ConfigError(
            "Accelerate's deepspeed_config has two folders for NVMe, but here is one for both "
            f"({', '.join(sorted(folders))}); name the same, or say both in a deepspeed_config_file"
        )
    return [f"mesh.shard={ranks}", "engine=deepspeed", *words]
