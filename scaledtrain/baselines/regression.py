"""Baselines that give numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from scaledtrain.baselines.baseline import Baseline, LeftOut
from scaledtrain.baselines.fitted import REGRESSORS, Sample, fit_regressor

__all__ = ["RegressionLearner"]


class RegressionLearner:
    """Sums the targets up, and keeps a sample for scikit-learn.

    * ``random``: the target of a training sample drawn at random: its mean squared error is about
      twice the variance of the targets.
    * ``mean``: the mean of the training targets: its mean squared error is that of the data to
      evaluate on about this mean, so their variance where both have the same mean.
    * those of `REGRESSORS`, fitted to the sample.

    Args:
        seed: of what is drawn.
        sample: filled on the way.
    """

    names = ("random", "mean", *REGRESSORS)

    def __init__(self, seed: int, sample: Sample) -> None:
        self._seed = seed
        self._sample = sample
        self._sum: Tensor | None = None
        self._seen = 0

    def see(self, inputs: Tensor, targets: Tensor) -> None:
        """Add a batch's targets."""
        total = targets.double().sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self._seen += len(targets)
        self._sample.add(inputs, targets)

    def baselines(self, names: Iterable[str]) -> list[Baseline | LeftOut]:
        """Those of these names."""
        made: list[Baseline | LeftOut] = []
        for name in names:
            if name == "random":
                made.append(self._random())
            elif name == "mean":
                made.append(self._mean())
            else:
                made.append(fit_regressor(name, self._sample, self._seed))
        return made

    def _random(self) -> Baseline:
        generator = torch.Generator().manual_seed(self._seed)
        targets = self._sample.targets.float()

        def outputs(inputs: Tensor) -> Tensor:
            return targets[torch.randint(len(targets), (len(inputs),), generator=generator)]

        return Baseline(
            "random", "the target of another sample", outputs, len(targets), is_trivial=True
        )

    def _mean(self) -> Baseline:
        assert self._sum is not None
        mean = (self._sum / self._seen).float()

        def outputs(inputs: Tensor) -> Tensor:
            return mean.expand(len(inputs), *mean.shape)

        says = f"always saying {mean.item():.4g}" if mean.numel() == 1 else "always saying the mean"
        return Baseline("mean", says, outputs, self._seen, is_trivial=True)
