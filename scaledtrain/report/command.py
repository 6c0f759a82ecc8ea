"""The report command: one page about some runs.

```
python -m scaledtrain.report runs/digits-mlp-sync-... runs/digits-mlp-async-...
```
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from scaledtrain.errors import ConfigError
from scaledtrain.launching import guarded
from scaledtrain.report.page import find_runs, write_report
from scaledtrain.report.search_page import is_search, write_search_report

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report that the command line asks for."""
    guarded(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="scaledtrain report",
        description="One HTML page about one run or several side by side, which opens offline.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="the folder of a run, one that holds runs, or a search's",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="default: report.html in the folder that holds all of them"
    )
    given = parser.parse_args(arguments)
    searches = [folder for folder in given.runs if is_search(folder)]
    if searches:
        if len(given.runs) > 1:
            raise ConfigError(
                f"{searches[0]} is a search, which has a page of its own; give it alone, or the "
                "folders of runs inside its trials"
            )
        page = write_search_report(given.out or Path(searches[0]) / "report.html", searches[0])
        print(os.path.relpath(page))
        return
    folder = os.path.commonpath([run.resolve() for run in find_runs(given.runs)])
    path = write_report(given.out or Path(folder) / "report.html", given.runs)
    print(os.path.relpath(path))
