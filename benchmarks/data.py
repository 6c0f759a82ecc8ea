"""How fast samples come from a disk and from the page cache, shuffled, and how they get there.

python -m benchmarks.data                          everything; results/ and README.md
python -m benchmarks.data --only 1KiB              some of 64KiB, 1KiB
python -m benchmarks.data --folder DIR             where the files go; default: the temporary one
python -m benchmarks.data --quick                  does it run? Little data, stores nothing
python -m benchmarks.data --table                  write README.md's table anew
python -m benchmarks.data --check                  fail if README.md is not up to date
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    Report,
    Spread,
    provenance,
    python_module,
    rotated,
    run_group,
)
from scaledtrain.data import ShardedDataset, ShardedLoader, ShardWriter

MIB = 2**20
N_BYTES = 1024 * MIB
PACKAGES = ("torch", "numpy", "xxhash")
SETTINGS = {"threads_per_rank": 1, "n_bytes": N_BYTES}


@dataclass(frozen=True)
class Case:
    """One kind of data."""

    sample_bytes: int
    batch_size: int


CASES: Mapping[str, Case] = {"64KiB": Case(65_536, 32), "1KiB": Case(1_024, 256)}
CACHES = ("cold", "warm")


@dataclass(frozen=True)
class Reading:
    """One contender in one round: a pass over all samples."""

    case: str
    cache: str
    contender: str
    round: int
    n_bytes: int
    samples: int
    seconds: float
    first_seconds: float
    """From opening the data to the first batch."""
    anonymous_bytes: int
    """The most memory beyond the page cache, more than before the data were opened."""
    cached_share: float
    """Of the files, in the page cache before the data were opened."""
    load_average: float

    @property
    def rate(self) -> float:
        """MiB a second."""
        return self.n_bytes / MIB / self.seconds


# --- The contenders ---------------------------------------------------------------------------

Batches = Iterator[Any]


def sequential(folder: Path, case: Case) -> Batches:
    """Every file from its beginning to its end, into one buffer; the kernel reads ahead."""
    buffer = memoryview(bytearray(MIB))
    for path in _files(folder):
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while n := file.readinto(buffer):
                yield buffer[:n]


def memory_map(folder: Path, case: Case) -> Batches:
    """One array, of which each batch is picked by NumPy, in an order that is fully random."""
    array = np.memmap(folder / "raw.bin", np.uint8, "r").reshape(-1, case.sample_bytes)
    order = np.random.default_rng(0).permutation(len(array))
    for start in range(0, len(order), case.batch_size):
        yield array[order[start : start + case.batch_size]]


def ours(folder: Path, case: Case, start: float = 0.0, **options: Any) -> Batches:
    """`ShardedLoader`, from that share of an epoch on."""
    data = ShardedDataset(folder, verify=options.pop("verify", True))
    loader = ShardedLoader(data, case.batch_size, **options)
    return loader.batches(0, int(start * len(loader)))


READERS: Mapping[str, Callable[[Path, Case], Batches]] = {
    "sequential read": sequential,
    "batched memory map": memory_map,
    "ours": ours,
    "ours, unchecked": partial(ours, verify=False),
    "ours, full shuffle": partial(ours, shuffle="full"),
    "ours, last tenth": partial(ours, start=0.9),
}


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*"))


def _chunks(case: Case, n_bytes: int) -> Iterator[np.ndarray[Any, Any]]:
    """All samples, 16 MiB at a time."""
    chunk = np.random.default_rng(0).integers(0, 256, 16 * MIB, np.uint8)
    chunk = chunk.reshape(-1, case.sample_bytes)
    for start in range(0, n_bytes // case.sample_bytes, len(chunk)):
        yield chunk[: n_bytes // case.sample_bytes - start]


def write_raw(folder: Path, case: Case, n_bytes: int) -> None:
    """One file, on the disk when this returns."""
    with open(folder / "raw.bin", "wb", buffering=0) as file:
        file.writelines(chunk.data for chunk in _chunks(case, n_bytes))
        os.fsync(file.fileno())


def write_ours(folder: Path, case: Case, n_bytes: int) -> None:
    """`ShardWriter`: the disk gets a shard while the next one is filled."""
    with ShardWriter(folder) as writer:
        for chunk in _chunks(case, n_bytes):
            writer.write_batch({"x": chunk})


WRITERS: Mapping[str, Callable[[Path, Case, int], None]] = {
    "raw write": write_raw,
    "our write": write_ours,
}


# --- Measuring --------------------------------------------------------------------------------


def cached_share(files: Sequence[Path]) -> float:
    """Which share of the files' pages is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = cached = 0
    for path in files:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
            n = -(-len(mapped) // mmap.PAGESIZE)
            flags = (ctypes.c_ubyte * n)()
            place = ctypes.c_char.from_buffer(mapped)
            address = ctypes.addressof(place)
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), flags):
                raise OSError(ctypes.get_errno(), f"mincore of {path}")
            del place
            pages, cached = pages + n, cached + int((np.frombuffer(flags, np.uint8) & 1).sum())
    return cached / max(1, pages)


def drop(files: Sequence[Path]) -> None:
    """Take the files out of the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill(files: Sequence[Path]) -> None:
    """Bring the files into the page cache."""
    for path in files:
        path.read_bytes()


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def read(contender: str, case: Case, cache: str, folder: Path) -> dict[str, Any]:
    """One pass; what a `Reading` has of it."""
    files = [folder / "raw.bin"] if contender == "batched memory map" else _files(folder)
    (drop if cache == "cold" else fill)(files)
    share = cached_share(files)
    before = most = anonymous_bytes()
    start = time.perf_counter()
    first = n_bytes = 0.0
    looked = start
    for batch in READERS[contender](folder, case):
        now = time.perf_counter()
        first = first or now - start
        n_bytes += batch["x"].nbytes if isinstance(batch, dict) else batch.nbytes
        if now - looked > 0.02:
            most, looked = max(most, anonymous_bytes()), now
    seconds = time.perf_counter() - start
    return {
        "n_bytes": int(n_bytes),
        "samples": int(n_bytes) // case.sample_bytes,
        "seconds": seconds,
        "first_seconds": first,
        "anonymous_bytes": most - before,
        "cached_share": share,
    }


def write(contender: str, case: Case, n_bytes: int, folder: Path) -> dict[str, Any]:
    """One writing; what a `Reading` has of it."""
    before = anonymous_bytes()
    start = time.perf_counter()
    WRITERS[contender](folder, case, n_bytes)
    seconds = time.perf_counter() - start
    return {
        "n_bytes": n_bytes,
        "samples": n_bytes // case.sample_bytes,
        "seconds": seconds,
        "first_seconds": 0.0,
        "anonymous_bytes": anonymous_bytes() - before,
        "cached_share": 0.0,
    }


def _work(contender: str, case: str, cache: str, n_bytes: str, folder: str) -> None:
    path = Path(folder)
    if contender in WRITERS:
        told = write(contender, CASES[case], int(n_bytes), path)
    else:
        told = read(contender, CASES[case], cache, path)
    (path / "told.json").write_text(json.dumps(told), encoding="utf-8")


def measure(case: str, number: int, n_bytes: int, parent: str | None) -> Iterator[Reading]:
    """All contenders of one case, each in a fresh process."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        todo = [(name, "disk") for name in rotated(list(WRITERS), number)]
        for cache in CACHES:
            todo += [(name, cache) for name in rotated(list(READERS), number)]
        for name, cache in todo:
            load_average = os.getloadavg()[0]
            work = ["--work", name, case, cache, str(n_bytes), folder]
            run_group(python_module("benchmarks.data", *work), 1, pinned=False)
            told = json.loads((Path(folder) / "told.json").read_text("utf-8"))
            yield Reading(case, cache, name, number, load_average=load_average, **told)


# --- What is shown ----------------------------------------------------------------------------


def rate_ratio(
    readings: Sequence[Reading], case: str, cache: str, who: str, against: str
) -> Spread | None:
    """Rate of one over that of another, within each round."""
    by_round: dict[int, dict[str, float]] = {}
    for r in readings:
        if (r.case, r.cache) == (case, cache):
            by_round.setdefault(r.round, {})[r.contender] = r.rate
    both = [r for r in by_round.values() if who in r and against in r]
    return Spread.of([r[who] / r[against] for r in both])


def _of_ours(readings: Sequence[Reading], case: str, name: str, value: str) -> Spread | None:
    found = [r for r in readings if (r.case, r.contender, r.cache) == (case, name, "cold")]
    return Spread.of([getattr(r, value) for r in found])


@dataclass(frozen=True)
class Bar:
    """What has to be reached: a least ratio of rates, or a largest value."""

    text: str
    measured: Callable[[Sequence[Reading]], Spread | None]
    limit: float
    unit: float = 1.0
    is_least: bool = True

    def line(self, readings: Sequence[Reading]) -> str:
        """A row of the table: what, how much, and whether it holds."""
        what = f"{self.text} {'≥' if self.is_least else '≤'} {self.limit:g}"
        spread = self.measured(readings)
        if spread is None:
            return f"| {what} | not measured | |"
        value, low, high = (number / self.unit for number in spread[:3])
        holds = value >= self.limit if self.is_least else value <= self.limit
        shown = f"{value:.2f} ({low:.2f} to {high:.2f})"
        return f"| {what} | {shown} | {'pass' if holds else '**MISSED**'} |"


def bars(case: str) -> list[Bar]:
    """What has to be reached with one kind of data."""
    ratio, own = partial(rate_ratio, case=case), partial(_of_ours, case=case)
    return [
        Bar(
            f"{case}, cold: ours / sequential read",
            partial(ratio, cache="cold", who="ours", against="sequential read"),
            0.85,
        ),
        Bar(
            f"{case}, warm: ours / batched memory map",
            partial(ratio, cache="warm", who="ours", against="batched memory map"),
            0.9,
        ),
        Bar(
            f"{case}, cold: ours / ours, unchecked",
            partial(ratio, cache="cold", who="ours", against="ours, unchecked"),
            0.9,
        ),
        Bar(
            f"{case}: our write / raw write",
            partial(ratio, cache="disk", who="our write", against="raw write"),
            0.9,
        ),
        Bar(
            f"{case}, cold: first batch, ms",
            partial(own, name="ours", value="first_seconds"),
            50.0,
            unit=1e-3,
            is_least=False,
        ),
        Bar(
            f"{case}, cold: first batch after resuming in the last tenth of an epoch, ms",
            partial(own, name="ours, last tenth", value="first_seconds"),
            50.0,
            unit=1e-3,
            is_least=False,
        ),
        Bar(
            f"{case}: memory beyond the page cache, MiB",
            partial(own, name="ours", value="anonymous_bytes"),
            400.0,
            unit=MIB,
            is_least=False,
        ),
    ]


def render(readings: Sequence[Reading], where: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    parts = [provenance(where)]
    lines = ["| | MiB/s | samples/s | first batch, ms |", "|---|--:|--:|--:|"]
    for key in dict.fromkeys((r.case, r.cache, r.contender) for r in readings):
        rounds = [r for r in readings if (r.case, r.cache, r.contender) == key]
        rate = statistics.median(r.rate for r in rounds)
        samples = statistics.median(r.samples / r.seconds for r in rounds)
        first = statistics.median(r.first_seconds for r in rounds) * 1e3
        shown = f"{first:.1f}" if first else ""
        lines.append(f"| {', '.join(key)} | {rate:,.0f} | {samples:,.0f} | {shown} |")
    parts.append("\n".join(lines))
    cold = [r.cached_share for r in readings if r.cache == "cold"]
    if cold:
        parts.append(
            f"Of the files of a cold pass at most {max(cold):.1%} were in the page cache before it."
        )
    rows = "\n".join(bar.line(readings) for case in CASES for bar in bars(case))
    parts.append(f"What it has to reach:\n\n| | measured | |\n|---|---|---|\n{rows}")
    return "\n\n".join(parts) + "\n"


REPORT = Report("data", Reading, render)


# --- The command ------------------------------------------------------------------------------


def rounds(
    cases: Sequence[str], count: int, folder: str | None, before: Sequence[Reading], is_quick: bool
) -> Iterator[Reading]:
    """Case after case, again and again; a later command adds rounds."""
    n_bytes = N_BYTES
    if is_quick:
        cases, count, n_bytes = cases[:1], 1, 32 * MIB
    first = {c: max((r.round for r in before if r.case == c), default=-1) + 1 for c in cases}
    for number in range(count):
        for case in cases:
            for reading in measure(case, number + first[case], n_bytes, folder):
                what = f"{case:6} {reading.cache:5} {reading.contender:20}"
                print(f"round {number + 1}/{count}  {what} {reading.rate:8.0f} MiB/s")
                yield reading


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("data", __doc__, "32 MiB of one kind", rounds=5)
    add_some(parser, "only", list(CASES))
    parser.add_argument("--folder", help="on the disk that is to be measured")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.work:
        _work(*options.work)
        return 0
    measure = partial(rounds, options.only, options.rounds, options.folder)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure)


if __name__ == "__main__":
    sys.exit(main())
