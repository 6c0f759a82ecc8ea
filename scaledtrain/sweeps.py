"""Arguments that hold several values, as Hydra writes them: ``a,b``, ``range(...)``."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException

from scaledtrain.errors import ConfigError

__all__ = ["split_sweeps", "texts"]


def split_sweeps(arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Those arguments of a command line that have one value, and those that have several.

    Raises:
        ConfigError: two of the latter have the same key.

    Example:
        >>> plain, sweeps = split_sweeps(["model=mlp", "seed=0,1", "model.hidden=[8,8]"])
        >>> plain, [(sweep.key_or_group, texts(sweep)) for sweep in sweeps]
        (['model=mlp', 'model.hidden=[8,8]'], [('seed', ['0', '1'])])
    """
    parser = OverridesParser.create()
    plain: list[str] = []
    sweeps: list[Override] = []
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            plain.append(argument)
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException:  # whoever composes the config tells
            plain.append(argument)
            continue
        if override.is_sweep_override():
            sweeps.append(override)
        else:
            plain.append(argument)
    keys = [sweep.key_or_group for sweep in sweeps]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key} is given several values twice; write all in one place")
    return plain, sweeps


def texts(sweep: Override) -> list[str]:
    """The values of a sweep that can be counted, as they are written on a command line.

    Raises:
        ConfigError: they cannot, or there are none.
    """
    try:
        found = [str(value) for value in sweep.sweep_iterator(transformer=Transformer.encode)]
    except HydraException as error:
        raise ConfigError(
            f"{sweep.input_line} does not say which values: write them out (0.1,0.01), or a "
            "range(start,stop,step)"
        ) from error
    if not found:
        raise ConfigError(f"{sweep.input_line} has no value; a range ends before its stop")
    return found
