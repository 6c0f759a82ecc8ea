"""What is learnt: data to train and to test on, the loss, and how good a model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from scaledtrain import data
from scaledtrain.models import next_token_loss
from scaledtrain.schedule import LossFn

__all__ = ["Task", "accuracy", "digits", "stdlib_text"]


@dataclass(frozen=True)
class Task:
    """What ``data=...`` on the command line makes; your own function may return one, too.

    Args:
        train: samples to train on.
        test: samples to evaluate on; None: no evaluation.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar, the mean over the samples. None: the model
            returns its own loss, as ``model(**batch).loss``.
        metrics: name -> ``metric(outputs, targets)``, a scalar, the mean over the samples.
        sizes: arguments of models that follow from the data, by name. A model that needs one of
            them and is not given it gets it from here.
        gathers: whether ``dataset[[0, 5, 7]]`` is a batch, which beats collating by far.
        facts: what a reader of the results should know about the data.
    """

    train: Dataset[Any]
    test: Dataset[Any] | None = None
    loss_fn: LossFn | None = F.cross_entropy
    metrics: Mapping[str, Callable[[Any, Any], Tensor]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    gathers: bool = False
    facts: Mapping[str, str | int] = field(default_factory=dict)

    def train_loader(self, batch_size: int) -> DataLoader[Any]:
        """Batches in random order."""
        return self._loader(self.train, batch_size, shuffle=True)

    def test_loader(self, batch_size: int) -> DataLoader[Any] | None:
        """Batches in order; None if there is nothing to test on."""
        return None if self.test is None else self._loader(self.test, batch_size, shuffle=False)

    def _loader(self, dataset: Dataset[Any], batch_size: int, shuffle: bool) -> DataLoader[Any]:
        if isinstance(dataset, IterableDataset):
            return DataLoader(dataset, batch_size=batch_size)
        if not self.gathers:
            return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)
        order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)  # type: ignore[arg-type]
        batches = BatchSampler(order, batch_size, drop_last=False)
        return DataLoader(dataset, sampler=batches, batch_size=None)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose largest output is at the target.

    Args:
        outputs: float ``[n, n_classes]``.
        targets: int64 ``[n]``.
    """
    return (outputs.argmax(dim=1) == targets).double().mean()


def digits(as_images: bool = True) -> Task:
    """Which digit an 8x8 image shows; see `scaledtrain.data.digits`.

    Args:
        as_images: whether a sample is ``[1, 8, 8]``, rather than ``[64]``.
    """
    train, test = data.digits("train", as_images), data.digits("test", as_images)
    sizes = {"in_features": 64, "out_features": 10, "n_classes": 10}
    return Task(
        train,
        test,
        metrics={"accuracy": accuracy},
        sizes={**sizes, "channels": 1} if as_images else sizes,
        gathers=True,
        facts={"train_samples": len(train), "test_samples": len(test)},
    )


def stdlib_text(
    sequence_length: int = 128,
    level: Literal["byte", "char"] = "byte",
    max_train_bytes: int | None = None,
    max_test_bytes: int | None = None,
) -> Task:
    """The next byte or character of Python's own source; see `scaledtrain.data.stdlib_text`.

    Args:
        sequence_length: tokens in a sample.
        level: what a token is.
        max_train_bytes: read only so much to train on; None: all.
        max_test_bytes: read only so much to evaluate on; None: all.
    """
    train = data.stdlib_text("train", sequence_length, level, max_train_bytes)
    test = data.stdlib_text("test", sequence_length, level, max_test_bytes)
    return Task(
        train,
        test,
        loss_fn=next_token_loss,
        sizes={"vocab_size": train.vocab_size, "sequence_length": sequence_length},
        gathers=True,
        facts={
            "train_samples": len(train),
            "test_samples": len(test),
            "train_sha256": train.fingerprint,
            "test_sha256": test.fingerprint,
        },
    )
