"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast, final

from torch import Tensor, nn

from scaledtrain.errors import ConfigError

__all__ = ["MLP"]


@final
class MLP(nn.Module):
    """Linear layers with a ReLU between each two; inputs are flattened beyond the batch dim.

    With widths ``w = (in_features, *hidden, out_features)`` it has
    ``sum((w[i] + 1) * w[i + 1])`` parameters.

    Args:
        in_features: Numbers in one sample, over all its dims: 64 for an 8x8 image.
        hidden: Widths of the hidden layers; an empty sequence makes it a linear model.
        out_features: Numbers in one output row, e.g. the number of classes.

    Raises:
        ConfigError: A width is below 1.

    Example:
        >>> import torch
        >>> model = MLP(64, [32, 16], 10)
        >>> tuple(model(torch.zeros(5, 1, 8, 8)).shape)
        (5, 10)
    """

    def __init__(self, in_features: int, hidden: Sequence[int], out_features: int) -> None:
        super().__init__()
        widths = (in_features, *hidden, out_features)
        if min(widths) < 1:
            raise ConfigError(
                f"MLP got the widths {widths} (in_features, *hidden, out_features); a layer of "
                "width 0 or less carries nothing: give widths of at least 1"
            )
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.in_features = in_features
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, inputs: Tensor) -> Tensor:
        """Map a batch of samples to logits.

        Args:
            inputs: Float ``[batch, ...]`` with ``in_features`` numbers in each sample.

        Returns:
            Float ``[batch, out_features]``.

        Raises:
            ConfigError: A sample has another size than ``in_features``.
        """
        return cast(Tensor, self.layers(_flat(inputs, self.in_features)))

    def pipeline_parts(self) -> list[nn.Module]:
        """Each linear layer with its ReLU, to be cut into stages."""
        layers = [*self.layers, nn.Identity()]
        pairs = list(zip(layers[::2], layers[1::2], strict=True))
        first = nn.Sequential(_Flatten(self.in_features), *pairs[0])
        return [first, *(nn.Sequential(*pair) for pair in pairs[1:])]


class _Flatten(nn.Module):
    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features

    def forward(self, inputs: Tensor) -> Tensor:
        return _flat(inputs, self.in_features)


def _flat(inputs: Tensor, in_features: int) -> Tensor:
    flat = inputs.flatten(start_dim=1)
    if flat.shape[1] != in_features:
        raise ConfigError(
            f"MLP got inputs of shape {tuple(inputs.shape)}, {flat.shape[1]} numbers a sample, "
            f"but was built for in_features={in_features}: build it for the data's size"
        )
    return flat
