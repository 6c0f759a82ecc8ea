"""Metrics that a config names, as those of torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scaledtrain.errors import ConfigError
from scaledtrain.measures import Accumulator, Metric
from scaledtrain.schema import Node, complete, make

__all__ = ["classes_in", "make_metrics"]


def classes_in(sizes: Mapping[str, Any]) -> int | None:
    """How many classes, or tokens, there are; None: nobody says."""
    names = ("n_classes", "vocab_size", "out_features")
    return next((sizes[name] for name in names if isinstance(sizes.get(name), int)), None)


def make_metrics(nodes: Mapping[str, Node], sizes: Mapping[str, Any]) -> dict[str, Metric]:
    """Make them, with ``num_classes`` and the like from what is known of the data.

    Args:
        nodes: name -> what makes it.
        sizes: what is known, by the names that models have for it.

    Raises:
        ConfigError: one lacks an argument that nobody knows, or is no metric.
    """
    n_classes = classes_in(sizes)
    known = dict(sizes) if n_classes is None else {**sizes, "num_classes": n_classes}
    made: dict[str, Metric] = {}
    for name, node in nodes.items():
        if name == "loss":
            raise ConfigError("eval_metrics has a 'loss', which every evaluation has; rename it")
        whole, lacking = complete(node, known)
        if lacking and not node.get("_partial_", False):  # a function gets them of each batch
            raise ConfigError(
                f"eval_metrics.{name} needs {' and '.join(lacking)}, which the data do not say; "
                f"set eval_metrics.{name}.{lacking[0]}=..., or, if it is a function of outputs and "
                f"targets, eval_metrics.{name}._partial_=true"
            )
        try:
            metric = make(whole)
        except (ValueError, ModuleNotFoundError) as error:  # as torchmetrics refuses arguments
            raise ConfigError(f"eval_metrics.{name}: {error}") from error
        if not isinstance(metric, Accumulator) and not callable(metric):
            raise ConfigError(
                f"eval_metrics.{name} names {node['_target_']!r}, which made a "
                f"{type(metric).__name__}; it must make a metric of torchmetrics, or a function of "
                "outputs and targets"
            )
        made[name] = metric
    return made
