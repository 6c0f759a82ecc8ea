"""What the benchmarks share: fresh processes, interleaved rounds, medians, stored results.

A contender runs in processes of its own, once per round; within a round all contenders of a case
run one after another, and the next round begins with another one. A contender's time is the median
over rounds of the median over blocks of steps; a ratio is taken within each round, where the two
ran a short while apart, and then the median over rounds.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import pty
import shlex
import socket
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
PICTURE = "picture.png"
T = TypeVar("T")


class BenchmarkError(Exception):
    """A measurement cannot be made, or is not worth anything."""


@dataclass(frozen=True)
class Measurement:
    """One contender in one round: what it did, and the time of each block of its steps."""

    workload: str
    ranks: int
    contender: str
    round: int
    steps_per_block: int
    block_seconds: list[float]
    losses: list[float]
    """Of each rank at a fixed step: shows that all contenders computed the same."""
    load_average: float
    """Of the machine over the last minute, when this began."""

    @property
    def case(self) -> tuple[str, int]:
        """Within a case everybody does the same work."""
        return self.workload, self.ranks

    @property
    def seconds(self) -> float:
        """Per step: the median block's."""
        return statistics.median(self.block_seconds) / self.steps_per_block


class Spread(NamedTuple):
    """A median, and between what it lies."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        return cls(statistics.median(values), min(values), max(values), len(values))


def times(measurements: Iterable[Measurement], case: tuple[str, int], who: str) -> Spread | None:
    """Seconds per step over the rounds; None if it was not measured."""
    return Spread.of([m.seconds for m in measurements if m.case == case and m.contender == who])


def ratios(
    measurements: Iterable[Measurement], case: tuple[str, int], above: str, below: str
) -> Spread | None:
    """Time of one contender over that of another, within each round that has both."""
    return Spread.of([a / b for a, b in _pairs(measurements, case, above, below)])


def differences(
    measurements: Iterable[Measurement], case: tuple[str, int], first: str, second: str
) -> Spread | None:
    """Seconds per step that the first takes more than the second, within each round."""
    return Spread.of([a - b for a, b in _pairs(measurements, case, first, second)])


def _pairs(
    measurements: Iterable[Measurement], case: tuple[str, int], first: str, second: str
) -> list[tuple[float, float]]:
    by_round: dict[int, dict[str, float]] = {}
    for m in measurements:
        if m.case == case:
            by_round.setdefault(m.round, {})[m.contender] = m.seconds
    rounds = [by_round[r] for r in sorted(by_round)]
    return [(r[first], r[second]) for r in rounds if first in r and second in r]


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The items from another one on, so that no contender is always first."""
    by %= max(len(items), 1)
    return [*items[by:], *items[:by]]


def check_losses(measurements: Iterable[Measurement], relative: float = 1e-4) -> None:
    """See that within each case everybody computed the same.

    Raises:
        BenchmarkError: two contenders' losses differ by more than rounding makes them differ.
    """
    first: dict[tuple[str, int], Measurement] = {}
    for m in measurements:
        one = first.setdefault(m.case, m)
        agree = len(m.losses) == len(one.losses) and all(
            abs(a - b) <= relative * abs(b) for a, b in zip(m.losses, one.losses, strict=False)
        )
        if not agree:
            raise BenchmarkError(
                f"{m.contender} (round {m.round}) and {one.contender} (round {one.round}) did not "
                f"compute the same in {m.workload} on {m.ranks} ranks: the losses are {m.losses} "
                f"and {one.losses}"
            )


def environment(packages: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where a measurement is made, without a word that names the machine."""
    return {
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _git("rev-parse", "--short", "HEAD") or "uncommitted",
        "dirty": _is_dirty(),
        "cpu": _cpu_model(),
        "cores": len(cores()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "settings": dict(settings),
    }


def provenance(where: Mapping[str, Any]) -> str:
    """When, of what and on what, in one sentence."""
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v)
    commit = where["commit"] + (" with changes" if where["dirty"] else "")
    return (
        f"{where['started'][:10]}, commit {commit}; {where['cpu']}, {where['cores']} cores, "
        f"{where['system']}; Python {where['python']}, {versions}."
    )


def _git(*arguments: str) -> str | None:
    with suppress(OSError):
        ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return ran.stdout.strip() if ran.returncode == 0 else None
    return None


def _is_dirty() -> bool:
    """Whether the commit alone does not say what was measured."""
    own = [":!benchmarks/results", ":!benchmarks/README.md"]  # written by the benchmark itself
    return _git("status", "--porcelain", "--", ".", *own) != ""


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


class ResultsFolder:
    """``<date>-<commit>/`` with command.txt, config.jsonl, environment.json, raw.jsonl, table.md.

    A line of command.txt is a command, and that of config.jsonl what its options came to. A line of
    raw.jsonl is one dataclass: what a benchmark writes down of each of its runs.

    A later run on the same day, commit and environment is added to the same folder.

    Args:
        parent: where the folders of one benchmark lie.
        where: what `environment` returned.
    """

    def __init__(self, parent: Path, where: Mapping[str, Any]) -> None:
        name = f"{where['started'][:10]}-{where['commit']}"
        self.path = parent / name
        more = 2
        while self.path.exists() and not _same(self.environment(), where):
            self.path = parent / f"{name}-{more}"
            more += 1
        if not self.path.exists():
            self.path.mkdir(parents=True)
            text = json.dumps(dict(where), indent=2) + "\n"
            (self.path / "environment.json").write_text(text, encoding="utf-8")

    @classmethod
    def newest(cls, parent: Path) -> ResultsFolder | None:
        """The folder whose first run began last; None if there is none."""
        folders = []
        for file in parent.glob("*/environment.json"):
            where = json.loads(file.read_text(encoding="utf-8"))
            folders.append((where["started"], file.parent))
        if not folders:
            return None
        folder = cls.__new__(cls)
        folder.path = max(folders)[1]
        return folder

    def environment(self) -> dict[str, Any]:
        where: dict[str, Any] = json.loads((self.path / "environment.json").read_text("utf-8"))
        return where

    def add_command(self, command: str, options: Mapping[str, Any]) -> None:
        """Note a command and its options, with those that were not given."""
        with (self.path / "command.txt").open("a", encoding="utf-8") as file:
            file.write(command + "\n")
        with (self.path / "config.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**self.environment()["settings"], **options}) + "\n")

    def add(self, record: DataclassInstance) -> None:
        """Write one down at once: a run that is cut short keeps what it has."""
        with (self.path / "raw.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def read(self, kind: Callable[..., T]) -> list[T]:
        """All records, in the order in which they were added.

        Args:
            kind: their dataclass.
        """
        raw = self.path / "raw.jsonl"
        if not raw.exists():
            return []
        return [kind(**json.loads(x)) for x in raw.read_text("utf-8").splitlines()]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return {**one, "started": ""} == {**other, "started": ""}


@dataclass(frozen=True)
class Report:
    """What one benchmark shows in README.md: made from its newest results, between two markers.

    Args:
        name: of the benchmark, its folder of results and its markers.
        kind: the dataclass of its records.
        render: records and environment -> Markdown.
        draw: records and file -> the picture that lies beside them; None: there is none.
        results: where the folders of all benchmarks lie.
        readme: the file with the markers.
    """

    name: str
    kind: Callable[..., Any]
    render: Callable[[Sequence[Any], Mapping[str, Any]], str]
    draw: Callable[[Sequence[Any], Path], None] | None = None
    results: Path = RESULTS
    readme: Path = README

    def open(self, where: Mapping[str, Any], options: Mapping[str, Any]) -> ResultsFolder:
        """The folder that a run in this environment writes to; it notes the command.

        Args:
            where: what `environment` returned.
            options: of the command, with those that were not given.
        """
        folder = ResultsFolder(self.results / self.name, where)
        command = shlex.join(["python", "-m", f"benchmarks.{self.name}", *sys.argv[1:]])
        folder.add_command(command, options)
        return folder

    def text(self) -> str:
        """What README.md has to show; a picture is named as README.md sees it."""
        folder = ResultsFolder.newest(self.results / self.name)
        if folder is None:
            return "No results are stored yet."
        text = self.render(folder.read(self.kind), folder.environment())
        if self.draw is None:
            return text
        picture = folder.path.relative_to(self.readme.parent) / PICTURE
        return f"{text}\n![{self.name}]({picture.as_posix()})\n"

    def write(self) -> None:
        """Write table.md, the picture, and what README.md shows."""
        text, made = self.readme.read_text(encoding="utf-8"), self.text()
        folder = ResultsFolder.newest(self.results / self.name)
        if folder is not None:
            records = folder.read(self.kind)
            table = self.render(records, folder.environment())
            (folder.path / "table.md").write_text(table, encoding="utf-8")
            if self.draw is not None:
                self.draw(records, folder.path / PICTURE)
        self.readme.write_text(replace_between(text, self.name, made), encoding="utf-8")

    def is_current(self) -> bool:
        """Whether README.md shows what the newest results say."""
        text = self.readme.read_text(encoding="utf-8")
        return replace_between(text, self.name, self.text()) == text

    def check(self) -> int:
        """The exit status of ``--check``."""
        if self.is_current():
            return 0
        print(f"benchmarks/README.md differs: run python -m benchmarks.{self.name} --table")
        return 1


def next_round(measurements: Iterable[Measurement], case: tuple[str, int]) -> int:
    """The number of the round that follows those already stored."""
    return max((m.round for m in measurements if m.case == case), default=-1) + 1


def replace_between(text: str, name: str, body: str) -> str:
    """Put ``body`` between ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        BenchmarkError: a marker is missing.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found and found_end):
        raise BenchmarkError(f"the text has no {begin} followed by {end}")
    return f"{head}{begin}\n{body.strip()}\n{end}{tail}"


def run_group(
    command: Sequence[str], ranks: int, timeout_seconds: float = 300.0, pinned: bool = True
) -> None:
    """Run a command as a job of fresh processes: as torchrun would, one thread each.

    Both output streams are a terminal, so that progress bars work as they do for a person.

    Args:
        command: the same for all ranks.
        ranks: how many.
        timeout_seconds: for all of it.
        pinned: a rank has one core to itself; else all of them share all cores.

    Raises:
        BenchmarkError: there are not enough cores, or a rank failed; with the end of what it said.
    """
    if pinned and ranks > len(cores()):
        raise BenchmarkError(f"{ranks} ranks need a core each, but there are {len(cores())}")
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TERM": "xterm",
    }
    if ranks > 1:
        shared |= {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "TORCHELASTIC_RUN_ID": "benchmark",  # by this Lightning knows torchrun's jobs
        }
    with _terminal() as (terminal, said):
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
                with _on_core(cores()[rank]) if pinned else nullcontext():
                    processes.append(
                        subprocess.Popen(
                            command,
                            cwd=ROOT,
                            env={**shared, **own},
                            stdin=subprocess.DEVNULL,
                            stdout=terminal,
                            stderr=terminal,
                        )
                    )
            failed = _wait(processes, time.monotonic() + timeout_seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if failed:
        text = b"".join(said).decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
        end = "\n".join(text.splitlines()[-40:])
        raise BenchmarkError(f"{' '.join(command)} {failed}; it said at last:\n{end}")


def _wait(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> str | None:
    """Wait for all; returns what went wrong. Polls seldom, to leave the cores to the ranks."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return f"failed on rank {rank} with status {code}"
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return "took too long"
        time.sleep(0.1)


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    """Processes started inside run on this core only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _terminal() -> Iterator[tuple[int, list[bytes]]]:
    """A terminal of 24 x 100 to write to, and a list that fills with what is written."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    said: list[bytes] = []

    def listen() -> None:
        with suppress(OSError):  # EIO: nobody has it open any more
            while data := os.read(ours, 65536):
                said.append(data)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        yield theirs, said
    finally:
        os.close(theirs)
        listener.join()
        os.close(ours)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def python_module(*arguments: str) -> list[str]:
    """A command that runs a module with this interpreter."""
    return [sys.executable, "-m", *arguments]
