"""The training command: makes what a config names, and runs it.

```
python -m scaledtrain.train workers=4 strategy=async
torchrun --nproc-per-node 4 -m scaledtrain.train strategy=async
```
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import cast

from scaledtrain.build import Config, batch_sizes, build_settled, settle
from scaledtrain.callbacks import Callback
from scaledtrain.comm.protocols import Link
from scaledtrain.command_line import read_command_line
from scaledtrain.config import TrainConfig, check, to_yaml
from scaledtrain.connection import Connection, Transport, connect
from scaledtrain.environment import environment
from scaledtrain.fit_loop import FitResult
from scaledtrain.launching import Interrupted, guarded, workers_to_start
from scaledtrain.local_job import SAVE_SECONDS, UNWIND_SECONDS, start_workers
from scaledtrain.parallel.accelerate import with_accelerate
from scaledtrain.records import write_file
from scaledtrain.run_config import write_config
from scaledtrain.run_dir import RESULT, choose_run_dir
from scaledtrain.tasks import Task

__all__ = ["join", "launch", "main", "report_result", "run", "run_settled"]

_MULTIRUN = ("-m", "--multirun")


def main() -> None:
    """Train as the command line says."""
    guarded(lambda: _main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> None:
    given = [argument for argument in arguments if argument not in _MULTIRUN]
    if len(given) == len(arguments):
        launch(arguments, "scaledtrain.train")
    else:
        from scaledtrain.multirun import multirun

        multirun(given)


def launch(arguments: Sequence[str], module: str, callbacks: Sequence[Callback] = ()) -> None:
    """Train as a command line says: in this process, or in new ones for ``workers=n``.

    Args:
        arguments: of the command line.
        module: whose ``main`` calls this; new processes call it, too.
        callbacks: called beside those that the config asks for.
    """
    arguments = with_accelerate(list(arguments))
    composed = read_command_line(arguments, "train", "scaledtrain train")
    if composed is None:
        return
    config = check(composed)
    if workers := workers_to_start(config.workers):
        config.mesh.check(workers)  # rather here, once, than on every rank
        data_ranks = config.mesh.replicas(workers) * config.mesh.shard
        batch_sizes(config).local(data_ranks, config.gradient_accumulation_steps, config.elastic)
        seconds = SAVE_SECONDS if config.checkpointing is not None else UNWIND_SECONDS
        start_workers(module, arguments, workers, seconds)
        return
    with join(config) as link:
        run_dir = None if config.fast_dev_run else choose_run_dir(config, link)
        try:
            result = run(config, link, run_dir, callbacks)
        except BaseException:
            if run_dir is not None:
                with suppress(OSError):  # nothing was written: leave no empty folder
                    run_dir.rmdir()
            raise
        if link.group.rank == 0:
            report_result(result, run_dir)


def report_result(result: FitResult, run_dir: Path | None) -> None:
    """Print how a run ended, and where everything is."""
    values = "  ".join(f"{name} {value:.4f}" for name, value in result.evaluation.items())
    print(f"ended at step {result.step} after {result.seconds:.1f} s: {result.stopped_by}")
    print(f"last evaluation: {values or 'none'}")
    if run_dir is None:
        print("nothing was kept (fast_dev_run)")
    else:
        print(f"config, result, metrics and TensorBoard events: {run_dir}")


@contextmanager
def join(config: TrainConfig) -> Iterator[Connection]:
    """The connection that a config asks for.

    After an error it stays open: the ranks agree over the job's store on who tells it, and the
    process ends anyway.
    """
    link = connect(
        device=config.device,
        transport=cast(Transport, config.transport),
        timeout_seconds=config.timeout_seconds,
    )
    yield link
    link.close()


def run(
    config: Config, link: Link, run_dir: Path | None = None, callbacks: Sequence[Callback] = ()
) -> FitResult:
    """Train; every rank calls this.

    Args:
        config: as `check` takes it.
        link: to the other ranks.
        run_dir: where ``config.yaml`` (complete: it can be run again), metrics and ``result.json``
            go; None writes nothing.
        callbacks: called beside those that the config asks for.

    Raises:
        ConfigError: the config's parts do not fit each other.
        Interrupted: Ctrl-C.
    """
    return run_settled(*settle(check(config)), link, run_dir, callbacks)


def run_settled(
    config: TrainConfig,
    task: Task,
    link: Link,
    run_dir: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """As `run`, with what `settle` returned: so that many ranks of one process load data once."""
    trainer, train, test = build_settled(config, task, link, run_dir, callbacks)
    writes = run_dir is not None and link.group.rank == 0
    if run_dir is not None and writes:
        changed = write_config(run_dir, config)
        if changed is not None:
            trainer.metrics.say(changed)
    with trainer:
        try:
            result = trainer.fit(
                train,
                max_steps=config.max_steps,
                max_epochs=config.max_epochs,
                max_seconds=config.max_seconds,
                eval=test,
                eval_every=config.eval_every,
            )
        except Interrupted:  # which says what has been saved
            raise
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted at step {trainer.step_count}") from None
    if run_dir is not None and writes:
        told = {
            "result": asdict(result),
            # Of rank 0's trainable parameters at the end, in their order, as `Replica.sha256`.
            "parameters_sha256": trainer.replica.sha256() if trainer.layout.in_memory else None,
            "config_sha256": hashlib.sha256(to_yaml(config).encode()).hexdigest(),
            "data": task.facts,
            "environment": environment(link),
        }
        write_file(run_dir / RESULT, f"{json.dumps(told, indent=2)}\n")
    return result


if __name__ == "__main__":
    main()
