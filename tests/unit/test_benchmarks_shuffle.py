"""How well data are shuffled: what is measured, and the contenders."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks import shuffle as bench
from benchmarks.shuffle import (
    BATCH_SIZE,
    REPORT,
    WAYS,
    Layout,
    Run,
    displacement,
    from_buffer,
    imbalance,
    measure,
    plan,
    render,
)
from tests.unit.test_benchmarks import WHERE


def test_imbalance_by_hand() -> None:
    # 2 classes of 4, batches of 4, so 2 of each expected. 0000 1111: chi^2 = (2^2 + 2^2) / 2 = 4.
    # 0001 0111: (1 + 1) / 2 = 1. By chance: (2 - 1) (8 - 4) / (8 - 1) = 4/7.
    assert imbalance(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 4) == pytest.approx(4 / (4 / 7))
    assert imbalance(np.array([0, 0, 0, 1, 0, 1, 1, 1]), 4) == pytest.approx(1 / (4 / 7))
    assert imbalance(np.array([0, 1, 0, 1, 1, 0, 1, 0]), 4) == 0


def test_displacement_by_hand() -> None:
    # Each of 4 moves by 3, 1, 1, 3: a mean of 2, half of the data set
    assert displacement(np.array([3, 2, 1, 0])) == 0.5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [Layout([40, 7, 25, 28], 20), Layout([9, 1], 1)])
def test_every_way_gives_each_sample_once(way: str, layout: Layout) -> None:
    orders = [WAYS[way].order(layout, 3, epoch).tolist() for epoch in range(2)]
    for order in orders:
        assert sorted(order) == list(range(layout.samples))
    assert (orders[0] == orders[1]) == (way == "none" or (layout.buffer == 1 and way == "buffer"))


def test_a_sample_leaves_the_buffer_after_it_has_come() -> None:
    """What is given at place p has come by then: at most p + 20 samples have."""
    given = from_buffer(np.arange(200), 20, 20, random.Random(0))
    assert (given - np.arange(200)).max() < 20
    # It begins at 4 and takes two for one: at place p it has seen 4 + 2 p at most
    given = from_buffer(np.arange(200), 20, 4, random.Random(0))
    assert all(given[p] < 4 + 2 * p for p in range(8))


def test_streaming_s_ranges() -> None:
    """10 shards of 10: py1e spreads each over at most 1.25 buffers, py1s over itself."""
    for way, reach in (("py1e", 1.25 * 40), ("py1s", 10), ("py1b", 40 + 10)):
        order = WAYS[way].order(Layout([10] * 10, 40), 1, 0)
        for shard in range(10):
            places = np.flatnonzero(order // 10 == shard)
            assert places.max() - places.min() < reach


def test_block_shuffle_is_as_imbalanced_as_theory_says() -> None:
    """64 of 640 blocks of one label in a group: 1 + b / 64 x (1 - 64 / 640), about."""
    layout = Layout([1_000] * 100, 10_000)
    labels = np.arange(100_000) // 1_000
    orders = [WAYS["block"].order(layout, seed, 0) for seed in range(3)]
    found = np.mean([imbalance(labels[order], BATCH_SIZE) for order in orders])
    assert found == pytest.approx(1 + BATCH_SIZE / 64 * 0.9, rel=0.05)


def test_a_run_is_a_function_of_its_seed() -> None:
    first = measure("webdataset", 0.01, 1, epochs=1)
    assert first == measure("webdataset", 0.01, 1, epochs=1)
    assert first.train_loss != measure("webdataset", 0.01, 2, epochs=1).train_loss


def test_the_table_shows_means_and_errors() -> None:
    runs = [Run("block", 0.1, s, 1.5 + s, 40.0, 0.33, 0.2, 0.05 + 0.02 * s) for s in (0, 1)]
    text = render(runs, WHERE)
    # Deviation sqrt(0.5) over sqrt(2 seeds) is 0.5; of 5 and 7 it is 1
    assert "| ours, `block` | 10% | 2.00 ± 0.50 | 40.0 ± 0.0 | 0.330 ± 0.000 |" in text
    assert "| 0.200 ± 0.000 | 6.0 ± 1.0 |" in text
    assert "over 2 seeds" in text
    assert "py1e" not in text


def test_the_plan_has_a_row_for_each_size_of_a_buffer() -> None:
    assert plan(["full", "block"]) == [("full", 0.0), ("block", 0.01), ("block", 0.1)]


def test_the_shipped_readme_shows_the_shipped_results() -> None:
    assert REPORT.is_current()


def test_a_wrong_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "sorted"])
    assert "--only sorted: it can be some of none, full, block" in capsys.readouterr().err
