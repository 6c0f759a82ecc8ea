"""A model in eval mode: what it is worth over a loader, and its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scaledtrain.comm.protocols import Link
from scaledtrain.data.loaders import must_end
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.data.steps import StepBatch, Weigh
from scaledtrain.errors import ConfigError
from scaledtrain.measures import Measures, Metric
from scaledtrain.parallel import Layout
from scaledtrain.schedule import Schedule
from scaledtrain.strategies import Strategy

__all__ = ["Evaluator", "as_numbers", "eval_mode"]


class Evaluator:
    """Runs one rank's piece of a model over loaders, in eval mode.

    Args:
        layout: of the replica; it has the model.
        schedule: how a batch runs.
        strategy: who shares the batches, and with which parameters.
        link: to the other ranks.
        weigh: of how many terms the loss of a batch is the mean, if not of its samples.
        enter: told ``"evaluate"`` before each batch, for whoever watches that all goes on.
    """

    def __init__(
        self,
        layout: Layout,
        schedule: Schedule,
        strategy: Strategy,
        link: Link,
        weigh: Weigh | None,
        enter: Callable[[Literal["evaluate"]], None],
    ) -> None:
        self._layout = layout
        self._schedule = schedule
        self._strategy = strategy
        self._link = link
        self._weigh = weigh
        self._enter = enter

    def measure(self, loader: Iterable[Any], metrics: Mapping[str, Metric]) -> dict[str, Tensor]:
        """As `Trainer.measure`."""
        must_end(loader, "an evaluation")
        layout, timeline = self._layout, self._link.timeline
        group = self._strategy.lockstep
        group.broadcast(list(layout.model.buffers()))
        layout.share_buffers()
        self._enter("evaluate")
        start = timeline.now()
        share = layout.steps(loader, group.rank, group.size, weigh=self._weigh)
        measures = Measures(metrics, self._link.device)
        with (
            self._strategy.consensus(),
            eval_mode(layout.model),
            closing(share.epoch(0)) as steps,
        ):
            layout.refresh()
            for step in steps:
                self._enter("evaluate")
                for batch, size in zip(step.microbatches, step.sizes, strict=True):
                    outputs, loss = self._schedule.predict(StepBatch([batch], [size]))
                    if outputs is not None:  # else another rank has them
                        measures.add(loss, outputs[0], _targets(batch, metrics), size)
        timeline.add("evaluation", start)
        return measures.values([group, layout.pieces])

    def predict(self, loader: Iterable[Any]) -> list[Any]:
        """As `Trainer.predict`."""
        must_end(loader, "a prediction")
        self._layout.refresh()
        outputs = []
        with eval_mode(self._layout.model):
            for step in ReplicaLoader(loader, device=self._link.device).epoch(0):
                for batch in step.microbatches:
                    made = self._schedule.outputs(batch)
                    if made is not None:  # else another rank has them
                        outputs.append(made)
        return outputs


def as_numbers(found: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of metrics, each of which has to be one number.

    Raises:
        ConfigError: one is not.
    """
    for name, value in found.items():
        if value.numel() != 1:
            raise ConfigError(
                f"eval_metrics has {name!r}, whose value is no number but "
                f"{tuple(value.shape)} of them; call trainer.measure(loader, {{...}}) for it, "
                "or python -m scaledtrain.evaluate"
            )
    return {name: value.item() for name, value in found.items()}


def _targets(batch: Any, metrics: Mapping[str, Metric]) -> Any:
    if not metrics:
        return None
    if not isinstance(batch, (tuple, list)):
        raise ConfigError(
            f"eval_metrics ({', '.join(metrics)}) compare outputs with targets, but the loader "
            f"gave a {type(batch).__name__} instead of (inputs, targets)"
        )
    return batch[1]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module is then put back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
