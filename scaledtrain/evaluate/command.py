"""The evaluate command: what a saved run is worth.

```
python -m scaledtrain.evaluate runs/mine
torchrun --nproc-per-node 4 -m scaledtrain.evaluate runs/mine
```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from scaledtrain.baselines.results import read_baselines, verdict
from scaledtrain.checkpoint.export import checkpoints_at, run_of
from scaledtrain.command_line import only_run, read_command_line, runs_and_settings
from scaledtrain.connection import Transport, connect
from scaledtrain.evaluate.measure import EvaluateConfig, evaluate_run
from scaledtrain.evaluate.results import Evaluated, write_evaluated
from scaledtrain.launching import guarded
from scaledtrain.schema import parse

__all__ = ["main", "to_text"]

_PROG = "scaledtrain evaluate"


def main() -> None:
    """Evaluate the run that the command line names."""
    guarded(lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    runs, settings = runs_and_settings(arguments)
    composed: Any = read_command_line(settings, "evaluate", _PROG)
    if composed is None:
        return
    options = parse("", OmegaConf.to_container(composed, resolve=True), EvaluateConfig)
    run = Path(only_run(runs, _PROG))
    there = checkpoints_at(run)  # rather here than once all ranks have met
    link = connect(
        device=options.device,
        transport=cast(Transport, options.transport),
        timeout_seconds=options.timeout_seconds,
    )
    found = evaluate_run(run, options, link)
    if link.group.rank == 0:
        folder = run_of(there[-1].path, run)
        print(to_text(found))
        print(write_evaluated(folder, found))
        baselines = read_baselines(folder)  # last: it may be damaged
        if baselines is not None and (said := verdict(baselines, found.values)):
            print(said)
    link.close()


def to_text(found: Evaluated) -> str:
    """The numbers, for people to read."""
    of = "" if found.samples is None else f", {found.samples:,} test samples"
    lines = [f"{found.checkpoint}{of}"]
    width = max(map(len, [*found.values, *found.tables])) + 2
    lines += [f"{name:<{width}}{value:.4f}" for name, value in found.values.items()]
    lines += [f"{name:<{width}}{_shape(table)} values" for name, table in found.tables.items()]
    calibration = found.calibration
    if calibration is not None:
        lines.append(
            f"calibration: it says {calibration.mean_confidence:.1%} and is right in "
            f"{calibration.accuracy:.1%}; expected calibration error "
            f"{calibration.expected_error:.4f} ({calibration.n_bins} bins)"
        )
        lines += [str(threshold) for threshold in calibration.thresholds]
    return "\n".join(lines)


def _shape(table: Any) -> str:
    sizes = []
    while isinstance(table, list):
        sizes.append(str(len(table)))
        table = table[0] if table else None
    return " x ".join(sizes)
