"""What is told of a layer, and which modules of a large model are told of together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Row", "Sums", "add", "group_names", "module_of", "row_of"]

Sums = dict[str, float]
"""What can be added up over modules, by name."""
Row = dict[str, float | None]
"""What is told, by name; None: it is not finite."""


def module_of(parameter: str) -> str:
    """The name of the module that a parameter is in; of one in none, its own.

    Example:
        >>> module_of("blocks.0.norm.weight"), module_of("scale")
        ('blocks.0.norm', 'scale')
    """
    return parameter.rpartition(".")[0] or parameter


def group_names(names: Iterable[str], most: int) -> dict[str, str]:
    """For each name that of its group; there are at most so many groups.

    Modules are taken together by the modules that contain them, as few levels as it takes. Where
    even those of the first level are too many, neighbours are taken together.

    Args:
        names: of modules, in the model's order.
        most: groups.

    Example:
        >>> group_names(["0.norm", "0.mlp.in", "0.mlp.out", "1.norm"], 3)
        {'0.norm': '0.norm', '0.mlp.in': '0.mlp', '0.mlp.out': '0.mlp', '1.norm': '1.norm'}
        >>> list(group_names(["0", "1", "2", "3", "4"], 2).values())
        ['0..2', '0..2', '0..2', '3..4', '3..4']
    """
    parts = {name: name.split(".") for name in names}
    for depth in range(max(map(len, parts.values()), default=1), 0, -1):
        found = {name: ".".join(each[:depth]) for name, each in parts.items()}
        groups = list(dict.fromkeys(found.values()))
        if len(groups) <= most:
            return found
    size = math.ceil(len(groups) / most)
    spans = [groups[i : i + size] for i in range(0, len(groups), size)]
    ranges = {group: _range(span) for span in spans for group in span}
    return {name: ranges[group] for name, group in found.items()}


def _range(span: Sequence[str]) -> str:
    return span[0] if len(span) == 1 else f"{span[0]}..{span[-1]}"


def add(to: dict[str, Sums], key: str, sums: Mapping[str, float]) -> None:
    """Add to those of a group, which begin at 0."""
    own = to.setdefault(key, {})
    for name, value in sums.items():
        own[name] = own.get(name, 0.0) + value


def row_of(sums: Mapping[str, float]) -> Row:
    """What is told of a group of modules.

    Args:
        sums: squares of norms (``gradient``, ``weight``, ``update``, and ``updated``, of the
            weights whose update was measured); of activations their ``count``, ``total`` and
            ``squares``, of those that may be zero the ``nonzero`` of ``looked_at``, of those that
            have limits the ``saturated`` of ``limited``; the ``dead`` of ``units``.

    Example:
        >>> row_of({"gradient": 9.0, "update": 0.04, "updated": 4.0})
        {'grad_norm': 3.0, 'update_ratio': 0.1}
        >>> row_of({"count": 4.0, "total": 8.0, "squares": 20.0, "nonzero": 3, "looked_at": 4})
        {'mean': 2.0, 'std': 1.0, 'zeros': 0.25}
    """
    row: Row = {}
    if "gradient" in sums:
        row["grad_norm"] = _root(sums["gradient"])
    if "weight" in sums:
        row["weight_norm"] = _root(sums["weight"])
    if sums.get("updated"):
        row["update_ratio"] = _root(sums["update"] / sums["updated"])
    if sums.get("count"):
        mean = sums["total"] / sums["count"]
        row["mean"] = _finite(mean)
        row["std"] = _root(max(sums["squares"] / sums["count"] - mean**2, 0.0))
    if sums.get("looked_at"):
        row["zeros"] = 1.0 - sums["nonzero"] / sums["looked_at"]
    if sums.get("limited"):
        row["saturated"] = sums["saturated"] / sums["limited"]
    if sums.get("units"):
        row |= {"dead": sums["dead"], "units": sums["units"]}
    return row


def _root(square: float) -> float | None:
    return _finite(math.sqrt(square)) if square >= 0 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
