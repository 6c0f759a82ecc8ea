"""Whether a model is right as often as it says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scaledtrain.errors import ConfigError

__all__ = ["Bin", "expected_calibration_error", "reliability"]


@dataclass(frozen=True)
class Bin:
    """Answers whose probabilities lie in ``[low, high)``; in the last bin up to 1."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean of the probabilities."""
    accuracy: float
    """Share of them that is right."""


def reliability(confidence: Tensor, right: Tensor, n_bins: int = 15) -> list[Bin]:
    """The bins that have answers, the least certain first.

    Args:
        confidence: ``[n]``, probabilities of the answers.
        right: ``[n]``, whether each is right.
        n_bins: of equal width.

    Raises:
        ConfigError: there is no bin, or no answer.

    Example:
        >>> reliability(torch.tensor([0.7, 0.9, 0.8]), torch.tensor([0, 1, 1]), 2)
        [Bin(low=0.5, high=1.0, count=3, confidence=0.8, accuracy=0.6667)]
    """
    counts, confidences, rights = _sums(confidence, right, n_bins)
    return [
        Bin(
            low=i / n_bins,
            high=(i + 1) / n_bins,
            count=count,
            confidence=round((confidences[i] / count).item(), 4),
            accuracy=round((rights[i] / count).item(), 4),
        )
        for i, count in enumerate(counts.tolist())
        if count
    ]


def _sums(confidence: Tensor, right: Tensor, n_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each bin: answers, their confidence, and how many are right."""
    if n_bins < 1 or not len(confidence):
        raise ConfigError(f"{len(confidence)} answers in {n_bins} bins; both have to be >= 1")
    places = (confidence.double() * n_bins).long().clamp(0, n_bins - 1)
    counts, confidences, rights = (
        torch.bincount(places, weights=values, minlength=n_bins)
        for values in (None, confidence.double(), right.double())
    )
    return counts, confidences, rights


def expected_calibration_error(confidence: Tensor, right: Tensor, n_bins: int = 15) -> float:
    """How far accuracy and confidence are apart, mean over the answers (Naeini et al., 2015).

    ``sum_b n_b / n |accuracy_b - confidence_b|`` over the bins of `reliability`. That of
    torchmetrics adds float32 up, which ends at 2^24 answers in a bin, and has a bin more, of 1.

    Args:
        confidence: ``[n]``.
        right: ``[n]``.
        n_bins: as in `reliability`.

    Example:
        >>> round(expected_calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([1, 0])), 4)
        0.25
    """
    _, confidences, rights = _sums(confidence, right, n_bins)
    return ((rights - confidences).abs().sum() / len(confidence)).item()
