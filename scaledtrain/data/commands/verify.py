"""``verify``: reads everything against its checksums."""

from __future__ import annotations

import argparse
from typing import Any

from scaledtrain.data.commands.progress import progress_bar
from scaledtrain.data.sharded.manifest import Manifest
from scaledtrain.data.sharded.storage import open_folder
from scaledtrain.data.sharded.verification import verify

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    what = "read everything against its checksums; exit code 1 if something is damaged"
    parser = commands.add_parser("verify", help=what, description=what)
    parser.add_argument("folder", metavar="FOLDER", help="of the sharded data set")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    manifest = Manifest.load(open_folder(parsed.folder))
    with progress_bar(len(manifest.shards), "shard") as bar:
        damaged = verify(parsed.folder, lambda _: bar.update() and None)
    for why in damaged.values():
        print(why)
    shards = len(manifest.shards)
    unfinished = "" if manifest.complete else "; the data set is not finished"
    print(f"{parsed.folder}: {len(damaged)} of {shards} shards damaged{unfinished}")
    return 1 if damaged else 0
