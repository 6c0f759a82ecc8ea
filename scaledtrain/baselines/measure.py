"""Lets the baselines of a task learn, and evaluates them as its models are."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scaledtrain.baselines.baseline import Baseline, Learner, LeftOut, check_targets
from scaledtrain.baselines.classification import ClassificationLearner
from scaledtrain.baselines.fitted import Sample
from scaledtrain.baselines.language import LanguageLearner
from scaledtrain.baselines.regression import RegressionLearner
from scaledtrain.baselines.results import HUMAN, Baselines, Row
from scaledtrain.data.loaders import known_length, must_end
from scaledtrain.data.replica_loader import ReplicaLoader, first_batch
from scaledtrain.errors import ConfigError
from scaledtrain.measures import Measures
from scaledtrain.schedule import LossFn
from scaledtrain.schema import did_you_mean
from scaledtrain.tasks import Kind, Task, kind_of

__all__ = ["BaselineOptions", "measure_baselines"]

_BATCH = 256
_MAX_OUTPUTS = 2**26  # numbers that a baseline gives at once
_SIZES: Mapping[Kind, tuple[str, ...]] = {
    "classification": ("n_classes", "out_features"),
    "language_model": ("vocab_size",),
    "regression": (),
}


@dataclass(frozen=True)
class BaselineOptions:
    """Which baselines there are, and how much they learn from.

    Args:
        human: what people reach: a number for the task's first metric (its loss, if it has no
            other), or metric -> number.
        samples: the most training samples that a model of scikit-learn is fitted to.
        count_samples: the most that are counted, for frequencies and means; None: all.
        only: names of those that are wanted; None: all of the kind.
        kind: of the task; None: what the data look like.
        batch_size: samples that are counted and evaluated at a time.
    """

    human: float | Mapping[str, float] | None = None
    samples: int = 10_000
    count_samples: int | None = 1_000_000
    only: list[str] | None = None
    kind: Kind | None = None
    batch_size: int = _BATCH

    def __post_init__(self) -> None:
        for name in ("samples", "count_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"baselines.{name} is {value}; it counts samples, >= 1")


def measure_baselines(
    task: Task,
    options: BaselineOptions | None = None,
    *,
    sizes: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Baselines:
    """Values of the baselines of a task, by its own loss and metrics, on its own test data.

    They learn from the batches of one epoch in random order, which are read one after the other:
    the data need not fit into memory. Where there are more samples than the options allow, these
    are the first ones of that order.

    Args:
        task: data, loss and metrics.
        options: how much of it.
        sizes: what is known of the model, as ``n_classes`` and ``vocab_size``; default: what the
            task says.
        seed: of the order of the samples, and of all that is drawn.

    Raises:
        ConfigError: there are no test data, or they are no (inputs, targets), or an option does not
            fit them.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> x, y = torch.zeros(4, 1), torch.tensor([0, 1, 1, 1])
        >>> task = Task(TensorDataset(x, y), TensorDataset(x[:2], y[:2]), sizes={"n_classes": 2})
        >>> found = measure_baselines(task, BaselineOptions(only=["most_frequent"]))
        >>> found.rows[0].says, round(found.rows[0].values["loss"], 4)  # ln(6 / 2) + ln(6 / 4), / 2
        ('always saying 1', 0.752)
    """
    options = options or BaselineOptions()
    loss_fn, loader = _check(task, options)
    kind = options.kind or kind_of(first_batch(loader, seed))
    n_outputs = _n_outputs(kind, {**task.sizes, **(sizes or {})})
    learner = _learner(kind, n_outputs, options, seed)
    wanted = _wanted(options.only, learner.names, kind)
    human = _human(options.human, ["loss", *task.metrics])
    seen = 0
    for inputs, targets in _pairs(loader, seed, options.count_samples):
        learner.see(inputs, targets)
        seen += len(targets)
    made = learner.baselines(wanted)
    baselines = [each for each in made if isinstance(each, Baseline)]
    found, evaluated = _evaluate(task, loss_fn, kind, baselines, options.batch_size, n_outputs)
    rows = [
        Row(b.name, b.says, values, b.samples, b.is_trivial, b.note)
        for b, values in zip(baselines, found, strict=True)
    ]
    if human:
        rows.append(Row(HUMAN, "people", human, 0))
    return Baselines(
        kind=kind,
        rows=rows,
        left_out={each.name: each.why for each in made if isinstance(each, LeftOut)},
        train_samples=known_length(task.train),
        counted_samples=seen,
        test_samples=evaluated,
        seed=seed,
        data=dict(task.facts),
    )


def _check(task: Task, options: BaselineOptions) -> tuple[LossFn, Iterable[Any]]:
    """The loss, and batches to learn from."""
    if task.test is None:
        raise ConfigError(
            "the data have nothing to evaluate on, so no baseline can be told; set data.test_path, "
            "or return a Task with test data"
        )
    if task.loss_fn is None:
        raise ConfigError(
            "the model makes its loss itself, so that no baseline has one; return a Task with "
            "a loss_fn, whose batches are (inputs, targets)"
        )
    loader = task.train_loader(options.batch_size)
    if options.count_samples is None:
        must_end(loader, "counting with baselines.count_samples=null")
    return task.loss_fn, loader


def _learner(kind: Kind, n_outputs: int | None, options: BaselineOptions, seed: int) -> Learner:
    sample = Sample(options.samples)
    if kind == "classification":
        return ClassificationLearner(n_outputs, seed, sample)
    if kind == "regression":
        return RegressionLearner(seed, sample)
    if n_outputs is None:
        raise ConfigError(
            "the size of the vocabulary is not known; set data.n_classes, or model.vocab_size"
        )
    return LanguageLearner(n_outputs)


def _n_outputs(kind: Kind, sizes: Mapping[str, Any]) -> int | None:
    """None: nobody says; one is the logit of two classes."""
    found = (sizes[name] for name in _SIZES[kind] if isinstance(sizes.get(name), int))
    return next((size for size in found if size > 1), None)


def _wanted(only: list[str] | None, names: tuple[str, ...], kind: Kind) -> list[str]:
    for name in only or ():
        if name not in names:
            raise ConfigError(
                f"baselines.only has {name!r}{did_you_mean(name, names)}; of {kind} there are: "
                f"{', '.join(names)}"
            )
    return [name for name in names if only is None or name in only]


def _pairs(
    loader: Iterable[Any], seed: int, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of an epoch, no more than so many samples."""
    left = limit
    with closing(ReplicaLoader(loader, seed=seed).epoch(0)) as steps:
        for step in steps:
            for batch in step.microbatches:
                kind_of(batch)  # that it is a pair
                inputs, targets = batch
                if left is not None and len(targets) >= left:
                    yield inputs[:left], targets[:left]
                    return
                left = None if left is None else left - len(targets)
                yield inputs, targets


def _evaluate(
    task: Task,
    loss_fn: LossFn,
    kind: Kind,
    baselines: list[Baseline],
    batch_size: int,
    n_outputs: int | None,
) -> tuple[list[dict[str, float]], int]:
    """Each one's values, and of how many samples."""
    loader = _test_loader(task, batch_size)
    _, targets = first_batch(loader)
    per_sample = targets[0].numel() * (n_outputs or 1)
    loader = _test_loader(task, max(1, min(batch_size, _MAX_OUTPUTS // per_sample)))
    # Each has metrics of its own: some have a state.
    measures = [Measures(copy.deepcopy(dict(task.metrics)), torch.device("cpu")) for _ in baselines]
    samples = 0
    for inputs, targets in _pairs(loader, 0):
        samples += len(targets)
        for baseline, measure in zip(baselines, measures, strict=True):
            outputs = baseline.outputs(inputs)
            if kind != "regression":
                check_targets(targets[targets >= 0], outputs.shape[-1], "classes")
            try:
                loss = loss_fn(outputs, targets)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise ConfigError(
                    f"the loss of the data cannot be had of outputs {list(outputs.shape)} for "
                    f"targets {list(targets.shape)}, as baselines of {kind} give them: {error}; "
                    "set baselines.kind if this is another kind of task"
                ) from error
            measure.add(loss, outputs, targets, len(targets))
    values = [{n: float(v) for n, v in m.values([]).items() if v.numel() == 1} for m in measures]
    return values, samples


def _test_loader(task: Task, batch_size: int) -> Iterable[Any]:
    loader = task.test_loader(batch_size)
    assert loader is not None
    must_end(loader, "an evaluation")
    return loader


def _human(given: float | Mapping[str, float] | None, metrics: list[str]) -> dict[str, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {metrics[min(1, len(metrics) - 1)]: float(given)}
    for name in given:
        if name not in metrics:
            raise ConfigError(
                f"baselines.human has {name!r}{did_you_mean(name, metrics)}, but the data evaluate "
                f"{', '.join(metrics)}"
            )
    return {name: float(value) for name, value in given.items()}
