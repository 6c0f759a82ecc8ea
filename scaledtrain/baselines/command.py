"""The baselines command: what is reached without learning much, on the data of a training.

```
python -m scaledtrain.baselines experiment=digits_mlp
python -m scaledtrain.baselines runs/mine baselines.human=0.98
```
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scaledtrain.baselines.measure import BaselineOptions, measure_baselines
from scaledtrain.baselines.results import write_baselines
from scaledtrain.baselines.table import to_text
from scaledtrain.build import settle
from scaledtrain.command_line import read_command_line, runs_and_settings
from scaledtrain.config import TrainConfig, check
from scaledtrain.errors import ConfigError
from scaledtrain.launching import guarded
from scaledtrain.report.runs import read_run
from scaledtrain.run_config import load_config
from scaledtrain.schema import parse

__all__ = ["main"]

_PROG = "scaledtrain baselines"


def main() -> None:
    """Measure the baselines that the command line asks for."""
    guarded(lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    runs, settings = runs_and_settings(arguments)
    composed: Any = read_command_line(settings, "baselines", _PROG)
    if composed is None:
        return
    own: Any = OmegaConf.to_container(composed.baselines, resolve=True)
    options: BaselineOptions = parse("baselines", own, BaselineOptions)
    del composed["baselines"]
    run_dir: Path | None = None
    if runs:
        run_dir = _only_run(runs, settings)
        config = load_config(run_dir)
    else:
        config = check(composed)
        run_dir = None if config.run_dir is None else Path(config.run_dir)
    config, task = settle(config)
    found = measure_baselines(task, options, sizes=_numbers(config), seed=config.seed)
    values = {} if run_dir is None else _last_evaluation(run_dir)
    print(to_text(found, values))
    if run_dir is not None:
        print(write_baselines(run_dir, found))


def _only_run(runs: Sequence[str], settings: Sequence[str]) -> Path:
    if len(runs) > 1:
        raise ConfigError(f"{len(runs)} runs were given; give one at a time")
    for setting in settings:
        if "=" in setting and not setting.startswith("baselines."):
            raise ConfigError(
                f"{setting} is given with {runs[0]}, whose own config says what its data are; "
                "beside a run give baselines.KEY=VALUE only"
            )
    return Path(runs[0])


def _numbers(config: TrainConfig) -> Mapping[str, int]:
    """What the model knows of its sizes."""
    return {key: value for key, value in config.model.items() if isinstance(value, int)}


def _last_evaluation(run_dir: Path) -> Mapping[str, float]:
    """None of a run that has not begun, or made no record yet."""
    try:
        evaluations = read_run(run_dir).evaluations
    except ConfigError:
        return {}
    return evaluations[-1].values if evaluations else {}
