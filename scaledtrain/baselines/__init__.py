"""What is reached without learning much: the values that a model's are to be read against."""

from scaledtrain.baselines.measure import BaselineOptions, measure_baselines
from scaledtrain.baselines.results import (
    Baselines,
    Row,
    read_baselines,
    verdict,
    write_baselines,
)

__all__ = [
    "BaselineOptions",
    "Baselines",
    "Row",
    "measure_baselines",
    "read_baselines",
    "verdict",
    "write_baselines",
]
