"""The state of a replica from those of the ranks that had it together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["can_gather", "gathered", "has_all"]


def can_gather(states: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each rank had the optimizer's state by parameter."""
    optimizers = [one["strategy"]["updater"]["optimizer"] for one in states]
    return all("param_groups" in optimizer for optimizer in optimizers)


def gathered(states: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """What a rank needs that has some parameters, or all, of those that several ranks had.

    Where the ranks had stages, each had the optimizer's state of its own parameters; the optimizer
    of any other rank numbers them in another way.

    Args:
        states: of all ranks of one replica.
        names: of the parameters that are wanted, in the optimizer's order.
    """
    state = dict(states[0])
    state["model"] = {key: value for one in states for key, value in one["model"].items()}
    strategy = state["strategy"] = dict(state["strategy"])
    updater = strategy["updater"] = dict(strategy["updater"])
    optimizers = [one["strategy"]["updater"]["optimizer"] for one in states]
    updater["optimizer"] = _optimizer(optimizers, names)
    return state


def has_all(state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> bool:
    """Whether a rank had these parameters, and no others, as far as that can be seen."""
    optimizer = state["strategy"].get("updater", {}).get("optimizer", {"param_groups": []})
    wanted = {name for name, p in parameters.items() if p.requires_grad}
    if "param_groups" not in optimizer:  # an engine's, of ranks that have all of them or none
        return not wanted or not wanted.isdisjoint(state["model"])
    groups = optimizer["param_groups"]
    trained = {name for group in groups for name in group.get("param_names", ())}
    had = state["model"].keys() | trained  # which a model may save by other names
    return wanted <= had and trained <= parameters.keys()


def _optimizer(states: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    by_name: dict[str, Any] = {}
    group_of: dict[str, int] = {}
    for state in states:
        for index, group in enumerate(state["param_groups"]):
            for number, name in zip(group["params"], group["param_names"], strict=True):
                group_of[name] = index
                if number in state["state"]:
                    by_name[name] = state["state"][number]
    groups: list[dict[str, Any]] = []
    kept: dict[int, str] = {}
    for index, group in enumerate(states[0]["param_groups"]):
        own = [name for name in names if group_of.get(name) == index]
        numbers = list(range(len(kept), len(kept) + len(own)))
        groups.append({**group, "params": numbers, "param_names": own})
        kept |= dict(zip(numbers, own, strict=True))
    found = {number: by_name[name] for number, name in kept.items() if name in by_name}
    return {"state": found, "param_groups": groups}
