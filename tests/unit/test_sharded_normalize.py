"""Normalising on the fly: equal to NumPy on the whole array."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from scaledtrain.data import (
    Column,
    Normalization,
    Ragged,
    ShardedDataset,
    ShardedLoader,
    ShardWriter,
    compute_statistics,
)
from scaledtrain.data.sharded.columns import DTYPES, Array
from scaledtrain.errors import ConfigError, DataError

N = 120
RANDOM = np.random.default_rng(1)
MIX = RANDOM.normal(0, 1, (6, 6))
X = (RANDOM.normal(0, 1, (N, 6)) @ MIX + 100).astype(np.float32)
IMAGES = RANDOM.integers(0, 256, (N, 3, 4, 2)).astype(np.uint8)
POINTS = [RANDOM.normal([5, -5], [1, 3], (i % 4, 2)) for i in range(N)]
# The result is float32, whose numbers near 1 are 1.2e-7 apart.
FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    columns = {"points": Column("float64", (2,), ragged=True)}
    with ShardWriter(folder, columns, shard_samples=50) as writer:
        writer.write_batch({"x": X, "image": IMAGES, "points": POINTS, "i": range(N)})
    compute_statistics(folder, covariance=["x", "image", "points"])
    return folder


def whole(folder: Path, column: str, how: Any, **options: Any) -> Array:
    data = ShardedDataset(folder, [column], normalize={column: how}, **options)
    values = data[:][column]
    values = values.values if isinstance(values, Ragged) else values
    assert values.dtype == torch.float32
    return values.numpy()


def white(values: Array, method: str, eps: float) -> Array:
    """By NumPy, of float64 ``[n, features]``."""
    variances, vectors = np.linalg.eigh(np.cov(values.T, bias=True))
    roots = 1 / np.sqrt(variances + eps * variances.mean())
    rotated = (values - values.mean(0)) @ vectors * roots
    return rotated @ vectors.T if method == "zca" else rotated[:, ::-1]


class TestAgainstNumPy:
    def test_zero_center(self, folder: Path) -> None:
        x = X.astype(np.float64)
        np.testing.assert_allclose(
            whole(folder, "x", "zero_center"), x - x.mean(0), rtol=1e-6, atol=1e-5
        )

    def test_standardize(self, folder: Path) -> None:
        points = np.concatenate(POINTS)
        for column, values, axes in (
            ("x", X, 0),
            ("image", IMAGES, (0, 2, 3)),
            ("points", points, 0),
        ):
            mean = values.mean(axes, np.float64, keepdims=True)
            std = values.std(axes, np.float64, keepdims=True)
            found = whole(folder, column, "standardize")
            np.testing.assert_allclose(found, (values - mean) / std, **FLOAT32)
            with_eps = whole(folder, column, Normalization("standardize", eps=0.5))
            expected = (values - mean) / np.sqrt(std**2 + 0.5 * (std**2).mean())
            np.testing.assert_allclose(with_eps, expected, **FLOAT32)

    @pytest.mark.parametrize("method", ["zca", "pca"])
    @pytest.mark.parametrize("eps", [None, 0.0, 0.1])
    def test_whiten(self, method: Any, eps: float | None, folder: Path) -> None:
        how = Normalization("whiten", method=method, eps=eps)
        x = X.astype(np.float64)
        pixels = IMAGES.transpose(0, 2, 3, 1).astype(np.float64)
        points = np.concatenate(POINTS)
        for column, values in (("x", x), ("image", pixels), ("points", points)):
            found = whole(folder, column, how)
            found = found.transpose(0, 2, 3, 1) if column == "image" else found
            found = found.reshape(-1, values.shape[-1])
            expected = white(values.reshape(found.shape), method, 1e-6 if eps is None else eps)
            if method == "pca":  # the sign of each component is free
                expected = expected * np.sign((expected * found).sum(0))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            if eps == 0:  # uncorrelated, of variance 1
                identity = np.eye(found.shape[1])
                np.testing.assert_allclose(np.cov(found.T, bias=True), identity, atol=1e-4)

    def test_of_one_number_for_a_whole_column(self, folder: Path) -> None:
        statistics = compute_statistics(folder, axis=None, save=False)
        found = whole(folder, "image", "standardize", statistics=statistics)
        np.testing.assert_allclose(found, (IMAGES - IMAGES.mean()) / IMAGES.std(), **FLOAT32)

    def test_a_large_mean_costs_no_digits(self, tmp_path: Path) -> None:
        """Numbers of 2^24 have no fraction in float32, their mean has: 2^24 + 2.4."""
        values = 2**24 + np.array([0, 2, 2, 4, 4], np.float32)
        with ShardWriter(tmp_path) as writer:
            writer.write_batch({"v": values})
        compute_statistics(tmp_path)
        assert float(np.float32(2**24 + 2.4)) == 2**24 + 2
        expected = [-2.4, -0.4, -0.4, 1.6, 1.6]
        np.testing.assert_allclose(whole(tmp_path, "v", "zero_center"), expected, rtol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_every_kind_of_number(self, dtype: str, tmp_path: Path) -> None:
        values = torch.tensor([0, 1, 1, 3, 9]) % (2 if dtype == "bool" else 10)
        with ShardWriter(tmp_path, {"v": Column(dtype)}) as writer:
            writer.write_batch({"v": values.to(getattr(torch, dtype))})
        compute_statistics(tmp_path)
        array = values.numpy()
        found = whole(tmp_path, "v", "standardize")
        np.testing.assert_allclose(found, (array - array.mean()) / array.std(), **FLOAT32)


class TestEverywhereTheSame:
    @pytest.mark.parametrize("column", ["x", "image", "points"])
    @pytest.mark.parametrize("kind", ["standardize", "whiten"])
    def test_samples_batches_iteration_and_loaders(
        self, column: str, kind: Any, folder: Path
    ) -> None:
        data = ShardedDataset(folder, [column, "i"], normalize={column: kind})

        def rows(batch: Any) -> list[Any]:
            values = batch[column]
            return values.unbind() if isinstance(values, Ragged) else list(values)

        expected = rows(data[:])
        samples = [data[i][column] for i in range(N)]
        iterated = [sample[column] for sample in data]
        mixed = {}
        for batch in ShardedLoader(data, 7, block_bytes=2_000, buffer_bytes=8_000):
            mixed |= dict(zip(batch["i"].tolist(), rows(batch), strict=True))
        for one in (samples, iterated, [mixed[i] for i in range(N)]):
            for found, value in zip(one, expected, strict=True):
                torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rows(pickle.loads(pickle.dumps(data))[:])[9], expected[9])

    def test_in_a_data_loader(self, folder: Path) -> None:
        data = ShardedDataset(folder, ["x"], normalize={"x": "standardize"}, as_tuple=True)
        batches = BatchSampler(SequentialSampler(data), 50, drop_last=False)
        found = torch.cat([x for (x,) in DataLoader(data, sampler=batches, batch_size=None)])
        assert torch.equal(found, data[:][0])

    def test_crops(self, folder: Path) -> None:
        data = ShardedDataset(folder, normalize={"image": "standardize", "points": "zero_center"})
        crop = (slice(1, 3), slice(None, None, 2), 1)
        assert torch.equal(data.read(5, "image", crop), data[5]["image"][crop])
        assert torch.equal(data.read(7, "points", (slice(1, 3), 0)), data[7]["points"][1:3, 0])
        assert torch.equal(data.read(5, "x"), torch.from_numpy(X[5]))
        assert data.view(5, "image").tolist() == IMAGES[5].tolist(), "what is stored"
        with pytest.raises(ConfigError, match="column 'x' is whitened, which takes whole samples"):
            ShardedDataset(folder, normalize={"x": "whiten"}).read(0, "x")

    def test_test_data_with_the_statistics_of_training_data(
        self, folder: Path, tmp_path: Path
    ) -> None:
        with ShardWriter(tmp_path) as writer:
            writer.write_batch({"x": X[:9] + 1})
        statistics = ShardedDataset(folder).manifest.statistics
        found = whole(tmp_path, "x", "standardize", statistics=statistics)
        np.testing.assert_allclose(found, (X[:9] + 1 - X.mean(0, np.float64)) / X.std(0), rtol=1e-4)


class TestDegenerate:
    def test_a_constant_becomes_zero(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path) as writer:
            writer.write_batch({"v": [[0.1, 1.0], [0.1, 3.0]]})
        compute_statistics(tmp_path, covariance=["v"])
        for kind in ("standardize", "whiten"):
            found = whole(tmp_path, "v", kind)
            np.testing.assert_allclose(found, [[0, -1], [0, 1]], atol=1e-6)

    @pytest.mark.parametrize("eps", [None, 0.0])
    def test_a_covariance_of_less_than_full_rank(
        self, eps: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """4 features that are sums of 2: white in two directions, 0 in the others."""
        values = RANDOM.normal(0, 1, (50, 2)) @ RANDOM.normal(0, 1, (2, 4))
        with ShardWriter(tmp_path) as writer:
            writer.write_batch({"v": values})
        compute_statistics(tmp_path, covariance=["v"])
        with caplog.at_level(logging.WARNING):
            found = whole(tmp_path, "v", Normalization("whiten", "pca", eps))
        assert "covariance of column 'v' has rank 2 of 4" in caplog.text
        expected = np.diag([1.0, 1.0, 0.0, 0.0])
        np.testing.assert_allclose(np.cov(found.T, bias=True), expected, atol=1e-5)
        zca = whole(tmp_path, "v", Normalization("whiten", "zca", eps))
        variances = np.linalg.eigvalsh(np.cov(zca.T, bias=True))
        np.testing.assert_allclose(variances, [0, 0, 1, 1], atol=1e-5)

    def test_ragged_samples_that_are_empty(self, folder: Path) -> None:
        data = ShardedDataset(folder, ["points"], normalize={"points": "whiten"})
        assert data[0]["points"].shape == (0, 2)
        assert data[[0, 4]]["points"].offsets.tolist() == [0, 0, 0]


class TestMissing:
    @pytest.fixture
    def gaps(self, tmp_path: Path) -> Path:
        """Means 3 and 20, standard deviations 2 and 10; the ages' -1 is none."""
        with ShardWriter(tmp_path, {"age": Column("uint16")}) as writer:
            v = [[1.0, 10.0], [5.0, 30.0], [np.nan, 30.0], [3.0, 10.0]]
            writer.write_batch({"v": v, "age": np.array([10, 30, 65535, 20], np.uint16)})
        compute_statistics(tmp_path, missing="ignore", sentinels={"age": 65535}, covariance=["v"])
        return tmp_path

    def test_is_nan_unless_told_otherwise(self, gaps: Path) -> None:
        found = whole(gaps, "v", "zero_center")
        np.testing.assert_allclose(found, [[-2, -10], [2, 10], [np.nan, 10], [0, -10]])
        ages = whole(gaps, "age", "zero_center")
        np.testing.assert_allclose(ages, [-10, 10, np.nan, 0])
        data = ShardedDataset(gaps, normalize={"age": "zero_center"})
        assert data[2]["age"].isnan()
        assert data.read(2, "age").isnan()

    def test_is_filled(self, gaps: Path) -> None:
        v = whole(gaps, "v", Normalization("standardize", fill=0.0))
        assert v[2].tolist() == [0.0, 1.0]
        ages = whole(gaps, "age", Normalization("zero_center", fill=-7.5))
        assert ages.tolist() == [-10, 10, -7.5, 0]

    def test_before_whitening(self, gaps: Path) -> None:
        how = Normalization("whiten", fill=0.0, eps=0.0)
        found = whole(gaps, "v", how)
        complete = np.array([[1.0, 10.0], [5.0, 30.0], [3.0, 10.0]])
        np.testing.assert_allclose(found[[0, 1, 3]], white(complete, "zca", 0.0), atol=1e-5)
        assert np.isfinite(found[2]).all()
        assert np.isnan(whole(gaps, "v", "whiten")[2]).all(), "each has a part of the missing one"

    def test_is_an_error(self, gaps: Path) -> None:
        with pytest.raises(DataError, match="1 values of column 'age' in a batch are missing"):
            whole(gaps, "age", Normalization("standardize", fill="raise"))


@pytest.mark.parametrize(
    ("normalize", "told"),
    [
        ({"x": "standardise"}, "normalize is 'standardise'; it is one of zero_center, standardize"),
        ("standardize", "normalize is 'standardize'; it says it by column"),
        ({"z": "standardize"}, "normalize names 'z'; the columns are x, image"),
        (
            {"i": "whiten"},
            r"needs its covariance, .*compute_statistics\(folder, covariance=\['i'\]",
        ),
    ],
)
def test_a_mistake_is_told(normalize: Any, told: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        ShardedDataset(folder, normalize=normalize)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"method": "svd"}, "method is 'svd'"), ({"eps": -1.0}, "eps is -1"), ({"fill": "x"}, "fill")],
)
def test_options_that_cannot_be(options: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Normalization("whiten", **options)


def test_statistics_of_other_features_are_refused(folder: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write({"x": np.zeros(5, np.float32)})
    statistics = ShardedDataset(folder).manifest.statistics
    with pytest.raises(ConfigError, match=r"values of shape \[5\], but its statistics .* \[6\]"):
        ShardedDataset(tmp_path, normalize={"x": "standardize"}, statistics=statistics)
