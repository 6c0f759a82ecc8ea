"""The comparison command: the same training with several strategies, one after the other.

```
torchrun --standalone --nproc-per-node 4 -m scaledtrain.compare
python -m scaledtrain.compare 'strategies=[sync,"async optimizer.lr=0.3"]' max_seconds=30
```

Every strategy starts from the same parameters and trains for the same time, in the same processes.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import fill
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from scaledtrain.callbacks import Callback
from scaledtrain.command_line import read_command_line
from scaledtrain.config import Target, TrainConfig, check
from scaledtrain.connection import Connection
from scaledtrain.environment import environment
from scaledtrain.errors import ConfigError
from scaledtrain.launching import guarded, workers_to_start
from scaledtrain.local_job import start_workers
from scaledtrain.report.comparison import Comparison, report
from scaledtrain.report.picture import require_matplotlib
from scaledtrain.report.summary import Goal
from scaledtrain.run_dir import choose_run_dir, has_run
from scaledtrain.schedule import Slowdown
from scaledtrain.short_run import refuse_fast_dev_run
from scaledtrain.train import join, run
from scaledtrain.trainer import Trainer

__all__ = ["main"]

_PROG = "scaledtrain compare"
# What one connection, one folder and a fair comparison ask for.
_SHARED = (
    "workers",
    "device",
    "transport",
    "timeout_seconds",
    "run_dir",
    "name",
    "max_seconds",
    "slowdown",
    "target",
)
_LINE_SECONDS = 5.0  # between two lines of progress where there is no terminal


def main() -> None:
    """Compare as the command line says."""
    guarded(_main)


def _main() -> None:
    arguments = sys.argv[1:]
    if read_command_line(arguments, "compare", _PROG) is None:
        return
    configs = compose_each(arguments)
    first = next(iter(configs.values()))
    refuse_fast_dev_run(first.fast_dev_run, "compare")
    goal = _goal(first.target)
    require_matplotlib()
    if workers := workers_to_start(first.workers):
        start_workers("scaledtrain.compare", arguments, workers)
        return
    with join(first) as link:
        folder = choose_run_dir(first, link)
        compare(configs, goal, link, folder)
        if link.group.rank == 0:
            print(f"\n{report(folder)}")


def compose_each(arguments: Sequence[str]) -> dict[str, TrainConfig]:
    """Name -> config of each strategy that a command line asks for.

    An entry of ``strategies`` is a choice of the group ``strategy``, with further settings behind
    it: ``async optimizer.lr=0.3``. It is composed as if it stood at the end of the command line.
    Its name is the choice, if no other entry has the same, else all of it.

    Args:
        arguments: as in ``sys.argv[1:]``, without ``--help`` and ``--cfg``.

    Raises:
        ConfigError: no list of strategies, two alike, or one whose config is wrong.
    """
    composed: Any = read_command_line(arguments, "compare", _PROG)
    if any(argument.startswith("strategy=") for argument in arguments):
        raise ConfigError("a comparison has several strategies: write strategies=[sync,async]")
    plain: Any = OmegaConf.to_container(composed)
    entries = plain["strategies"]
    if (
        not isinstance(entries, list)
        or not entries
        or not all(isinstance(e, str) and e.strip() for e in entries)
    ):
        raise ConfigError(
            f"strategies is {entries!r}; it is a list of choices of strategy, each with settings "
            "of its own if need be: strategies=[sync,'async optimizer.lr=0.3']"
        )
    if len(set(entries)) < len(entries):
        raise ConfigError(f"strategies has an entry twice: {', '.join(entries)}; leave one out")
    configs = {}
    choices = [entry.split(maxsplit=1)[0] for entry in entries]
    for entry, choice in zip(entries, choices, strict=True):
        settings = shlex.split(entry)[1:]
        own: Any = read_command_line(
            [*arguments, f"strategy={choice}", *settings], "compare", _PROG
        )
        del own["strategies"]
        config = check(own)
        if config.max_seconds is None:
            raise ConfigError(
                "max_seconds is null, but every strategy is to train for the same time; set it"
            )
        configs[entry if choices.count(choice) > 1 else choice] = config
    first, *others = configs.values()
    for key in _SHARED:
        if any(getattr(config, key) != getattr(first, key) for config in others):
            raise ConfigError(
                f"{key} differs between the strategies, but they are compared under the same "
                "conditions; set it for all"
            )
    if len(set(_places(configs).values())) < len(configs):
        raise ConfigError(f"entries of strategies are too alike: {', '.join(configs)}")
    return configs


def _places(names: Iterable[str]) -> dict[str, str]:
    """Name -> folder of each run."""
    return {name: re.sub(r"[^\w.=-]+", "-", name) for name in names}


def _goal(target: Target) -> Goal:
    values = [v for v in (target.at_least, target.at_most) if v is not None]
    if target.metric is None or len(values) != 1:
        raise ConfigError(
            "strategies are compared by the time to a target: set target.metric and one of "
            "target.at_least and target.at_most"
        )
    return Goal(target.metric, values[0], at_most=target.at_most is not None)


def compare(configs: Mapping[str, TrainConfig], goal: Goal, link: Connection, folder: Path) -> None:
    """Train with each config; every rank calls this.

    Args:
        configs: name -> config of the run.
        goal: the time to it is compared; it ends no run.
        link: to the other ranks.
        folder: where ``comparison.json`` and a folder of each run go.

    A crash loses the run that was under way; those before it can be reported.
    """
    first = next(iter(configs.values()))
    places = _places(configs)
    total = sum(config.max_seconds or 0.0 for config in configs.values())
    note = _note(first.slowdown, link.group.size)
    with _Progress(total, enabled=link.group.rank == 0) as progress:
        if link.group.rank == 0:
            for place in places.values():
                _check_empty(folder / place)
            progress.say(f"{', '.join(configs)}: {total:g} s of training\n{fill(note, 100)}")
            Comparison(
                goal,
                runs=places,
                note=note,
                configs={name: asdict(config) for name, config in configs.items()},
                environment=environment(link),
            ).save(folder)
        for name, config in configs.items():
            progress.begin(name)
            config = replace(config, target=Target())
            run(config, link, folder / places[name], callbacks=[progress])


def _check_empty(folder: Path) -> None:
    if has_run(folder):
        raise ConfigError(f"{folder} holds a run already; give another run_dir, or remove it")


def _note(slowdown: Slowdown, workers: int) -> str:
    """What is pretended."""
    slow = {rank: f for rank, f in slowdown.factors.items() if rank < workers and f > 1}
    text = "".join(f"; worker {rank} is made {f:g} times slower" for rank, f in slow.items())
    if slowdown.gamma_shape is not None:
        text += (
            f"; the time of each step varies (gamma distributed, shape {slowdown.gamma_shape:g})"
        )
    if not text and not slowdown.min_compute_seconds:
        return f"{workers} workers on {os.cpu_count()} cores."
    if not slowdown.min_compute_seconds:
        return f"{workers} workers on {os.cpu_count()} cores{text}, by sleeping."
    return (
        f"{workers} workers on {os.cpu_count()} cores{text}. Each step is made to compute for at "
        f"least {1000 * slowdown.min_compute_seconds:g} ms by sleeping: processes, messages and "
        "gradients are real, the time of the devices is pretended."
    )


class _Progress(Callback):
    """Seconds of training over all runs, on one rank: a bar, or plain lines without a terminal."""

    def __init__(self, total: float, enabled: bool) -> None:
        self._total = total
        self._enabled = enabled
        self._name = ""
        self._before = self._now = 0.0
        self._line = _LINE_SECONDS
        self._text = ""
        self._bar: tqdm[Any] | None = None
        if enabled and sys.stderr.isatty():
            form = "{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
            self._bar = tqdm(total=total, bar_format=form, dynamic_ncols=True, leave=False)

    def begin(self, name: str) -> None:
        """The next run begins."""
        self._name, self._before, self._text = name, self._now, ""

    def say(self, text: str) -> None:
        """Write a line that stays."""
        tqdm.write(text, file=sys.stderr)

    def on_step_end(self, trainer: Trainer) -> None:
        """Move the bar."""
        if not self._enabled:
            return
        self._now = min(self._total, self._before + trainer.metrics.seconds)
        if self._bar is not None:
            self._bar.set_description_str(f"{self._name} ", refresh=False)
            self._bar.set_postfix_str(self._text, refresh=False)
            self._bar.update(self._now - self._bar.n)
        elif self._now >= self._line:
            self._line = self._now + _LINE_SECONDS
            self.say(f"{self._now:.0f}/{self._total:.0f} s  {self._name}  {self._text}")

    def on_evaluation(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Show the values beside the bar."""
        self._text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    main()
