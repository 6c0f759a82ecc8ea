"""Whether two ranks with half a batch each do what one rank does with all of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scaledtrain.callbacks import Callback
from scaledtrain.check.modules import dropouts, norms_of_batches
from scaledtrain.check.subject import Subject
from scaledtrain.check.verdict import Verdict, failed, passed, skipped
from scaledtrain.comm.protocols import Link
from scaledtrain.data.cut import count_samples, cut, to_device
from scaledtrain.sim import Cluster, Constant, Topology, Wire, simulate
from scaledtrain.trainer import Trainer

__all__ = ["ranks"]

_STEPS = 3
_CLOSE = 1e-3  # of the gradient's norm
_LR = 1e-3

_FREE = Cluster(
    Constant(1.0),
    Topology(
        ranks_per_host=2,
        hosts=1,
        port=Wire(latency_seconds=0.0, gigabits_per_second=float("inf")),
    ),
)


class _InEvalMode(nn.Module):
    """A model that is trained in eval mode: without dropout, and without statistics of batches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def train(self, mode: bool = True) -> _InEvalMode:
        self.training = mode
        self.model.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class _Gradients(Callback):
    def __init__(self) -> None:
        self.of_steps: list[list[Tensor]] = []

    def on_reduced(self, trainer: Trainer) -> None:
        self.of_steps.append(
            [
                torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for p in trainer.replica.parameters
            ]
        )


def ranks(subject: Subject) -> Verdict:
    """A few steps of two simulated ranks under `Sync`, against one rank with the same samples.

    In eval mode, since dropout drops other numbers on each rank, and batch norm takes the
    statistics of each rank's half: these models legitimately differ.
    """
    batches = [_even(to_device(b, torch.device("cpu"))) for b in subject.batches(_STEPS)]
    batches = [batch for batch in batches if count_samples(batch) > 1]
    if not batches:
        return skipped("the first batches have one sample each, which two ranks cannot share")
    halves = [
        cut(batch, low, high)
        for batch in batches
        for n in [count_samples(batch)]
        for low, high in [(0, n // 2), (n // 2, n)]
    ]
    model = _InEvalMode(subject.model().cpu())
    names = [name for name, p in model.model.named_parameters() if p.requires_grad]
    one = _train(subject, model, batches, 1, len(batches))
    two = _train(subject, model, halves, 2, len(batches))
    difference, ratio, place = _compare(one, two, names)
    told = "two ranks with half of each batch have the gradients of one rank"
    if aside := _aside(model.model):
        told += f" ({aside})"
    if difference <= _CLOSE:
        return passed(f"{told}, to {difference:.1g}", difference=difference)
    numbers: dict[str, Any] = {"difference": difference, "ratio": ratio}
    if abs(ratio - 0.5) < 0.01:
        return failed(
            f"the gradients of two ranks are {ratio:.2f} of those of one rank with the same "
            "samples: the loss is a sum over the batch, not a mean",
            "take the mean over the samples, so that the mean over ranks is that of all",
            **numbers,
        )
    return failed(
        f"the gradients of two ranks differ from those of one rank with the same samples by "
        f"{difference:.1%} of their norm, most in {place}",
        "let the loss be a mean over the samples of a batch, or tell Trainer by loss_weight what "
        "it is the mean of; let no sample's loss depend on others in its batch",
        **numbers,
    )


def _even(batch: Any) -> Any:
    n = count_samples(batch)
    return cut(batch, 0, n - n % 2)


def _aside(model: nn.Module) -> str:
    kinds = {"dropout": dropouts(model), "batch norm": norms_of_batches(model)}
    if not any(kinds.values()):
        return ""
    return f"in eval mode: {' and '.join(k for k, found in kinds.items() if found)} differ by rank"


def _train(
    subject: Subject, model: nn.Module, batches: Sequence[Any], n_ranks: int, steps: int
) -> list[list[Tensor]]:
    def program(link: Link) -> list[list[Tensor]]:
        gradients = _Gradients()
        with Trainer(
            copy.deepcopy(model),
            subject.loss_fn,
            partial(torch.optim.SGD, lr=_LR),
            loss_weight=subject.loss_weight,
            callbacks=[gradients],
            console=False,
            link=link,
        ) as trainer:
            trainer.fit(batches, max_steps=steps)
        return gradients.of_steps

    found = simulate(program, _FREE, n_ranks).results[0]
    assert found is not None
    return found


def _compare(
    one: list[list[Tensor]], two: list[list[Tensor]], names: Sequence[str]
) -> tuple[float, float, str]:
    """Largest relative difference of a step, ratio along it, and where it is largest."""
    worst, ratio, place = -1.0, 1.0, ""
    for a, b in zip(one, two, strict=True):
        flat_a = torch.cat([t.double().flatten() for t in a])
        flat_b = torch.cat([t.double().flatten() for t in b])
        size = float(flat_a.norm())
        difference = float((flat_b - flat_a).norm()) / max(size, 1e-30)
        if not difference <= worst:  # NaN is the worst
            worst = difference
            ratio = float(flat_a @ flat_b) / max(size, 1e-30) ** 2
            far = [float((y - x).double().norm()) for x, y in zip(a, b, strict=True)]
            place = names[far.index(max(far))]
    return worst, ratio, place
