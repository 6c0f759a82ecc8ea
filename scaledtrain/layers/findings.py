"""What is wrong with a layer, in words: each thing once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from scaledtrain.layers.rows import Sums

__all__ = ["Findings", "TensorFacts"]

PATIENCE = 2
"""Measurements in a row that must show a thing before it is told."""
DEAD_SHARE = 0.2
"""Of a module's units."""
SATURATED_SHARE = 0.5
"""Of a module's outputs."""
LARGE_UPDATE = 0.1
"""||change|| / ||weights|| in one step."""
STILL = 1e-3
"""Of the median ratio of all tensors: one that is below it hardly moves."""
FADES = 1e-4
"""Gradients of the first third of the layers over those of the last, or the other way."""
MOST_NAMES = 3

_Found = tuple[str, str]
"""What a thing is, for counting, and how it is told."""


class TensorFacts(NamedTuple):
    """One tensor of a model."""

    name: str
    size: int
    is_matrix: bool
    sums: Sums


class Findings:
    """Looks at measurements, one after another.

    Attributes:
        told: what has been said already, and is not said again.
    """

    def __init__(self) -> None:
        self.told: set[str] = set()
        self._in_a_row: dict[str, int] = {}

    def look(
        self,
        tensors: Sequence[TensorFacts],
        modules: Mapping[str, tuple[str, Sums]],
        dead_after: int,
    ) -> list[str]:
        """What this measurement is the first to show.

        Args:
            tensors: of the model, in its order; empty if there were no gradients.
            modules: name -> class, and what came out.
            dead_after: samples for which a dead unit has been zero.
        """
        found = {
            **dict(_about_activations(modules, dead_after)),
            **dict(_about_updates(tensors)),
            **dict(_about_gradients(tensors)),
        }
        # The update of a tensor that it was not the turn of is neither here nor there.
        out_of_turn = {t.name for t in tensors if "updated" not in t.sums}
        for key in [*self._in_a_row]:
            what, _, name = key.partition(" ")
            is_unknown = what in ("large", "still") and name in out_of_turn
            if key not in found and not is_unknown:
                del self._in_a_row[key]
        said: dict[str, list[str]] = {}
        for key, text in found.items():
            self._in_a_row[key] = self._in_a_row.get(key, 0) + 1
            is_due = self._in_a_row[key] >= PATIENCE or key.startswith("dead ")
            if is_due and key not in self.told:
                self.told.add(key)
                said.setdefault(key.partition(" ")[0], []).append(text)
        return [
            text if i < MOST_NAMES else f"... and {len(texts) - MOST_NAMES} more such"
            for texts in said.values()
            for i, text in enumerate(texts[: MOST_NAMES + 1])
        ]

    def state_dict(self) -> dict[str, Any]:
        """What has been said and what is about to be."""
        return {"told": sorted(self.told), "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.told = set(state["told"])
        self._in_a_row = dict(state["in_a_row"])


def _about_activations(
    modules: Mapping[str, tuple[str, Sums]], dead_after: int
) -> Iterator[_Found]:
    for name, (kind, sums) in modules.items():
        called = f"{name} ({kind})" if name else f"the model ({kind})"
        dead, units = sums.get("dead", 0.0), sums.get("units", 0.0)
        if units and dead >= DEAD_SHARE * units:
            yield (
                f"dead {name}",
                f"{called}: {dead:.0f} of {units:.0f} units were zero for each of the last "
                f"{dead_after:,} samples that were looked at, or more. A unit that is always zero "
                "learns no more: lower the learning rate or warm it up, look at the initial values "
                "and biases before it, or take a LeakyReLU or GELU",
            )
        limited = sums.get("limited", 0.0)
        if limited and sums["saturated"] > SATURATED_SHARE * limited:
            yield (
                f"saturated {name}",
                f"{called}: {sums['saturated'] / limited:.0%} of its outputs are within 0.01 of "
                "their limits, where hardly any gradient passes: normalise what goes in, take "
                "smaller initial weights, or lower the learning rate",
            )


def _about_updates(tensors: Sequence[TensorFacts]) -> Iterator[_Found]:
    """Of matrices: norms and biases begin at 0 or 1, and may well change by as much."""
    ratios = {
        t.name: math.sqrt(t.sums["update"] / t.sums["updated"])
        for t in tensors
        if t.is_matrix and t.sums.get("updated", 0.0) > 0 and math.isfinite(t.sums["update"])
    }
    median = statistics.median(ratios.values()) if ratios else 0.0
    for name, ratio in ratios.items():
        if ratio > LARGE_UPDATE:
            yield (
                f"large {name}",
                f"update/weight of {name} is {ratio:.2g} (usual: 1e-4 to 1e-2). It is nearly "
                "rewritten in a few steps: lower the learning rate, warm it up, or clip gradients "
                "(max_grad_norm=1.0)",
            )
        elif 0 < ratio < STILL * median:
            yield (
                f"still {name}",
                f"update/weight of {name} is {ratio:.2g}, but {median:.2g} in the middle of all "
                "layers: it hardly learns; look at its gradient, at its parameter group's learning "
                "rate, and at the scale of its initial values",
            )


def _about_gradients(tensors: Sequence[TensorFacts]) -> Iterator[_Found]:
    known = [t for t in tensors if math.isfinite(t.sums.get("gradient", math.inf))]
    if not any(t.sums["gradient"] > 0 for t in known):
        return
    for t in known:
        if t.sums["gradient"] == 0:
            yield (
                f"none {t.name}",
                f"{t.name} gets no gradient: the loss does not depend on it (it is not used, or "
                "detached, or all that is behind it is dead); freeze it if that is meant "
                "(requires_grad_(False))",
            )
    matrices = [t for t in known if t.is_matrix and t.sums["gradient"] > 0]
    third = len(matrices) // 3
    if third < 1 or len(matrices) < 4:
        return
    roots = [math.sqrt(t.sums["gradient"] / t.size) for t in matrices]
    first, last = statistics.median(roots[:third]), statistics.median(roots[-third:])
    for key, small, large, word in (
        ("vanishing", first, last, "vanish"),
        ("exploding", last, first, "explode"),
    ):
        if small < FADES * large:
            a_layer = (first / last) ** (1 / (len(matrices) - third))
            yield (
                f"{key} gradients",
                f"gradients {word} on their way from the last layers to the first: their root mean "
                f"square is {last:.2g} in the last third, {first:.2g} in the first "
                f"({matrices[0].name}), a factor of {a_layer:.2g} a layer; add normalisation or "
                "residual connections, or scale the initial values (He, Xavier)",
            )
