"""The data command: write, look at, check and rewrite sharded data sets.

```
python -m scaledtrain.data write images photos photos-sharded --size 64 64 --workers 4
python -m scaledtrain.data verify photos-sharded
```
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from scaledtrain.data.commands import head, inspect, reshard, stats, verify, write
from scaledtrain.launching import guarded

__all__ = ["COMMANDS", "main", "run"]

COMMANDS = (write, inspect, head, verify, stats, reshard)
"""Modules with ``add(commands)``, which adds a parser whose default ``run`` is the command."""


def main() -> None:
    """Run what the command line says; exit code 1: something is damaged, 2: wrong arguments."""
    guarded(_main)


def _main() -> None:
    if code := run(sys.argv[1:]):
        raise SystemExit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command.

    Args:
        arguments: of the command line, the command first.

    Returns:
        The exit code: 0, or 1 if a data set is damaged.

    Raises:
        ScaledTrainError: it failed.
        SystemExit: the arguments are wrong, or help was asked for.
    """
    parser = argparse.ArgumentParser(
        prog="scaledtrain data", description="Write, look at, check and rewrite sharded data sets."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    parsed = parser.parse_args(arguments)
    with warnings.catch_warnings():  # commands say by themselves what is not finished
        warnings.filterwarnings("ignore", message=".* was not finished", category=UserWarning)
        code: int = parsed.run(parsed)
    return code
