"""Whether what a model says of one sample depends on others, or of one position on later ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from scaledtrain.check.expected import class_dim, predicts_next
from scaledtrain.check.modules import outputs_by_module, same
from scaledtrain.check.subject import Subject, logits_of
from scaledtrain.check.verdict import Verdict, failed, passed, skipped, together
from scaledtrain.data.cut import count_samples

__all__ = ["samples"]

_CLOSE = 1e-5  # relative to the largest output: what other orders of summation may change


@torch.no_grad()
def samples(subject: Subject) -> Verdict:
    """Puts another sample in one's place, in eval mode: only that one's outputs may change.

    For language models also other tokens behind a position: outputs up to it may not change.
    """
    model, (batch,) = subject.model().eval(), subject.batches(1, subject.samples)
    n = count_samples(batch)
    if n < 2:
        return skipped("the batch has one sample, which no other can leak into")

    def outputs(changed: Any) -> Tensor | None:
        return logits_of(subject.loss(model, changed)[0])

    usual = outputs(batch)
    if usual is None or len(usual) != n:
        return skipped("the model returns no tensor with one entry for each sample")
    replaced = n - 1
    other = next(
        (k for k in range(n - 1) if not _alike(subject.inputs(batch), k, replaced, n)), None
    )
    if other is None:
        return skipped("all samples of the batch are the same")
    swapped = _swapped(batch, other, replaced, n)
    made = outputs(swapped)
    found: list[Verdict] = []
    if made is not None:
        where = _where(subject, model, batch, swapped, replaced, n)
        found += _leaks(usual[:replaced], made[:replaced], replaced, where)
    told = f"the outputs of {n - 1} samples stay when the last one is another"
    if predicts_next(subject, batch):
        found += _sees_later(subject, outputs, batch, usual)
        told += ", and no position sees later ones"
    return together(found, passed(told))


def _alike(inputs: Any, a: int, b: int, n: int) -> bool:
    rows: list[bool] = []

    def compare(t: Tensor) -> Tensor:
        if t.dim() and len(t) == n:
            rows.append(same(t[a], t[b]))
        return t

    tree_map_only(Tensor, compare, inputs)
    return all(rows)


def _swapped(batch: Any, source: int, target: int, n: int) -> Any:
    """The batch with one sample in another's place, too."""

    def swap(t: Tensor) -> Tensor:
        if t.dim() and len(t) == n:
            t = t.clone()
            t[target] = t[source]
        return t

    return tree_map_only(Tensor, swap, batch)


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Which entries of the first dim differ by more than rounding."""
    far = (a - b).abs().reshape(len(a), -1).amax(1)
    return ~(far <= _CLOSE * a.abs().max())


def _leaks(usual: Tensor, made: Tensor, replaced: int, where: str) -> Iterator[Verdict]:
    changed = _differ(usual.float(), made.float()).nonzero().flatten().tolist()
    if changed:
        yield failed(
            f"the outputs of sample {changed[0]} change with sample {replaced}"
            f"{f' (in all {len(changed)})' if len(changed) > 1 else ''}"
            f"{f', first in {where}' if where else ''}: samples mix",
            "look for a view, reshape, transpose, softmax, mean or norm over the batch's dim",
            samples=changed,
        )


def _where(subject: Subject, model: Any, batch: Any, swapped: Any, replaced: int, n: int) -> str:
    """The first module in which another sample's outputs change."""
    usual, other = (
        outputs_by_module(model, lambda b=b: subject.loss(model, b))  # type: ignore[misc]
        for b in (batch, swapped)
    )
    for (name, before), (_, after) in zip(usual, other, strict=False):
        for a, b in zip(before, after, strict=False):
            if not a.is_floating_point() or a.dim() < 2 or len(a) != n or a.shape != b.shape:
                continue
            if bool(_differ(a.float(), b.float())[:replaced].any()):
                return name
    return ""


def _sees_later(subject: Subject, outputs: Any, batch: Any, usual: Tensor) -> Iterator[Verdict]:
    tokens = batch["input_ids"] if isinstance(batch, Mapping) else subject.inputs(batch)
    middle = tokens.shape[1] // 2
    later = tokens.clone()
    later[:, middle:] = tokens[:, middle:].flip(1).roll(1, 0)
    changed = {**batch, "input_ids": later} if isinstance(batch, Mapping) else (later, batch[1])
    made = outputs(changed)
    if made is None or same(later, tokens):
        return
    if usual.dim() > 2 and class_dim(usual, tokens) == 1:  # [batch, classes, positions]
        usual, made = usual.transpose(1, 2), made.transpose(1, 2)
    by_position = _differ(
        usual[:, :middle].float().transpose(0, 1), made[:, :middle].float().transpose(0, 1)
    )
    seen = by_position.nonzero().flatten().tolist()
    if seen:
        yield failed(
            f"outputs at position {seen[0]} change with tokens from position {middle} on: it sees "
            "the tokens that it is to predict",
            "mask attention to later positions (is_causal=True)",
            positions=seen,
        )
