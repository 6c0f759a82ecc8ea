"""The tuning command: a search among settings.

```
python -m scaledtrain.tune experiment=digits_convnet 'optimizer.lr=tag(log,interval(1e-4,0.1))'
python -m scaledtrain.tune show runs/tune-digits_convnet-sync
```
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf

from scaledtrain.command_line import compose, read_command_line
from scaledtrain.config import TrainConfig, check
from scaledtrain.errors import ConfigError
from scaledtrain.jobs import hold_folder, places_for
from scaledtrain.judged import NO_TARGET
from scaledtrain.launching import guarded, tell
from scaledtrain.parallel.accelerate import with_accelerate
from scaledtrain.schema import parse
from scaledtrain.short_run import refuse_fast_dev_run
from scaledtrain.sweeps import split_sweeps, texts
from scaledtrain.tune.settings import Asked, Tuning, require_optuna

__all__ = ["main"]

_PROG = "scaledtrain tune"


def main() -> None:
    """Search as the command line says."""
    guarded(lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["show"]:
        require_optuna()
        _show([Path(folder) for folder in arguments[1:]])
        return
    plain, sweeps = split_sweeps(arguments)
    if read_command_line(with_accelerate(plain), "tune", _PROG) is None:
        return
    require_optuna()
    own = compose([argument for argument in plain if argument.startswith("tune.")], "tune")
    tuning = parse("tune", OmegaConf.to_container(own.tune, resolve=True), Tuning)
    training = [argument for argument in plain if not argument.startswith("tune.")]
    config = _check(training, sweeps)
    refuse_fast_dev_run(config.fast_dev_run, "tune")
    _search(training, sweeps, tuning.settled(config.target), config, plain)


def _check(training: Sequence[str], sweeps: Sequence[Override]) -> TrainConfig:
    """The config of some of the values; a key or a choice that is not there is told here, once."""
    if not sweeps:
        raise ConfigError(
            "nothing is searched: give a key several values, as optimizer.lr=0.1,0.01 or "
            "'optimizer.lr=tag(log,interval(1e-4,1))'; see scaledtrain tune --help"
        )
    for sweep in sweeps:
        if sweep.key_or_group.split(".")[0] == "tune" or sweep.key_or_group == "run_dir":
            raise ConfigError(f"{sweep.key_or_group} is of the search, and has one value")
    firsts = [f"{sweep.get_key_element()}={_first(sweep)}" for sweep in sweeps]
    composed = read_command_line(with_accelerate([*training, *firsts]), "train", _PROG)
    assert composed is not None
    return check(composed)


def _first(sweep: Override) -> str:
    """One of its values."""
    values = sweep.value()
    if not isinstance(values, IntervalSweep):
        return texts(sweep)[0]
    assert values.start is not None
    assert values.end is not None
    if isinstance(values.start, int):
        return str(values.start)
    # Hardly a whole number, so that a key which has to be one is told now.
    return str(values.start + 0.37 * (values.end - values.start))


def _search(
    training: Sequence[str],
    sweeps: Sequence[Override],
    tuning: Tuning,
    config: TrainConfig,
    given: Sequence[str],
) -> None:
    import optuna

    from scaledtrain.tune.results import told
    from scaledtrain.tune.search import Search
    from scaledtrain.tune.space import Parameter, combinations
    from scaledtrain.tune.study import mend, open_study

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    points = combinations(sweeps) if tuning.sampler == "grid" else None
    space = [Parameter.of(sweep) for sweep in sweeps]
    places = places_for(tuning.at_once, config.workers or 1, config.device)
    folder = Path(config.run_dir or f"runs/tune-{config.name}")
    asked = Asked.of([*given, *(str(s.input_line) for s in sweeps)], tuning, config.eval_every)
    of_train = [a for a in training if not a.startswith(("run_dir=", "console="))]
    with hold_folder(folder) as lock:
        asked.begin(folder)
        mend(folder)
        study = open_study(folder, tuning)
        fixed = [*of_train, *NO_TARGET, "console=false"]
        search = Search(study, folder, fixed, space, points, tuning)
        search.run(places, [lock])
        print(told(study, str(tuning.metric), folder))
    tell(f"plots: scaledtrain report {folder}")


def _show(folders: Sequence[Path]) -> None:
    from scaledtrain.tune.results import told
    from scaledtrain.tune.study import open_study

    if not folders:
        raise ConfigError("whose trials? Write scaledtrain tune show FOLDER")
    for folder in folders:
        tuning = Asked.load(folder).tuning
        print(told(open_study(folder, tuning), str(tuning.metric), folder))
