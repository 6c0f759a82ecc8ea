"""What the loss is of a model that knows nothing yet, and what kind of loss it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scaledtrain.check.subject import Subject, logits_of

__all__ = ["Uninformed", "class_dim", "is_cross_entropy", "predicts_next", "uninformed"]

_IGNORED = -100  # by torch's losses
_CLOSE = 0.01


@dataclass(frozen=True)
class Uninformed:
    """The loss of the best outputs that do not depend on the inputs, as far as that is known."""

    loss: float
    why: str


def class_dim(outputs: Tensor, targets: Any) -> int | None:
    """In which dim of the outputs the classes are, if the targets are classes; None: they are not.

    Example:
        >>> targets = torch.zeros(2, 5, dtype=torch.int64)
        >>> class_dim(torch.zeros(2, 5, 7), targets), class_dim(torch.zeros(2, 7, 5), targets)
        (2, 1)
    """
    if not isinstance(targets, Tensor) or outputs.dim() != targets.dim() + 1:
        return None
    if outputs.shape[:-1] == targets.shape:
        return outputs.dim() - 1
    if (outputs.shape[0], *outputs.shape[2:]) == tuple(targets.shape):
        return 1
    return None


@torch.no_grad()
def is_cross_entropy(subject: Subject, outputs: Tensor, targets: Any) -> bool:
    """Whether the loss takes logits: the same number added to all classes changes nothing."""
    dim = class_dim(outputs, targets)
    if subject.loss_fn is None or dim is None or targets.is_floating_point():
        return False
    equal = torch.zeros_like(outputs)
    a, b = (float(subject.loss_fn(equal + shift, targets)) for shift in (0.0, 3.0))
    return a > 0 and math.isclose(a, b, rel_tol=1e-3)


@torch.no_grad()
def uninformed(subject: Subject, outputs: Any, batch: Any) -> Uninformed | None:
    """The loss itself tells: of equal logits, or of the mean of the targets.

    Args:
        subject: has the loss.
        outputs: of its model, for their shape.
        batch: that they are of.
    """
    made, targets = logits_of(outputs), subject.targets(batch)
    if subject.loss_fn is None:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if made is None or labels is None or labels.is_floating_point():
            return None
        classes = made.shape[-1]
        return Uninformed(math.log(classes), f"ln {classes}")
    if made is None or not isinstance(targets, Tensor):
        return None
    if is_cross_entropy(subject, made, targets):
        classes = made.shape[class_dim(made, targets) or 1]
        loss = float(subject.loss_fn(torch.zeros_like(made), targets))
        is_plain = math.isclose(loss, math.log(classes), rel_tol=_CLOSE)
        return Uninformed(loss, f"ln {classes}" if is_plain else "of equal logits")
    if not targets.is_floating_point() or made.shape != targets.shape or len(targets) < 2:
        return None
    centre = targets.mean(0, keepdim=True).expand_as(made).to(made.dtype)
    candidates = {
        "of the mean target": float(subject.loss_fn(centre.contiguous(), targets)),
        "of logits 0": float(subject.loss_fn(torch.zeros_like(made), targets)),
    }
    binary = bool(((targets == 0) | (targets == 1)).all())
    why = "of logits 0" if binary else "of the mean target"
    squares = float(((targets - centre) ** 2).mean())
    if not binary and math.isclose(candidates[why], squares, rel_tol=_CLOSE):
        return Uninformed(squares, "the variance of the targets")
    return Uninformed(candidates[why], why)


def predicts_next(subject: Subject, batch: Any) -> bool:
    """Whether targets are the inputs' next tokens, so that no position may see later ones."""
    inputs, targets = subject.inputs(batch), subject.targets(batch)
    if subject.loss_fn is None:
        if not isinstance(batch, Mapping) or "labels" not in batch or "input_ids" not in batch:
            return False
        tokens, labels = batch["input_ids"], batch["labels"]
        known = labels != _IGNORED
        if labels.shape != tokens.shape or not bool(known.any()):
            return False
        return bool((labels == tokens)[known].all())
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        return False
    if inputs.is_floating_point() or inputs.dim() != 2 or inputs.shape != targets.shape:
        return False
    ahead, known = inputs[:, 1:], targets[:, :-1] != _IGNORED
    return bool(known.any()) and bool((targets[:, :-1] == ahead)[known].all())
