"""What is learnt: data to train and to test on, the loss, and how good a model is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
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
from scaledtrain.data.sharded.manifest import MANIFEST
from scaledtrain.data.sharded.mixture import Stop
from scaledtrain.data.sharded.normalize import Normalization, NormalizationKind
from scaledtrain.data.sharded.order import Shuffle
from scaledtrain.data.sharded.storage import CACHE_BYTES
from scaledtrain.errors import ConfigError
from scaledtrain.measures import Metric
from scaledtrain.models import next_token_loss
from scaledtrain.schedule import LossFn

__all__ = ["Kind", "Task", "accuracy", "digits", "kind_of", "sharded", "stdlib_text"]

Kind = Literal["classification", "regression", "language_model"]
Samples = Dataset[Any] | data.Mixture
MakeLoader = Callable[[Samples, int, bool], Iterable[Any]]


@dataclass(frozen=True)
class Task:
    """What ``data=...`` on the command line makes; your own function may return one, too.

    Args:
        train: samples to train on.
        test: samples to evaluate on; None: no evaluation.
        loss_fn: ``loss_fn(outputs, targets)``, a scalar, the mean over the samples. None: the model
            returns its own loss, as ``model(**batch).loss``.
        metrics: name -> ``metric(outputs, targets)``, a scalar, the mean over the samples; or a
            metric of torchmetrics, which is of all samples.
        sizes: arguments of models that follow from the data, by name. A model that needs one of
            them and is not given it gets it from here.
        gathers: whether ``dataset[[0, 5, 7]]`` is a batch, which beats collating by far.
        facts: what a reader of the results should know about the data.
        make_loader: ``make_loader(dataset, batch_size, shuffle)``, its batches; None: a
            ``DataLoader``.
    """

    train: Samples
    test: Samples | None = None
    loss_fn: LossFn | None = F.cross_entropy
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    gathers: bool = False
    facts: Mapping[str, str | int] = field(default_factory=dict)
    make_loader: MakeLoader | None = None

    def train_loader(self, batch_size: int) -> Iterable[Any]:
        """Batches in random order."""
        return self._loader(self.train, batch_size, shuffle=True)

    def test_loader(self, batch_size: int) -> Iterable[Any] | None:
        """Batches in order; None if there is nothing to test on."""
        return None if self.test is None else self._loader(self.test, batch_size, shuffle=False)

    def _loader(self, dataset: Samples, batch_size: int, shuffle: bool) -> Iterable[Any]:
        if self.make_loader is not None:
            return self.make_loader(dataset, batch_size, shuffle)
        assert isinstance(dataset, Dataset), "a mixture comes with its make_loader"
        if isinstance(dataset, IterableDataset):
            return DataLoader(dataset, batch_size=batch_size)
        if not self.gathers:
            return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)
        order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)  # type: ignore[arg-type]
        batches = BatchSampler(order, batch_size, drop_last=False)
        return DataLoader(dataset, sampler=batches, batch_size=None)


def kind_of(batch: Any) -> Kind:
    """What a batch asks for: numbers, the next token at each place, or a class of each sample.

    Raises:
        ConfigError: it is not (inputs, targets) of tensors.

    Example:
        >>> import torch
        >>> kind_of((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])))
        'classification'
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
            if targets.is_floating_point():
                return "regression"
            are_tokens = not inputs.is_floating_point() and inputs.dim() > 1
            same = are_tokens and inputs.shape == targets.shape
            return "language_model" if same else "classification"
    raise ConfigError(
        f"a batch of the data is a {type(batch).__name__} from which nothing can be told of "
        "inputs and targets; it must be a pair of tensors, (inputs, targets)"
    )


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


def sharded(
    path: str | Mapping[str, float],
    test_path: str | None = None,
    inputs: str = "x",
    targets: str = "y",
    loss: Literal["cross_entropy", "mse", "next_token"] = "cross_entropy",
    n_classes: int | None = None,
    normalize: NormalizationKind | Normalization | None = None,
    balance_classes: Literal["draws", "loss"] | None = None,
    shuffle: Shuffle = "block",
    block_bytes: int = 2**20,
    buffer_bytes: int = 64 * 2**20,
    verify: bool = True,
    on_damage: Literal["raise", "skip"] = "raise",
    stop: Stop = "first_exhausted",
    infinite: bool = False,
    pad: Mapping[str, float] | None = None,
    bucket_by: str | None = None,
    max_tokens: int | None = None,
    cache: str | None = None,
    cache_bytes: str | int = CACHE_BYTES,
    retries: int = data.Remote.retries,
    timeout_seconds: float = data.Remote.timeout_seconds,
    total_seconds: float = data.Remote.total_seconds,
    storage_options: Mapping[str, Any] | None = None,
) -> Task:
    """Data of your own, also more than fit into memory; see `scaledtrain.data.ShardedDataset`.

    Args:
        path: folder, or URL, of the data set to train on, as `scaledtrain.data.ShardWriter` wrote
            it; or folder -> weight of several, which are mixed (`scaledtrain.data.Mixture`).
        test_path: one to evaluate on; None: no evaluation.
        inputs: column that the model is given: float, or tokens.
        targets: column that the loss compares its outputs with.
        loss: ``"cross_entropy"`` of classes, with the accuracy as a metric, ``"mse"``, or
            ``"next_token"`` of a language model.
        n_classes: how many classes, or tokens in the vocabulary; None: the model says.
        normalize: how the inputs are normalised, also to evaluate, with the statistics that
            `scaledtrain.data.compute_statistics` stored in ``path``: ``"zero_center"``,
            ``"standardize"``, ``"whiten"``, or a `scaledtrain.data.Normalization`.
        balance_classes: for classes of different sizes: ``"draws"``: train on samples drawn such
            that all classes come equally often (see `scaledtrain.data.ClassBalance`; in place of
            ``shuffle``); ``"loss"``: weigh each sample's loss by `scaledtrain.data.class_weights`
            of the data to train on, also to evaluate.
        shuffle: of the samples to train on; see `scaledtrain.data.ShardedLoader`, also for the
            rest.
        block_bytes: how long a read is.
        buffer_bytes: bytes of the blocks that are mixed with each other.
        verify: check what is read against its checksums.
        on_damage: what a damaged shard does.
        stop: when an epoch of several data sets ends.
        infinite: train on epochs that follow one another without an end.
        pad: column of samples of different lengths -> value that they are padded with.
        bucket_by: such a column: train on batches of similar length in it.
        max_tokens: the most tokens in a batch to train on, with padding.
        cache: folder for copies of a URL's shards; None: in the user's cache folder.
        cache_bytes: how many bytes of copies it may hold.
        retries: attempts after the first, for a file at a URL; see `scaledtrain.data.Remote`, also
            for the rest.
        timeout_seconds: an attempt that brings nothing for so long is given up.
        total_seconds: for all attempts for a file.
        storage_options: of fsspec for this kind of URL.

    Raises:
        ConfigError: a folder without a data set, or without these columns or their statistics, or
            samples of different lengths that are not padded, which no model here takes.
    """
    remote = data.Remote(
        retries, timeout_seconds, total_seconds, options=dict(storage_options or {})
    )

    def dataset(folder: str, statistics: data.Statistics | None = None) -> data.ShardedDataset:
        found = data.ShardedDataset(
            folder,
            [inputs, targets],
            as_tuple=True,
            verify=verify,
            on_damage=on_damage,
            normalize=None if normalize is None else {inputs: normalize},
            statistics=statistics,
            cache=cache,
            cache_bytes=cache_bytes,
            remote=remote,
        )
        for name, column in found.columns.items():
            if column.ragged and name not in (pad or {}):
                raise ConfigError(
                    f"column {name!r} of {folder} has samples of different lengths, which no model "
                    f"of scaledtrain.models takes; pad them with data.pad={{{name}: 0}}, write "
                    "them packed to one length, or return a Task of your own"
                )
        return found

    def mixture(weights: Mapping[str, float]) -> data.Mixture:
        if normalize is not None:
            raise ConfigError(
                f"normalize is {normalize!r}, but path names several data sets, each of which has "
                "statistics of its own; write them as one, or return a Task of your own whose data "
                "sets are all given the same statistics"
            )
        return data.Mixture([(dataset(name), weight) for name, weight in weights.items()], stop)

    def loader(samples: Any, batch_size: int, training: bool) -> data.ShardedLoader:
        return data.ShardedLoader(
            samples,
            batch_size,
            shuffle=shuffle if training else "none",
            balance=balance if training and balance_classes == "draws" else None,
            infinite=infinite and training,
            bucket_by=bucket_by if training else None,
            max_tokens=max_tokens if training else None,
            pad=pad,
            block_bytes=block_bytes,
            buffer_bytes=buffer_bytes,
        )

    train = dataset(path) if isinstance(path, str) else mixture(path)
    test = None
    if test_path is not None:
        test = dataset(
            test_path, None if isinstance(train, data.Mixture) else train.manifest.statistics
        )
    balance, loss_fn = None, _LOSSES[loss]
    if balance_classes is not None:
        if loss != "cross_entropy":
            raise ConfigError(
                f"balance_classes is {balance_classes!r}, but loss {loss!r} has no classes; it "
                "goes with cross_entropy"
            )
        if isinstance(train, data.Mixture):
            raise ConfigError(
                f"balance_classes is {balance_classes!r}, but path names several data sets; give "
                "them weights instead, or write them as one"
            )
        balance = data.ClassBalance(train, targets)
        if balance_classes == "loss":
            loss_fn = _WeightedClassLoss(data.class_weights(balance.counts, n_classes))
    facts = _facts("train", train) | ({} if test is None else _facts("test", test))
    return Task(
        train,
        test,
        loss_fn=loss_fn,
        metrics={"accuracy": accuracy} if loss == "cross_entropy" else {},
        sizes=_sizes(train.columns[inputs].shape, train.columns[targets].shape, loss, n_classes),
        facts=facts,
        make_loader=loader,
    )


def _facts(name: str, part: data.ShardedDataset | data.Mixture) -> dict[str, str | int]:
    """How many samples, and of what: manifests have the checksums of every byte."""
    sources = [part] if isinstance(part, data.ShardedDataset) else part.sources
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.folder.read(MANIFEST))
    return {f"{name}_samples": len(part), f"{name}_sha256": digest.hexdigest()}


def _class_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Labels may be of any whole dtype: bytes, to save space."""
    return F.cross_entropy(outputs, targets.long())


class _WeightedClassLoss:
    """The mean over the samples of each one's loss times the weight of its class.

    Not divided by the weights of the batch, as ``F.cross_entropy`` does: so the mean over several
    batches, or replicas, is that of all their samples.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weights = self._weights.to(outputs.device, outputs.dtype)
        return F.cross_entropy(outputs, targets.long(), weights, reduction="none").mean()


def _token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return next_token_loss(outputs, targets.long())


_LOSSES: Mapping[str, LossFn] = {
    "cross_entropy": _class_loss,
    "mse": F.mse_loss,
    "next_token": _token_loss,
}


def _sizes(
    inputs: tuple[int, ...], targets: tuple[int, ...], loss: str, n_classes: int | None
) -> dict[str, int]:
    """What models can know of their arguments."""
    sizes = {"in_features": math.prod(inputs)}
    if len(inputs) == 1:
        sizes["sequence_length"] = inputs[0]
    if len(inputs) == 3:
        sizes["channels"] = inputs[0]
    if loss == "mse":
        sizes["out_features"] = math.prod(targets)
    elif n_classes is not None:
        sizes |= dict.fromkeys(("n_classes", "out_features", "vocab_size"), n_classes)
    return sizes
