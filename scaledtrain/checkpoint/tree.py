"""A state as JSON and named tensors, and back: what needs neither pickle nor any class of the file.

A number, a text, a truth value and None stand for themselves. Everything else is an object of one
key, which says what it is: ``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}``,
``{"tensor": "model/0.weight"}``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaledtrain.errors import CheckpointError, ConfigError

__all__ = ["flatten", "restore", "tensor_names"]


def flatten(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Part a state into a skeleton, which is JSON, and its tensors by name.

    A tensor's name is the way to it. In the state of an optimizer it goes over the parameter's
    name, not over its number: ``strategy/updater/optimizer/state/0.weight/exp_avg``.

    Args:
        state: of dicts, lists, tuples, sets, Counters, tensors, NumPy arrays and numbers, numbers,
            texts and None. Tensors elsewhere than on the CPU are copied there.

    Raises:
        ConfigError: there is an object of another type; it says which, and where.

    Example:
        >>> flatten({"step": 3, "sizes": (1, 2), "mean": torch.zeros(2)})[0]
        {'dict': [['step', 3], ['sizes', {'tuple': [1, 2]}], ['mean', {'tensor': 'mean'}]]}
    """
    tensors: dict[str, Tensor] = {}
    return _flatten(state, "", tensors), tensors


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": _keep(value.detach().cpu(), path, tensors)}
    if isinstance(value, np.ndarray):
        return {"array": _keep(torch.from_numpy(value.copy()), path, tensors)}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        names = _names_of_parameters(value)
        items = []
        for key, item in value.items():
            at = _under(path, key)
            if key == "state" and names:
                item = {names.get(i, i): each for i, each in item.items()}
                numbers = {name: i for i, name in names.items()}
                entries = [
                    [numbers.get(name, name), _flatten(each, _under(at, name), tensors)]
                    for name, each in item.items()
                ]
                items.append([key, {"dict": entries}])
            else:
                items.append([_flatten(key, at, tensors), _flatten(item, at, tensors)])
        return {kind: items}
    for kind, of in (("list", list), ("tuple", tuple), ("set", (set, frozenset))):
        if isinstance(value, of):
            each = [_flatten(item, _under(path, i), tensors) for i, item in enumerate(value)]
            return {kind: each}
    raise ConfigError(
        f"the state has a {type(value).__name__} at {path or 'its root'}, which cannot be saved "
        "without pickle, and that is never loaded; let its state_dict return numbers, texts, "
        "tensors, and lists and dicts of them"
    )


def _names_of_parameters(state: Mapping[Any, Any]) -> dict[int, str]:
    """Of the state of an optimizer that was given names: by the parameter's number."""
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not isinstance(state.get("state"), Mapping):
        return {}
    named = {
        number: name
        for group in groups
        for number, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }
    return named if len(set(named.values())) == len(named) else {}


def _under(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _keep(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    while path in tensors:  # {"a": {"b": ...}, "a/b": ...}
        path += "'"
    tensors[path] = tensor
    return path


def restore(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `flatten` parted.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(skeleton, dict):
        return skeleton
    try:
        return _restore(skeleton, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"this is no saved state: {error!r}") from error


def _restore(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "float":
        return float(content)
    if kind in ("dict", "counter"):
        items = {_restore(key, tensors): _restore(value, tensors) for key, value in content}
        return Counter(items) if kind == "counter" else items
    each = [_restore(item, tensors) for item in content]
    return {"list": list, "tuple": tuple, "set": set}[kind](each)


def tensor_names(skeleton: Any) -> list[str]:
    """Of all tensors that a skeleton refers to.

    Raises:
        CheckpointError: it is none.
    """
    try:
        return _tensor_names(skeleton)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"this is no saved state: {error!r}") from error


def _tensor_names(skeleton: Any) -> list[str]:
    if not isinstance(skeleton, dict):
        return []
    names = []
    for kind, content in skeleton.items():
        if kind in ("tensor", "array"):
            names.append(str(content))
        elif kind in ("dict", "counter"):
            names += [name for _, value in content for name in _tensor_names(value)]
        elif isinstance(content, list):
            names += [name for item in content for name in _tensor_names(item)]
    return names
