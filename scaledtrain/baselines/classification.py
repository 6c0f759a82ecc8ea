"""Baselines that name classes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from scaledtrain.baselines.baseline import Baseline, LeftOut, check_targets
from scaledtrain.baselines.fitted import CLASSIFIERS, Sample, fit_classifier
from scaledtrain.errors import ConfigError

__all__ = ["ClassificationLearner"]

_NOISE = 1e-4  # of logits: enough to choose a class by, too little to change a loss


class ClassificationLearner:
    """Counts the classes, and keeps a sample for scikit-learn.

    * ``random``: a class drawn with equal chances: loss ln C, accuracy about 1 / C.
    * ``most_frequent``: the same for every input: the frequencies of the classes in the training
      data, each counted once more than it is there, (n_c + 1) / (n + C), as probabilities; so its
      answer is the most frequent class, and a class that is rare there costs a finite loss.
    * those of `CLASSIFIERS`, fitted to the sample.

    Args:
        n_classes: C; None: as many as are seen.
        seed: of what is drawn.
        sample: filled on the way.
    """

    names = ("random", "most_frequent", *CLASSIFIERS)

    def __init__(self, n_classes: int | None, seed: int, sample: Sample) -> None:
        self._n_classes = n_classes
        self._seed = seed
        self._sample = sample
        self._counts = torch.zeros(n_classes or 1, dtype=torch.int64)

    def see(self, inputs: Tensor, targets: Tensor) -> None:
        """Count a batch's classes."""
        if targets.dim() != 1:
            raise ConfigError(
                f"baselines of classification need one class a sample, targets of shape [n], and "
                f"got {list(targets.shape)}; set baselines.kind if this is another kind of task"
            )
        if targets.numel():
            check_targets(targets, self._n_classes or int(targets.max()) + 1, "classes")
        counts = torch.bincount(targets.long(), minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        self._sample.add(inputs, targets)

    def baselines(self, names: Iterable[str]) -> list[Baseline | LeftOut]:
        """Those of these names."""
        made: list[Baseline | LeftOut] = []
        for name in names:
            if name == "random":
                made.append(self._random())
            elif name == "most_frequent":
                made.append(self._most_frequent())
            else:
                made.append(fit_classifier(name, self._sample, self._counts, self._seed))
        return made

    def _random(self) -> Baseline:
        generator = torch.Generator().manual_seed(self._seed)
        n_classes = len(self._counts)

        def outputs(inputs: Tensor) -> Tensor:
            return _NOISE * torch.rand(len(inputs), n_classes, generator=generator)

        return Baseline("random", "a class drawn at random", outputs, 0, is_trivial=True)

    def _most_frequent(self) -> Baseline:
        seen = int(self._counts.sum())
        logits = ((self._counts + 1).double() / (seen + len(self._counts))).log().float()

        def outputs(inputs: Tensor) -> Tensor:
            return logits.expand(len(inputs), -1)

        most = int(self._counts.argmax())
        share = int(self._counts[most]) / max(seen, 1)
        note = f"{share:.1%} of the training data"
        return Baseline(
            "most_frequent", f"always saying {most}", outputs, seen, is_trivial=True, note=note
        )
