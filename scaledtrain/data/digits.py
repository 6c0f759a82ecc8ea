"""Handwritten digits, bundled with scikit-learn: a small real dataset without a download."""

from __future__ import annotations

from typing import Literal

import torch
from torch.utils.data import TensorDataset

from scaledtrain.errors import ConfigError

__all__ = ["digits"]

N_TEST = 360
SPLIT_SEED = 0
PIXEL_MAX = 16.0


def digits(split: Literal["train", "test"] = "train", as_images: bool = False) -> TensorDataset:
    """Load 1,797 grey 8x8 images of the digits 0 to 9, split once and for all.

    The split is stratified by label with a fixed seed: 1,437 samples to train on and 360 to test,
    the same ones in every process.

    A ``TensorDataset`` takes a list of indices and gathers the whole batch at once. That is many
    times faster than collating single samples::

        DataLoader(dataset, sampler=BatchSampler(RandomSampler(dataset), 32, drop_last=False),
                   batch_size=None)

    Args:
        split: ``"train"`` or ``"test"``.
        as_images: Whether a sample is an image with a channel dim, for a convnet, rather than flat.

    Returns:
        Pairs of pixels, float32 ``[64]`` or ``[1, 8, 8]`` in [0, 1], and a label, int64 scalar.
        A list of ``n`` indices gives float32 ``[n, 64]`` or ``[n, 1, 8, 8]`` and int64 ``[n]``.

    Raises:
        ConfigError: The split has another name, or scikit-learn is not installed.

    Example:
        >>> from torch.utils.data import BatchSampler, DataLoader, RandomSampler
        >>> train = digits("train", as_images=True)
        >>> batches = BatchSampler(RandomSampler(train), 32, drop_last=False)
        >>> images, labels = next(iter(DataLoader(train, sampler=batches, batch_size=None)))
        >>> tuple(images.shape), tuple(labels.shape)
        ((32, 1, 8, 8), (32,))

    References:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
        Repository, 1998 (its test set).
    """
    if split not in ("train", "test"):
        raise ConfigError(f"digits got split={split!r}, but has only two: give 'train' or 'test'")
    try:
        from sklearn import datasets, model_selection  # type: ignore[import, unused-ignore]
    except ImportError as error:
        raise ConfigError(
            f"digits({split!r}) reads the images that come with scikit-learn, which cannot be "
            "imported here: pip install 'scaledtrain[examples]'"
        ) from error
    bunch = datasets.load_digits()
    train_rows, test_rows = model_selection.train_test_split(
        range(len(bunch.target)), test_size=N_TEST, random_state=SPLIT_SEED, stratify=bunch.target
    )
    rows = train_rows if split == "train" else test_rows
    pixels = torch.tensor(bunch.data[rows], dtype=torch.float32) / PIXEL_MAX
    labels = torch.tensor(bunch.target[rows], dtype=torch.int64)
    return TensorDataset(pixels.view(-1, 1, 8, 8) if as_images else pixels, labels)
