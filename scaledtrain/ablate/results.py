"""What an ablation found: paired differences over the seeds, as a table and in sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scaledtrain.ablate.interval import Interval
from scaledtrain.ablate.plan import FULL, Plan
from scaledtrain.disk import replace_file
from scaledtrain.report.runs import read_run
from scaledtrain.run_dir import RESULT

__all__ = ["LINES", "Effect", "Measured", "effects", "measure", "told", "write_lines"]

LINES = "ablation.jsonl"
MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """A run that came to its end.

    Args:
        without: the component that it was made without; `FULL`: with all.
        seed: of the run.
        quality: the metric in the last evaluation; None: there was none, or it was not finite.
        samples_per_second: of all ranks, over the run.
        memory_bytes: peak of the rank that had most.
        seconds: of the training.
    """

    without: str
    seed: int
    quality: float | None
    samples_per_second: float
    memory_bytes: float
    seconds: float


@dataclass(frozen=True)
class Effect:
    """What taking a component away changes.

    Args:
        without: its name.
        seeds: how many pairs of runs.
        quality: difference of the metric; None: no pair has it.
        speed: of samples a second, in percent of the full training's.
        memory: difference of the peaks, in MiB.
    """

    without: str
    seeds: int
    quality: Interval | None
    speed: Interval
    memory: Interval


def measure(plan: Plan) -> list[Measured]:
    """All runs that have come to their end, in the order in which they are made."""
    return [_measured(plan, *run) for run in plan.order() if plan.is_made(*run)]


def _measured(plan: Plan, name: str, seed: int) -> Measured:
    folder = plan.run_dir(name, seed)
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))["result"]
    quality = result["evaluation"].get(plan.metric)
    log = read_run(folder)
    peaks = [interval.memory_bytes for worker in log.workers for interval in worker.intervals]
    return Measured(
        without=name,
        seed=seed,
        quality=quality if quality is not None and math.isfinite(quality) else None,
        samples_per_second=log.samples_per_second,
        memory_bytes=max(peaks),
        seconds=result["seconds"],
    )


def effects(runs: Sequence[Measured]) -> list[Effect]:
    """Of each component: the differences to the full training of the same seed, their mean."""
    full = {run.seed: run for run in runs if run.without == FULL}
    found = []
    for name in dict.fromkeys(run.without for run in runs if run.without != FULL):
        pairs = [(run, full[run.seed]) for run in runs if run.without == name and run.seed in full]
        if not pairs:
            continue
        qualities = [
            a.quality - b.quality
            for a, b in pairs
            if a.quality is not None and b.quality is not None
        ]
        speeds = [100 * (a.samples_per_second / b.samples_per_second - 1) for a, b in pairs]
        found.append(
            Effect(
                without=name,
                seeds=len(pairs),
                quality=Interval.of(qualities) if qualities else None,
                speed=Interval.of(speeds),
                memory=Interval.of([(a.memory_bytes - b.memory_bytes) / MIB for a, b in pairs]),
            )
        )
    return found


def told(plan: Plan, runs: Sequence[Measured]) -> str:
    """The table, and a sentence for each component."""
    full = [run for run in runs if run.without == FULL]
    if not full:
        return "no training with all components has come to its end yet"
    qualities = [run.quality for run in full if run.quality is not None]
    quality = f"{sum(qualities) / len(qualities):.4f}" if qualities else "-"
    speed = sum(run.samples_per_second for run in full) / len(full)
    memory = sum(run.memory_bytes for run in full) / len(full) / MIB
    table = [["without", plan.metric, "samples/s", "peak memory", "seeds"]]
    table += [["(nothing)", quality, f"{speed:,.0f}", f"{memory:,.0f} MiB", str(len(full))]]
    found = effects(runs)
    for effect in found:
        table.append(
            [
                effect.without,
                "-" if effect.quality is None else _shown(effect.quality, ".4f"),
                _shown(effect.speed, ".1f", " %"),
                _shown(effect.memory, ".1f", " MiB"),
                str(effect.seeds),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table
    ]
    lines.insert(1, "-" * len(lines[0]))
    notes = [f"{effect.without}: {sentence(effect, plan)}" for effect in found]
    told_of = {FULL, *(effect.without for effect in found)}
    notes += [
        f"{name}: no pair of runs has come to its end" for name in plan.names if name not in told_of
    ]
    return "\n".join([*lines, "", *notes])


def _shown(interval: Interval, form: str, unit: str = "") -> str:
    bar = "?" if math.isinf(interval.half_width) else f"{interval.half_width:{form}}"
    return f"{interval.mean:+{form}}{unit} ± {bar}"


def sentence(effect: Effect, plan: Plan) -> str:
    """What a component is worth, in words."""
    if effect.seeds == 1:
        return "one seed gives no error bar; more seeds do: ablate.seeds=[0,1,2]"
    sign = 1 if plan.best_is == "highest" else -1
    said = []
    if effect.quality is not None:
        better = sign * effect.quality.mean < 0  # without it is worse
        words = "is good for" if better else "harms"
        said.append((effect.quality, f"{words} {plan.metric}", plan.metric))
    slower = effect.speed.mean > 0  # without it is faster
    said.append((effect.speed, "costs speed" if slower else "is good for speed", "speed"))
    more = effect.memory.mean < 0  # without it needs less
    said.append((effect.memory, "costs memory" if more else "saves memory", "memory"))
    clear = [words for interval, words, _ in said if not interval.holds_zero]
    unclear = [name for interval, _, name in said if interval.holds_zero]
    if unclear:
        clear.append(f"not distinguishable in {' and '.join(unclear)}")
    return "; ".join(clear)


def write_lines(folder: Path, runs: Sequence[Measured]) -> None:
    """A JSON line for each run, whole or as it was."""
    text = "".join(json.dumps(asdict(run)) + "\n" for run in runs)
    replace_file(folder / LINES, text.encode())
