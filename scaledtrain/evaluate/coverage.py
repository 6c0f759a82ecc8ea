"""How many cases can be answered if only those are that the model is sure of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaledtrain.errors import ConfigError

__all__ = ["Threshold", "coverage_curve", "thresholds"]


@dataclass(frozen=True)
class Threshold:
    """From which confidence on to answer, for a wanted accuracy of the answers."""

    wanted: float
    confidence: float | None
    """None: not even the most certain answers are as accurate."""
    coverage: float
    """Share of the cases that are answered."""
    accuracy: float | None
    """Of these answers, on the data that the threshold was chosen on, so it is the best case."""
    held_out_coverage: float
    """The same where it is chosen on one half of the cases and measured on the other, both ways."""
    held_out_accuracy: float | None

    def __str__(self) -> str:
        wanted = f"{_percent(self.wanted)} accuracy"
        if self.confidence is None:
            return f"for {wanted} there is no threshold: the most certain answers are less accurate"
        text = (
            f"for {wanted} answer {self.coverage:.0%} of cases, those of confidence >= "
            f"{self.confidence:.4g}"
        )
        if self.held_out_accuracy is None:
            return f"{text} (on held-out halves: none)"
        return (
            f"{text} (on held-out halves: {self.held_out_coverage:.0%} of cases at "
            f"{_percent(self.held_out_accuracy)})"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def coverage_curve(confidence: Tensor, right: Tensor) -> Tensor:
    """Rows of (confidence, coverage, accuracy), the most certain answers first.

    A row is what is reached if all answers of at least that confidence are given; equally certain
    ones are given together.

    Args:
        confidence: ``[n]``.
        right: ``[n]``.

    Example:
        >>> coverage_curve(torch.tensor([0.5, 0.9, 0.5, 0.75]), torch.tensor([0, 1, 1, 1]))
        tensor([[0.9000, 0.2500, 1.0000],
                [0.7500, 0.5000, 1.0000],
                [0.5000, 1.0000, 0.7500]], dtype=torch.float64)
    """
    if not len(confidence):
        raise ConfigError("there is no answer, so no accuracy of answers")
    ordered, order = confidence.double().sort(descending=True, stable=True)
    answered = torch.arange(1, len(ordered) + 1, dtype=torch.float64, device=ordered.device)
    accuracy = right[order].double().cumsum(0) / answered
    is_last = torch.ones(len(ordered), dtype=torch.bool, device=ordered.device)
    is_last[:-1] = ordered[1:] < ordered[:-1]  # of equally certain ones
    return torch.stack([ordered, answered / len(ordered), accuracy], 1)[is_last]


def thresholds(
    confidence: Tensor, right: Tensor, wanted: Sequence[float], seed: int = 0
) -> list[Threshold]:
    """For each wanted accuracy the threshold that answers most cases.

    Args:
        confidence: ``[n]``.
        right: ``[n]``.
        wanted: accuracies, above 0 and at most 1.
        seed: of how the cases are divided into halves.

    Raises:
        ConfigError: an accuracy is none.

    Example:
        >>> confidence, right = torch.tensor([0.5, 0.9, 0.6, 0.75]), torch.tensor([0, 1, 1, 1])
        >>> found = thresholds(confidence, right, [0.99])[0]
        >>> round(found.confidence, 4), found.coverage, found.accuracy
        (0.6, 0.75, 1.0)
    """
    for share in wanted:
        if not 0 < share <= 1:
            raise ConfigError(f"accuracies has {share}; each is a share of the answers, in (0, 1]")
    # Sorted first, so that the halves are the same however ranks have shared the cases.
    by_right = right.argsort(stable=True)
    by_both = by_right[confidence[by_right].argsort(stable=True)]
    confidence, right = confidence[by_both], right[by_both]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(confidence), generator=generator).to(confidence.device)
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    curve = coverage_curve(confidence, right)
    found = []
    for share in wanted:
        chosen = _choose(curve, share)
        answered, correct = 0, 0
        for here, there in (halves, halves[::-1]):
            if len(here):
                at = _choose(coverage_curve(confidence[here], right[here]), share)
                if at is not None:
                    given = confidence[there].double() >= at[0]
                    answered += int(given.sum())
                    correct += int((right[there] > 0)[given].sum())
        found.append(
            Threshold(
                wanted=share,
                confidence=None if chosen is None else chosen[0],
                coverage=0.0 if chosen is None else chosen[1],
                accuracy=None if chosen is None else chosen[2],
                held_out_coverage=answered / len(confidence),
                held_out_accuracy=correct / answered if answered else None,
            )
        )
    return found


def _choose(curve: Tensor, wanted: float) -> list[float] | None:
    """The last row that is accurate enough: it answers most."""
    enough = (curve[:, 2] >= wanted).nonzero()
    return curve[int(enough[-1])].tolist() if len(enough) else None
