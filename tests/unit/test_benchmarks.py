"""How the benchmarks turn times into tables: no test here depends on how fast anything is."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overhead
from benchmarks.command_line import add_some, carry_out, command_line
from benchmarks.harness import (
    README,
    RESULTS,
    BenchmarkError,
    Measurement,
    ResultsFolder,
    check_losses,
    cores,
    differences,
    next_round,
    ratios,
    replace_between,
    rotated,
    run_group,
    times,
)
from benchmarks.overhead import BARS, CONTENDERS, WORKLOADS, TimedBatches, render

TINY = ("tiny", 1)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="ranks are put on cores")
WHERE: dict[str, Any] = {
    "started": "2026-01-02T03:04:05Z",
    "commit": "abc1234",
    "dirty": False,
    "cpu": "a processor",
    "cores": 2,
    "system": "Linux x86_64",
    "python": "3.12.0",
    "versions": {"torch": "2.13.0", "missing": None},
    "settings": {"threads": 1},
}


def measured(
    contender: str,
    milliseconds: float,
    round: int = 0,
    case: tuple[str, int] = TINY,
    losses: list[float] | None = None,
) -> Measurement:
    """A round of three blocks of 10 steps, of which one was disturbed."""
    block = milliseconds / 1e3 * 10
    return Measurement(
        workload=case[0],
        ranks=case[1],
        contender=contender,
        round=round,
        steps_per_block=10,
        block_seconds=[block, 50 * block, 0.5 * block],
        losses=losses or [2.0] * case[1],
        load_average=0.0,
    )


def three_rounds() -> list[Measurement]:
    """The machine is twice as slow in the second round: the ratios do not mind."""
    return [
        *(measured("careful", ms, round=r) for r, ms in enumerate([0.2, 0.4, 0.2])),
        *(measured("ours", ms, round=r) for r, ms in enumerate([0.22, 0.42, 0.25])),
    ]


def test_a_round_is_its_median_block() -> None:
    assert measured("ours", 0.3).seconds == pytest.approx(0.3e-3)


def test_times_are_medians_over_rounds() -> None:
    spread = times(three_rounds(), TINY, "ours")
    assert spread is not None
    assert spread == pytest.approx((0.25e-3, 0.22e-3, 0.42e-3, 3))
    assert times(three_rounds(), TINY, "fabric") is None
    assert times(three_rounds(), ("tiny", 2), "ours") is None


def test_ratios_are_taken_within_rounds() -> None:
    spread = ratios(three_rounds(), TINY, "ours", "careful")
    assert spread is not None
    # 0.22 / 0.2, 0.42 / 0.4, 0.25 / 0.2; the ratio of the medians would be 0.25 / 0.2
    assert spread == pytest.approx((1.1, 1.05, 1.25, 3))


def test_differences_are_taken_within_rounds() -> None:
    spread = differences(three_rounds(), TINY, "ours", "careful")
    assert spread is not None
    assert spread == pytest.approx((0.02e-3, 0.02e-3, 0.05e-3, 3))


def test_a_round_without_one_of_the_two_gives_no_ratio() -> None:
    rounds = [*three_rounds(), measured("ours", 9.0, round=3), measured("careful", 1.0, round=4)]
    spread = ratios(rounds, TINY, "ours", "careful")
    assert spread is not None
    assert spread.rounds == 3


def test_everybody_is_first_once() -> None:
    assert [rotated("abc", by) for by in range(4)] == [
        list(o) for o in ("abc", "bca", "cab", "abc")
    ]
    assert rotated([], 1) == []


def test_rounds_go_on_counting_in_each_case() -> None:
    assert next_round(three_rounds(), TINY) == 3
    assert next_round(three_rounds(), ("tiny", 2)) == 0


def test_losses_that_agree_but_for_rounding_pass() -> None:
    check_losses(
        [measured("plain", 1.0, losses=[2.0, 3.0]), measured("ours", 1.0, losses=[2.0001, 3.0])]
    )


@pytest.mark.parametrize("losses", [[2.0, 3.001], [2.0], [float("nan"), 3.0]])
def test_contenders_that_compute_something_else_are_named(losses: list[float]) -> None:
    other = measured("fabric", 1.0, losses=losses)
    with pytest.raises(BenchmarkError, match=r"fabric .* plain .* did not compute the same"):
        check_losses([measured("plain", 1.0, losses=[2.0, 3.0]), other])


def test_other_cases_may_have_other_losses() -> None:
    check_losses([measured("plain", 1.0), measured("plain", 1.0, case=("gpt", 1), losses=[5.5])])


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path, WHERE)
    for measurement in three_rounds():
        folder.add(measurement)
    folder.add_command("python -m benchmarks.overhead", {"rounds": 5})
    assert folder.path.name == "2026-01-02-abc1234"
    assert folder.read(Measurement) == three_rounds()
    assert folder.environment() == WHERE
    assert (folder.path / "config.jsonl").read_text() == '{"threads": 1, "rounds": 5}\n'
    assert sorted(f.name for f in folder.path.iterdir()) == [
        "command.txt",
        "config.jsonl",
        "environment.json",
        "raw.jsonl",
    ]


def test_a_later_run_adds_to_the_folder_unless_the_environment_changed(tmp_path: Path) -> None:
    first = ResultsFolder(tmp_path, WHERE)
    later = {**WHERE, "started": "2026-01-02T09:00:00Z"}
    assert ResultsFolder(tmp_path, later).path == first.path
    changed = ResultsFolder(tmp_path, {**later, "dirty": True})
    assert changed.path.name == "2026-01-02-abc1234-2"
    assert ResultsFolder(tmp_path, {**later, "dirty": True}).path == changed.path


def test_the_newest_folder_is_the_one_begun_last(tmp_path: Path) -> None:
    assert ResultsFolder.newest(tmp_path) is None
    ResultsFolder(tmp_path, {**WHERE, "commit": "fff0000"})
    last = ResultsFolder(tmp_path, {**WHERE, "started": "2026-01-02T09:00:00Z"})
    newest = ResultsFolder.newest(tmp_path)
    assert newest is not None
    assert newest.path == last.path


def test_only_what_is_between_the_markers_is_replaced() -> None:
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n"
    once = replace_between(text, "x", "new\n")
    assert once == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n"
    assert replace_between(once, "x", "new") == once
    with pytest.raises(BenchmarkError, match="<!-- y:begin -->"):
        replace_between(text, "y", "new")


def test_the_table_shows_times_ratios_and_bars() -> None:
    text = render(three_rounds(), WHERE)
    assert "2026-01-02, commit abc1234; a processor, 2 cores" in text
    assert "torch 2.13.0." in text
    assert "| careful | 0.200 | 1.000 (1.000 to 1.000) |" in text
    assert "| ours | 0.250 | 1.100 (1.050 to 1.250) |" in text
    assert "Medians over 3 rounds" in text
    assert "careful ≤ 0.03 ms | 0.0200 ms (0.0200 to 0.0500) | pass |" in text
    assert "ours / careful ≤ 1.15 | 1.1000 (1.0500 to 1.2500) | pass |" in text
    assert "| gpt, 2 ranks: careful / ours ≥ 1 | not measured | |" in text


def test_a_bar_that_was_not_reached_is_shown() -> None:
    case = ("tiny", 2)
    slow = [measured("careful", 1.0, case=case), measured("ours", 0.6, case=case)]
    assert "| tiny, 2 ranks: careful / ours ≥ 2 | 1.6667 (1.6667 to 1.6667) | **MISSED** |" in (
        render(slow, WHERE)
    )


def test_a_table_of_contenders_that_disagree_is_not_made() -> None:
    with pytest.raises(BenchmarkError, match="did not compute the same"):
        render([measured("careful", 1.0), measured("ours", 1.0, losses=[7.0])], WHERE)


def test_the_table_of_the_all_reduce() -> None:
    case = overhead.reduce_case(2**20)
    both = [measured("shared_memory", 0.05, case=case), measured("gloo", 0.6, case=case)]
    assert "| 1 MiB | 50.0 | 600.0 | 12.0 (12.0 to 12.0) |" in render(both, WHERE)


def test_readme_is_regenerated_from_the_newest_results_and_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    report = replace(overhead.REPORT, readme=readme, results=results)
    readme.write_text("# Title\n<!-- overhead:begin -->\n<!-- overhead:end -->\nend\n")
    assert report.check() == 1
    assert "run python -m benchmarks.overhead --table" in capsys.readouterr().out
    report.write()
    assert "No results are stored yet." in readme.read_text()
    assert report.check() == 0

    folder = report.open(WHERE, {})
    for measurement in three_rounds():
        folder.add(measurement)
    assert report.check() == 1
    report.write()
    assert "| ours | 0.250 | 1.100" in readme.read_text()
    assert (folder.path / "table.md").read_text() == render(three_rounds(), WHERE)
    assert report.check() == 0


def test_a_command_stores_its_records_with_what_its_options_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- overhead:begin -->\n<!-- overhead:end -->\n")
    report = replace(overhead.REPORT, readme=readme, results=tmp_path / "results")
    asked: list[tuple[int, bool]] = []

    def measure(before: Sequence[Measurement], is_quick: bool) -> list[Measurement]:
        asked.append((len(before), is_quick))
        return three_rounds()

    def command(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["overhead", *arguments])
        parser = command_line("overhead", "", "little", rounds=3)
        add_some(parser, "workers", {"1": 1, "2": 2})
        parser.add_argument("--work", help=argparse.SUPPRESS)
        options = parser.parse_args(arguments)
        return carry_out(options, report, ("torch",), {"threads": 1}, measure)

    assert command("--quick") == 0
    assert "| ours | 0.250 |" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    assert command("--check") == 1  # not even "No results are stored yet."
    assert command() == command("--rounds", "2") == 0
    assert asked == [(0, True), (0, False), (6, False)]
    (folder,) = (tmp_path / "results" / "overhead").iterdir()
    assert (folder / "command.txt").read_text().splitlines() == [
        "python -m benchmarks.overhead",
        "python -m benchmarks.overhead --rounds 2",
    ]
    configs = [json.loads(line) for line in (folder / "config.jsonl").read_text().splitlines()]
    both = {"threads": 1, "workers": [1, 2]}
    assert configs == [{**both, "rounds": 3}, {**both, "rounds": 2}]
    where = json.loads((folder / "environment.json").read_text())
    assert where["versions"] == {"torch": torch.__version__}
    assert where["cpu"]
    assert command("--check") == 0


def test_a_picture_lies_beside_the_results_and_is_shown(tmp_path: Path) -> None:
    def draw(records: Sequence[Measurement], path: Path) -> None:
        path.write_text(f"a picture of {len(records)}")

    readme = tmp_path / "README.md"
    readme.write_text("<!-- overhead:begin -->\n<!-- overhead:end -->\n")
    report = replace(overhead.REPORT, readme=readme, results=tmp_path / "results", draw=draw)
    folder = report.open(WHERE, {})
    folder.add(measured("careful", 1.0))
    report.write()
    assert "![overhead](results/overhead/2026-01-02-abc1234/picture.png)" in readme.read_text()
    assert (folder.path / "picture.png").read_text() == "a picture of 1"
    assert "![" not in (folder.path / "table.md").read_text()
    assert report.is_current()


def test_the_shipped_readme_shows_the_shipped_results_and_names_all_contenders() -> None:
    assert overhead.REPORT.is_current()
    text = README.read_text(encoding="utf-8")
    for contender in CONTENDERS:
        assert f"| `{contender}` |" in text


def test_shipped_results_name_no_path_of_the_machine() -> None:
    for file in RESULTS.rglob("*.*"):
        if file.is_file() and file.suffix != ".png":
            assert not re.search(r"/(home|root|tmp|work|mnt)/", file.read_text(encoding="utf-8"))


def test_bars_compare_contenders_that_take_part() -> None:
    for bar in BARS:
        assert bar.case[0] in WORKLOADS
        assert all(overhead.takes_part(who, bar.case) for who in (bar.first, bar.second))
    assert not overhead.takes_part("ours_gloo", ("tiny", 1))


@pytest.mark.parametrize("per_step", [1, 2])
def test_batches_are_timed_by_blocks_of_steps(per_step: int) -> None:
    workload = overhead.quick(WORKLOADS["tiny"])
    ready = [(torch.tensor(float(i)), torch.tensor(i)) for i in range(3)]
    loader = TimedBatches(ready, workload, per_step)
    seen = [int(y) for _, y in loader]
    # 1 step to warm up, 2 blocks of 20, and 1 whose request ends the last block
    assert workload.steps == 42
    assert len(seen) == len(loader) == 42 * per_step
    assert seen[:4] == [0, 1, 2, 0]
    assert len(loader.block_seconds) == 2


def test_the_checked_loss_is_that_of_the_given_step() -> None:
    loss_fn = overhead.CheckedLoss(lambda x, y: x * y, step=2)
    for i in range(4):
        loss_fn(torch.tensor(float(i)), torch.tensor(10.0))
    assert loss_fn.value == torch.tensor(10.0)


@on_linux
def test_ranks_run_in_a_terminal_on_a_core_each(tmp_path: Path) -> None:
    script = (
        "import os, sys; "
        "rank = os.environ.get('RANK', '-'); "
        "said = [rank, sys.stderr.isatty(), len(os.sched_getaffinity(0)), "
        "os.environ['OMP_NUM_THREADS'], os.get_terminal_size(2).columns]; "
        f"open(os.path.join({str(tmp_path)!r}, rank), 'w').write(repr(said))"
    )
    run_group([sys.executable, "-c", script], ranks=1, timeout_seconds=30)
    assert (tmp_path / "-").read_text() == "['-', True, 1, '1', 100]"


@on_linux
def test_more_ranks_than_cores_may_share_them(tmp_path: Path) -> None:
    script = (
        "import os; rank = os.environ['RANK']; "
        f"open(os.path.join({str(tmp_path)!r}, rank), 'w').write(str(os.sched_getaffinity(0)))"
    )
    ranks = len(cores()) + 1
    run_group([sys.executable, "-c", script], ranks, timeout_seconds=60, pinned=False)
    said = {(tmp_path / str(rank)).read_text() for rank in range(ranks)}
    assert said == {str(set(cores()))}


@on_linux
def test_a_rank_that_fails_is_shown_with_what_it_said() -> None:
    with pytest.raises(BenchmarkError, match=r"failed on rank 0 with status 1(.|\n)*no such luck"):
        run_group([sys.executable, "-c", "raise SystemExit('no such luck')"], 1, 30)


@on_linux
def test_a_rank_that_hangs_is_ended() -> None:
    with pytest.raises(BenchmarkError, match="took too long"):
        run_group([sys.executable, "-c", "import time; time.sleep(60)"], 1, timeout_seconds=0.5)


@on_linux
def test_ranks_need_a_core_each() -> None:
    with pytest.raises(BenchmarkError, match="1000 ranks need a core each"):
        run_group(["true"], 1000)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "tiny,nothing"], "nothing"),
        (["--ranks", "3"], "--ranks 3"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_a_wrong_option_is_explained(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        overhead.main(arguments)
    assert text in capsys.readouterr().err


def test_workloads_check_a_step_that_is_made() -> None:
    for workload in WORKLOADS.values():
        inputs, targets = workload.batch(torch.Generator())
        assert workload.loss_fn(workload.model()(inputs), targets).dim() == 0
        assert workload.checked_step <= workload.steps
        assert overhead.quick(workload).checked_step <= overhead.quick(workload).steps
