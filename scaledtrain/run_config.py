"""The config in the folder of a run: what it is made with, and what it was made with before."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scaledtrain.config import TrainConfig, check, to_yaml
from scaledtrain.errors import ConfigError
from scaledtrain.records import write_file
from scaledtrain.run_dir import CONFIG

__all__ = ["dotted", "load_config", "write_config"]

_OF_A_START = ("resume", "run_dir", "workers", "console")  # they may be others each time
_NOTHING = "nothing"


def write_config(run_dir: Path, config: TrainConfig) -> str | None:
    """Write the config, whole or not at all; an earlier one that differs is kept beside.

    Returns:
        What differs, for people to read; None: nothing of weight.
    """
    path, text = run_dir / CONFIG, to_yaml(config)
    earlier = path.read_text(encoding="utf-8") if path.exists() else text
    if earlier == text:
        write_file(path, text)
        return None
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
    kept = next(name for name in names if not name.exists())
    write_file(kept, earlier)
    write_file(path, text)
    before, now = (dotted(_read(t)) for t in (earlier, text))
    differing = [
        f"{key} {before.get(key, _NOTHING)} -> {now.get(key, _NOTHING)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, _NOTHING) != now.get(key, _NOTHING)
        and key.partition(".")[0] not in _OF_A_START
    ]
    return f"other settings than in {kept.name}: {'; '.join(differing)}" if differing else None


def load_config(run_dir: Path) -> TrainConfig:
    """The config that a run was made with, last.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"there is no {path}, which says what the run was made with; give the folder of a run "
            "that a command of scaledtrain made"
        )
    try:
        written = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {error}; restore it, or remove it") from error
    return check(cast(DictConfig, written))


def _read(text: str) -> dict[Any, Any]:
    return cast(dict[Any, Any], OmegaConf.to_container(OmegaConf.create(text)))


def dotted(config: Mapping[Any, Any]) -> dict[str, Any]:
    """The settings in a config by their paths.

    Example:
        >>> dotted({"seed": 0, "optimizer": {"lr": 0.1}})
        {'seed': 0, 'optimizer.lr': 0.1}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{key}.{inner}": each for inner, each in dotted(value).items()}
        else:
            found[str(key)] = value
    return found
