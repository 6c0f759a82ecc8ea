"""Whether gradients reach every parameter, and the optimizer has it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

from torch import Tensor, nn

from scaledtrain.check.modules import take_small_steps
from scaledtrain.check.subject import Subject
from scaledtrain.check.verdict import Verdict, failed, named, passed, together

__all__ = ["gradients"]

_STEPS = 3  # what begins at zero lets gradients pass from the second on


def gradients(subject: Subject) -> Verdict:
    """Names the parameters that get no gradient, zeros, or NaN; are frozen; are not updated."""
    model = subject.model()
    parameters = dict(model.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    frozen = [name for name in parameters if name not in trained]
    none, zero, bad = set(trained), set(trained), set[str]()

    def see() -> None:
        for name, p in trained.items():
            if p.grad is None:
                continue
            none.discard(name)
            if not bool(p.grad.isfinite().all()):
                bad.add(name)
            if bool((p.grad != 0).any()):
                zero.discard(name)

    batches = subject.batches(_STEPS, subject.samples)
    losses: Iterator[Tensor] = (
        subject.loss(model, batch)[1] for batch in islice(cycle(batches), _STEPS)
    )
    take_small_steps(model, losses, see)
    return together(
        [
            *_no_gradients([n for n in trained if n in none], "no gradient"),
            *_no_gradients([n for n in trained if n in zero - none], "only zeros as gradient"),
            *_not_finite([n for n in trained if n in bad]),
            *_frozen([n for n in frozen if not n.startswith(tuple(subject.frozen))]),
            *_left_out(subject, model),
        ],
        passed(
            f"{len(trained)} parameters get gradients"
            + (f", {len(frozen)} are frozen" if frozen else ""),
            parameters=len(trained),
            frozen=len(frozen),
        ),
    )


def _no_gradients(names: list[str], what: str) -> Iterator[Verdict]:
    if names:
        yield failed(
            f"{what} for {named(names)}",
            "look for detach(), no_grad(), .item(), argmax or rounding between it and the loss, "
            "for units that are all dead, or for a module that is not called",
            without_gradients=names,
        )


def _not_finite(names: list[str]) -> Iterator[Verdict]:
    if names:
        yield failed(
            f"NaN or infinite gradients of {named(names)}",
            "look for a square root, a logarithm, a norm or a division at 0 behind it",
            not_finite=names,
        )


def _frozen(names: list[str]) -> Iterator[Verdict]:
    if names:
        beginnings = sorted({name.split(".")[0] for name in names})
        yield failed(
            f"frozen (requires_grad=False): {named(names)}",
            f"if it is meant, say so: check.frozen=[{','.join(beginnings)}]",
            frozen=names,
        )


def _left_out(subject: Subject, model: nn.Module) -> Iterator[Verdict]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        return
    optimizer = subject.make_optimizer(trained)
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if names := [name for name, p in trained if id(p) not in given]:
        yield failed(
            f"the optimizer was not given {named(names)}",
            "give it all parameters that require a gradient",
            not_updated=names,
        )
