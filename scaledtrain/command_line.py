"""From a command line to a config: Hydra composes it, mistakes are told in a line or two.

Differences to a plain ``@hydra.main``: no output folder, working directory or logging of its own; a
class of the user's can stand where a group's choice stands (``model=package.module.Class``); every
argument of a chosen class can be set without a ``+``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any, NoReturn

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scaledtrain.errors import ConfigError
from scaledtrain.schema import did_you_mean

__all__ = ["compose", "config_folder", "only_run", "read_command_line", "runs_and_settings"]

_ASSIGNMENT = re.compile(r"(?P<key>[A-Za-z_][\w/.]*)=(?P<value>.*)", re.DOTALL)
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_BEFORE_A_WORD = ("-c", "--cfg", "-cd", "--config-dir", "-cn", "--config-name")  # flags
_NO_PLACE = re.compile(r"Could not (?:delete|override) '([^']+)'\. No match in the defaults list")
# Two ways to say the same: the one on the command line replaces the other in the files.
_ALTERNATIVES = [
    ("max_steps", "max_epochs"),
    ("data.local_batch_size", "data.global_batch_size"),
]


def config_folder() -> Path:
    """Where the YAML files are: beside the modules once installed, at the top of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def compose(
    overrides: Sequence[str] = (),
    config_name: str = "train",
    config_dir: str | Path | None = None,
) -> DictConfig:
    """Compose a config as the command line does.

    Args:
        overrides: ``GROUP=CHOICE`` and ``KEY=VALUE``.
        config_name: the YAML file to begin with.
        config_dir: a folder with more YAML files, the caller's own.

    Raises:
        ConfigError: a file, group or choice that is not there, or a value that cannot be read.

    Example:
        >>> compose(["strategy=async", "optimizer.lr=0.5"]).optimizer.lr
        0.5
    """
    config = _compose(overrides, config_name, config_dir)
    del config["hydra"]
    return config


def read_command_line(arguments: Sequence[str], config_name: str, prog: str) -> DictConfig | None:
    """The config that a command line asks for; None if it asks for help, which is then printed.

    Args:
        arguments: as in ``sys.argv[1:]``.
        config_name: the YAML file to begin with.
        prog: the command's name, for help.

    Raises:
        ConfigError: as `compose`, or an unknown flag.
    """
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    flags = parser.add_argument_group("Flags").add_argument
    flags("-h", "--help", action="store_true", help="this text")
    flags("-c", "--cfg", choices=["job"], metavar="job", help="print the config instead of running")
    flags("--resolve", action="store_true", help="with --cfg: interpolations resolved")
    flags("-cd", "--config-dir", metavar="DIR", help="more YAML files: your own groups' choices")
    flags("-cn", "--config-name", metavar="NAME", default=config_name, help="YAML to begin with")
    options = parser.parse_intermixed_args(list(arguments))
    config = _compose(options.overrides, options.config_name, options.config_dir)
    if options.help:
        flag_lines = parser.format_help().partition("Flags:\n")[2]
        print(_help(config, options.config_dir, flag_lines))
        return None
    del config["hydra"]
    if options.cfg:
        print(OmegaConf.to_yaml(config, resolve=options.resolve), end="")
        return None
    return config


def runs_and_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that name folders of runs, and the others.

    The folder of a run may have a = in its name: those of a comparison do.

    Example:
        >>> runs_and_settings(["a/run", "seed=1", "--cfg", "job", "--help"])
        (['a/run'], ['seed=1', '--cfg', 'job', '--help'])
    """
    runs: list[str] = []
    settings: list[str] = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        is_run = Path(word).is_dir() or not (word.startswith("-") or "=" in word)
        (runs if is_run and before not in _BEFORE_A_WORD else settings).append(word)
    return runs, settings


def only_run(runs: Sequence[str], prog: str) -> str:
    """The one run that a command is about.

    Args:
        runs: that were given.
        prog: the command, for the message.

    Raises:
        ConfigError: there is none, or there are several.
    """
    if len(runs) != 1:
        raise ConfigError(
            f"{len(runs) or 'no'} runs were given; write {prog} RUN, where RUN is one's folder"
        )
    return runs[0]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _folders(config_dir: str | Path | None) -> list[Path]:
    if config_dir is None:
        return [config_folder()]
    own = Path(config_dir).resolve()
    if not own.is_dir():
        raise ConfigError(f"--config-dir is {str(config_dir)!r}, which is no folder")
    return [config_folder(), own]


def _groups(config_dir: str | Path | None) -> dict[str, list[str]]:
    """Choices by group: the names of the YAML files in every folder that has some."""
    groups: dict[str, set[str]] = {}
    for folder in _folders(config_dir):
        for file in folder.glob("*/**/*.yaml"):
            group = file.parent.relative_to(folder).as_posix()
            groups.setdefault(group, set()).add(file.stem)
    return {group: sorted(groups[group]) for group in sorted(groups)}


def _compose(
    overrides: Sequence[str], config_name: str, config_dir: str | Path | None
) -> DictConfig:
    groups = _groups(config_dir)
    lenient = [o for override in overrides for o in _lenient(override, groups)]
    lenient += _without_alternatives(overrides)
    folders = _folders(config_dir)
    # The file to begin with has to be in Hydra's first folder; groups are found in any.
    folders.sort(key=lambda folder: not (folder / f"{config_name}.yaml").is_file())
    lenient += [f"hydra.searchpath=['file://{folder}']" for folder in folders[1:]]
    try:
        with initialize_config_dir(str(folders[0]), version_base="1.3"):
            config = hydra_compose(config_name, lenient, return_hydra_config=True)
        choices: dict[str, Any] = config.hydra.runtime.choices
        OmegaConf.set_struct(config, False)
    except MissingConfigException as error:
        raise _no_such_choice(error, config_name) from error
    except OverrideParseException as error:
        given = error.override.removeprefix("++")
        raise ConfigError(
            f"{given!r} cannot be read as KEY=VALUE; put quotes within the shell's around a value "
            "that holds spaces, commas or =: \"strategies=[sync,'async optimizer.lr=0.3']\""
        ) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_in_short(str(error))) from error
    if "name" in config and config.name is None:
        parts = [choices.get("experiment")] if choices.get("experiment") else []
        parts += [choices.get(group) for group in ("data", "model", "strategy")][bool(parts) * 2 :]
        config.name = "-".join(str(part) for part in parts if part)
    return config


def _lenient(override: str, groups: dict[str, list[str]]) -> Iterator[str]:
    """What Hydra is to read: keys may be new, a class may take the place of a group's choice."""
    match = _ASSIGNMENT.fullmatch(override)
    if match is None:
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"{override!r} is neither GROUP=CHOICE nor KEY=VALUE; see --help")
        yield override  # +key=value, ~key, group@package=choice: as Hydra has it
        return
    key, value = match["key"], match["value"]
    if key.startswith("hydra."):
        raise ConfigError(f"{override}: Hydra's own settings have no effect here; leave it out")
    if key not in groups:
        if "/" in key:
            guess = did_you_mean(key, groups)
            raise ConfigError(f"there is no group {key!r}{guess}; groups: {', '.join(groups)}")
        yield f"++{override}"
    elif _CLASS.fullmatch(value):
        yield f"~{key}"
        yield f"++{key.replace('/', '.')}._target_={value}"
    else:
        yield override


def _without_alternatives(overrides: Sequence[str]) -> Iterator[str]:
    given = {match["key"] for o in overrides if (match := _ASSIGNMENT.fullmatch(o))}
    for keys in _ALTERNATIVES:
        if given & set(keys):
            yield from (f"++{key}=null" for key in keys if key not in given)


def _no_such_choice(error: MissingConfigException, config_name: str) -> ConfigError:
    group, _, choice = (error.missing_cfg_file or config_name).rpartition("/")
    options = sorted(error.options or [])
    if not group:
        options = sorted(file.stem for file in config_folder().glob("*.yaml"))
        return ConfigError(
            f"there is no config named {choice!r}{did_you_mean(choice, options)}; "
            f"there are: {', '.join(options)}; --config-dir adds a folder of your own"
        )
    return ConfigError(
        f"{group} is {choice!r}{did_you_mean(choice, options)}, but can be: {', '.join(options)}; "
        f"for a class of your own write {group}=package.module.Class"
    )


def _in_short(message: str) -> str:
    """What Hydra says, without its advice about Hydra."""
    if match := _NO_PLACE.match(message):
        part, _, name = match[1].rpartition("/")
        return f"{match[1]} cannot be chosen here: {part or 'this config'} has no part {name!r}"
    lines = [line.strip() for line in message.replace("++", "").splitlines()]
    return " ".join(s for s in lines if s and "hydra.cc" not in s and "--multirun" not in s)


def _help(config: DictConfig, config_dir: str | Path | None, flags: str) -> str:
    groups = _groups(config_dir)
    width = max(map(len, groups)) + 2
    lines = [f"  {group:<{width}}{', '.join(choices)}" for group, choices in groups.items()]
    template = Template(config.hydra.help.template)
    return template.safe_substitute(APP_CONFIG_GROUPS="\n".join(lines), FLAGS_HELP=flags.rstrip())
