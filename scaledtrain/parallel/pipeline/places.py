"""Parameters of modules, for a while replaced by other tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

__all__ = ["Places"]


class Places:
    """Where modules have some parameters.

    Args:
        modules: with all that is inside.
        parameters: to be found.
    """

    def __init__(self, modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> None:
        wanted = set(parameters)
        self._found = [
            (inner, name, parameter)
            for module in modules
            for inner in module.modules()
            for name, parameter in inner._parameters.items()
            if parameter is not None and parameter in wanted
        ]

    @contextmanager
    def holding(self, instead: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
        """Inside, modules compute with other tensors, of the same shapes."""
        for module, name, parameter in self._found:
            module._parameters[name] = instead[parameter]
        try:
            yield
        finally:
            for module, name, parameter in self._found:
                module._parameters[name] = parameter
