"""In what the configs of runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from scaledtrain.errors import ConfigError
from scaledtrain.run_config import dotted
from scaledtrain.run_dir import CONFIG

__all__ = ["differences", "read_config"]

_OF_EACH_RUN = ("run_dir", "name")
_ABSENT = "–"


def read_config(folder: Path) -> dict[str, str]:
    """A run's ``config.yaml`` as dotted keys and values in words; empty if there is none.

    Raises:
        ConfigError: it is there, but no YAML mapping.
    """
    path = folder / CONFIG
    if not path.exists():  # a Trainer in a script of one's own
        return {}
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; restore it, or remove it") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds {config!r} instead of keys and values; remove it")
    return {k: "null" if v is None else str(v) for k, v in dotted(config).items()}


def differences(configs: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """The keys whose values are not the same in all configs that are there, and the values.

    Example:
        >>> differences([{"lr": "0.1", "seed": "0"}, {"lr": "0.2", "seed": "0"}])
        [('lr', ['0.1', '0.2'])]
    """
    known = [config for config in configs if config]
    keys = dict.fromkeys(key for config in known for key in config if key not in _OF_EACH_RUN)
    return [
        (key, [config.get(key, _ABSENT) for config in configs])
        for key in keys
        if len({config.get(key) for config in known}) > 1
    ]
