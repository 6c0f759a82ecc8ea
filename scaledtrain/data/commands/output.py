"""What ``write`` and ``reshard`` share: where the shards go, and how they are written."""

from __future__ import annotations

import argparse

from scaledtrain.data.commands.progress import progress_bar
from scaledtrain.data.convert import Source, convert
from scaledtrain.data.sharded.writer import SHARD_BYTES

__all__ = ["add_output", "names", "write"]

_MIB = 2**20


def names(text: str) -> list[str]:
    """``"a,b"`` as a list."""
    return [name for name in text.split(",") if name]


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options; OUTPUT comes after the positional arguments that are there."""
    parser.add_argument("folder", metavar="OUTPUT", help="folder of the sharded data set")
    size = SHARD_BYTES // _MIB
    parser.add_argument(
        "--shard-mib", type=float, default=size, metavar="MIB", help=f"of a shard (default: {size})"
    )
    parser.add_argument("--shard-samples", type=int, metavar="N", help="at most, in a shard")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that read (default: 1)"
    )
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--resume", action="store_true", help="go on where a run was ended")
    there.add_argument("--overwrite", action="store_true", help="delete what is in OUTPUT")


def write(source: Source, parsed: argparse.Namespace) -> int:
    """Write a source as these options say, with a progress bar; returns the exit code."""
    with progress_bar(source.parts, "part") as bar:

        def on_part(parts: int, samples: int) -> None:
            bar.set_postfix_str(f"{samples:,} samples", refresh=False)
            bar.update(parts - bar.n)

        samples = convert(
            source,
            parsed.folder,
            workers=parsed.workers,
            shard_bytes=int(parsed.shard_mib * _MIB),
            shard_samples=parsed.shard_samples,
            resume=parsed.resume,
            overwrite=parsed.overwrite,
            on_part=on_part,
        )
    print(f"{parsed.folder}: {samples:,} samples")
    return 0
