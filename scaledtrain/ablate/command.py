"""The ablation command: the same training without one component at a time.

```
python -m scaledtrain.ablate experiment=digits_large_batch max_epochs=10
python -m scaledtrain.ablate show runs/ablate-digits_large_batch-sync
```
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from omegaconf import OmegaConf

from scaledtrain.ablate.plan import Ablation, Plan, quoted, variants
from scaledtrain.ablate.results import effects, measure, told, write_lines
from scaledtrain.command_line import compose, read_command_line
from scaledtrain.config import check
from scaledtrain.errors import ConfigError
from scaledtrain.jobs import (
    Job,
    Place,
    arguments_for,
    hold_folder,
    last_lines,
    places_for,
    run_jobs,
    was_interrupted,
)
from scaledtrain.judged import judged_by
from scaledtrain.launching import FAILED, guarded, tell
from scaledtrain.parallel.accelerate import with_accelerate
from scaledtrain.schema import parse
from scaledtrain.short_run import refuse_fast_dev_run

__all__ = ["main"]

_PROG = "scaledtrain ablate"
_PICTURE = "ablation.png"


def main() -> None:
    """Ablate as the command line says."""
    guarded(lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["show"]:
        if not arguments[1:]:
            raise ConfigError("whose runs? Write scaledtrain ablate show FOLDER")
        for shown in arguments[1:]:
            _tell(Plan.load(Path(shown)))
        return
    arguments = [quoted(argument) for argument in arguments]
    if read_command_line(with_accelerate(arguments), "ablate", _PROG) is None:
        return
    own = compose([argument for argument in arguments if argument.startswith("ablate.")], "ablate")
    asked = OmegaConf.to_container(own.ablate, resolve=True)
    ablation = parse("ablate", asked, Ablation)
    training = [argument for argument in arguments if not argument.startswith("ablate.")]
    if any(argument.startswith("seed=") for argument in training):
        raise ConfigError("each training is made with each of several seeds: set ablate.seeds")
    config = check(read_command_line(with_accelerate(training), "train", _PROG) or {})
    refuse_fast_dev_run(config.fast_dev_run, "ablate")
    metric, best_is = judged_by("ablate", ablation.metric, ablation.best_is, config.target)
    texts = variants(training, ablation)
    places = places_for(ablation.at_once, config.workers or 1, config.device)
    folder = Path(config.run_dir or f"runs/ablate-{config.name}")
    plan = Plan(folder, list(texts), list(ablation.seeds), metric, best_is)
    with hold_folder(folder) as lock:
        plan.begin(texts)
        tell(f"{len(plan.names)} x {len(plan.seeds)} trainings: {', '.join(plan.names)}")
        crashed = run(plan, places, [lock])
        _tell(plan)
    if crashed:
        tell(f"{len(crashed)} crashed: {', '.join(crashed)}; the same command makes them again")
        raise SystemExit(FAILED)


def run(plan: Plan, places: Sequence[Place], keep_open: Sequence[int] = ()) -> list[str]:
    """Make all runs that have not been made; one that crashes is told, and the others go on.

    Args:
        plan: begun.
        places: as for `run_jobs`.
        keep_open: the same.

    Returns:
        The names of those that crashed.
    """
    crashed: list[str] = []

    def jobs() -> Iterator[Job]:
        for name, seed in plan.order():
            if not plan.is_made(name, seed):
                folder = plan.run_dir(name, seed)
                path = plan.config(name)
                given = ["--config-dir", str(path.parent), "--config-name", path.stem]
                own = [f"seed={seed}", *arguments_for(folder)]
                log = folder / "log.txt"
                yield Job(folder.name, "scaledtrain.train", [*given, *own], log)

    def ended(job: Job, code: int) -> None:
        assert job.log is not None
        if was_interrupted(code):
            tell(f"{job.name}: it was interrupted; the same command makes it again")
        elif code:
            crashed.append(job.name)
            tell(f"{job.name} crashed; {job.log} ends:\n{last_lines(job.log)}")
        else:
            tell(f"{job.name}: made")
            write_lines(plan.folder, measure(plan))

    run_jobs(jobs(), places, ended, keep_open)
    return crashed


def _tell(plan: Plan) -> None:
    runs = measure(plan)
    print(told(plan, runs))
    found = effects(runs)
    if found and find_spec("matplotlib") is None:
        tell("for a picture, too: pip install 'scaledtrain[examples]'")
    elif found:
        from scaledtrain.ablate.figure import draw

        draw(plan.folder / _PICTURE, found, plan.metric)
        print(f"picture: {plan.folder / _PICTURE}")
