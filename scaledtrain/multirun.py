"""``scaledtrain train --multirun``: a training for each combination of values, in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from scaledtrain.command_line import read_command_line
from scaledtrain.config import check
from scaledtrain.errors import ConfigError
from scaledtrain.jobs import Job, arguments_for, hold_folder, places_for, run_jobs, was_interrupted
from scaledtrain.launching import FAILED, tell
from scaledtrain.run_dir import has_run, make_run_dir
from scaledtrain.sweeps import split_sweeps, texts

__all__ = ["multirun"]


def multirun(arguments: Sequence[str]) -> None:
    """Train as each combination says; one that fails is told, and the others go on.

    Args:
        arguments: as in ``sys.argv[1:]``, without the flag.

    Raises:
        ConfigError: nothing has several values, a combination is no config, or ``run_dir`` holds
            such runs already.
        SystemExit: a training failed; all others were made.
    """
    plain, sweeps = split_sweeps(arguments)
    given = [argument for argument in plain if not argument.startswith("run_dir=")]
    combinations = [
        [f"{sweep.get_key_element()}={text}" for sweep, text in zip(sweeps, values, strict=True)]
        for values in itertools.product(*map(texts, sweeps))
    ]
    config = None
    for combination in combinations:
        composed = read_command_line([*plain, *combination], "train", "scaledtrain train")
        if composed is None:  # it asked for help
            return
        config = check(composed)
    if not sweeps:
        raise ConfigError(
            "--multirun trains once for each combination of values, but no argument has several; "
            "write optimizer.lr=0.1,0.01 or seed=range(3)"
        )
    assert config is not None
    places = places_for(1, config.workers or 1, config.device)
    folder = make_run_dir(replace(config, name=f"{config.name}-multirun"))
    failed: list[str] = []

    def jobs() -> Iterator[Job]:
        for number, combination in enumerate(combinations):
            tell(f"[{number + 1}/{len(combinations)}] {' '.join(combination)}")
            own = [*given, *combination, *arguments_for(folder / str(number))]
            yield Job(str(number), "scaledtrain.train", own)

    def ended(job: Job, code: int) -> None:
        if was_interrupted(code):
            raise SystemExit(code if code > 0 else 128 - code)
        if code:
            failed.append(job.name)

    with hold_folder(folder) as lock:
        if config.resume is None and any(map(has_run, folder.glob("*/"))):
            raise ConfigError(
                f"run_dir {folder} holds runs already, which would be written over; give another "
                "run_dir, remove it, or go on with these (the same combinations, resume=auto)"
            )
        run_jobs(jobs(), places, ended, [lock])
    print(f"{len(combinations)} trainings: {folder}")
    if failed:
        tell(f"{len(failed)} of {len(combinations)} failed: {', '.join(failed)}")
        raise SystemExit(FAILED)
