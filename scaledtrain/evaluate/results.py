"""What an evaluation found, kept in the folder of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scaledtrain.disk import replace_file
from scaledtrain.errors import ConfigError
from scaledtrain.evaluate.calibration import Bin
from scaledtrain.evaluate.coverage import Threshold
from scaledtrain.tasks import Kind

__all__ = ["EVALUATION", "Calibration", "Evaluated", "read_evaluated", "write_evaluated"]

EVALUATION = "evaluation.json"  # in the folder of a run


@dataclass(frozen=True)
class Calibration:
    """Of a model that gives probabilities of classes or tokens."""

    answers: int
    accuracy: float
    mean_confidence: float
    expected_error: float
    n_bins: int
    bins: Sequence[Bin]
    curve: Sequence[Sequence[float]]
    """Rows of (confidence, coverage, accuracy), a few hundred at most."""
    thresholds: Sequence[Threshold]


@dataclass(frozen=True)
class Evaluated:
    """A checkpoint on the test data of its run."""

    checkpoint: str
    """Its name."""
    step: int
    kind: Kind
    samples: int | None
    values: Mapping[str, float]
    tables: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Metrics of several values, as nested lists: a confusion matrix has true classes as rows."""
    calibration: Calibration | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)


def write_evaluated(folder: str | Path, found: Evaluated) -> Path:
    """Write it, whole or not at all; an earlier one is replaced.

    Args:
        folder: of the run.
        found: what is written.

    Returns:
        The file.
    """
    path = Path(folder) / EVALUATION
    replace_file(path, f"{json.dumps(asdict(found), indent=1)}\n".encode())
    return path


def read_evaluated(folder: str | Path) -> Evaluated | None:
    """What is in the folder of a run; None: it was not evaluated.

    Args:
        folder: of the run.

    Raises:
        ConfigError: the file is none of these.
    """
    path = Path(folder) / EVALUATION
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        calibration = content.pop("calibration")
        if calibration is not None:
            bins = [Bin(**each) for each in calibration.pop("bins")]
            found = [Threshold(**each) for each in calibration.pop("thresholds")]
            calibration = Calibration(**calibration, bins=bins, thresholds=found)
        return Evaluated(**content, calibration=calibration)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} does not hold an evaluation ({type(error).__name__}: {error}); make it again: "
            f"python -m scaledtrain.evaluate {folder}"
        ) from error
