"""Which trainings an ablation consists of, and which of them have been made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig

from scaledtrain.ablate.components import components_in
from scaledtrain.command_line import read_command_line
from scaledtrain.config import check, to_yaml
from scaledtrain.disk import replace_file
from scaledtrain.errors import ConfigError
from scaledtrain.judged import NO_TARGET, BestIs
from scaledtrain.parallel.accelerate import with_accelerate
from scaledtrain.run_dir import RESULT
from scaledtrain.schema import did_you_mean

__all__ = ["FULL", "Ablation", "Plan", "quoted", "variants"]

FULL = "full"
"""The name of the training with all components."""

_PLAN = "ablation.json"
_SET_FOR_EACH = {"name": "ablation", "seed": 0, "run_dir": None, "resume": None, "console": False}


@dataclass(frozen=True)
class Ablation:
    """The keys below ``ablate``; ``configs/ablate.yaml`` says what each means."""

    seeds: Sequence[int]
    only: Sequence[str] | None
    without: Mapping[str, Sequence[str]]
    metric: str | None
    best_is: BestIs | None
    at_once: int

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"ablate.seeds is {list(self.seeds)}; give some, each once: [0,1,2]")
        for name in self.without:
            if not re.fullmatch(r"\w+", name) or name == FULL:
                raise ConfigError(
                    f"ablate.without has the name {name!r}, but a name is one word of letters, "
                    f"digits and _, and not {FULL}"
                )


def quoted(argument: str) -> str:
    """``ablate.without.NAME=[KEY=VALUE,...]`` with the quotes that Hydra wants around a ``=``.

    Example:
        >>> quoted("ablate.without.small=[model.hidden=[8,8],seed=1]")
        "ablate.without.small=['model.hidden=[8,8]','seed=1']"
        >>> quoted("ablate.without.small=['seed=1']")
        "ablate.without.small=['seed=1']"
    """
    match = re.fullmatch(r"(ablate\.without\.\w+=)\[([^'\"]*)\]", argument, re.DOTALL)
    if match is None:
        return argument
    parts, depth = [""], 0
    for letter in match[2]:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return f"{match[1]}[{','.join(repr(part.strip()) for part in parts)}]"


def variants(arguments: Sequence[str], ablation: Ablation) -> dict[str, str]:
    """Name -> config, as YAML, of the training with everything and of those without something.

    Args:
        arguments: of the training command.
        ablation: what is asked for.

    Raises:
        ConfigError: nothing can be taken away, ``only`` names what is not there, or a config
            without a component cannot be.
    """
    full = _compose([*arguments, *NO_TARGET])
    found = components_in(full)
    for name, overrides in ablation.without.items():
        found[name] = _compose([*arguments, *NO_TARGET, *overrides])
    if ablation.only is not None:
        for name in ablation.only:
            if name not in found:
                there = ", ".join(found) or "nothing that is known"
                raise ConfigError(
                    f"ablate.only names {name!r}{did_you_mean(name, found)}, which this config "
                    f"does not have on; it has: {there}; for one of your own give "
                    f"ablate.without.{name}=[KEY=VALUE]"
                )
        found = {name: found[name] for name in ablation.only}
    if not found:
        raise ConfigError(
            "nothing can be taken away: the config has no component on that is known; give one of "
            "your own: ablate.without.NAME=[KEY=VALUE]"
        )
    texts = {FULL: _text(FULL, full)}
    for name, config in found.items():
        texts[name] = _text(name, config)
        if texts[name] == texts[FULL]:
            raise ConfigError(
                f"ablate.without.{name} changes nothing: the config is so already; give another "
                "KEY=VALUE"
            )
    return texts


def _compose(arguments: Sequence[str]) -> DictConfig:
    config = read_command_line(with_accelerate(arguments), "train", "scaledtrain ablate")
    assert config is not None
    return config


def _text(name: str, config: DictConfig) -> str:
    """What a run of it reads."""
    config = config.copy()
    for key, value in _SET_FOR_EACH.items():
        config[key] = value
    try:
        return to_yaml(check(config))
    except ConfigError as error:
        raise ConfigError(
            f"there is no training without {name}: {error}; leave it out by ablate.only, or take "
            f"it away in another way: ablate.without.{name}=[KEY=VALUE]"
        ) from error


@dataclass(frozen=True)
class Plan:
    """An ablation in its folder.

    Args:
        folder: where everything is.
        names: of the variants, the full one first.
        seeds: of each.
        metric: what quality is.
        best_is: where it is best.
    """

    folder: Path
    names: Sequence[str]
    seeds: Sequence[int]
    metric: str
    best_is: BestIs

    def begin(self, texts: Mapping[str, str]) -> None:
        """Write the configs; or see that what is in the folder was made with the same.

        Raises:
            ConfigError: it was not.
        """
        (self.folder / "configs").mkdir(exist_ok=True)
        for name, text in texts.items():
            path = self.config(name)
            if path.exists() and path.read_text(encoding="utf-8") != text:
                raise ConfigError(
                    f"{self.folder} holds an ablation whose {name} was another training, and the "
                    "two cannot be held against each other; give the same arguments, or another "
                    "run_dir; ablate.seeds and ablate.only may change"
                )
            replace_file(path, text.encode())
        kept = {**asdict(self), "folder": None}
        replace_file(self.folder / _PLAN, json.dumps(kept, indent=2).encode())

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read what `begin` wrote.

        Raises:
            ConfigError: the folder is not that of an ablation.
        """
        try:
            kept = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
            return cls(**{**kept, "folder": folder})
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder} holds no ablation ({_PLAN}: {error}); give the folder that scaledtrain "
                "ablate wrote to"
            ) from error

    def config(self, name: str) -> Path:
        """The file with a variant's config; of its name no other is shipped."""
        return self.folder / "configs" / f"ablation-{name}.yaml"

    def run_dir(self, name: str, seed: int) -> Path:
        """Where a run goes."""
        return self.folder / "runs" / f"{name}-seed{seed}"

    def is_made(self, name: str, seed: int) -> bool:
        """Whether the run came to its end."""
        return (self.run_dir(name, seed) / RESULT).exists()

    def order(self) -> Iterator[tuple[str, int]]:
        """Name and seed of all runs: seed by seed, so that what changes on the host meets all.

        Each seed begins with another variant.
        """
        names = list(self.names)
        for place, seed in enumerate(self.seeds):
            first = place % len(names)
            yield from ((name, seed) for name in [*names[first:], *names[:first]])
