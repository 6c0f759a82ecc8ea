"""Whether a batch, what a model makes of it, and the loss have shapes and values as needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from scaledtrain.check.expected import class_dim, is_cross_entropy
from scaledtrain.check.subject import Subject, logits_of
from scaledtrain.check.verdict import EVERYTHING, Verdict, failed, named, passed, together, warning
from scaledtrain.data.cut import count_samples

__all__ = ["shapes"]

_BATCHES = 4  # that are looked at
_LIKE_BYTES = 50.0  # no input that was normalised is so large
_IGNORED = -100  # by torch's losses


def shapes(subject: Subject) -> Verdict:
    """A batch, its outputs and its loss.

    Targets are whole numbers in the range of the classes, tokens' targets are the next tokens,
    inputs are finite and not bytes of images, the first dim counts samples everywhere, outputs and
    targets do not broadcast, outputs are no probabilities if the loss takes logits, and the loss is
    one finite number.
    """
    batches = subject.batches(_BATCHES)
    found = [*_not_finite(subject, batches), *_images(subject, batches)]
    batch, model = batches[0], subject.model()
    n = count_samples(batch)
    with torch.no_grad():
        outputs = _outputs(subject, model, batch)
    made, targets = logits_of(outputs), subject.targets(batch)
    found += _first_dim(n, subject.inputs(batch), made, targets)
    is_clear = all(finding.status != "failed" for finding in found)
    if is_clear and made is not None and isinstance(targets, Tensor):
        found += [*_classes(subject, made, batches), *_broadcast(made, targets)]
        found += _shifted(subject.inputs(batch), targets)
    if any(finding.status == "failed" for finding in found):
        # The loss may raise something that says less.
        return replace(together(found, passed("")), undermines=EVERYTHING)
    with torch.no_grad():
        loss = float(subject.loss(model, batch)[1])
    if made is not None and isinstance(targets, Tensor):
        found += _probabilities(subject, model, made, targets)
    if loss != loss or abs(loss) == float("inf"):
        found.append(
            failed(
                f"the loss of the first batch is {loss}",
                "look for a logarithm or a division of 0 in model and loss",
            )
        )
    return together(found, passed(_told(subject, batch, made, loss), samples=n, loss=loss))


def _outputs(subject: Subject, model: nn.Module, batch: Any) -> Any:
    if subject.loss_fn is None:
        return subject.loss(model, batch)[0]
    return model(subject.inputs(batch))


def _not_finite(subject: Subject, batches: list[Any]) -> Iterator[Verdict]:
    bad: dict[str, int] = {}
    for batch in batches:
        for name, value in _tensors(subject, batch):
            if value.is_floating_point():
                finite = value.flatten(1).isfinite().all(1) if value.dim() > 1 else value.isfinite()
                bad[name] = bad.get(name, 0) + int((~finite).sum())
    for name, count in bad.items():
        if count:
            yield failed(
                f"{name} of {count} of {sum(map(count_samples, batches))} samples hold NaN or "
                "infinite numbers",
                "leave these samples out, or fill in what is missing",
            )


def _images(subject: Subject, batches: list[Any]) -> Iterator[Verdict]:
    x = subject.inputs(batches[0])
    if not isinstance(x, Tensor) or x.dim() != 4:
        return
    if x.dtype == torch.uint8 or (float(x.min()) >= 0 and float(x.max()) > _LIKE_BYTES):
        yield warning(
            f"the images are {_dtype(x)} from {float(x.min()):g} to {float(x.max()):g}: bytes that "
            "were not normalised",
            "divide by 255, or subtract the mean and divide by the standard deviation "
            "(data.normalize=standardize)",
        )


def _first_dim(n: int, inputs: Any, made: Tensor | None, targets: Any) -> Iterator[Verdict]:
    sizes = {"inputs": inputs, "outputs": made, "targets": targets}
    for name, value in sizes.items():
        if isinstance(value, Tensor) and value.dim() and len(value) != n:
            yield failed(
                f"the batch has {n} samples, but {name} of shape {tuple(value.shape)} have not "
                f"{n} in their first dim",
                "put the batch first (batch_first=True; view(batch, -1), not view(-1, batch))",
            )


def _classes(subject: Subject, made: Tensor, batches: list[Any]) -> Iterator[Verdict]:
    targets = subject.targets(batches[0])
    dim = class_dim(made, targets)
    if dim is None or made.shape[dim] == 1 or targets.dtype == torch.bool:
        return
    if targets.is_floating_point():
        yield failed(
            f"outputs {tuple(made.shape)} have a dim for classes, but the targets are "
            f"{_dtype(targets)} {tuple(targets.shape)}",
            "classes are whole numbers: targets.long(); for a regression give both one shape",
        )
        return
    known = torch.cat([t[t != _IGNORED] for t in map(subject.targets, batches)])
    if not known.numel():
        return
    low, high = int(known.min()), int(known.max())
    if low < 0 or high >= made.shape[dim]:
        shift = f": subtract {low}" if low > 0 and high - low < made.shape[dim] else ""
        yield failed(
            f"targets go from {low} to {high}, but the model has {made.shape[dim]} outputs, for "
            f"classes 0 to {made.shape[dim] - 1}",
            f"count classes from 0{shift}, or give the model {high + 1} outputs",
        )


def _broadcast(made: Tensor, targets: Tensor) -> Iterator[Verdict]:
    if class_dim(made, targets) is not None and made.shape[-1] > 1:
        return
    if targets.is_floating_point() and made.shape != targets.shape:
        yield failed(
            f"outputs {tuple(made.shape)} and targets {tuple(targets.shape)} are not of one shape, "
            "so that a loss compares every output with every target, or fails",
            "squeeze the one or unsqueeze the other: targets[:, None]",
        )


def _shifted(inputs: Any, targets: Tensor) -> Iterator[Verdict]:
    if not isinstance(inputs, Tensor) or inputs.is_floating_point() or inputs.dim() != 2:
        return
    if inputs.shape != targets.shape or inputs.shape[1] < 4:
        return
    places = {0: "the inputs themselves", 1: "the tokens before them", -2: "two tokens ahead"}
    time = inputs.shape[1]
    for shift, what in places.items():
        ahead = max(-shift, 0)
        late = targets[:, max(shift, 0) : time - ahead]
        if torch.equal(late, inputs[:, ahead : time - max(shift, 0)]):
            yield failed(
                f"the targets are {what}, not the next tokens",
                "shift once: inputs tokens[:, :-1], targets tokens[:, 1:], and nothing in the loss",
            )
            return


def _probabilities(
    subject: Subject, model: nn.Module, made: Tensor, targets: Tensor
) -> Iterator[Verdict]:
    dim = class_dim(made, targets)
    if dim is None or made.shape[dim] < 2 or not is_cross_entropy(subject, made, targets):
        return
    sums = made.float().sum(dim)
    if bool((made >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        places = [name for name, m in model.named_modules() if isinstance(m, nn.Softmax)]
        where = f"softmax in {named(places[-1:])}" if places else "the outputs sum to 1"
        yield failed(
            f"{where}: the model returns probabilities, but the loss takes logits, and makes a "
            "softmax itself",
            "return logits, and make probabilities where they are shown",
        )


def _tensors(subject: Subject, batch: Any) -> Iterator[tuple[str, Tensor]]:
    parts = {"inputs": subject.inputs(batch), "targets": subject.targets(batch)}
    if subject.loss_fn is None:
        parts = {"": batch}
    for name, part in parts.items():
        for path, value in tree_flatten_with_path(part)[0]:
            if isinstance(value, Tensor) and value.dim():
                yield name + "".join(map(str, path)), value


def _told(subject: Subject, batch: Any, made: Tensor | None, loss: float) -> str:
    told = [
        f"{name} {_dtype(value)} {tuple(value.shape)}" for name, value in _tensors(subject, batch)
    ]
    if made is not None:
        told.append(f"outputs {_dtype(made)} {tuple(made.shape)}")
    return f"{', '.join(told)}, loss {loss:.4g}"


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
