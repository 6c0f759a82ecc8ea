"""Reads files of JSON lines, one line at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from scaledtrain.errors import ConfigError

__all__ = ["parse_lines"]

_T = TypeVar("_T")


def parse_lines(path: Path, parse: Callable[[Any], _T]) -> Iterator[_T]:
    """Parse each line of a file; a crash may have cut the last one short, which is left out.

    No more than a line is in memory.

    Args:
        path: of the file.
        parse: makes a value of a line's JSON, or raises ValueError, KeyError, TypeError or
            AttributeError.

    Raises:
        ConfigError: a line other than the last cannot be parsed.
    """
    broken: tuple[int, Exception] | None = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if broken is not None:
                raise ConfigError(
                    f"{path}, line {broken[0]} is not a record of a run "
                    f"({type(broken[1]).__name__}: {broken[1]}); the file was changed, or another "
                    "version of scaledtrain wrote it"
                ) from broken[1]
            try:
                value = parse(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                broken = (number, error)
                continue
            yield value
