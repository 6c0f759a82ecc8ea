"""How the benchmark of the transport counts bytes and makes its tables."""

from __future__ import annotations

import socket
import sys
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import transport as bench
from benchmarks.harness import README
from benchmarks.transport import LAYOUTS, Exchange, imbalance, render, socket_bytes, speed_ratio
from scaledtrain import Replica, connect
from scaledtrain.comm.protocols import ServeOptions
from tests.unit.test_benchmarks import WHERE


def timed(contender: str, milliseconds: float, round: int = 0, case: str = "gloo") -> Exchange:
    """Three repetitions, of which one was disturbed."""
    seconds = [milliseconds / 1e3, 1.0, milliseconds / 2e3]
    return Exchange(case, contender, round, 64 * bench.MIB, seconds, [], [], 0.0)


def balance(contender: str, sent: list[int], received: list[int]) -> Exchange:
    return Exchange("balance", contender, 0, bench.MIB, [], sent, received, 0.0)


def test_ratios_of_rates_are_taken_within_rounds() -> None:
    exchanges = [
        timed("push and pull", 100.0),
        timed("send and receive", 90.0),
        timed("push and pull", 200.0, round=1),
        timed("send and receive", 100.0, round=1),
    ]
    spread = speed_ratio(exchanges, "gloo", "push and pull", "send and receive")
    assert spread is not None
    assert spread == pytest.approx((0.7, 0.5, 0.9, 2))  # 90 / 100 and 100 / 200
    assert speed_ratio(exchanges, "shared_memory", "push and pull", "copy") is None


def test_the_busiest_rank_is_held_against_the_average_one() -> None:
    # A server on rank 0 of four: it takes 3 gradients and gives 3 sets of parameters of size 1, the
    # others give 1 and take 1. 6 over the mean of 6, 2, 2 and 2, which is 3.
    one = balance("one server", [3, 1, 1, 1], [3, 1, 1, 1])
    assert one.imbalance == 2.0
    # Four shards of size 1/4: every rank takes and gives 3 x 1/4 for its shard, and 3/4 + 3/4 as a
    # worker of the other three shards.
    assert balance("four shards", [6, 6, 6, 6], [6, 6, 6, 6]).imbalance == 1.0
    assert imbalance([one], "four shards") is None


def test_the_table_shows_rates_and_bars() -> None:
    exchanges = [
        timed("push and pull", 100.0),
        timed("send and receive", 90.0),
        timed("push and pull", 50.0, case="shared_memory"),
        timed("copy", 25.0, case="shared_memory"),
        balance("one server", [3, 1, 1, 1], [3, 1, 1, 1]),
        balance("four shards", [6, 6, 6, 6], [6, 6, 6, 6]),
    ]
    text = render(exchanges, WHERE)
    # 2 x 67,108,864 bytes in 0.1 s
    assert "| gloo over loopback: push and pull | 64 | 100.0 | 1.34 |" in text
    assert "| one server | 2.00 |" in text
    assert "copy into shared memory ≥ 0.8 | 0.50 (0.50 to 0.50) | **MISSED** |" in text
    assert "send and receive ≥ 0.8 | 0.90 (0.90 to 0.90) | pass |" in text
    assert "average rank ≤ 1.3 | 1.00 (1.00 to 1.00) | pass |" in text
    assert "average rank ≤ 1.3 | not measured | |" in render(exchanges[:5], WHERE)


@pytest.mark.parametrize("name", list(bench.SERVERS))
def test_a_push_and_a_pull_go_to_a_server_that_rejects_or_uses(name: str) -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    replica = Replica(model, partial(torch.optim.SGD, lr=0.5))
    tensors = [torch.ones(1, 2)]
    with connect() as link:
        store = link.serve(
            replica.parameters,
            lambda _: bench.Server(replica.parameters, replica.updater, 1, bench.SERVERS[name]),
            ServeOptions(),
        )
        exchange = bench._push_and_pull(store, tensors)
        exchange()
        # Rejected, the parameters stay 1; used, they become 1 - 0.5 x 1.
        assert tensors[0].tolist() == ([[1.0, 1.0]] if name == "push and pull" else [[0.5, 0.5]])
        exchange()  # of the version that was pulled
        assert tensors[0].tolist() == ([[1.0, 1.0]] if name == "push and pull" else [[0.25, 0.25]])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's counts are Linux's")
def test_the_bytes_of_sockets_are_counted_at_both_ends() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    one = socket.create_connection(listening.getsockname())
    other, _ = listening.accept()
    with listening, one, other:
        before = socket_bytes()
        one.sendall(b"x" * 1000)
        assert len(other.recv(1000, socket.MSG_WAITALL)) == 1000
        other.sendall(b"y" * 50)
        assert len(one.recv(50, socket.MSG_WAITALL)) == 50
        received = socket_bytes()[1] - before[1]
    assert received == 1050  # both ends are of this process


def test_the_copies_move_as_many_bytes_as_push_and_pull() -> None:
    calls = bench._copies(64)
    for call in calls.values():
        call()
    assert list(calls) == ["copy", "copy in and out"]


def test_contenders_of_the_readme_are_those_of_the_benchmark() -> None:
    text = README.read_text(encoding="utf-8")
    for name in (*bench.SERVERS, "copy", "copy in and out", "send and receive", *LAYOUTS):
        assert f"*{name}*" in text
    assert bench.REPORT.is_current()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "copy"], "--only copy: it can be some of shared_memory, gloo, balance"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_a_wrong_option_is_explained(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert text in capsys.readouterr().err
