"""Statistics of sharded data: equal to NumPy on the whole array, stored, and never stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaledtrain.data import (
    Column,
    Normalization,
    ShardedDataset,
    ShardWriter,
    Statistics,
    compute_statistics,
)
from scaledtrain.data.sharded import ColumnStatistics
from scaledtrain.data.sharded.manifest import MANIFEST, Manifest
from scaledtrain.data.sharded.storage import open_folder
from scaledtrain.errors import ConfigError, DataError
from tests.sharded_samples import damage, shard
from tests.worlds import World

N = 203
RANDOM = np.random.default_rng(0)
X = (RANDOM.normal(1e4, [1, 5, 0.1], (N, 3))).astype(np.float32)
IMAGES = RANDOM.integers(0, 256, (N, 2, 4, 3)).astype(np.uint8)
LABELS = RANDOM.integers(0, 5, N).astype(np.int16)
TOKENS = [RANDOM.normal(0, 1, (i % 4, 2)) for i in range(N)]


def write(folder: Path, **options: Any) -> Path:
    columns = {"tokens": Column("float64", (2,), ragged=True)}
    with ShardWriter(folder, columns, **{"shard_samples": 40, **options}) as writer:
        writer.write_batch({"x": X, "image": IMAGES, "label": LABELS, "tokens": TOKENS})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sharded"))


def assert_equals(found: ColumnStatistics, values: Any) -> None:
    """Values ``[n, *features]``; float64 on both sides, so only roundings of sums differ."""
    values = np.asarray(values, np.float64)
    assert (found.count == len(values)).all()
    assert not found.missing.any()
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.variance, values.var(0), rtol=1e-9)
    np.testing.assert_allclose(found.std, values.std(0), rtol=1e-9)
    assert found.minimum.tolist() == values.min(0).tolist()
    assert found.maximum.tolist() == values.max(0).tolist()


def bits(statistics: Statistics) -> Any:
    return statistics.to_json()


class TestAgainstNumPy:
    def test_by_feature_channel_pixel_and_column(self, folder: Path) -> None:
        found = compute_statistics(folder, axis={"image": -1}, save=False)
        assert (found.samples, found.shards) == (N, 6)
        assert_equals(found["x"], X)
        assert_equals(found["image"], IMAGES.reshape(-1, 3))
        assert_equals(found["label"], LABELS)
        assert_equals(found["tokens"], np.concatenate(TOKENS))
        for axis, by_feature in (
            (None, IMAGES.reshape(-1)),
            (0, IMAGES.transpose(0, 2, 3, 1).reshape(-1, 2)),
            ((0, 2), IMAGES.transpose(0, 2, 1, 3).reshape(-1, 2, 3)),
            ((0, 1, 2), IMAGES),
        ):
            assert_equals(
                compute_statistics(folder, ["image"], axis=axis, save=False)["image"], by_feature
            )

    def test_histograms(self, folder: Path) -> None:
        found = compute_statistics(folder, bins=16, save=False)
        for name, values in (("x", X), ("tokens", np.concatenate(TOKENS)), ("label", LABELS)):
            histogram = found[name].histogram
            assert histogram is not None
            for feature, row in enumerate(np.reshape(values, (len(values), -1)).T):
                expected, _ = np.histogram(row, histogram.edges[feature])
                assert histogram.counts[feature].tolist() == expected.tolist()
                assert expected.sum() == len(row)

    def test_covariance_and_class_counts(self, folder: Path) -> None:
        found = compute_statistics(
            folder, covariance=["x", "image"], classes=["label"], bins=0, save=False
        )
        covariance = found["x"].covariance
        assert covariance is not None
        expected = np.cov(X.astype(np.float64).T, bias=True)
        np.testing.assert_allclose(covariance.matrix, expected, rtol=1e-8, atol=1e-8)
        of_channels = found["image"].covariance
        assert of_channels is not None
        pixels = IMAGES.transpose(1, 0, 2, 3).reshape(2, -1).astype(np.float64)
        np.testing.assert_allclose(of_channels.matrix, np.cov(pixels, bias=True), rtol=1e-10)
        counts = dict(enumerate(np.bincount(LABELS).tolist()))
        assert found["label"].class_counts == counts
        assert found["x"].histogram is None

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "uint16", "uint32", "bool", "int64"])
    def test_of_every_kind_of_number(self, dtype: str, tmp_path: Path) -> None:
        values = torch.arange(12).reshape(6, 2).remainder(2 if dtype == "bool" else 100)
        with ShardWriter(tmp_path, {"v": Column(dtype, (2,))}, shard_samples=4) as writer:
            writer.write_batch({"v": values.to(getattr(torch, dtype))})
        assert_equals(compute_statistics(tmp_path)["v"], values.numpy())

    def test_one_sample(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path) as writer:
            writer.write({"v": [1.5, 2.5]})
        found = compute_statistics(tmp_path, covariance=["v"])["v"]
        assert_equals(found, [[1.5, 2.5]])
        assert found.covariance is not None
        assert found.covariance.matrix.tolist() == [[0, 0], [0, 0]]

    def test_ragged_samples_that_are_all_empty(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path, {"v": Column("float32", ragged=True)}) as writer:
            writer.write_batch({"v": [np.zeros(0, np.float32)] * 3})
        found = compute_statistics(tmp_path)["v"]
        assert (found.count, found.missing, found.variance.shape) == (0, 0, ())
        assert np.isnan([found.mean, found.variance, found.minimum, found.maximum]).all()
        assert ShardedDataset(tmp_path).manifest.statistics is not None


class TestMissing:
    @pytest.fixture
    def gaps(self, tmp_path: Path) -> Path:
        with ShardWriter(tmp_path, shard_samples=2) as writer:
            nan = np.nan
            writer.write_batch(
                {
                    "v": [[1.0, nan], [nan, nan], [5.0, nan], [6.0, nan]],
                    "age": [30, -1, -1, 50],
                }
            )
        return tmp_path

    def test_is_an_error_unless_told_otherwise(self, gaps: Path) -> None:
        with pytest.raises(DataError, match=r"shard-00000.*3 values of column 'v' are missing"):
            compute_statistics(gaps)
        with pytest.raises(DataError, match=r"1 values of column 'age' are missing"):
            compute_statistics(gaps, ["age"], sentinels={"age": -1})

    def test_is_counted_and_left_out(self, gaps: Path) -> None:
        found = compute_statistics(
            gaps, missing="ignore", sentinels={"age": -1}, classes=["age"], covariance=["v"]
        )
        v, age = found["v"], found["age"]
        assert v.count.tolist() == [3, 0]
        assert v.missing.tolist() == [1, 4]
        np.testing.assert_allclose(v.mean, [4, np.nan])
        np.testing.assert_allclose(v.variance, [14 / 3, np.nan])  # (9 + 1 + 4) / 3
        assert v.histogram is not None
        assert v.histogram.counts.sum(1).tolist() == [3, 0]
        assert v.covariance is not None
        assert v.covariance.count == 0, "no sample is whole"
        assert (age.count, age.missing, age.mean, age.minimum) == (2, 2, 40, 30)
        assert age.class_counts == {30: 1, 50: 1}

    def test_a_sentinel_is_rounded_as_the_values_are(self, tmp_path: Path) -> None:
        """The next numbers beside -9999 that bfloat16 has are -9984 and -10048."""
        columns = {"v": Column("bfloat16")}
        with ShardWriter(tmp_path, columns) as writer:
            writer.write_batch({"v": torch.tensor([1.0, -9999.0, 3.0], dtype=torch.bfloat16)})
        found = compute_statistics(tmp_path, missing="ignore", sentinels={"v": -9999})["v"]
        assert (found.count, found.missing, found.mean) == (2, 1, 2.0)
        how = Normalization("standardize", fill=9.0)
        dataset = ShardedDataset(tmp_path, normalize={"v": how})
        assert dataset.gather(np.arange(3))[0]["v"].tolist() == [-1.0, 9.0, 1.0]

    def test_infinity_is_not_missing(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path) as writer:
            writer.write_batch({"v": [1.0, -np.inf]})
        with pytest.raises(DataError, match="column 'v' has an infinite value"):
            compute_statistics(tmp_path, missing="ignore")

    def test_squares_beyond_float64(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path) as writer:
            writer.write_batch({"v": [0.0, 1e200]})
        with pytest.raises(DataError, match="from 0 to 1e.200, whose squares"):
            compute_statistics(tmp_path)


class TestStored:
    def test_in_the_manifest_every_bit_of_them(self, tmp_path: Path) -> None:
        write(tmp_path)
        found = compute_statistics(
            tmp_path, axis={"image": (0, 1, 2)}, covariance=["image"], classes=["label"]
        )
        stored = ShardedDataset(tmp_path).manifest.statistics
        assert stored is not None
        assert bits(stored) == bits(found)
        assert not list(tmp_path.glob("*unfinished*"))

    def test_columns_that_were_computed_before_stay(self, tmp_path: Path) -> None:
        write(tmp_path)
        compute_statistics(tmp_path, ["x"])
        assert list(compute_statistics(tmp_path, ["label"]).columns) == ["label"]
        stored = Manifest.load(open_folder(tmp_path)).current_statistics(tmp_path)
        assert sorted(stored.columns) == ["label", "x"]
        with pytest.raises(ConfigError, match="no statistics of column 'image', only of x, label"):
            stored["image"]

    def test_of_fewer_samples_than_there_are_now_are_an_error(self, tmp_path: Path) -> None:
        write(tmp_path)
        compute_statistics(tmp_path, ["x", "label"])
        write(tmp_path, resume=True)
        told = "are of 203 samples in 6 shards, but now there are 406 in 12; compute them again"
        with pytest.raises(ConfigError, match=told):
            ShardedDataset(tmp_path, normalize={"x": "standardize"})
        assert len(ShardedDataset(tmp_path)) == 406, "without them it can be read"
        compute_statistics(tmp_path, ["x"])
        ShardedDataset(tmp_path, normalize={"x": "standardize"})
        stored = Manifest.load(open_folder(tmp_path)).statistics
        assert stored is not None
        assert list(stored.columns) == ["x"], "the stale ones are gone"

    def test_there_are_none(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"has no statistics; compute them once: .*compute_"):
            ShardedDataset(folder, normalize={"x": "standardize"})

    def test_not_while_a_writer_is_at_work(self, tmp_path: Path) -> None:
        write(tmp_path)
        with (
            ShardWriter(tmp_path, resume=True),
            pytest.raises(ConfigError, match="another ShardWriter is at work"),
        ):
            compute_statistics(tmp_path)
        assert compute_statistics(tmp_path).samples == N, "it is free again"

    def test_nothing_changes_where_it_fails(self, tmp_path: Path) -> None:
        before = (write(tmp_path) / MANIFEST).read_bytes()
        damage(shard(tmp_path, 5), -1)
        with pytest.raises(DataError, match="shard-00005.safetensors is damaged"):
            compute_statistics(tmp_path)
        assert (tmp_path / MANIFEST).read_bytes() == before
        ShardWriter(tmp_path, resume=True).close()

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"samples": 203, "shards": 6', '"samples": -203, "shards": 6'),
            ('"axis": [0]', '"axis": [0, 1]'),
            ('"axis": [0]', '"axis": 0'),
            ('"count": [203, ', '"count": [-203, '),
            ('"count": [203, ', '"count": [203.5, '),
            ('"count": [203, ', '"count": [203, 203, '),
            ('"count": [203, ', f'"count": [{2**64}, '),
            ('"mean": [', '"mean": ["a", '),
            ('"histogram": {', '"histogram": {"exponent": 3, "_": '),
            ('"class_counts": [[', '"class_counts": [[1], ['),
        ],
    )
    def test_a_manifest_that_lies(self, old: str, new: str, tmp_path: Path) -> None:
        write(tmp_path)
        compute_statistics(tmp_path, ["x", "label"], classes=["label"])
        text = (tmp_path / MANIFEST).read_text()
        assert old in text
        with pytest.raises(DataError, match="is no manifest of a data set"):
            Manifest.from_json(text.replace(old, new, 1))


class TestOnManyRanks:
    def test_bits_do_not_depend_on_the_ranks(self, folder: Path) -> None:
        told: list[tuple[int, int]] = []
        options: dict[str, Any] = {"covariance": ["x", "tokens"], "classes": ["label"]}
        options |= {"axis": {"image": None}, "save": False}
        alone = compute_statistics(folder, **options, on_shard=lambda *at: told.append(at))
        assert told == [(done, 6) for done in range(1, 7)]
        for ranks in (1, 2, 4, 7):  # of 7, one has no shard
            found = World(ranks).run(
                lambda link: compute_statistics(folder, **options, group=link.group)
            )
            assert [bits(one) for one in found] == [bits(alone)] * ranks

    def test_ranks_store_once(self, tmp_path: Path) -> None:
        write(tmp_path)
        found = World(3).run(lambda link: compute_statistics(tmp_path, ["x"], group=link.group))
        assert bits(Manifest.load(open_folder(tmp_path)).current_statistics(tmp_path)) == bits(
            found[2]
        )

    def test_what_one_rank_finds_all_ranks_tell(self, tmp_path: Path) -> None:
        write(tmp_path)
        damage(shard(tmp_path, 1), -1)

        def told(link: Any) -> str:
            with pytest.raises(DataError) as error:
                compute_statistics(tmp_path, group=link.group)
            return str(error.value)

        each = World(3).run(told)
        assert all("shard-00001.safetensors is damaged" in one for one in each)
        assert [one.startswith("rank 1: ") for one in each] == [True, False, True]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"columns": ["z"]}, "no column 'z'"),
        ({"covariance": ["z"]}, "covariance names 'z'"),
        ({"classes": "label"}, "classes names 'label'; it is a collection"),
        ({"columns": ["x"], "sentinels": {"label": 0}}, "sentinels names 'label'"),
        (
            {"sentinels": {"label": 40_000}},
            "sentinel of column 'label' is 40000, which int16 cannot",
        ),
        ({"sentinels": {"label": 0.5}}, "sentinel of column 'label' is 0.5"),
        ({"sentinels": {"x": float("nan")}}, "NaN is missing anyway"),
        ({"axis": {"x": 1}}, r"axis is 1 for column 'x', whose values have the dims \[0\]"),
        ({"axis": {"label": 0}}, "axis is 0 for column 'label'"),
        ({"axis": {"image": (0, -3)}}, "names a dim twice"),
        ({"bins": 1}, "bins is 1"),
        ({"workers": -1}, "workers is -1"),
        ({"missing": "drop"}, "missing is 'drop'"),
        ({"classes": ["x"]}, "column 'x' is float32, but only whole numbers are classes"),
    ],
)
def test_a_mistake_is_told(options: dict[str, Any], told: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        compute_statistics(folder, **options)


def test_statistics_too_large_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write({"v": np.zeros(300_000, np.uint8), "label": 0})
    damage(shard(tmp_path, 0), -1)
    # 8 * 300_000^2, 8 * 64 * 300_000
    with pytest.raises(ConfigError, match="takes 720,000,000,000 bytes, more than 134,217,728"):
        compute_statistics(tmp_path, covariance=["v"], bins=0)
    with pytest.raises(ConfigError, match="64 bins of each of the 300000 .* 153,600,000 bytes"):
        compute_statistics(tmp_path)


def test_more_values_than_classes_can_be(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write_batch({"id": range(2**16 + 1)})
    with pytest.raises(ConfigError, match="more than 65536 different values"):
        compute_statistics(tmp_path, classes=["id"])
