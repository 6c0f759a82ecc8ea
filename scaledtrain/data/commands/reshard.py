"""``reshard``: writes a sharded data set anew."""

from __future__ import annotations

import argparse
from typing import Any

from scaledtrain.data.commands.output import add_output, names, write
from scaledtrain.data.convert import Shards

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    what = "write a sharded data set in another order, with other columns or sizes of shards"
    parser = commands.add_parser("reshard", help=what, description=what)
    parser.add_argument("input", metavar="FOLDER", help="of the sharded data set")
    add_output(parser)
    parser.add_argument(
        "--columns", type=names, metavar="COLUMN,...", help="to keep (default: all)"
    )
    parser.add_argument(
        "--shuffle", choices=("none", "block", "full"), default="none", help="(default: none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle (default: 0)")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    source = Shards(parsed.input, columns=parsed.columns, shuffle=parsed.shuffle, seed=parsed.seed)
    return write(source, parsed)
