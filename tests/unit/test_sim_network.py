"""What messages and collectives cost, against arithmetic by hand."""

import math
from collections.abc import Sequence

import pytest

from scaledtrain.errors import ConfigError
from scaledtrain.sim import Network, Nic, Queue, Topology, Wire, bottleneck, seconds_alone

MB = 1e6
# 1 Gb/s is 125 MB/s: a message of 125 MB takes a second.
CARD = Nic(Wire(latency_seconds=0.001, gigabits_per_second=1.0))
PORT = Wire(latency_seconds=1e-5, bytes_per_second=1e9)
UPLINK = Wire(latency_seconds=0.030, gigabits_per_second=0.5)


def send(path: Sequence[Queue], now: float, n_bytes: float) -> float:
    """When a message has arrived that no other one comes between."""
    arrival = now
    head = now
    for queue in path:
        head, tail = queue.enter(head, n_bytes)
        arrival = max(arrival + queue.latency_seconds, tail)
    return arrival


class TestWire:
    def test_bandwidth_in_bytes(self) -> None:
        assert Wire(0.0, gigabits_per_second=8.0).bandwidth == 1e9
        assert Wire(0.0, bytes_per_second=5e9).bandwidth == 5e9
        assert Wire(0.0, gigabits_per_second=math.inf).bandwidth == math.inf

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            ({"latency_seconds": -1.0, "bytes_per_second": 1.0}, "latency_seconds of a link is -1"),
            ({"latency_seconds": 0.0}, "give one of them, and only one"),
            (
                {"latency_seconds": 0.0, "bytes_per_second": 1.0, "gigabits_per_second": 1.0},
                "give one of them",
            ),
            ({"latency_seconds": 0.0, "bytes_per_second": 0.0}, "bandwidth of a link is 0.0"),
            ({"latency_seconds": 0.0, "gigabits_per_second": math.nan}, "it must be positive"),
        ],
    )
    def test_what_cannot_be_is_told(self, arguments: dict[str, float], told: str) -> None:
        with pytest.raises(ConfigError, match=told):
            Wire(**arguments)


class TestQueue:
    def test_messages_leave_in_the_order_in_which_they_came(self) -> None:
        queue = Queue(Wire(latency_seconds=0.5, bytes_per_second=100.0))
        assert queue.enter(1.0, 200.0) == (1.5, 3.5)  # busy 1 to 3; each byte 0.5 s later
        assert queue.enter(2.0, 100.0) == (3.5, 4.5)  # waits until 3, busy to 4
        assert queue.enter(9.0, 100.0) == (9.5, 10.5)  # it was free long before
        assert queue.free_at == 10.0

    def test_without_a_limit_only_the_latency_is_left(self) -> None:
        queue = Queue(Wire(latency_seconds=0.5, bytes_per_second=math.inf))
        assert [queue.enter(1.0, 1e12), queue.enter(1.0, 1e12)] == [(1.5, 1.5), (1.5, 1.5)]


class TestMessages:
    def test_within_a_rank_there_is_no_way(self) -> None:
        network = Network(Topology(nic=CARD), n_ranks=2)
        assert network.path(1, 1) == []
        assert seconds_alone([], 1e9) == 0.0

    def test_alone_it_takes_the_latencies_and_the_slowest_link(self) -> None:
        topology = Topology(ranks_per_host=2, port=PORT, nic=CARD, sites=2, uplink=UPLINK)
        # Ranks 0 to 5 are in site 0 (hosts 0, 1, 2), 6 to 11 in site 1.
        expected = {
            (0, 1): 1e-5 + 0.125,  # one host: 125 MB at 1 GB/s
            (0, 2): 0.001 + 1.0,  # one site: the cards, 125 MB/s
            (0, 6): 0.001 + 0.030 + 2.0,  # two sites: the uplinks, 62.5 MB/s
        }
        for (src, dst), seconds in expected.items():
            network = Network(topology, n_ranks=12)
            path = network.path(src, dst)
            assert seconds_alone(path, 125 * MB) == pytest.approx(seconds)
            assert send(path, 3.0, 125 * MB) == pytest.approx(3.0 + seconds)
        assert bottleneck(network.path(0, 6)) is network.path(1, 11)[1]  # site 0's way out
        assert [len(network.path(0, dst)) for dst in (0, 1, 2, 6)] == [0, 2, 2, 4]

    def test_into_one_card_they_go_one_after_another(self) -> None:
        network = Network(Topology(nic=CARD), n_ranks=4)
        arrivals = [send(network.path(src, 0), 0.0, 125 * MB) for src in (1, 2, 3)]
        assert arrivals == pytest.approx([1.001, 2.001, 3.001])

    def test_into_two_cards_they_go_side_by_side(self) -> None:
        """Why a server is divided into shards: half the bytes into each of two cards."""
        network = Network(Topology(nic=CARD), n_ranks=4)
        arrivals = [
            send(network.path(src, shard), 0.0, 125 * MB / 2) for src in (2, 3) for shard in (0, 1)
        ]
        # Each sender's card: 0 to 0.5 for shard 0, 0.5 to 1 for shard 1. Into shard 0: 0 to 0.5,
        # 0.5 to 1; into shard 1: 0.5 to 1, 1 to 1.5.
        assert arrivals == pytest.approx([0.501, 1.001, 1.001, 1.501])

    def test_the_two_directions_of_a_card_do_not_disturb_each_other(self) -> None:
        network = Network(Topology(nic=CARD), n_ranks=2)
        arrivals = [send(network.path(*way), 0.0, 125 * MB) for way in ((0, 1), (1, 0))]
        assert arrivals == pytest.approx([1.001, 1.001])

    def test_ranks_of_one_host_share_its_card(self) -> None:
        network = Network(Topology(ranks_per_host=2, port=PORT, nic=CARD), n_ranks=6)
        arrivals = [send(network.path(*way), 0.0, 125 * MB) for way in ((0, 2), (1, 4))]
        assert arrivals == pytest.approx([1.001, 2.001])  # from host 0 to hosts 1 and 2

    def test_sites_share_their_uplink(self) -> None:
        network = Network(Topology(nic=CARD, sites=2, uplink=UPLINK), n_ranks=8)
        ways = ((0, 4), (1, 5), (6, 2))  # two out of site 0, one into it
        arrivals = [send(network.path(*way), 0.0, 125 * MB) for way in ways]
        assert arrivals == pytest.approx([2.031, 4.031, 2.031])

    def test_a_slow_way_in_counts_where_it_is(self) -> None:
        """A home: much in, little out; and one host with a card of its own."""
        home = Nic(
            egress=Wire(0.02, gigabits_per_second=0.01), ingress=Wire(0.01, gigabits_per_second=0.1)
        )
        network = Network(Topology(nic=home, nics={0: CARD}), n_ranks=3)
        # Out of a home 1.25 MB/s, into it 12.5 MB/s; host 0 has 125 MB/s both ways.
        assert send(network.path(1, 2), 0.0, 1.25 * MB) == pytest.approx(0.02 + 0.01 + 1.0)
        assert send(network.path(2, 0), 0.0, 1.25 * MB) == pytest.approx(0.02 + 1.0)
        assert send(network.path(0, 1), 0.0, 12.5 * MB) == pytest.approx(0.001 + 0.01 + 1.0)


class TestPlacement:
    def test_ranks_fill_hosts_and_sites_in_order(self) -> None:
        topology = Topology(ranks_per_host=2, port=PORT, nic=CARD, sites=3, uplink=UPLINK)
        placement = topology.placement(n_ranks=10)
        # rank * 3 // 10: sites of 4, 3 and 3 ranks, so of 2 hosts each.
        expected = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert [placement.of(rank)[1] for rank in range(10)] == expected
        assert [placement.of(rank)[0] for rank in range(10)] == [0, 0, 1, 1, 2, 2, 3, 4, 4, 5]
        assert placement.n_hosts == 6

    def test_fewer_ranks_than_sites(self) -> None:
        placement = Topology(nic=CARD, sites=4, uplink=UPLINK).placement(n_ranks=2)
        assert [placement.of(rank) for rank in range(2)] == [(0, 0), (1, 2)]

    @pytest.mark.parametrize(
        ("topology", "told"),
        [
            ({"nic": CARD, "sites": 0}, "sites of a topology is 0; it must be >= 1"),
            ({"nic": CARD, "ranks_per_host": 2}, "no port, but a host has several ranks"),
            ({"ranks_per_host": 8, "port": PORT}, "no nic, but there may be several hosts"),
            ({"nic": CARD, "sites": 2}, "no uplink, but there are several sites"),
            (
                {"nic": CARD, "sites": 4, "uplink": UPLINK, "hosts": 6},
                "6 hosts cannot be shared equally among 4 sites; take 8 hosts",
            ),
        ],
    )
    def test_what_cannot_be_is_told(self, topology: dict[str, object], told: str) -> None:
        with pytest.raises(ConfigError, match=told):
            Topology(**topology)  # type: ignore[arg-type]

    def test_more_ranks_than_there_is_room_for(self) -> None:
        host = Topology(ranks_per_host=8, port=PORT, hosts=1)
        Network(host, n_ranks=8)
        with pytest.raises(ConfigError, match=r"9 workers do not fit on 1 host x 8 .* at most 8"):
            Network(host, n_ranks=9)

    def test_hosts_that_do_not_send_cost_nothing(self) -> None:
        network = Network(Topology(nic=CARD), n_ranks=100_000)
        network.path(99_999, 0)
        assert len(network._queues) == 2


class TestCollectives:
    def network(self, algorithm: str, n_ranks: int = 8, **topology: object) -> Network:
        nic = {"nic": CARD, "algorithm": algorithm, **topology}
        return Network(Topology(**nic), n_ranks)  # type: ignore[arg-type]

    def test_ring(self) -> None:
        network, ranks = self.network("ring"), range(8)
        # 2 * 7/8 * 125 MB / 125 MB/s + 14 * 1 ms
        assert network.all_reduce_seconds(125 * MB, ranks) == pytest.approx(1.75 + 0.014)
        assert network.all_gather_seconds(125 * MB, ranks) == pytest.approx(7.0 + 0.007)
        assert network.broadcast_seconds(125 * MB, ranks) == pytest.approx(1.0 + 0.007)

    def test_tree(self) -> None:
        network = self.network("tree", n_ranks=9)
        # Eight ranks: 3 levels; nine: 4.
        assert network.all_reduce_seconds(125 * MB, range(8)) == pytest.approx(2.0 + 0.006)
        assert network.all_reduce_seconds(125 * MB, range(9)) == pytest.approx(2.0 + 0.008)
        assert network.all_gather_seconds(125 * MB, range(8)) == pytest.approx(7.0 + 0.003)
        assert network.broadcast_seconds(125 * MB, range(8)) == pytest.approx(1.0 + 0.003)

    def test_auto_takes_the_cheaper_one(self) -> None:
        network = self.network("auto")
        large, small = 125 * MB, 125.0  # a second, a microsecond
        assert network.all_reduce_seconds(large, range(8)) == pytest.approx(1.764)  # ring
        assert network.all_reduce_seconds(small, range(8)) == pytest.approx(0.006002)  # tree

    def test_one_rank_costs_nothing(self) -> None:
        network = self.network("auto")
        for cost in (
            network.all_reduce_seconds,
            network.all_gather_seconds,
            network.broadcast_seconds,
        ):
            assert cost(125 * MB, [3]) == 0.0

    def test_a_ring_is_as_slow_as_its_slowest_link(self) -> None:
        topology = {"ranks_per_host": 2, "port": PORT, "sites": 2, "uplink": UPLINK}
        network = self.network("ring", n_ranks=8, **topology)  # two hosts in each site
        n_bytes = 125 * MB
        # On one host: 2 * 1/2 * 0.125 s + 2 * 10 us
        assert network.all_reduce_seconds(n_bytes, [0, 1]) == pytest.approx(0.125 + 2e-5)
        # In one site each card is crossed once in each direction: 2 * 3/4 * 1 s + 6 * 1 ms
        assert network.all_reduce_seconds(n_bytes, range(4)) == pytest.approx(1.5 + 0.006)
        # In both: 2 * 7/8 * 2 s + 14 * 31 ms, in whatever order the ranks are named
        for ranks in (range(8), [5, 2, 7, 0, 1, 6, 3, 4]):
            assert network.all_reduce_seconds(n_bytes, ranks) == pytest.approx(3.5 + 0.434)

    def test_one_slow_card_slows_all(self) -> None:
        slow = Nic(Wire(latency_seconds=0.001, gigabits_per_second=0.1))
        network = self.network("ring", n_ranks=4, nics={2: slow})
        assert network.all_reduce_seconds(125 * MB, range(4)) == pytest.approx(15.0 + 0.006)
        assert network.all_reduce_seconds(125 * MB, [0, 1, 3]) == pytest.approx(4 / 3 + 0.004)
