"""Values of baselines: kept in the folder of a run, and what a run's own are beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scaledtrain.disk import replace_file
from scaledtrain.errors import ConfigError
from scaledtrain.tasks import Kind

__all__ = [
    "BASELINES",
    "HUMAN",
    "Baselines",
    "Row",
    "compare",
    "lower_is_better",
    "main_metric",
    "read_baselines",
    "verdict",
    "write_baselines",
]

BASELINES = "baselines.json"  # in the folder of a run
HUMAN = "human"

_LOWER = re.compile(
    r"loss|error|perplexity|entropy|deviance|divergence|distance|(^|_)(mse|rmse|mae|mape|nll|ece|"
    r"brier|ppl|wer|cer|bpb|bpc|bits_per_\w+)($|_)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Row:
    """One baseline's values."""

    name: str
    says: str
    """In words, to follow "than"."""
    values: Mapping[str, float]
    samples: int
    """That it has learnt from."""
    is_trivial: bool = False
    """It looks at no input."""
    note: str = ""


@dataclass(frozen=True)
class Baselines:
    """Those of a task, and what they are of."""

    kind: Kind
    rows: Sequence[Row]
    left_out: Mapping[str, str]
    """Name -> why."""
    train_samples: int | None
    """In the data; None: not known."""
    counted_samples: int
    test_samples: int
    seed: int
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """That they have values of, the loss first."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))


def lower_is_better(metric: str) -> bool:
    """By its name: losses and errors are better the lower they are, all else the higher.

    Example:
        >>> [lower_is_better(name) for name in ("loss", "val_mse", "wer", "f1", "auroc", "power")]
        [True, True, True, False, False, False]
    """
    return _LOWER.search(metric) is not None


def main_metric(metrics: Sequence[str]) -> str | None:
    """The one by which a result is told: the first that is not the loss, or else that."""
    return next((m for m in metrics if m != "loss"), metrics[0] if metrics else None)


def write_baselines(folder: str | Path, found: Baselines) -> Path:
    """Write them, whole or not at all; earlier ones are replaced.

    Args:
        folder: of the run; made where there is none.
        found: what is written.

    Returns:
        The file.
    """
    path = Path(folder) / BASELINES
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, f"{json.dumps(asdict(found), indent=2)}\n".encode())
    return path


def read_baselines(folder: str | Path) -> Baselines | None:
    """Those in the folder of a run; None: there are none.

    Args:
        folder: of the run.

    Raises:
        ConfigError: the file is none of theirs.
    """
    path = Path(folder) / BASELINES
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in content.pop("rows")]
        return Baselines(**content, rows=rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} does not hold baselines ({type(error).__name__}: {error}); make it again: "
            f"python -m scaledtrain.baselines {folder}"
        ) from error


def compare(found: Baselines, values: Mapping[str, float]) -> list[tuple[Row, dict[str, float]]]:
    """Each baseline, and by how much a run is better: above 0, in its metric's own unit."""
    return [
        (
            row,
            {m: _better_by(m, values[m], value) for m, value in row.values.items() if m in values},
        )
        for row in found.rows
    ]


def _better_by(metric: str, model: float, other: float) -> float:
    return other - model if lower_is_better(metric) else model - other


def verdict(found: Baselines, values: Mapping[str, float]) -> str:
    """A sentence that reads a run's values against the baselines; "" if nothing can be compared.

    Args:
        found: the baselines.
        values: of the run's evaluation.

    Example:
        >>> rows = [Row("most_frequent", "always saying 7", {"accuracy": 0.1}, 9, True),
        ...         Row("logistic_regression", "logistic regression", {"accuracy": 0.85}, 9),
        ...         Row("human", "people", {"accuracy": 0.984}, 0)]
        >>> found = Baselines("classification", rows, {}, 9, 9, 4, 0)
        >>> verdict(found, {"accuracy": 0.973})
        'By accuracy the model is 12.3 points above logistic regression and 1.1 below people.'
        >>> verdict(found, {"accuracy": 0.1})
        'By accuracy the model is not better than always saying 7 (0.1 and 0.1).'
    """
    metric = main_metric([m for m in values if any(m in row.values for row in found.rows)])
    if metric is None:
        return ""
    model = values[metric]
    there = [row for row in found.rows if metric in row.values]
    human = [row for row in there if row.name == HUMAN]
    others = sorted(
        (row for row in there if row.name != HUMAN),
        key=lambda row: _better_by(metric, row.values[metric], 0.0),
        reverse=True,
    )
    for row in others:
        # NaN, too, is not better.
        if row.is_trivial and not _better_by(metric, model, row.values[metric]) > 0:
            return (
                f"By {metric} the model is not better than {row.says} "
                f"({model:.4g} and {row.values[metric]:.4g})."
            )
    parts = [_distance(metric, model, row) for row in others[:1]]
    parts += [_distance(metric, model, row, is_short=bool(parts)) for row in human]
    return f"By {metric} the model is {' and '.join(parts)}."


def _distance(metric: str, model: float, row: Row, is_short: bool = False) -> str:
    other = row.values[metric]
    if model == other:
        return f"as good as {row.says}"
    where = "above" if model > other else "below"
    is_share = not lower_is_better(metric) and 0 <= model <= 1 and 0 <= other <= 1
    if is_share:
        number, unit = f"{100 * abs(model - other):.1f}", "" if is_short else " points"
    else:
        number, unit = f"{abs(model - other):.4g}", ""
    return f"{number}{unit} {where} {row.says}"
