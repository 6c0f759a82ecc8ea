"""The callback that measures a model's layers while it trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scaledtrain.byte_sizes import parse_bytes
from scaledtrain.callbacks import Callback
from scaledtrain.errors import ConfigError
from scaledtrain.layers.activations import Activations, is_compiled
from scaledtrain.layers.findings import Findings, TensorFacts
from scaledtrain.layers.parameters import Tensors
from scaledtrain.layers.rows import Row, Sums, add, group_names, module_of, row_of
from scaledtrain.layers.scale import ScaleWatch
from scaledtrain.loss_scale import LossScale

if TYPE_CHECKING:
    from scaledtrain.data.steps import StepBatch
    from scaledtrain.trainer import Trainer

__all__ = ["LayerWatch"]

_logger = logging.getLogger(__name__)

_SAMPLED = 4096  # values of a tensor, or of an output, in a histogram
_WHOLE = "the model"  # has no name among its modules
_SHOWN = ("grad_norm", "update_ratio", "std", "zeros", "dead", "saturated")


class LayerWatch(Callback):
    r"""Measures the layers of the first replica in every so many steps, and tells what is wrong.

    * Of the parameters: the norm of the gradient (of all replicas, where they combine them; before
      clipping), the norm of the weights, and the update-to-weight ratio
      \|w_after - w_before\| / \|w_before\| of what the step has really changed.
    * Of the activations on this rank's samples: mean, standard deviation, share of zeros, dead
      units (zero for ``dead_after_samples`` samples on end, of those that were looked at), and of
      tanh and sigmoid the share within 0.01 of their limits.

    They are lines of kind ``"layers"`` in the records, and scalars and histograms (of at most 4,096
    values of a tensor) in TensorBoard. Each thing that is wrong is told once, in a warning: dead
    units, saturation, updates that are too large or far smaller than those of other layers, no
    gradient, gradients that vanish or explode from layer to layer, and a loss scale of float16 that
    is at its floor or overflows again and again.

    No number of the training changes. In the other steps it costs nothing; in a measured one a few
    passes over parameters and outputs, and a copy of the parameters from the gradients (with a
    server, from the pull) to the end of the step, of at most ``copy_size``.

    Every rank needs one of the same settings. Those of the first replica work; the ranks of a
    pipeline tell of their own layers each, those of a sharded model together. A crash loses what
    was counted since the last checkpoint.

    Args:
        every_steps: between two measurements.
        activations: look at them, too. A model that ``torch.compile`` has taken calls no hooks, so
            that nothing is seen of them, which is told.
        histograms: give TensorBoard histograms.
        max_rows: modules that are told of apart; in a larger model they are taken together.
        dead_after_samples: see above.
        copy_size: of parameters at a time (``"256MiB"``); tensors of a larger model take turns.

    Raises:
        ConfigError: a value out of its range.

    Example:
        >>> from functools import partial
        >>> from scaledtrain import Trainer
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> _ = torch.nn.init.constant_(model[0].weight, 3.0)
        >>> watch = LayerWatch(every_steps=1)
        >>> trainer = Trainer(model, torch.nn.functional.mse_loss,
        ...                   partial(torch.optim.SGD, lr=0.1), console=False, callbacks=[watch])
        >>> batch = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0]])
        >>> _ = trainer.fit([batch], max_steps=1)
        >>> row = watch.rows["0"]  # the gradient is 2 (3 - 1) (1, 0); 0.4 / sqrt(18)
        >>> round(row["grad_norm"], 6), round(row["update_ratio"], 6)
        (4.0, 0.094281)
    """

    def __init__(
        self,
        *,
        every_steps: int = 100,
        activations: bool = True,
        histograms: bool = True,
        max_rows: int = 64,
        dead_after_samples: int = 500,
        copy_size: str | int = "256MiB",
    ) -> None:
        for name, value in (
            ("every_steps", every_steps),
            ("max_rows", max_rows),
            ("dead_after_samples", dead_after_samples),
        ):
            if value < 1:
                raise ConfigError(f"layers.{name} is {value}; it is a number >= 1")
        self._every = every_steps
        self._looks_inside = activations
        self._draws = histograms
        self._max_rows = max_rows
        self._dead_after = dead_after_samples
        self._copy_bytes = parse_bytes(copy_size, "layers.copy_size")
        self._steps = 0
        self._findings = Findings()
        self._silent: list[tuple[str, Tensor]] = []  # of a resumed run, until there are modules
        self._tensors: Tensors | None = None
        self._activations: Activations | None = None
        self._scale: ScaleWatch | None = None
        self._began: int | None = None  # at which step a measurement did
        self._drawn: dict[str, dict[str, Tensor]] = {}
        self.rows: dict[str, Row] = {}
        """Of the last measurement, by module."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Find what there is to measure."""
        self._began = None
        if trainer.layout.link.group.rank > 0:  # of another replica
            return
        if not trainer.layout.in_memory:
            raise ConfigError(
                "layers looks at the parameters between updates, but with engine.offload=nvme they "
                "are in files then; leave layers out, or take engine.offload=cpu"
            )
        self._tensors = Tensors(trainer, self._copy_bytes)
        if self._scale is None and trainer.link.group.rank == 0:
            floor = (trainer.precision.loss_scale or LossScale()).minimum
            self._scale = ScaleWatch(floor, self._findings.told)
        inside = trainer.layout.named_modules()
        if not self._looks_inside:
            return
        if trainer.is_compiled or any(is_compiled(module) for _, module in inside):
            trainer.metrics.say(
                "layers: what torch.compile has made calls no hooks, so that gradients and updates "
                "are measured, and activations are not"
            )
            return
        before = self._silent_units()
        sampled = _SAMPLED if self._draws and trainer.metrics.draws else 0
        self._activations = Activations(inside, sampled)
        self._activations.recall(before)

    def needs_own_gradients(self, trainer: Trainer, batch: StepBatch) -> bool:
        """A step begins; the combined gradients will do."""
        if self._tensors is not None and self._steps % self._every == 0:
            self._tensors.forget()
            self._drawn = {}
            self._began = trainer.step_count
            if trainer.strategy.pushes_gradients:  # the pull brings the update
                self._tensors.before()
            if self._activations is not None:
                self._activations.begin()
        return False

    def on_gradients(self, trainer: Trainer) -> None:
        """The forward passes are over."""
        if self._activations is not None:
            self._activations.end()

    def on_reduced(self, trainer: Trainer) -> None:
        """The gradients are those of the step; by now activations have been given up."""
        if self._began is None or self._tensors is None:
            return
        if not trainer.strategy.pushes_gradients:
            self._tensors.before()
        self._tensors.gradients()
        if self._draws and trainer.metrics.draws:
            weights, gradients = self._tensors.sampled(_SAMPLED)
            self._drawn = {"weights": weights, "gradients": gradients}

    def on_step_end(self, trainer: Trainer) -> None:
        """Count the step, and tell of it if it was measured."""
        self._steps += 1
        if self._tensors is None:
            return
        writes = trainer.layout.shards.rank == 0
        warnings = [] if self._scale is None else [*self._scale.look(trainer.scaler.metrics())]
        measured = self._measured(trainer, self._tensors)
        if writes and measured is not None:
            warnings += self._told(trainer, *measured)
        if writes and warnings:
            trainer.metrics.note("warning", trainer.step_count, {"layers": warnings})
            for text in warnings:
                _logger.warning("step %d: %s", trainer.step_count, text)

    def _measured(
        self, trainer: Trainer, tensors: Tensors
    ) -> tuple[list[TensorFacts], dict[str, Sums]] | None:
        """Of each tensor and each module; None: this step was not measured, or taken back."""
        began, self._began = self._began, None
        if began is None:
            return None
        rows = tensors.after()
        seen = {} if self._activations is None else self._activations.finish(self._dead_after)
        least = began if trainer.strategy.pushes_gradients else began + 1  # a server counts
        if trainer.in_lockstep and trainer.step_count < least:
            return None
        facts = zip(tensors.names, tensors.sizes, tensors.is_matrix, rows, strict=False)
        return [TensorFacts(*each) for each in facts], seen

    def _told(
        self, trainer: Trainer, tensors: list[TensorFacts], seen: dict[str, Sums]
    ) -> list[str]:
        """Write the measurement down; returns what is wrong."""
        names = self._groups()
        sums: dict[str, Sums] = {}
        for tensor in tensors:
            add(sums, names[module_of(tensor.name)], tensor.sums)
        for module, of_module in seen.items():
            add(sums, names[module], of_module)
        order = dict.fromkeys(names.values())
        self.rows = {name or _WHOLE: row_of(sums[name]) for name in order if name in sums}
        step, metrics = trainer.step_count, trainer.metrics
        metrics.note("layers", step, {"layers": self.rows})
        for what in _SHOWN:
            known = {name: row.get(what) for name, row in self.rows.items()}
            metrics.show(f"layers_{what}", step, {n: v for n, v in known.items() if v is not None})
        if self._activations is not None:
            self._drawn["activations"] = self._activations.values
        for what, drawn in self._drawn.items():
            metrics.show(f"layers_{what}", step, {}, _joined(drawn, names, what != "activations"))
        kinds = {} if self._activations is None else self._activations.classes
        modules = {name: (kinds[name], of_module) for name, of_module in seen.items()}
        return self._findings.look(tensors, modules, self._dead_after)

    def _groups(self) -> dict[str, str]:
        """The row of each module that is followed, or has parameters, in the model's order."""
        assert self._tensors is not None
        followed = [] if self._activations is None else list(self._activations.classes)
        owners = [module_of(name) for name in self._tensors.names]
        return group_names(dict.fromkeys([*followed, *owners]), self._max_rows)

    def _silent_units(self) -> list[tuple[str, Tensor]]:
        return self._silent if self._activations is None else self._activations.silent()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Let go of the model."""
        self.close()

    def close(self) -> None:
        """Let go of the model."""
        if self._activations is not None:
            self._activations.end()
        self._tensors = None  # and of the copies of a step that was not finished

    def state_dict(self) -> dict[str, Any]:
        """Steps, what has been told, and for how long which units have been zero."""
        return {
            "steps": self._steps,
            "findings": self._findings.state_dict(),
            "silent": self._silent_units(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._steps = state["steps"]
        self._findings.load_state_dict(state["findings"])
        self._silent, self._activations, self._scale = state["silent"], None, None


def _joined(
    drawn: Mapping[str, Tensor], names: Mapping[str, str], of_tensors: bool
) -> dict[str, Tensor]:
    """Values by row, on the host."""
    found: dict[str, list[Tensor]] = {}
    for name, values in drawn.items():
        row = names[module_of(name) if of_tensors else name] or _WHOLE
        found.setdefault(row, []).append(values)
    return {row: torch.cat(values).cpu() for row, values in found.items()}
