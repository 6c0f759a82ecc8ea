"""What comes out of a model's modules in some of its steps, as its hooks see it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from scaledtrain.layers.rows import Sums
from scaledtrain.layers.sampled import sampled
from scaledtrain.layers.units import Units
from scaledtrain.recompute.blocks import is_compiled as is_compiled_block
from scaledtrain.recompute.blocks import is_diverted

__all__ = ["Activations", "is_compiled"]

_HANDS_ON = (_DropoutNd, nn.Identity, nn.Flatten, nn.Unflatten)  # what another has computed
_NEAR = 0.01  # to a limit


def is_compiled(module: nn.Module) -> bool:
    """Whether its user has compiled it: a graph may take hooks in, and then call them for ever."""
    return module._compiled_call_impl is not None or is_compiled_block(module)


class Activations:
    """Follows the outputs of a model's modules while hooks are on them.

    A module with parameters of its own has a mean and a deviation; so has what has none, and may
    have zeros (ReLU, or a block that ends with one): for each of its units it is counted in how
    many samples on end it was zero; see `Units`. The same tensor counts once, for the innermost
    module that returns it, and again for one that has changed it in place
    (``nn.ReLU(inplace=True)``).

    Forward passes that activation checkpointing makes again are not counted. Nothing of what is
    computed changes, and no generator is used.

    Args:
        named_modules: of this rank.
        sample_values: of each output, at most, to be drawn as a histogram; 0: none.

    Attributes:
        values: of the outputs of the last step, by module.
    """

    def __init__(
        self, named_modules: Iterable[tuple[str, nn.Module]], sample_values: int = 0
    ) -> None:
        self._modules = {n: m for n, m in named_modules if not isinstance(m, _HANDS_ON)}
        self._sample_values = sample_values
        self._silent: dict[tuple[str, int], Tensor] = {}  # samples, of each unit
        self._handles: list[RemovableHandle] = []
        self._forget()

    def _forget(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._counts: dict[str, list[tuple[str, float | Tensor]]] = {}
        self._active: dict[tuple[str, int], Tensor] = {}
        self._samples: dict[tuple[str, int], int] = {}
        self._units = Units()
        self._last: tuple[Any, int] = (_nothing, 0)  # an output, and its version

    @property
    def classes(self) -> dict[str, str]:
        """Of the modules that are followed, by name, in the model's order."""
        return {name: type(module).__name__ for name, module in self._modules.items()}

    def begin(self) -> None:
        """Follow the passes from now on, and forget those of an unfinished step."""
        self.end()
        self._forget()
        me = weakref.ref(self)  # after an exception nobody may call `end`

        def look(name: str) -> Any:
            def after(module: nn.Module, _: Any, output: Any) -> None:
                owner = me()
                if owner is not None:
                    owner._look(name, module, output)
                    if not name:  # the whole model's: the pass is over
                        owner._units = Units()

            return after

        self._handles = [
            module.register_forward_hook(look(name))
            for name, module in self._modules.items()
            if not is_diverted(module)  # blocks that run together see other calls
        ]

    def end(self) -> None:
        """Follow no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _look(self, name: str, module: nn.Module, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # in a backward pass: it is computed again
            return
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        self._units.passed(module)
        if not isinstance(first, Tensor) or not first.is_floating_point() or first.dim() < 2:
            return
        version = 0 if first.is_inference() else first._version
        seen, seen_version = self._last
        if not first.numel() or (seen() is first and version == seen_version):
            return
        self._last = weakref.ref(first), version
        values = first.detach()
        if values.dtype.itemsize < 4:
            values = values.float()
        var, mean = torch.var_mean(values, correction=0)
        n = values.numel()
        counts: list[tuple[str, float | Tensor]] = [
            ("count", n),
            ("total", mean.double() * n),
            ("squares", (var.double() + mean.double().square()) * n),
        ]
        if isinstance(module, (nn.Tanh, nn.Sigmoid)):
            middle, reach = (0.5, 0.5) if isinstance(module, nn.Sigmoid) else (0.0, 1.0)
            near = (values - middle).abs() > reach - _NEAR
            counts += [("limited", n), ("saturated", near.sum())]
        if not any(True for _ in module.parameters(recurse=False)):
            counts += self._look_for_zeros(name, values)
        self._counts.setdefault(name, []).extend(counts)
        if self._sample_values:
            self.values[name] = sampled(values, self._sample_values)

    def _look_for_zeros(self, name: str, values: Tensor) -> list[tuple[str, float | Tensor]]:
        """Count them, and note which units were not zero in all of these samples."""
        nonzero = values != 0
        active = self._units.active(nonzero)
        key = (name, len(active))
        self._active[key] = self._active[key] | active if key in self._active else active
        self._samples[key] = self._samples.get(key, 0) + len(values)
        return [("looked_at", values.numel()), ("nonzero", nonzero.sum())]

    def finish(self, dead_after: int) -> dict[str, Sums]:
        """The step is over, and counts: what was seen, by module.

        Args:
            dead_after: samples for which a unit has been zero that is called dead.
        """
        self.end()
        for key, active in self._active.items():
            before = self._silent.get(key, torch.zeros(len(active), dtype=torch.int64))
            silent = torch.where(active, 0, before.to(active.device) + self._samples[key])
            self._silent[key] = silent
            name, units = key
            self._counts[name] += [("units", units), ("dead", (silent >= dead_after).sum())]
        flat = [(m, name, value) for m, counts in self._counts.items() for name, value in counts]
        on_device = [value for _, _, value in flat if isinstance(value, Tensor)]
        there = iter(torch.stack([v.double() for v in on_device]).tolist() if on_device else [])
        found: dict[str, Sums] = {}
        for module, name, value in flat:
            sums = found.setdefault(module, {})
            number = next(there) if isinstance(value, Tensor) else float(value)
            sums[name] = sums.get(name, 0.0) + number
        return found

    def silent(self) -> list[tuple[str, Tensor]]:
        """For how many samples each unit of a module has been zero; for `recall`."""
        return [(name, samples.cpu()) for (name, _), samples in self._silent.items()]

    def recall(self, silent: Iterable[tuple[str, Tensor]]) -> None:
        """Go on from there."""
        self._silent = {(name, len(samples)): samples for name, samples in silent}


def _nothing() -> None:
    pass
