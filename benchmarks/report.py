"""How large the report of four runs is, and how soon a browser has drawn it.

python -m benchmarks.report                everything; results/ and README.md
python -m benchmarks.report --quick        does it run? Runs of 2 seconds, nothing is stored
python -m benchmarks.report --table        write README.md's table anew
python -m benchmarks.report --check        fail if README.md is not up to date

The runs are real ones, of four workers each. A page is open when all figures in sight are drawn, in
a window 1000 pixels high; the clock is the page's own, which begins when the browser begins to load
it. A browser that has just been started opens the page from a file, once in each round.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command_line import carry_out, command_line
from benchmarks.harness import (
    BenchmarkError,
    Report,
    Spread,
    provenance,
    python_module,
    run_group,
)
from scaledtrain.report.page import write_report

STRATEGIES = ("sync", "async", "local_sgd", "diloco")
SECONDS, QUICK_SECONDS = 15.0, 2.0  # of each run
WIDTHS, HEIGHT = (1280, 400), 1000  # pixels
MAX_MIB, MAX_SECONDS = 5.0, 2.0
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
PACKAGES = ("torch", "bokeh")
SETTINGS = {
    "strategies": STRATEGIES,
    "workers": 4,
    "seconds": SECONDS,
    "trace": True,
    "straggler": "rank 3, 4 times slower",
    "window": f"{HEIGHT} pixels high",
}
# Says when all figures in sight are drawn, once they are.
WATCH = """<script>(function look() {
  const places = [...document.querySelectorAll('[id^="figure-"]')];
  const seen = places.filter((place) => place.getBoundingClientRect().top < innerHeight);
  const drawn = seen.every((place) => place.childElementCount)
    && Bokeh.documents.every((d) => d.is_idle);
  if (drawn) console.log(`open after ${performance.now()} ms`); else setTimeout(look, 5);
})();</script>"""


@dataclass(frozen=True)
class Opening:
    """One page in one browser."""

    round: int
    width: int
    n_bytes: int
    seconds: float
    records: int
    """Of all ranks of the four runs, which the page is made from."""


def browser() -> str:
    """The program.

    Raises:
        BenchmarkError: there is none.
    """
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise BenchmarkError(f"a page is opened by one of {', '.join(BROWSERS)}: install one")
    return found


def make_runs(folder: Path, seconds: float) -> None:
    """Train with each strategy."""
    options = [f"strategies=[{','.join(STRATEGIES)}]", f"max_seconds={seconds}", "trace=true"]
    command = python_module("scaledtrain.compare", *options, f"run_dir={folder}")
    run_group(command, 1, timeout_seconds=240.0 + 10 * seconds, pinned=False)


def seconds_to_open(page: Path, width: int, timeout_seconds: float = 60.0) -> float:
    """Until the page is drawn, in a browser of its own."""
    watched = page.with_name("watched.html")
    head, end, tail = page.read_text("utf-8").rpartition("</body>")
    watched.write_text(f"{head}{WATCH}{end}{tail}", "utf-8")
    # Processes of the browser may still write when it has been ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", "--enable-logging=stderr",
            f"--window-size={width},{HEIGHT}", watched.as_uri(),
        ]  # fmt: skip
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        timer = threading.Timer(timeout_seconds, process.kill)
        timer.start()
        try:
            for line in process.stderr:
                if match := re.search(r"open after ([\d.]+) ms", line):
                    return float(match[1]) / 1e3
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stderr.close()
    raise BenchmarkError(f"{page} was not drawn within {timeout_seconds:g} s")


def rounds(count: int, before: Sequence[Opening], is_quick: bool) -> Iterator[Opening]:
    """Make the runs once, and open their page again and again, wide and narrow in turns."""
    first = max((opening.round for opening in before), default=-1) + 1
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "compared"
        make_runs(made, QUICK_SECONDS if is_quick else SECONDS)
        page = write_report(Path(folder) / "report.html", [made])
        records = sum(len(f.read_text("utf-8").splitlines()) for f in made.rglob("metrics-*.jsonl"))
        for number in range(first, first + (1 if is_quick else count)):
            for width in WIDTHS:
                seconds = seconds_to_open(page, width)
                size = page.stat().st_size
                print(f"round {number}  {width} pixels  {seconds:.2f} s  {size / 2**20:.2f} MiB")
                yield Opening(number, width, size, seconds, records)


def render(openings: Sequence[Opening], where: Mapping[str, Any]) -> str:
    """The table, in Markdown."""
    largest = max(opening.n_bytes for opening in openings) / 2**20
    lines = ["| | measured | |", "|---|---|---|"]
    verdict = "pass" if largest <= MAX_MIB else "**MISSED**"
    lines.append(f"| size ≤ {MAX_MIB:g} MiB | {largest:.2f} MiB | {verdict} |")
    for width in WIDTHS:
        spread = Spread.of([o.seconds for o in openings if o.width == width])
        if spread is not None:
            verdict = "pass" if spread.median <= MAX_SECONDS else "**MISSED**"
            lines.append(
                f"| open at {width} pixels ≤ {MAX_SECONDS:g} s | {spread.median:.2f} s "
                f"({spread.low:.2f} to {spread.high:.2f}) | {verdict} |"
            )
    records = max(opening.records for opening in openings)
    told = (
        f"Four runs of four workers, {records:,} records. Medians; in brackets lowest and highest."
    )
    return "\n\n".join([provenance(where), "\n".join(lines), told]) + "\n"


REPORT = Report("report", Opening, render)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = command_line("report", __doc__, f"runs of {QUICK_SECONDS:g} seconds", rounds=5)
    options = parser.parse_args(arguments)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, partial(rounds, options.rounds))


if __name__ == "__main__":
    sys.exit(main())
