"""A small residual convolutional network without running statistics."""

from __future__ import annotations

from typing import cast, final

from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain.errors import ConfigError

__all__ = ["ConvNet"]

CHANNELS_PER_GROUP = 8


@final
class ConvNet(nn.Module):
    """A stem, two residual stages and a linear classifier, for images of any size.

    The second stage doubles the channels and halves the image; the mean over all positions then
    feeds the classifier, so one model takes 8x8 and 32x32 images alike. GroupNorm normalises each
    sample by itself: there are no running statistics, so data-parallel replicas have no buffers to
    agree on and a sample's output does not depend on its batch.

    With ``c`` channels, ``k`` classes and width ``w`` it has
    ``9cw + 2w`` (stem) ``+ 18w² + 4w`` (first stage) ``+ 56w² + 12w`` (second) ``+ 2wk + k`` (head)
    parameters.

    Args:
        channels: Channels of the input image: 1 for grey, 3 for colour.
        n_classes: Logits per image.
        width: Channels after the stem, a multiple of 8 (the size of a GroupNorm group).

    Raises:
        ConfigError: A size is below 1, or ``width`` is no multiple of 8.

    Example:
        >>> import torch
        >>> model = ConvNet(channels=1, n_classes=10, width=16)
        >>> tuple(model(torch.zeros(5, 1, 8, 8)).shape)
        (5, 10)

    References:
        He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385);
        Wu and He, "Group Normalization", 2018 (arXiv:1803.08494).
    """

    def __init__(self, channels: int, n_classes: int, width: int = 32) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("n_classes", n_classes)):
            if value < 1:
                raise ConfigError(f"ConvNet got {name}={value}; give a size of at least 1")
        if width < CHANNELS_PER_GROUP or width % CHANNELS_PER_GROUP:
            raise ConfigError(
                f"ConvNet got width={width}, which does not divide into GroupNorm groups of "
                f"{CHANNELS_PER_GROUP} channels: give a positive multiple of {CHANNELS_PER_GROUP}"
            )
        self.channels = channels
        self.stem = nn.Sequential(_conv3x3(channels, width), _group_norm(width), nn.ReLU())
        self.stages = nn.Sequential(
            _ResidualBlock(width, width, stride=1),
            _ResidualBlock(width, 2 * width, stride=2),
        )
        self.head = nn.Linear(2 * width, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map a batch of images to logits.

        Args:
            images: Float ``[batch, channels, height, width]``.

        Returns:
            Float ``[batch, n_classes]``.

        Raises:
            ConfigError: ``images`` has not four dims, or another number of channels.
        """
        _check(images, self.channels)
        features = self.stages(self.stem(images))
        return cast(Tensor, self.head(_mean(features)))

    def last_norms(self) -> list[nn.Module]:
        """The last normalisation layer of each residual branch; see `scaledtrain.optim`."""
        blocks = [block for block in self.stages if isinstance(block, _ResidualBlock)]
        return [block.branch[-1] for block in blocks]

    def pipeline_parts(self) -> list[nn.Module]:
        """The stem, each residual block, and the classifier, to be cut into stages."""
        first = nn.Sequential(_Check(self.channels), self.stem)
        return [first, *self.stages, nn.Sequential(_Mean(), self.head)]


class _Check(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        _check(images, self.channels)
        return images


class _Mean(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return _mean(features)


def _check(images: Tensor, channels: int) -> None:
    if images.dim() != 4 or images.shape[1] != channels:
        raise ConfigError(
            f"ConvNet got images of shape {tuple(images.shape)}, but takes "
            f"[batch, {channels}, height, width]: reshape the images or change channels"
        )


def _mean(features: Tensor) -> Tensor:
    return features.mean(dim=(2, 3))


class _ResidualBlock(nn.Module):
    """``relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))``."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv3x3(channels_in, channels_out, stride),
            _group_norm(channels_out),
            nn.ReLU(),
            _conv3x3(channels_out, channels_out),
            _group_norm(channels_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
                _group_norm(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.branch(x))


def _conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    # No bias: the norm that follows has one.
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)
