"""How fast parameters and gradients move, and whether one rank carries more than the others.

python -m benchmarks.transport                          everything; results/ and README.md
python -m benchmarks.transport --only gloo              some of shared_memory, gloo, balance
python -m benchmarks.transport --quick                  does it run? Small tensors, stores nothing
python -m benchmarks.transport --table                  write README.md's table anew
python -m benchmarks.transport --check                  fail if README.md is not up to date
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    Report,
    Spread,
    provenance,
    python_module,
    rotated,
    run_group,
)
from scaledtrain import ParameterServer, Replica, Strategy, connect
from scaledtrain.comm.protocols import ServeOptions, Store
from scaledtrain.comm.serving.partition import Piece
from scaledtrain.server import Admission, Asynchronous, Server

MIB = 2**20
N_BYTES = 64 * MIB
PACKAGES = ("torch", "numpy")
SETTINGS = {"threads_per_rank": 1, "pinned": True, "n_bytes": N_BYTES}
TIMED = ("shared_memory", "gloo")
CASES = (*TIMED, "balance")


@dataclass(frozen=True)
class Nothing(Admission):
    """Rejects every gradient, so that a push costs its transport only."""

    def accepts(self, worker: int, staleness: int, server: Any) -> bool:
        return False


SERVERS: Mapping[str, Admission] = {"push and pull": Nothing(), "with SGD": Asynchronous()}

# What is held against what in the balance of four ranks.
LAYOUTS: Mapping[str, Callable[[], Strategy]] = {
    "one server": ParameterServer,
    "four shards": partial(ParameterServer, shards=4),
}


@dataclass(frozen=True)
class Exchange:
    """One contender in one round."""

    case: str
    contender: str
    round: int
    n_bytes: int
    """Each way."""
    seconds: list[float]
    """Of each repetition; empty in the balance."""
    sent_bytes: list[int]
    """By each rank, over sockets; in the balance only."""
    received_bytes: list[int]
    load_average: float
    """Of the machine over the last minute, when this began."""

    @property
    def imbalance(self) -> float:
        """Bytes in and out of the busiest rank over those of the average one."""
        both = [s + r for s, r in zip(self.sent_bytes, self.received_bytes, strict=True)]
        return max(both) / statistics.fmean(both)


# --- Two ranks: a worker, and the one beside the server ---------------------------------------


def parameters(n_bytes: int) -> list[Tensor]:
    """Four tensors of float32."""
    return [torch.zeros(n_bytes // 16) for _ in range(4)]


def work_timed(case: str, n_bytes: int, repeats: int, folder: Path) -> None:
    """One rank of two: rank 1 pushes and pulls, and does what that is held against."""
    with connect(transport="torch" if case == "gloo" else "shared_memory") as link:
        stores = {name: _serve(link, n_bytes, admission) for name, admission in SERVERS.items()}
        if link.info.rank == 0:
            _answer(link, case, n_bytes, repeats)
        else:
            calls: dict[str, Callable[[], None]] = {
                name: _push_and_pull(store, parameters(n_bytes)) for name, store in stores.items()
            }
            calls |= _send_and_receive(n_bytes) if case == "gloo" else _copies(n_bytes)
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for repeat in range(repeats):
                for name, call in rotated(list(calls.items()), repeat):
                    start = time.perf_counter()
                    call()
                    seconds[name].append(time.perf_counter() - start)
            kept = {name: values[2:] for name, values in seconds.items()}  # the first warm up
            (folder / "seconds.json").write_text(json.dumps(kept), encoding="utf-8")
            assert link.store is not None
            link.store.set("transport/done", "1")


def _serve(link: Any, n_bytes: int, admission: Admission) -> Store:
    module = nn.ParameterList(parameters(n_bytes))
    replica = Replica(module, partial(torch.optim.SGD, lr=0.1))

    def make_server(pieces: Sequence[Piece]) -> Server:
        return Server(replica.parameters, replica.updater, link.group.size, admission)

    store: Store = link.serve(replica.parameters, make_server, ServeOptions())
    return store


def _answer(link: Any, case: str, n_bytes: int, repeats: int) -> None:
    """Rank 0: send back what comes, then wait; the server has threads of its own."""
    if case == "gloo":
        tensor = torch.zeros(n_bytes // 4)
        for _ in range(repeats):
            dist.recv(tensor, src=1)
            dist.send(tensor, dst=1)
    link.store.wait(["transport/done"], timedelta(seconds=300))


def _push_and_pull(store: Store, tensors: Sequence[Tensor]) -> Callable[[], None]:
    """In this order: the answer to a pull says that the push before it has been dealt with."""
    version = 0

    def exchange() -> None:
        nonlocal version
        store.push(tensors, version)
        version = store.pull(tensors).version

    return exchange


def _send_and_receive(n_bytes: int) -> dict[str, Callable[[], None]]:
    tensor = torch.zeros(n_bytes // 4)

    def exchange() -> None:
        dist.send(tensor, dst=0)
        dist.recv(tensor, src=0)

    return {"send and receive": exchange}


def _copies(n_bytes: int) -> dict[str, Callable[[], None]]:
    """As many bytes as a push and a pull, copied into memory that is shared; and out again."""
    shared = torch.frombuffer(mmap.mmap(-1, n_bytes), dtype=torch.float32)
    first, second = torch.zeros(n_bytes // 4), torch.zeros(n_bytes // 4)

    def once() -> None:
        shared.copy_(first)
        shared.copy_(second)

    def through() -> None:
        shared.copy_(first)
        second.copy_(shared)
        shared.copy_(second)
        first.copy_(shared)

    return {"copy": once, "copy in and out": through}


# --- Four ranks: who carries how much ---------------------------------------------------------


def work_balance(layout: str, n_bytes: int, steps: int, folder: Path) -> None:
    """One rank of four: make steps without computing, and count the bytes of its sockets."""
    module = nn.ParameterList(parameters(n_bytes))
    replica = Replica(module, partial(torch.optim.SGD, lr=0.1))
    strategy = LAYOUTS[layout]()
    with connect(transport="torch") as link:
        strategy.attach(replica, link)
        strategy.start(max_steps=None)
        _steps(strategy, replica, 2)  # by then all connections are there
        dist.barrier()
        before = socket_bytes()
        dist.barrier()
        _steps(strategy, replica, steps)
        dist.barrier()
        after = socket_bytes()
        dist.barrier()
        moved = [a - b for a, b in zip(after, before, strict=True)]
        text = json.dumps(moved)
        (folder / f"rank{link.group.rank}.json").write_text(text, encoding="utf-8")


def _steps(strategy: Strategy, replica: Replica, count: int) -> None:
    for _ in range(count):
        strategy.before_forward()
        replica.zero_grad()
        replica.gradients()
        strategy.reduce_gradients()
        strategy.apply_gradients()
        strategy.after_step()


def socket_bytes() -> tuple[int, int]:
    """(sent and acknowledged, received) over all TCP connections of this process, since they began.

    The kernel's own counts: ``tcpi_bytes_acked`` and ``tcpi_bytes_received`` of ``tcp_info``.
    """
    sent = received = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # not a socket, or closed meanwhile
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as own:
                if own.type == socket.SOCK_STREAM and own.family != socket.AF_UNIX:
                    told = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                    acked, got = struct.unpack_from("QQ", told, 120)
                    sent, received = sent + acked, received + got
    return sent, received


# --- Measuring --------------------------------------------------------------------------------


def measure(case: str, number: int, is_quick: bool) -> list[Exchange]:
    """Run a case in fresh processes."""
    n_bytes = MIB if is_quick else N_BYTES
    if case in TIMED:
        load_average = os.getloadavg()[0]
        repeats = 4 if is_quick else 22
        with tempfile.TemporaryDirectory() as folder:
            _run(case, [case, str(n_bytes), str(repeats), folder], ranks=2)
            seconds = json.loads((Path(folder) / "seconds.json").read_text("utf-8"))
        return [
            Exchange(case, name, number, n_bytes, values, [], [], load_average)
            for name, values in seconds.items()
        ]
    return [_measure_balance(layout, number, n_bytes // 8, is_quick) for layout in LAYOUTS]


def _measure_balance(layout: str, number: int, n_bytes: int, is_quick: bool) -> Exchange:
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        _run("balance", [layout, str(n_bytes), "4" if is_quick else "20", folder], ranks=4)
        moved = [
            json.loads((Path(folder) / f"rank{rank}.json").read_text("utf-8")) for rank in range(4)
        ]
    sent, received = zip(*moved, strict=True)
    return Exchange(
        "balance", layout, number, n_bytes, [], list(sent), list(received), load_average
    )


def _run(case: str, arguments: Sequence[str], ranks: int) -> None:
    flag = "--work-balance" if case == "balance" else "--work-timed"
    command = python_module("benchmarks.transport", flag, *arguments)
    run_group(command, ranks, pinned=ranks == 2)


# --- What is shown ----------------------------------------------------------------------------


def speed_ratio(exchanges: Sequence[Exchange], case: str, who: str, against: str) -> Spread | None:
    """Rate of one over that of another, which moves as many bytes, within each round."""
    by_round: dict[int, dict[str, float]] = {}
    for e in exchanges:
        if e.case == case:
            by_round.setdefault(e.round, {})[e.contender] = statistics.median(e.seconds)
    both = [r for r in by_round.values() if who in r and against in r]
    return Spread.of([r[against] / r[who] for r in both])


def imbalance(exchanges: Sequence[Exchange], layout: str) -> Spread | None:
    """Busiest over average rank."""
    return Spread.of([e.imbalance for e in exchanges if e.contender == layout])


@dataclass(frozen=True)
class Bar:
    """What has to be reached: a least ratio of rates, or a largest imbalance."""

    text: str
    measured: Callable[[Sequence[Exchange]], Spread | None]
    limit: float
    is_least: bool = True

    def line(self, exchanges: Sequence[Exchange]) -> str:
        """A row of the table: what, how much, and whether it holds."""
        what = f"{self.text} {'≥' if self.is_least else '≤'} {self.limit:g}"
        spread = self.measured(exchanges)
        if spread is None:
            return f"| {what} | not measured | |"
        value = spread.median
        holds = value >= self.limit if self.is_least else value <= self.limit
        shown = f"{value:.2f} ({spread.low:.2f} to {spread.high:.2f})"
        return f"| {what} | {shown} | {'pass' if holds else '**MISSED**'} |"


BARS = (
    Bar(
        "one host: rate of push and pull / rate of a copy into shared memory",
        partial(speed_ratio, case="shared_memory", who="push and pull", against="copy"),
        0.8,
    ),
    Bar(
        "gloo over loopback: rate of push and pull / rate of send and receive",
        partial(speed_ratio, case="gloo", who="push and pull", against="send and receive"),
        0.8,
    ),
    Bar(
        "four server shards: bytes of the busiest rank / of the average rank",
        partial(imbalance, layout="four shards"),
        1.3,
        is_least=False,
    ),
)

_TITLES = {"shared_memory": "one host", "gloo": "gloo over loopback"}


def render(exchanges: Sequence[Exchange], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    parts = [provenance(where)]
    lines = ["| as many bytes up as down | MiB each way | ms | GB/s |", "|---|--:|--:|--:|"]
    for case in TIMED:
        for name in dict.fromkeys(e.contender for e in exchanges if e.case == case):
            rounds = [e for e in exchanges if (e.case, e.contender) == (case, name)]
            seconds = statistics.median(statistics.median(e.seconds) for e in rounds)
            n_bytes = rounds[0].n_bytes
            cells = f"{n_bytes / MIB:g} | {seconds * 1e3:.1f} | {2 * n_bytes / seconds / 1e9:.2f}"
            lines.append(f"| {_TITLES[case]}: {name} | {cells} |")
    if len(lines) > 2:
        parts.append("\n".join(lines))
    lines = ["| four ranks: bytes in and out | busiest / average rank |", "|---|--:|"]
    for layout in LAYOUTS:
        if spread := imbalance(exchanges, layout):
            lines.append(f"| {layout} | {spread.median:.2f} |")
    if len(lines) > 2:
        parts.append("\n".join(lines))
    rows = "\n".join(bar.line(exchanges) for bar in BARS)
    parts.append(f"What it has to reach:\n\n| | measured | |\n|---|---|---|\n{rows}")
    return "\n\n".join(parts) + "\n"


REPORT = Report("transport", Exchange, render)


# --- The command ------------------------------------------------------------------------------


def rounds(
    cases: Sequence[str], count: int, before: Sequence[Exchange], is_quick: bool
) -> Iterator[Exchange]:
    """Case after case, again and again; a later command adds rounds."""
    first = {c: max((e.round for e in before if e.case == c), default=-1) + 1 for c in cases}
    count = 1 if is_quick else count
    for number in range(count):
        for case in cases:
            for exchange in measure(case, number + first[case], is_quick):
                shown = (
                    f"{exchange.imbalance:10.2f} x the average"
                    if case == "balance"
                    else f"{statistics.median(exchange.seconds) * 1e3:10.2f} ms"
                )
                print(f"round {number + 1}/{count}  {case:14} {exchange.contender:18} {shown}")
                yield exchange


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("transport", __doc__, "1 MiB", rounds=5)
    add_some(parser, "only", CASES)
    parser.add_argument("--work-timed", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--work-balance", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.work_timed or options.work_balance:
        torch.set_num_threads(1)
        work = work_timed if options.work_timed else work_balance
        what, n_bytes, count, folder = options.work_timed or options.work_balance
        work(what, int(n_bytes), int(count), Path(folder))
        return 0
    measure_all = partial(rounds, options.only, options.rounds)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure_all)


if __name__ == "__main__":
    sys.exit(main())
