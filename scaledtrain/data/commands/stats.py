"""``stats``: computes statistics, stores them in the manifest, and says what they are."""

from __future__ import annotations

import argparse
from typing import Any

from scaledtrain.data.commands.progress import progress_bar
from scaledtrain.data.sharded.compute_statistics import compute_statistics
from scaledtrain.data.sharded.manifest import Manifest
from scaledtrain.data.sharded.statistics import ColumnStatistics
from scaledtrain.data.sharded.storage import open_folder

__all__ = ["add", "lines_of"]

_MOST = 8  # features, or classes, that are shown of a column


def add(commands: Any) -> None:
    """Add the command."""
    what = "compute statistics of columns, and store them in the manifest"
    parser = commands.add_parser("stats", help=what, description=what)
    parser.add_argument("folder", metavar="FOLDER", help="of the sharded data set")
    parser.add_argument("--columns", nargs="+", metavar="COLUMN", help="which; default: all")
    parser.add_argument(
        "--axis",
        nargs="*",
        type=int,
        default=[0],
        metavar="DIM",
        help="dims of a sample's value each of whose indices is a feature; default 0 (channels "
        "that are first); none: one for the whole column",
    )
    parser.add_argument("--bins", type=int, default=64, help="of the histograms; 0: none")
    parser.add_argument(
        "--covariance", nargs="+", default=[], metavar="COLUMN", help="to whiten these columns"
    )
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="COLUMN", help="count each value of these"
    )
    parser.add_argument(
        "--missing",
        choices=["raise", "ignore"],
        default="raise",
        help="whether NaN is an error, or counted and left out",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that read; 0: this one")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    shards = len(Manifest.load(open_folder(parsed.folder)).shards)
    with progress_bar(shards, "shard") as bar:
        found = compute_statistics(
            parsed.folder,
            parsed.columns,
            axis=tuple(parsed.axis) or None,
            bins=parsed.bins,
            covariance=parsed.covariance,
            classes=parsed.classes,
            missing=parsed.missing,
            workers=parsed.workers,
            on_shard=lambda done, _: _show(bar, done),
        )
    for name in found.columns:
        for line in lines_of(name, found[name]):
            print(line)
    return 0


def _show(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def lines_of(name: str, found: ColumnStatistics) -> list[str]:
    """What a person wants to see of a column's statistics: a line for each of some features."""
    lines = []
    values = zip(
        found.mean.ravel(),
        found.std.ravel(),
        found.minimum.ravel(),
        found.maximum.ravel(),
        strict=True,
    )
    for index, (mean, std, least, most) in enumerate(values):
        if index == _MOST:
            lines.append(f"{name}  ... of {found.mean.size} features")
            break
        feature = f"{name}[{index}]" if found.mean.size > 1 else name
        lines.append(f"{feature}  mean {mean:.6g}  std {std:.6g}  from {least:.6g} to {most:.6g}")
    if missing := int(found.missing.sum()):
        lines.append(f"{name}  {missing:,} values are missing")
    if found.class_counts is not None:
        counts = [f"{value}: {count:,}" for value, count in found.class_counts.items()]
        more = ", ..." if len(counts) > _MOST else ""
        lines.append(f"{name}  {len(counts)} classes: {', '.join(counts[:_MOST])}{more}")
    return lines
