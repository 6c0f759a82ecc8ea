"""Folders of runs whose records are known to the last digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NO_STALENESS: dict[str, int] = {}


def step_record(
    *,
    step: int,
    seconds: float,
    steps: int,
    samples: int,
    samples_per_second: float,
    step_seconds: float,
    compute: float,
    waiting: float,
    staleness: dict[str, int] = NO_STALENESS,
) -> dict[str, Any]:
    """A line of metrics-rank<r>.jsonl; what is neither compute nor waiting is communication."""
    return {
        "kind": "step",
        "step": step,
        "seconds": seconds,
        "learning_rate": 0.1,
        "samples_per_second": samples_per_second,
        "step_seconds": step_seconds,
        "memory_bytes": 1,
        "loss": 0.5,
        "data_seconds": 0.0,
        "compute_seconds": compute,
        "communication_seconds": step_seconds - compute - waiting,
        "waiting_seconds": waiting,
        "evaluation_seconds": 0.0,
        "steps": steps,
        "samples": samples,
        "staleness_counts": staleness,
    }


def evaluation(seconds: float, accuracy: float) -> dict[str, Any]:
    return {"kind": "evaluation", "step": 1, "seconds": seconds, "loss": 1.0, "accuracy": accuracy}


def write(folder: Path, ranks: list[list[dict[str, Any]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for rank, lines in enumerate(ranks):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"metrics-rank{rank}.jsonl").write_text(text)
    return folder
