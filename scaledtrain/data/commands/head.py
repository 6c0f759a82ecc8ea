"""``head``: the first samples of a data set."""

from __future__ import annotations

import argparse
from itertools import islice
from typing import Any

from torch import Tensor

from scaledtrain.data.commands.output import names
from scaledtrain.data.convert import class_names
from scaledtrain.data.sharded import Column, ShardedDataset

__all__ = ["add"]

_VALUES = 6  # that are shown of a tensor
_CHARACTERS = 60  # of a text


def add(commands: Any) -> None:
    """Add the command."""
    what = "show the first samples"
    parser = commands.add_parser("head", help=what, description=what)
    parser.add_argument("folder", metavar="FOLDER", help="of the sharded data set")
    parser.add_argument("-n", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--columns", type=names, metavar="COLUMN,...", help="(default: all)")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    data = ShardedDataset(parsed.folder, parsed.columns)
    classes = class_names(parsed.folder)
    for number in islice(range(len(data)), max(parsed.n, 0)):
        print(f"sample {number}")
        for name, value in data[number].items():
            print(f"  {name}: {_shown(value, data.columns[name], classes.get(name, []))}")
    return 0


def _shown(value: Tensor, column: Column, classes: list[str]) -> str:
    if not value.ndim:
        number = value.item()
        known = classes and 0 <= number < len(classes)
        return f"{number} ({classes[int(number)]})" if known else str(number)
    shape = f"{column.dtype} {list(value.shape)}"
    if column.ragged and column.dtype == "uint8" and not column.shape:
        return f"{shape} {_text(bytes(value.numpy()))}"
    flat = value.reshape(-1)[: _VALUES + 1]
    numbers = flat.float() if column.dtype == "bfloat16" else flat
    told = [f"{number:.6g}" for number in numbers[:_VALUES].tolist()]
    if len(flat) > _VALUES:
        told.append("...")
    return f"{shape} {', '.join(told)}"


def _text(content: bytes) -> str:
    """The beginning of it, as text if that is what it is."""
    begin = content[: 4 * _CHARACTERS]
    try:
        text = begin.decode()
    except UnicodeDecodeError as error:
        # A character that is cut at the end is none that is wrong.
        if len(begin) == len(content) or error.start < len(begin) - 3:
            return repr(content[:16]) + ("..." if len(content) > 16 else "")
        text = begin[: error.start].decode()
    cut = len(text) > _CHARACTERS or len(begin) < len(content)
    return repr(text[:_CHARACTERS]) + ("..." if cut else "")
