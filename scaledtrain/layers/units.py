"""Which of a layer's units are active, in whatever dim of its outputs they are."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Units"]


class Units:
    """Finds the units in what a model's modules return.

    A unit is one place of the last dim; behind a convolution, until the next linear layer, a
    channel. Before the first of them, a channel where there are more than three dims.

    Example:
        >>> import torch
        >>> units, images = Units(), torch.zeros(2, 3, 4, 4)
        >>> images[1, 2] = 1.0
        >>> units.passed(nn.Conv2d(1, 3, 1))
        >>> units.active(images != 0)
        tensor([False, False,  True])
    """

    def __init__(self) -> None:
        self._channels_first: bool | None = None  # None: not known

    def passed(self, module: nn.Module) -> None:
        """A module has been called; what comes next may be its outputs.

        Args:
            module: any.
        """
        if isinstance(module, (_ConvNd, nn.Linear)):
            self._channels_first = isinstance(module, _ConvNd)

    def active(self, nonzero: Tensor) -> Tensor:
        """Which units are not zero for every sample.

        Args:
            nonzero: which outputs are not, ``[batch, ...]``.

        Returns:
            One truth value for each unit.
        """
        dims = nonzero.dim()
        channels_first = dims > 3 if self._channels_first is None else self._channels_first
        dim = 1 if channels_first else dims - 1
        active = nonzero.flatten(dim + 1).any(-1) if dim < dims - 1 else nonzero
        return active.flatten(0, dim - 1).any(0)
