"""How sure a model is of each answer, and whether it is right."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Confidences"]


class Confidences(Metric):
    """The probability of each answer, the most likely class or token, and whether it is right.

    Targets below 0 are left out, and outputs that are no classes, as one logit for two. The value
    is ``[2, n]``: probabilities, and 1 for what is right. It keeps 5 bytes for each sample, or
    token.

    Example:
        >>> metric = Confidences()
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.3, 0.7]]).log(), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor([[0.9000, 0.7000],
                [1.0000, 0.0000]])
    """

    full_state_update = False
    confidence: list[Tensor]
    right: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("confidence", default=[], dist_reduce_fx="cat")
        self.add_state("right", default=[], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: logits, classes in the last dim, or in the one after the samples.
            targets: int64, whose shape is that of the outputs without the classes.
        """
        dim = -1 if outputs.shape[:-1] == targets.shape else 1
        if outputs.dim() != targets.dim() + 1 or outputs.shape[dim] == 1:
            return
        confidence, answers = outputs.softmax(dim).max(dim)
        there = targets >= 0
        self.confidence.append(confidence[there].float())
        self.right.append((answers == targets)[there])

    def compute(self) -> Tensor:
        """``[2, n]``."""
        return torch.stack([self._joined(self.confidence), self._joined(self.right).float()])

    def _joined(self, parts: list[Tensor] | Tensor) -> Tensor:
        if isinstance(parts, Tensor):  # as it is once gathered
            return parts
        return torch.cat(parts) if parts else torch.zeros(0, device=self.device)
