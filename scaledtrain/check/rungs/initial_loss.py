"""Whether the loss of a fresh model is that of one that knows nothing."""

from __future__ import annotations

import math
from typing import Any

import torch

from scaledtrain.check.expected import class_dim, is_cross_entropy, uninformed
from scaledtrain.check.subject import Subject, logits_of
from scaledtrain.check.verdict import Verdict, failed, passed, skipped, warning
from scaledtrain.data.cut import count_samples

__all__ = ["initial_loss"]

_BATCHES = 4
_NEAR, _FAR = 1.2, 2.0  # times what is expected


@torch.no_grad()
def initial_loss(subject: Subject) -> Verdict:
    """The mean loss of the first batches against the expected one.

    That is ln of the number of classes for cross entropy, ln of the vocabulary for tokens, the
    variance of the targets for squared errors; the loss function itself is asked, with equal logits
    or with the mean of the targets.
    """
    model = subject.model()
    losses: list[float] = []
    expected: list[float] = []
    why = ""
    for batch in subject.batches(_BATCHES):
        outputs, loss = subject.loss(model, batch)
        losses.append(float(loss))
        if (known := uninformed(subject, outputs, batch)) is not None:
            expected.append(known.loss)
            why = known.why
    if not expected:
        return skipped(
            f"loss {sum(losses) / len(losses):.4g}; what to expect of it is not known: the model "
            "computes it itself, or the targets are no classes and not of the outputs' shape"
        )
    summed = _summed(subject, outputs, batch, expected[-1])
    if summed is not None:
        return summed
    loss_now, wanted = sum(losses) / len(losses), sum(expected) / len(expected)
    return _judge(loss_now, wanted, why, subject.is_trained)


def _judge(loss: float, wanted: float, why: str, is_trained: bool) -> Verdict:
    told = f"loss {loss:.4g}, expected {wanted:.4g} ({why})"
    numbers: dict[str, Any] = {"loss": loss, "expected": wanted}
    classes = why.startswith("ln") or "logits" in why
    if not math.isfinite(loss):
        return failed(told, "look for the first NaN: the inputs, then the initial weights")
    if is_trained:
        return passed(f"{told}; it begins with trained weights", **numbers)
    if loss < wanted / _FAR if not classes else loss < wanted / _NEAR:
        return failed(
            f"{told}: less than a model can know that has seen nothing",
            "look for targets among the inputs, for a loss that takes other outputs (log "
            "probabilities) than the model returns, or for weights that are trained already",
            **numbers,
        )
    if not classes:
        if loss > _FAR * wanted:
            return warning(
                f"{told}: the outputs begin far from the targets",
                "standardise the targets, or begin the last bias at their mean",
                **numbers,
            )
        return passed(told, **numbers)
    if loss > _FAR * wanted:
        return failed(
            f"{told}: the first logits are far too large",
            "normalise the inputs, or begin with smaller weights in the last layer",
            **numbers,
        )
    if loss > _NEAR * wanted:
        return warning(
            f"{told}: the first logits are too large",
            "normalise the inputs, or begin with smaller weights in the last layer",
            **numbers,
        )
    return passed(told, **numbers)


def _summed(subject: Subject, outputs: object, batch: object, at_equal: float) -> Verdict | None:
    """Of a cross entropy that is a sum over the samples."""
    made, targets = logits_of(outputs), subject.targets(batch)
    if made is None or not is_cross_entropy(subject, made, targets):
        return None
    mean = math.log(made.shape[class_dim(made, targets) or 1])
    for terms in {count_samples(batch), targets.numel()} - {1}:
        if math.isclose(at_equal, terms * mean, rel_tol=0.01):
            return failed(
                f"the loss of equal logits is {at_equal:.4g} = {terms} x {mean:.4g}: it is summed "
                "over the batch, not averaged",
                "take the mean (reduction='mean'), or the learning rate depends on the batch size",
                loss=at_equal,
                expected=mean,
            )
    return None
