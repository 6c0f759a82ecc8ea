"""Whether the model keeps to train and eval mode, and whoever predicts with it puts them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from scaledtrain.check.modules import (
    differing_module,
    dropouts,
    norms_of_batches,
    outputs_by_module,
    same,
)
from scaledtrain.check.subject import Subject
from scaledtrain.check.verdict import Verdict, failed, named, passed, together, warning
from scaledtrain.seeding import seed_everything

__all__ = ["modes"]


@torch.no_grad()
def modes(subject: Subject) -> Verdict:
    """Two passes in eval mode are equal and change nothing; in train mode dropout drops."""
    model, (batch,) = subject.model(), subject.batches(1, subject.samples)
    predict = subject.predict or _method(model)
    found = [*_evaluates(subject, model, batch), *_trains(subject, model, batch)]
    told = "two passes in eval mode are equal"
    if predict is not None:
        found += _predicts(subject, predict, batch)
        told += ", predict runs in eval mode and puts the mode back"
    return together(found, passed(told))


def _method(model: nn.Module) -> Callable[[nn.Module, Any], Any] | None:
    method = getattr(type(model), "predict", None)
    return method if callable(method) else None


def _evaluates(subject: Subject, model: nn.Module, batch: Any) -> Iterator[Verdict]:
    model.eval()
    stay = [name or "the model itself" for name, m in model.named_modules() if m.training]
    if stay:
        yield failed(
            f"{named(stay)} stay in train mode after model.eval()",
            "let train() of your module call that of nn.Module, and register submodules",
        )
        return
    before = {name: t.clone() for name, t in model.state_dict().items()}
    passes = []
    for seed in (1, 2):
        seed_everything(seed)
        passes.append(outputs_by_module(model, lambda: subject.loss(model, batch)))
    changed = [name for name, t in model.state_dict().items() if not same(before[name], t)]
    if changed:
        yield failed(
            f"a pass in eval mode changes {named(changed)}",
            "update buffers only if self.training",
        )
    if place := differing_module(*passes):
        yield failed(
            f"two passes in eval mode differ, first in {place}",
            "give F.dropout training=self.training, and add noise only in train mode",
            undermines=("samples", "ranks"),
        )


def _trains(subject: Subject, model: nn.Module, batch: Any) -> Iterator[Verdict]:
    model.train()
    drops, norms = dropouts(model), norms_of_batches(model)
    stay = [name or "the model itself" for name, m in model.named_modules() if not m.training]
    if stay:
        yield warning(
            f"{named(stay)} stay in eval mode after model.train()",
            "if it is not meant, let train() of your module call that of nn.Module",
        )
        return
    counted = {name: norm.num_batches_tracked for name, norm in norms.items()}
    before = {name: None if t is None else t.clone() for name, t in counted.items()}
    passes = []
    for seed in (1, 2):
        seed_everything(seed)
        passes.append(outputs_by_module(model, lambda: subject.loss(model, batch)))
    still = [n for n, t in counted.items() if t is not None and same(before[n], t)]
    if still:
        yield warning(
            f"{named(still)} do not update their statistics in train mode",
            "see that they are called, and their outputs used",
        )
    if drops and not differing_module(*passes):
        yield warning(
            f"{named(drops)} drop nothing in train mode: two passes are equal",
            "see that they are called, and their outputs used",
        )


def _predicts(
    subject: Subject, predict: Callable[[nn.Module, Any], Any], batch: Any
) -> Iterator[Verdict]:
    """Whoever predicts does it in eval mode, and leaves the model in the mode in which it was."""
    model = subject.model()
    ran_in_train_mode: list[str] = []
    for name, module in {**dropouts(model), **norms_of_batches(model)}.items():

        def look(module: nn.Module, args: Any, name: str = name) -> None:
            if module.training:
                ran_in_train_mode.append(name)

        module.register_forward_pre_hook(look)
    answers = []
    for seed in (1, 2):
        seed_everything(seed)
        answers.append(predict(model, subject.inputs(batch)))
    if ran_in_train_mode or not same(*answers):
        where = f" with {named(dict.fromkeys(ran_in_train_mode))} in train mode"
        yield failed(
            f"predict runs the model{where if ran_in_train_mode else ' so that answers differ'}",
            "call model.eval() in it, and model.train() behind it, or run it inside "
            "scaledtrain.evaluation.eval_mode(model)",
        )
        return
    changed = [name or "the model itself" for name, m in model.named_modules() if not m.training]
    if changed:
        yield failed(
            f"predict leaves {named(changed)} in eval mode, and training goes on in it",
            "put each module back into the mode in which it was (scaledtrain.evaluation.eval_mode)",
        )
