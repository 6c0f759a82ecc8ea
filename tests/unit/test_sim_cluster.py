"""Clusters as values: presets, what they are made of, and who dies when."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from scaledtrain.command_line import config_folder
from scaledtrain.errors import ConfigError
from scaledtrain.schema import Node, make, parse
from scaledtrain.sim import (
    Cluster,
    Constant,
    Failure,
    GivenFailures,
    Nic,
    Outage,
    RandomFailures,
    SlowWorkers,
    Topology,
    Wire,
    order_statistics,
    seconds_alone,
)

PRESETS = sorted((config_folder() / "cluster").glob("*.yaml"))


def load(file: Path, *overrides: str) -> Cluster:
    config = OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(list(overrides)))
    cluster = make(parse("cluster", OmegaConf.to_container(config), Node))
    assert isinstance(cluster, Cluster)
    return cluster


def preset(name: str, *overrides: str) -> Cluster:
    return load(config_folder() / "cluster" / f"{name}.yaml", *overrides)


class TestPresets:
    @pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
    def test_every_one_makes_a_cluster_that_computes_and_sends(self, file: Path) -> None:
        cluster = load(file)
        pace = cluster.pace(worker=1, seed=0)
        pace.begin_step()
        assert pace.seconds(0.0, 0.5) > 0
        assert seconds_alone(cluster.network(n_workers=8).path(0, 7), 1e6) > 0
        for outage in islice(cluster.outages(1, seed=0), 3):
            assert outage.dies_at > 0

    def test_laptop(self) -> None:
        network = preset("laptop").network(n_workers=4)
        assert seconds_alone(network.path(0, 3), 5e6) == pytest.approx(0.005068)  # 5 ms + 68 us

    def test_hosts_16x100g(self) -> None:
        cluster = preset("hosts_16x100g")
        # 1 GB over 128 ranks, 12.5 GB/s. A ring: 2 * 127/128 * 0.08 s + 254 * 15 us = 162.6 ms,
        # a tree: 2 * 0.08 s + 14 * 15 us = 160.2 ms, which is less.
        seconds = cluster.network(128).all_reduce_seconds(1e9, range(128))
        assert seconds == pytest.approx(0.16021)
        with pytest.raises(ConfigError, match="129 workers do not fit on 16 hosts x 8 ranks"):
            cluster.network(129)
        preset("hosts_16x100g", "topology.hosts=null").network(4096)

    @pytest.mark.parametrize("n_workers", [4, 8, 64])
    def test_sites_4x1g_has_four_sites_whatever_the_number_of_workers(self, n_workers: int) -> None:
        network = preset("sites_4x1g").network(n_workers)
        quarter = n_workers // 4
        # 125 kB over the uplinks: 30.05 ms + 1 ms
        for rank in range(quarter, n_workers, quarter):
            assert seconds_alone(network.path(0, rank), 125e3) == pytest.approx(0.03105)
        inside = network.path(0, quarter - 1)
        assert seconds_alone(inside, 125e3) < 0.001

    def test_volunteers(self) -> None:
        cluster = preset("volunteers")
        network = cluster.network(1000)
        # 2.5 MB/s out of a home; 12.5 MB/s into it
        assert seconds_alone(network.path(7, 0), 2.5e6) == pytest.approx(1.020)
        assert seconds_alone(network.path(0, 7), 12.5e6) == pytest.approx(1.015)
        assert list(cluster.outages(0, seed=0)) == []
        first = [next(cluster.outages(worker, seed=0)) for worker in range(1, 1000)]
        assert np.mean([o.dies_at for o in first]) == pytest.approx(7200, rel=0.1)

    def test_a_misspelt_key_is_told(self) -> None:
        with pytest.raises(ConfigError, match=r"'cluster.topology.ranks_per_hosts' \(did you mean"):
            preset("laptop", "topology.ranks_per_hosts=4")
        with pytest.raises(ConfigError, match="cluster.topology.port.bytes_per_second is 'fast'"):
            preset("laptop", "topology.port.bytes_per_second=fast")


class TestCluster:
    def cluster(self, **parts: Any) -> Cluster:
        nic = Nic(Wire(latency_seconds=0.0, gigabits_per_second=1.0))
        return Cluster(Constant(0.5), Topology(nic=nic), **parts)

    def test_a_straggler_makes_a_synchronous_step_exactly_so_much_longer(self) -> None:
        steps = order_statistics(self.cluster(speeds=SlowWorkers({3: 4.0})).pace, 8, n_steps=2)
        assert steps.tolist() == [0.5] * 7 + [2.0]  # the slowest: a quarter of the rate

    def test_without_failures_nobody_dies(self) -> None:
        assert list(self.cluster().outages(0, seed=0)) == []


class TestGivenFailures:
    def test_each_workers_own_in_the_order_of_time(self) -> None:
        failures = GivenFailures([Failure(1, 9.0), Failure(0, 3.0, 1.0), Failure(1, 2.0, 5.0)])
        assert list(failures.events(0, seed=0)) == [Outage(3.0, 4.0)]
        assert list(failures.events(1, seed=7)) == [Outage(2.0, 7.0), Outage(9.0, None)]
        assert list(failures.events(2, seed=0)) == []

    @pytest.mark.parametrize(
        ("failures", "told"),
        [
            ([(1, 2.0, 5.0), (1, 6.0, None)], "worker 1 dies at 6.0 s, but is away until 7.0 s"),
            ([(1, 2.0, None), (1, 6.0, None)], "worker 1 dies at 6.0 s, but is away for good"),
            ([(-1, 2.0, None)], "a failure of worker -1"),
            ([(1, -2.0, None)], "after -2.0 s cannot be"),
            ([(1, 2.0, 0.0)], "back_after_seconds of Failure is 0.0"),
        ],
    )
    def test_what_cannot_be_is_told(
        self, failures: Sequence[tuple[int, float, float | None]], told: str
    ) -> None:
        with pytest.raises(ConfigError, match=told):
            GivenFailures([Failure(*failure) for failure in failures])

    def test_in_a_config(self) -> None:
        listed = "failures.failures=[{worker: 2, seconds: 5, back_after_seconds: 2.5}]"
        target = "failures._target_=scaledtrain.sim.GivenFailures"
        assert list(preset("laptop", target, listed).outages(2, seed=0)) == [Outage(5.0, 7.5)]


class TestRandomFailures:
    def test_times_up_and_away_have_their_means(self) -> None:
        outages = list(islice(RandomFailures(10.0, 2.0).events(0, seed=0), 10_000))
        away = [o.returns_at - o.dies_at for o in outages if o.returns_at is not None]
        returns = [0.0, *(o.returns_at for o in outages if o.returns_at is not None)]
        up = [o.dies_at - since for o, since in zip(outages, returns, strict=False)]
        assert min(away) > 0
        assert min(up) > 0
        assert np.mean(up) == pytest.approx(10.0, abs=0.4)  # 4 of 10 / sqrt(10,000)
        assert np.mean(away) == pytest.approx(2.0, abs=0.08)

    def test_who_does_not_return_dies_once(self) -> None:
        (outage,) = RandomFailures(10.0).events(3, seed=0)
        assert outage.returns_at is None
        assert [outage] == list(RandomFailures(10.0).events(3, seed=0))
        assert [outage] != list(RandomFailures(10.0).events(3, seed=1))
        assert [outage] != list(RandomFailures(10.0).events(4, seed=0))

    def test_who_is_spared_does_not_die(self) -> None:
        failures = RandomFailures(10.0, spared=[0, 3])
        assert [len(list(failures.events(worker, seed=0))) for worker in range(5)] == [
            0,
            1,
            1,
            0,
            1,
        ]

    def test_what_cannot_be_is_told(self) -> None:
        with pytest.raises(ConfigError, match="mean_seconds_between_failures of RandomFailures"):
            RandomFailures(0.0)
        with pytest.raises(ConfigError, match="mean_seconds_to_return of RandomFailures is -1"):
            RandomFailures(1.0, -1.0)
