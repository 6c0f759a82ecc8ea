"""Where numbers stop being finite when a batch is computed again: in modules, in gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scaledtrain.errors import ConfigError
from scaledtrain.precision import Precision
from scaledtrain.schedule import LossFn, call_model
from scaledtrain.seeding import kept_generators
from scaledtrain.watch.pass_trace import PassTrace, is_finite

__all__ = ["Found", "KeptBuffers", "find_nonfinite", "nonfinite_names"]


class Found(NamedTuple):
    """What was not finite when a batch was computed."""

    where: str | None
    """Where it began: ``"the batch"``, ``"the output of NAME (CLASS)"`` of the first module whose
    inputs were finite, or ``"the loss"``. If all of the forward pass was finite, ``"the backward
    pass of NAME (CLASS)"``, which was given a finite gradient, or what else is known of it. None:
    all was finite."""
    parameters: list[str]
    """Names of those whose gradients are not finite, in the model's order."""
    loss: float
    """The mean over the microbatches."""

    def __bool__(self) -> bool:
        """Whether anything was not finite."""
        return self.where is not None or bool(self.parameters)


class KeptBuffers:
    """Copies of a model's buffers (running statistics), to put them back after a bad batch.

    Args:
        model: whose persistent buffers are kept; the others follow from them, or from nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        persistent = model.state_dict().keys()
        self._buffers = [b for name, b in model.named_buffers() if name in persistent]
        self._kept = [buffer.detach().clone() for buffer in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy them as they are now."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give them the values that were kept."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)


def nonfinite_names(names: Iterable[str], gradients: Iterable[Tensor | None]) -> list[str]:
    """Names of those gradients that are not finite."""
    pairs = zip(names, gradients, strict=True)
    return [name for name, g in pairs if g is not None and not bool(g.isfinite().all())]


def find_nonfinite(
    model: nn.Module,
    microbatches: Sequence[Any],
    loss_fn: LossFn | None,
    precision: Precision | None = None,
) -> Found:
    """Compute a batch once more, and look where NaN or infinities come up first.

    Generators, buffers and the parameters' ``.grad`` are afterwards as before; without the same
    generators dropout drops other activations than it did.

    Args:
        model: in the mode in which it trains.
        microbatches: on its device, as a loader gives them.
        loss_fn: as the Trainer has it.
        precision: of the run; None: fp32.

    Returns:
        What was not finite, if anything was.

    Raises:
        ConfigError: no parameter of the model has a gradient.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = model[2].weight.fill_(torch.inf)
        >>> batch = torch.ones(4, 2), torch.ones(4, 1)
        >>> find_nonfinite(model, [batch], nn.functional.mse_loss).where
        'the output of 2 (Linear)'
    """
    precision = precision or Precision()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    if not parameters:
        raise ConfigError(
            f"{type(model).__name__} has no parameter with requires_grad=True, so that there is no "
            "backward pass to look at; call model.requires_grad_(True) before find_nonfinite"
        )
    trace = PassTrace(model)
    bad: set[str] = set()
    losses: list[float] = []
    buffers, device = KeptBuffers(model), parameters[0].device
    gpus = [device] if device.type == "cuda" else []
    again = torch.random.fork_rng(gpus, device_type="cuda")
    with ExitStack() as put_back:
        put_back.callback(buffers.put_back)
        for kept in (kept_generators(), again, trace.watching()):
            put_back.enter_context(kept)
        for batch in microbatches:
            if not is_finite(batch):
                trace.began_in("the batch")
            with torch.enable_grad(), precision.autocast(device):
                loss = call_model(model, batch, loss_fn)[1]
            losses.append(loss.item())
            if not loss.isfinite():
                trace.began_in("the loss")
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            bad.update(nonfinite_names([name for name, _ in named], gradients))
    mean = sum(losses) / len(losses) if losses else 0.0
    found = [name for name, _ in named if name in bad]
    return Found(trace.where(found), found, mean)
