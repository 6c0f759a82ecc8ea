"""Simple models of scikit-learn, fitted to a sample of the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaledtrain.baselines.baseline import Baseline, LeftOut

__all__ = ["CLASSIFIERS", "REGRESSORS", "Sample", "fit_classifier", "fit_regressor"]

MAX_BYTES = 2**30
"""Of a sample's inputs, as float32."""

_MAX_ITERATIONS = 300
_PRIOR = 0.01  # mixed into the answers of models that are certain of what they say
_TINY = 1e-12

CLASSIFIERS: Mapping[str, str] = {
    "logistic_regression": "logistic regression",
    "nearest_neighbour": "the nearest neighbour",
    "decision_tree": "a decision tree",
}
REGRESSORS: Mapping[str, str] = {
    "linear_regression": "linear regression",
    "nearest_neighbour": "the nearest neighbour",
    "decision_tree": "a decision tree",
}


class Sample:
    """The first samples that come, each as a row of float32; there are no more than the limits say.

    Args:
        limit: of samples.
        max_bytes: of their inputs.

    Example:
        >>> sample = Sample(3)
        >>> sample.add(torch.zeros(2, 1, 2), torch.tensor([5, 6]))
        >>> sample.add(torch.ones(2, 1, 2), torch.tensor([7, 8]))
        >>> sample.inputs.shape, sample.targets
        (torch.Size([3, 2]), tensor([5, 6, 7]))
    """

    def __init__(self, limit: int, max_bytes: int = MAX_BYTES) -> None:
        self._limit = limit
        self._max_bytes = max_bytes
        self._inputs: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._size = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Keep of this batch what there is room for."""
        rows = inputs.reshape(len(inputs), -1)
        room = min(self._limit, self._max_bytes // (4 * max(1, rows.shape[1]))) - self._size
        if room > 0:
            self._inputs.append(rows[:room].float().clone())
            self._targets.append(targets[:room].clone())
            self._size += len(self._targets[-1])

    @property
    def inputs(self) -> Tensor:
        """Float ``[n, features]``."""
        return torch.cat(self._inputs)

    @property
    def targets(self) -> Tensor:
        """``[n, ...]``, as the data have them."""
        return torch.cat(self._targets)

    def __len__(self) -> int:
        return self._size


def fit_classifier(name: str, sample: Sample, counts: Tensor, seed: int) -> Baseline | LeftOut:
    """Fit one of `CLASSIFIERS`.

    Logistic regression gives probabilities of its own. A neighbour and a tree are certain of what
    they say, so an error would cost an infinite loss: their answer counts 99 %, and the frequencies
    of the classes the rest.

    Args:
        name: of it.
        sample: that it is fitted to.
        counts: of the classes in all of the data.
        seed: of what it draws.
    """
    made = _make(name, seed, is_classifier=True)
    if isinstance(made, LeftOut):
        return made
    prior = ((counts + 1).double() / (counts.sum() + len(counts))).numpy()
    fitted = _fit(name, made, sample.inputs.numpy(), sample.targets.numpy())
    if isinstance(fitted, LeftOut):
        return fitted
    share = _TINY if name == "logistic_regression" else _PRIOR

    def outputs(inputs: Tensor) -> Tensor:
        given = made.predict_proba(inputs.reshape(len(inputs), -1).float().numpy())
        full = np.zeros((len(inputs), len(counts)))
        full[:, made.classes_.astype(int)] = given
        return torch.from_numpy(np.log((1 - share) * full + share * prior)).float()

    return Baseline(name, CLASSIFIERS[name], outputs, len(sample), note=fitted)


def fit_regressor(name: str, sample: Sample, seed: int) -> Baseline | LeftOut:
    """Fit one of `REGRESSORS`.

    Args:
        name: of it.
        sample: that it is fitted to.
        seed: of what it draws.
    """
    made = _make(name, seed, is_classifier=False)
    if isinstance(made, LeftOut):
        return made
    shape = sample.targets.shape[1:]
    targets = sample.targets.reshape(len(sample), -1).float().numpy()
    fitted = _fit(name, made, sample.inputs.numpy(), targets)
    if isinstance(fitted, LeftOut):
        return fitted

    def outputs(inputs: Tensor) -> Tensor:
        given = made.predict(inputs.reshape(len(inputs), -1).float().numpy())
        return torch.from_numpy(np.asarray(given)).float().reshape(len(inputs), *shape)

    return Baseline(name, REGRESSORS[name], outputs, len(sample), note=fitted)


def _make(name: str, seed: int, is_classifier: bool) -> Any:
    """An estimator; all but the tree see features of mean 0 and deviation 1."""
    try:
        from sklearn import linear_model, neighbors, tree
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        return LeftOut(name, "it needs scikit-learn: pip install 'scaledtrain[baselines]'")
    makers: Mapping[tuple[str, bool], Callable[[], Any]] = {
        ("logistic_regression", True): lambda: linear_model.LogisticRegression(
            max_iter=_MAX_ITERATIONS
        ),
        ("linear_regression", False): linear_model.LinearRegression,
        ("nearest_neighbour", True): lambda: neighbors.KNeighborsClassifier(1),
        ("nearest_neighbour", False): lambda: neighbors.KNeighborsRegressor(1),
        ("decision_tree", True): lambda: tree.DecisionTreeClassifier(random_state=seed),
        ("decision_tree", False): lambda: tree.DecisionTreeRegressor(random_state=seed),
    }
    made = makers[name, is_classifier]()
    return made if name == "decision_tree" else make_pipeline(StandardScaler(), made)


def _fit(name: str, estimator: Any, inputs: Any, targets: Any) -> str | LeftOut:
    """Fit in place; returns a note, or why it cannot be."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            estimator.fit(inputs, targets)
        except ValueError as error:  # one class alone, NaN among the inputs
            return LeftOut(name, str(error).splitlines()[0])
    if any(issubclass(warning.category, ConvergenceWarning) for warning in told):
        return f"not converged in {_MAX_ITERATIONS} iterations"
    return ""
