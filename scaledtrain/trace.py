"""The trace command: what each rank did when, for viewers, as a picture, as a page.

```
python -m scaledtrain.trace runs/digits-mlp-async-... ranks=[0,1] to_seconds=2
```
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from scaledtrain.command_line import read_command_line
from scaledtrain.errors import ConfigError
from scaledtrain.launching import guarded
from scaledtrain.parallel.pipeline import draw_pipeline, planned_and_measured
from scaledtrain.report.chrome import write_chrome_trace
from scaledtrain.report.gantt import MAX_RANKS, draw_gantt, readable_window
from scaledtrain.report.picture import require_matplotlib
from scaledtrain.report.timeline_page import write_timeline_page
from scaledtrain.report.traces import Window, find_trace
from scaledtrain.schema import parse

__all__ = ["TraceConfig", "main", "show"]

_PROG = "scaledtrain trace"
_File = Literal["trace.json", "gantt.png", "timeline.html", "pipeline.png"]


@dataclass(frozen=True)
class TraceConfig:
    """What is shown of the runs; ``configs/trace.yaml`` says what each key means."""

    ranks: Sequence[int] | None
    from_seconds: float | None
    to_seconds: float | None
    out_dir: str | None
    files: Sequence[_File]

    def __post_init__(self) -> None:
        start = self.from_seconds or 0.0
        if self.to_seconds is not None and self.to_seconds <= start:
            raise ConfigError(
                f"to_seconds is {self.to_seconds:g}, which is not after from_seconds, {start:g}; "
                "nothing lies between them"
            )
        if self.ranks is not None and not self.ranks:
            raise ConfigError("ranks is [], so there is nothing to show; leave it out to show all")


def main() -> None:
    """Show what the command line asks for."""
    guarded(_main)


def _main() -> None:
    # The folder of a run may have a = in its name: those of a comparison do.
    runs = [a for a in sys.argv[1:] if Path(a).is_dir() or not (a.startswith("-") or "=" in a)]
    settings = [argument for argument in sys.argv[1:] if argument not in runs]
    config: Any = read_command_line(settings, "trace", _PROG)
    if config is None:
        return
    parsed = parse("", OmegaConf.to_container(config, resolve=True), TraceConfig)
    for path in show(runs, parsed):
        print(os.path.relpath(path))


def show(runs: Sequence[str | Path], config: TraceConfig) -> list[Path]:
    """Make the files.

    Args:
        runs: folders of runs that were traced.
        config: what of them.

    Returns:
        The files that were made.

    Raises:
        ConfigError: there is no run, one has no trace, matplotlib is missing for a picture, or
            there is no pipeline for that of one.
    """
    if not runs:
        raise ConfigError(f"no run was given; write {_PROG} RUN, where RUN is the folder of a run")
    if {"gantt.png", "pipeline.png"} & {*config.files}:
        require_matplotlib()
    traces = [find_trace(run) for run in runs]
    if config.ranks is not None:
        traces = [trace.only(config.ranks) for trace in traces]
        few = traces
    else:
        few = [trace.only([*trace.paths][:MAX_RANKS]) for trace in traces]
    start, end = config.from_seconds, config.to_seconds
    window = Window(start or 0.0, float("inf") if end is None else end)
    folder = Path(config.out_dir or os.path.commonpath([Path(run).resolve() for run in runs]))
    folder.mkdir(parents=True, exist_ok=True)
    for name in config.files:
        if name == "trace.json":
            write_chrome_trace(folder / name, traces, window)
        elif name == "gantt.png":
            windows = [readable_window(trace, start, end) for trace in few]
            draw_gantt(folder / name, few, windows)
        elif name == "pipeline.png":
            tables = [t for trace in traces for t in planned_and_measured(trace, window)]
            draw_pipeline(folder / name, tables)
        else:
            write_timeline_page(folder / name, few, window)
    return [folder / name for name in config.files]


if __name__ == "__main__":
    main()
