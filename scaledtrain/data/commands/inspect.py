"""``inspect``: what a data set holds."""

from __future__ import annotations

import argparse
from typing import Any

from scaledtrain.data.commands.stats import lines_of
from scaledtrain.data.convert import class_names
from scaledtrain.data.sharded import Column
from scaledtrain.data.sharded.manifest import Manifest
from scaledtrain.data.sharded.storage import open_folder

__all__ = ["add"]

_MOST_CLASSES = 8


def add(commands: Any) -> None:
    """Add the command."""
    what = "say what a sharded data set holds"
    parser = commands.add_parser("inspect", help=what, description=what)
    parser.add_argument("folder", metavar="FOLDER", help="of the sharded data set")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    manifest = Manifest.load(open_folder(parsed.folder))
    sizes = [shard.bytes for shard in manifest.shards]
    samples = [shard.samples for shard in manifest.shards]
    print(f"{parsed.folder}: {'complete' if manifest.complete else 'not finished'}")
    print(f"samples  {manifest.samples:,}")
    print(f"bytes    {sum(sizes):,} ({sum(sizes) / 2**20:,.1f} MiB)")
    spread = f", of {min(samples):,} to {max(samples):,} samples" if len(samples) > 1 else ""
    print(f"shards   {len(sizes):,}{spread}")
    classes = class_names(parsed.folder)
    width = max(map(len, manifest.columns), default=0)
    print("columns")
    for name, column in manifest.columns.items():
        print(f"  {name:<{width}}  {_kind(column)}{_classes(classes.get(name, []))}")
    if (statistics := manifest.statistics) is not None:
        print(f"statistics{', of fewer samples than there are now' if manifest.stale else ''}")
        for name, found in statistics.columns.items():
            for line in lines_of(name, found):
                print(f"  {line}")
    return 0


def _kind(column: Column) -> str:
    dims = [*(["length"] if column.ragged else []), *map(str, column.shape)]
    return f"{column.dtype} [{', '.join(dims)}]" if dims else column.dtype


def _classes(found: list[str]) -> str:
    if not found:
        return ""
    more = ", ..." if len(found) > _MOST_CLASSES else ""
    return f"  {len(found)} classes: {', '.join(found[:_MOST_CLASSES])}{more}"
