"""Evaluates a saved run on its test data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from scaledtrain.build import batch_sizes, settle
from scaledtrain.checkpoint.export import newest_intact, run_of
from scaledtrain.checkpoint.folder import Manifest
from scaledtrain.checkpoint.weights import load_weights
from scaledtrain.comm.protocols import Link
from scaledtrain.command_line import compose
from scaledtrain.data.loaders import known_length
from scaledtrain.data.replica_loader import first_batch
from scaledtrain.environment import environment
from scaledtrain.errors import ConfigError
from scaledtrain.eval_metrics import classes_in, make_metrics
from scaledtrain.evaluate.calibration import expected_calibration_error, reliability
from scaledtrain.evaluate.coverage import coverage_curve, thresholds
from scaledtrain.evaluate.results import Calibration, Evaluated
from scaledtrain.run_config import load_config
from scaledtrain.schema import Kind as NodeKind
from scaledtrain.schema import Node, make, parse
from scaledtrain.tasks import Kind, Task, kind_of
from scaledtrain.trainer import Trainer

__all__ = ["EvaluateConfig", "calibrate", "evaluate_run"]

_logger = logging.getLogger(__name__)

_MAX_ROWS = 300  # of a curve
_CONFIDENCES = "confidences"
_MATRIX = "confusion_matrix"
_LARGEST_MATRIX = 100  # classes

Nodes = Mapping[str, Annotated[Node, NodeKind(incomplete=True)]]


@dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated how; ``configs/evaluate.yaml`` says what the keys mean."""

    eval_metrics: Nodes = field(default_factory=dict)
    accuracies: Sequence[float] = (0.95, 0.99)
    n_bins: int = 15
    batch_size: int | None = None
    device: str | None = None
    transport: str = "auto"
    timeout_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("n_bins", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it is >= 1")
        for share in self.accuracies:
            if not 0 < share <= 1:
                raise ConfigError(f"accuracies has {share}; each is a share, above 0, at most 1")


def evaluate_run(run: str | Path, options: EvaluateConfig, link: Link) -> Evaluated:
    """Evaluate the newest intact checkpoint of a run, or one checkpoint. All ranks call it.

    The ranks share the test data; each has a whole model, in the precision that the run had,
    whatever its layout was.

    Args:
        run: the folder of a run, or of a checkpoint in it.
        options: what to evaluate.
        link: to the other ranks.

    Raises:
        ConfigError: there is no checkpoint, no config, or nothing to evaluate on.
        CheckpointError: all checkpoints are damaged.
    """
    if find_spec("torchmetrics") is None:
        raise ConfigError(
            "evaluating needs torchmetrics, which is not installed here: "
            "pip install 'scaledtrain[evaluate]'"
        )
    checkpoint = newest_intact(Path(run))
    config, task = settle(load_config(run_of(checkpoint, Path(run))))
    sizes = batch_sizes(config)
    size = options.batch_size or sizes.eval_batch_size or sizes.local_batch_size or 32
    loader = task.test_loader(size)
    if loader is None:
        raise ConfigError(
            "the run has no data to evaluate on; set data.test_path in its config.yaml"
        )
    kind = kind_of(first_batch(loader))
    model = make(config.model)
    load_weights(model, checkpoint)
    with Trainer(
        model,
        task.loss_fn,
        partial(torch.optim.SGD, lr=0.0),  # a Trainer has one
        precision=config.precision,
        seed=config.seed,
        console=False,
        link=link,
    ) as trainer:
        found = trainer.measure(loader, _metrics(task, kind, config.model, options))
    calibration = None
    if _CONFIDENCES in found:
        confidence, right = found.pop(_CONFIDENCES).cpu()
        if len(confidence):  # else there are no classes, as of one logit
            calibration = calibrate(confidence, right, options)
    return Evaluated(
        checkpoint=checkpoint.absolute().name,
        step=Manifest.read(checkpoint).step,
        kind=kind,
        samples=known_length(task.test),
        values={name: value.item() for name, value in found.items() if value.numel() == 1},
        tables={name: value.tolist() for name, value in found.items() if value.numel() != 1},
        calibration=calibration,
        environment=environment(link),
    )


def _metrics(task: Task, kind: Kind, model: Node, options: EvaluateConfig) -> dict[str, Any]:
    from scaledtrain.evaluate.confidence import Confidences

    sizes = {**task.sizes, **{k: v for k, v in model.items() if isinstance(v, int)}}
    metrics: dict[str, Any] = dict(task.metrics)
    n_classes = classes_in(sizes)
    usual = {} if kind == "classification" and (n_classes or 1) < 2 else _usual(kind)
    if kind == "classification" and n_classes is None:
        _logger.warning(
            "neither data nor model say how many classes there are, so there is no F1, AUROC or "
            "confusion matrix; for N classes give eval_metrics=classification "
            "eval_metrics.f1.num_classes=N eval_metrics.auroc.num_classes=N"
        )
    # What the run itself evaluates by a name stays: its arguments may be others than usual.
    usual = {name: node for name, node in usual.items() if name not in task.metrics}
    metrics |= make_metrics({**usual, **options.eval_metrics}, sizes)
    if kind != "regression":
        metrics[_CONFIDENCES] = Confidences()
    if kind == "classification" and n_classes is not None and 2 <= n_classes <= _LARGEST_MATRIX:
        from torchmetrics.classification import MulticlassConfusionMatrix

        metrics.setdefault(_MATRIX, MulticlassConfusionMatrix(n_classes))
    return metrics


def _usual(kind: Kind) -> Nodes:
    composed = compose([f"eval_metrics={kind}"], "evaluate")
    nodes: Nodes = parse("eval_metrics", OmegaConf.to_container(composed.eval_metrics), Nodes)
    return nodes


def calibrate(confidence: Tensor, right: Tensor, options: EvaluateConfig) -> Calibration:
    """What a model's confidence is worth.

    Args:
        confidence: ``[n]``, the probability of each answer.
        right: ``[n]``, 1 where it is right.
        options: bins, and wanted accuracies.
    """
    curve = coverage_curve(confidence, right)
    n_rows = min(len(curve), _MAX_ROWS)
    few = torch.linspace(0, len(curve) - 1, n_rows, dtype=torch.float64).round().long()
    return Calibration(
        answers=len(confidence),
        accuracy=right.double().mean().item(),
        mean_confidence=confidence.double().mean().item(),
        expected_error=expected_calibration_error(confidence, right, options.n_bins),
        n_bins=options.n_bins,
        bins=reliability(confidence, right, options.n_bins),
        curve=curve[few].tolist(),
        thresholds=thresholds(confidence, right, options.accuracies),
    )
