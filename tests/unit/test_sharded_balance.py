"""Classes of different sizes: weights, and draws that depend on seed, epoch and position alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaledtrain.data import (
    ClassBalance,
    ShardedDataset,
    ShardedLoader,
    ShardWriter,
    class_weights,
    compute_statistics,
)
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.errors import ConfigError, DataError
from tests.sharded_samples import damage, shard

SIZES = {0: 9_000, 3: 900, 7: 100}
N = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 samples of three classes, mixed."""
    folder = tmp_path_factory.mktemp("sharded")
    labels = np.repeat(list(SIZES), list(SIZES.values())).astype(np.uint8)
    np.random.default_rng(0).shuffle(labels)
    with ShardWriter(folder, shard_samples=3_000) as writer:
        writer.write_batch({"i": range(N), "label": labels, "x": np.zeros((N, 2), np.float32)})
    return folder


def balance(folder: Path, **options: Any) -> ClassBalance:
    return ClassBalance(ShardedDataset(folder), "label", **options)


def labels_of(folder: Path, indices: Any) -> Any:
    return ShardedDataset(folder)[indices]["label"].numpy()


def assert_drawn(times: int, draws: int, probability: float) -> None:
    """A binomial count: n p, give or take 5 sqrt(n p (1 - p)), once in 1.7 million wrong."""
    bound = 5 * math.sqrt(draws * probability * (1 - probability))
    assert abs(times - draws * probability) <= bound


class TestDraws:
    def test_classes_come_equally_often(self, folder: Path) -> None:
        own = balance(folder)
        assert own.counts == SIZES
        drawn = labels_of(folder, own.order(1).indices(0, 0, N))
        for label in SIZES:
            assert_drawn(int((drawn == label).sum()), N, 1 / 3)  # 3,333 +- 236

    def test_samples_of_a_class_come_equally_often(self, folder: Path) -> None:
        """Of 40,000 draws 1 / 300 each: 133 +- 58."""
        order = balance(folder).order(2)
        drawn = np.concatenate([order.indices(epoch, 0, N) for epoch in range(4)])
        times = np.bincount(drawn, minlength=N)
        rare = np.flatnonzero(labels_of(folder, np.arange(N)) == 7)
        assert len(rare) == 100
        for sample in rare:
            assert_drawn(int(times[sample]), 4 * N, 1 / 300)

    def test_by_given_weights(self, folder: Path) -> None:
        """9,000 * 1, 900 * 0, 100 * 30: three of four and one of four."""
        own = balance(folder, weights={0: 1, 3: 0, 7: 30})
        drawn = labels_of(folder, own.order(1).indices(0, 0, N))
        assert_drawn(int((drawn == 0).sum()), N, 3 / 4)
        assert_drawn(int((drawn == 7).sum()), N, 1 / 4)
        assert not (drawn == 3).any()
        last = balance(folder, weights={0: 0.1, 3: 0.1, 7: 0})
        assert not (labels_of(folder, last.order(1).indices(0, 0, N)) == 7).any()

    @given(st.integers(0, N), st.integers(0, N), st.integers(0, 3))
    @settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_a_place_is_the_same_whatever_is_asked_beside_it(
        self, folder: Path, start: int, stop: int, epoch: int
    ) -> None:
        start, stop = sorted((start, stop))
        order = balance(folder).order(5)
        part = order.indices(epoch, start, stop)
        assert part.tolist() == order.indices(epoch, 0, N)[start:stop].tolist()

    def test_seeds_and_epochs_differ(self, folder: Path) -> None:
        own = balance(folder)
        several = [own.order(s).indices(e, 0, N).tolist() for s in (0, 1) for e in (0, 1)]
        for i, one in enumerate(several):
            for other in several[:i]:
                equal = sum(a == b for a, b in zip(one, other, strict=True))
                # Sum of the squared probabilities: (1/9000 + 1/900 + 1/100) / 9 = 1 / 802.
                assert_drawn(equal, N, 1 / 802.1)
        assert balance(folder).order(1).indices(1, 0, N).tolist() == several[3]


class TestLoader:
    def loader(self, folder: Path, batch_size: int, **options: Any) -> ShardedLoader:
        return ShardedLoader(ShardedDataset(folder), batch_size, balance=balance(folder), **options)

    def test_an_epoch_has_the_draws_of_its_order(self, folder: Path) -> None:
        own = self.loader(folder, 300, seed=4)
        assert len(own) == 34
        for epoch in range(2):
            found = [i for batch in own for i in batch["i"].tolist()]
            assert found == own.order().indices(epoch, 0, N).tolist()

    def test_steps_hold_the_same_samples_for_any_number_of_ranks(self, folder: Path) -> None:
        def steps(ranks: int, start: int = 0) -> list[list[int]]:
            own = self.loader(folder, 800 // ranks)
            each = [
                ReplicaLoader(own, rank=r, replicas=ranks, seed=3).epoch(1, start)
                for r in range(ranks)
            ]
            return [
                [i for step in together for batch in step.microbatches for i in batch["i"].tolist()]
                for together in zip(*each, strict=True)
            ]

        one = steps(1)
        assert [len(step) for step in one] == [800] * 12 + [400]
        for ranks in (2, 4):
            assert steps(ranks) == one
            assert steps(ranks, start=5) == one[5:]

    def test_is_resumed_and_does_not_mistake_another_order_for_its_own(self, folder: Path) -> None:
        own = self.loader(folder, 500)
        iterator = iter(own)
        seen = [next(iterator)["i"].tolist() for _ in range(7)]
        iterator.close()  # type: ignore[attr-defined]
        state = own.state_dict()
        other = self.loader(folder, 500)
        other.load_state_dict(state)
        seen += [batch["i"].tolist() for batch in other]
        assert seen == [batch["i"].tolist() for batch in self.loader(folder, 500)]
        data = ShardedDataset(folder)
        weighted = ClassBalance(data, "label", {0: 1, 3: 1, 7: 2})
        for changed in ({}, {"balance": weighted}):
            with pytest.raises(ConfigError, match="another order of the samples"):
                ShardedLoader(data, 500, **changed).load_state_dict(state)


def test_of_another_data_set(folder: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write_batch({"label": [0, 1]})
    with pytest.raises(ConfigError, match="of a data set of 10000 samples, but this one has 2"):
        ShardedLoader(ShardedDataset(tmp_path), 2, balance=balance(folder))


def test_class_weights_of_a_data_set(folder: Path) -> None:
    statistics = compute_statistics(folder, ["label"], classes=["label"], save=False)
    counts = statistics["label"].class_counts
    assert counts == SIZES
    # 10,000 / (3 * 9,000), ...: each class has a third of all weight.
    expected = [10 / 27, 0, 0, 100 / 27, 0, 0, 0, 100 / 3]
    assert class_weights(counts).tolist() == pytest.approx(expected)
    assert class_weights(counts, n_classes=10).tolist() == pytest.approx([*expected, 0, 0])
    with pytest.raises(ConfigError, match="classes are 0 to 7, but .* weights for 0 to 4"):
        class_weights(counts, n_classes=5)
    with pytest.raises(ConfigError, match="classes are -1 to 0"):
        class_weights({-1: 3, 0: 2})
    with pytest.raises(ConfigError, match="no samples of any class"):
        class_weights({0: 0})


@pytest.mark.parametrize(
    ("column", "weights", "told"),
    [
        ("z", None, "column 'z' .* is not there"),
        ("x", None, "classes are whole numbers, one for each sample"),
        ("i", None, None),
        ("label", {0: 1.0}, r"for the classes \[0\], but column 'label' has \[0, 3, 7\]"),
        ("label", {0: 0, 3: 0, 7: 0}, "numbers >= 0, not all 0"),
        ("label", {0: 1, 3: 1, 7: -1}, "numbers >= 0"),
        ("label", {0: 1, 3: 1, 7: math.nan}, "numbers >= 0"),
    ],
)
def test_a_mistake_is_told(column: str, weights: Any, told: str | None, folder: Path) -> None:
    data = ShardedDataset(folder)
    if told is None:  # every sample a class of its own: allowed, and a draw from all samples
        own = ClassBalance(data, column, weights)
        assert sorted(set(own.order(0).indices(0, 0, N).tolist())) != list(range(N))
        return
    with pytest.raises(ConfigError, match=told):
        ClassBalance(data, column, weights)


def test_damage_is_told_or_left_out(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, shard_samples=2) as writer:
        writer.write_batch({"label": [0, 1, 0, 1, 1, 1]})
    damage(shard(tmp_path, 1), -1)
    with pytest.raises(DataError, match="shard-00001"):
        ClassBalance(ShardedDataset(tmp_path), "label")
    data = ShardedDataset(tmp_path, on_damage="skip")
    own = ClassBalance(data, "label")
    assert own.counts == {0: 1, 1: 3}
    drawn = {i for epoch in range(20) for i in own.order(0).indices(epoch, 0, 6).tolist()}
    assert drawn == {0, 1, 4, 5}
    assert sum(len(batch["label"]) for batch in ShardedLoader(data, 4, balance=own)) == 6
