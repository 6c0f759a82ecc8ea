"""Between the arguments and outputs of modules, and those of graphs: flat sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from scaledtrain.errors import ConfigError

__all__ = ["Pack", "Unpack", "one_or_all", "positional"]


class Unpack:
    """Leaves of the model's arguments.

    Args:
        spec: how they are nested.
        sizes: of each, one for each dim; None where it is free.
    """

    def __init__(self, spec: pytree.TreeSpec, sizes: Sequence[Sequence[int | None]]) -> None:
        self._spec = spec
        self._sizes = sizes

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        """Flat; ConfigError if they are not of the form that was traced."""
        arguments = args, dict(sorted(kwargs.items()))
        leaves, spec = pytree.tree_flatten(((arguments,), {}))
        if spec != self._spec:
            raise ConfigError(
                f"the model was traced with inputs of the form {self._spec}, but is given {spec}; "
                "give it batches of one kind"
            )
        for leaf, sizes in zip(leaves, self._sizes, strict=True):
            shape = leaf.shape if isinstance(leaf, Tensor) else ()
            if len(shape) != len(sizes) or any(
                size not in (None, own) for size, own in zip(sizes, shape, strict=True)
            ):
                wanted = ", ".join("any" if size is None else str(size) for size in sizes)
                raise ConfigError(
                    f"the model was traced for inputs of sizes [{wanted}], but is given "
                    f"{list(shape)}; its code fixes what is not any (len(x) does; x.shape[0] does "
                    "not): change it, or give it batches of one size"
                )
        return leaves


class Pack:
    """The model's outputs."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self._spec = spec

    def __call__(self, outputs: Sequence[Any]) -> Any:
        """As the model nests them."""
        return pytree.tree_unflatten(outputs, self._spec)


def positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
    """Tensors that a part before has returned."""
    assert not kwargs
    return args


def one_or_all(outputs: tuple[Any, ...]) -> Any:
    """What goes to the next part."""
    return outputs[0] if len(outputs) == 1 else outputs
