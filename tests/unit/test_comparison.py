"""Comparisons: what is composed, and every reported number against arithmetic done by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scaledtrain import compare, connect
from scaledtrain.config import Target
from scaledtrain.errors import ConfigError
from scaledtrain.report.comparison import Comparison, conclusion, expectation, main, report, table
from scaledtrain.report.runs import RunLog, read_run
from scaledtrain.report.summary import Goal, Summary, equally_spaced, summarise
from scaledtrain.schedule import Slowdown
from tests.run_folders import evaluation, step_record, write


def write_sync(folder: Path) -> Path:
    """Two workers, batch 10: worker 0 computes 0.1 s, worker 1 0.4 s, a step takes both 0.5 s.

    10 steps in two records, so 2 x 10 / 0.5 = 40 samples/s.
    """
    shared = {"samples": 50, "samples_per_second": 40.0, "step_seconds": 0.5, "steps": 5}
    fast = [
        step_record(step=s, seconds=s / 2, compute=0.1, waiting=0.35, **shared) for s in (5, 10)
    ]
    slow = [
        step_record(step=s, seconds=s / 2, compute=0.4, waiting=0.05, **shared) for s in (5, 10)
    ]
    evaluated = [evaluation(1.0, 0.5), evaluation(2.0, 0.8), evaluation(3.0, 0.9)]
    return write(folder, [[*evaluated[:2], *fast, evaluated[2]], slow])


def write_async(folder: Path) -> Path:
    """The same workers: 40 steps of 0.125 s and 10 of 0.5 s in 5 s: 50 updates, 100 samples/s."""
    fast = step_record(
        step=50,
        seconds=5.0,
        steps=40,
        samples=400,
        samples_per_second=100.0,
        step_seconds=0.125,
        compute=0.1,
        waiting=0.0125,
        staleness={"0": 29, "1": 10},
    )
    slow = step_record(
        step=50,
        seconds=5.0,
        steps=10,
        samples=100,
        samples_per_second=100.0,
        step_seconds=0.5,
        compute=0.4,
        waiting=0.0,
        staleness={"3": 5, "4": 4},
    )
    evaluated = [evaluation(0.25 * i, min(0.9, 0.1 * i)) for i in range(1, 13)]
    return write(folder, [[*evaluated, fast], [slow]])


def summary(log: RunLog, name: str = "it", target: float = 0.85) -> Summary:
    return summarise(name, log, log.evaluations, Goal("accuracy", target))


def comparison(folder: Path, target: float = 0.85) -> Path:
    write_sync(folder / "sync")
    write_async(folder / "async")
    Comparison(
        goal=Goal("accuracy", target),
        runs={"sync": "sync", "async": "async"},
        note="Device time is pretended.",
        configs={"sync": {"seed": 3}},
        environment={"cores": 2},
    ).save(folder)
    return folder


# Reading


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    log = read_run(write_async(tmp_path))
    assert [w.rank for w in log.workers] == [0, 1]
    assert [w.steps for w in log.workers] == [40, 10]
    assert [w.samples for w in log.workers] == [400, 100]
    assert log.workers[0].seconds_in("compute") == pytest.approx(40 * 0.1)
    assert log.workers[0].elapsed == pytest.approx(5.0)
    assert log.staleness == {0: 29, 1: 10, 3: 5, 4: 4}
    assert log.evaluations[0].values == {"loss": 1.0, "accuracy": 0.1}
    assert log.workers[0].spans == ()


def test_a_trace_is_read_if_there_is_one(tmp_path: Path) -> None:
    write_sync(tmp_path)
    (tmp_path / "trace-rank1.jsonl").write_text('["compute", 0.5, 0.75]\n["waiting", 0.75, 1')
    workers = read_run(tmp_path).workers
    assert workers[0].spans == ()
    assert workers[1].spans == (("compute", 0.5, 0.75),)


def test_a_line_cut_off_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = write_sync(tmp_path) / "metrics-rank1.jsonl"
    text = path.read_text()
    path.write_text(text[:-20])
    assert [w.steps for w in read_run(tmp_path).workers] == [10, 5]


def test_a_broken_line_elsewhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write_sync(tmp_path) / "metrics-rank1.jsonl"
    path.write_text('{"kind": "step"\n' + path.read_text())
    with pytest.raises(ConfigError, match=r"metrics-rank1.jsonl, line 1 is not a record"):
        read_run(tmp_path)


def test_a_folder_that_is_not_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no metrics-rank0.jsonl"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        read_run(tmp_path / "missing")


def test_a_missing_rank_is_an_error(tmp_path: Path) -> None:
    (write_sync(tmp_path) / "metrics-rank0.jsonl").unlink()
    with pytest.raises(ConfigError, match="of rank 1 but not of 0"):
        read_run(tmp_path)


def test_a_run_without_a_step_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [[evaluation(1.0, 0.5)]])
    with pytest.raises(ConfigError, match="no record of a step"):
        read_run(tmp_path)


# Computing


def test_lockstep_is_expected_at_the_pace_of_the_slowest(tmp_path: Path) -> None:
    row = summary(read_run(write_sync(tmp_path)))
    assert row.lockstep
    assert row.samples_per_second == pytest.approx(40)
    assert row.batch_sizes == pytest.approx([10, 10])
    assert row.compute_seconds == pytest.approx([0.1, 0.4])
    assert row.expected_samples_per_second == pytest.approx(20 / 0.4)  # 50
    assert expectation(row) == (
        "it, if all wait for the slowest: 2 x 10 / 400.0 ms = 50 samples/s; measured 40 (0.80)"
    )


def test_without_waiting_the_rates_of_the_workers_add_up(tmp_path: Path) -> None:
    row = summary(read_run(write_async(tmp_path)))
    assert not row.lockstep
    assert row.samples_per_second == pytest.approx(100)
    assert row.expected_samples_per_second == pytest.approx(10 / 0.1 + 10 / 0.4)  # 125
    assert expectation(row) == (
        "it, if nobody waits: 10 / 100.0 + 10 / 400.0 ms = 125 samples/s; measured 100 (0.80)"
    )


def test_waiting_is_a_sum_and_a_share_of_each_worker(tmp_path: Path) -> None:
    row = summary(read_run(write_sync(tmp_path)))
    assert row.waiting_seconds == pytest.approx([10 * 0.35, 10 * 0.05])
    assert row.waiting_shares == pytest.approx([0.35 / 0.5, 0.05 / 0.5])  # 70 %, 10 %


def test_staleness_is_that_of_all_workers(tmp_path: Path) -> None:
    row = summary(read_run(write_async(tmp_path)))
    # (29*0 + 10*1 + 5*3 + 4*4) / 48 = 41/48
    assert row.staleness_mean == pytest.approx(41 / 48)
    assert row.staleness_max == 4
    fresh = summary(read_run(write_sync(tmp_path / "sync")))
    assert (fresh.staleness_mean, fresh.staleness_max) == (None, None)


@pytest.mark.parametrize(("target", "seconds"), [(0.5, 1.0), (0.75, 2.0), (0.9, 3.0), (0.95, None)])
def test_time_to_goal_is_that_of_the_first_evaluation_there(
    tmp_path: Path, target: float, seconds: float | None
) -> None:
    row = summary(read_run(write_sync(tmp_path)), target=target)
    assert row.seconds_to_goal == seconds
    assert row.final == 0.9


def test_nobody_gets_more_looks_at_the_goal_than_the_others(tmp_path: Path) -> None:
    logs = {
        "sync": read_run(write_sync(tmp_path / "sync")),  # every 1.0 s
        "async": read_run(write_async(tmp_path / "async")),  # every 0.25 s
    }
    chosen = equally_spaced(logs)
    assert [e.seconds for e in chosen["sync"]] == [1.0, 2.0, 3.0]
    assert [e.seconds for e in chosen["async"]] == [1.0, 2.0, 3.0]


def test_the_last_evaluation_always_counts(tmp_path: Path) -> None:
    lines = [
        step_record(
            step=1,
            seconds=1,
            steps=1,
            samples=1,
            samples_per_second=1,
            step_seconds=1,
            compute=1,
            waiting=0,
        )
    ]
    seconds = {"often": [1, 2, 3, 4, 5], "seldom": [2, 4]}
    logs = {
        name: read_run(write(tmp_path / name, [[*lines, *(evaluation(s, 0.5) for s in times)]]))
        for name, times in seconds.items()
    }
    assert [e.seconds for e in equally_spaced(logs)["often"]] == [2, 4, 5]


def test_runs_that_were_never_evaluated_have_no_result(tmp_path: Path) -> None:
    lines = write_sync(tmp_path) / "metrics-rank0.jsonl"
    kept = [line for line in lines.read_text().splitlines() if 'evaluation"' not in line]
    lines.write_text("\n".join(kept) + "\n")
    log = read_run(tmp_path)
    assert equally_spaced({"sync": log}) == {"sync": []}
    row = summary(log)
    assert (row.final, row.seconds_to_goal) == (None, None)
    assert "never" in table([row], Goal("accuracy", 0.85))


# Saying


def test_the_conclusion_compares_the_best_with_the_first(tmp_path: Path) -> None:
    rows = [
        summary(read_run(write_sync(tmp_path / "sync")), "sync"),
        summary(read_run(write_async(tmp_path / "async")), "async"),
    ]
    assert conclusion(rows, Goal("accuracy", 0.85)) == (
        "With worker 1 computing 4.0 times as long as the fastest, async trained 2.5 times as many "
        "samples per second as sync (100 against 40); accuracy 0.85 was reached by async after "
        "2.2 s, by sync after 3.0 s."
    )


def test_the_conclusion_says_never(tmp_path: Path) -> None:
    row = summary(read_run(write_sync(tmp_path)), "sync", target=0.99)
    assert conclusion([row], Goal("accuracy", 0.99)).endswith("reached accuracy 0.99 never.")


def test_a_report_prints_draws_and_adds_the_results(tmp_path: Path) -> None:
    text = report(comparison(tmp_path))
    assert text.splitlines()[2].split() == ["sync", "40", "3.0", "0.900", "-", "-"]
    assert text.splitlines()[3].split() == ["async", "100", "3.0", "0.900", "0.85", "4"]
    assert "70% (3.5 s)" in text
    assert "Device time is pretended." in text
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert saved["configs"] == {"sync": {"seed": 3}}
    assert saved["environment"] == {"cores": 2}
    assert [r["expected_samples_per_second"] for r in saved["results"]] == pytest.approx([50, 125])


def test_a_report_can_be_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = report(comparison(tmp_path))
    main([str(tmp_path)])
    assert capsys.readouterr().out == first + "\n"


def test_traced_runs_are_drawn_with_a_strip_each(tmp_path: Path) -> None:
    comparison(tmp_path)
    report(tmp_path)
    plain = (tmp_path / "comparison.png").read_bytes()
    for rank in (0, 1):
        lines = [["compute", 0.1 * i, 0.1 * i + 0.05] for i in range(20)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "sync" / f"trace-rank{rank}.jsonl").write_text(text)
    report(tmp_path)
    height = slice(20, 24)  # of a PNG's header
    traced = (tmp_path / "comparison.png").read_bytes()
    assert int.from_bytes(traced[height], "big") > int.from_bytes(plain[height], "big")


def test_a_goal_that_is_not_evaluated_is_an_error(tmp_path: Path) -> None:
    comparison(tmp_path)
    path = tmp_path / "comparison.json"
    path.write_text(path.read_text().replace('"accuracy"', '"f1"'))
    with pytest.raises(ConfigError, match="'f1', but the evaluations of sync have: loss, accuracy"):
        report(tmp_path)


def test_a_folder_without_a_comparison_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"comparison\.json cannot be read"):
        main([str(tmp_path)])
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(SystemExit, match="run the comparison again"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="usage"):
        main([])


def test_missing_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not there
    with pytest.raises(ConfigError, match=r"pip install 'scaledtrain\[examples\]'"):
        report(tmp_path)


# Composing


def test_each_strategy_gets_the_same_config_but_its_own_settings() -> None:
    configs = compare.compose_each(
        ["strategies=[sync,'async optimizer.lr=0.3 eval_every=7']", "seed=5"]
    )
    assert list(configs) == ["sync", "async"]
    assert configs["sync"].strategy["_target_"] == "scaledtrain.strategies.Sync"
    assert configs["async"].strategy["_target_"] == "scaledtrain.strategies.ParameterServer"
    assert [c.seed for c in configs.values()] == [5, 5]
    assert [c.optimizer["lr"] for c in configs.values()] == [0.4, 0.3]
    assert configs["async"].eval_every == 7


def test_one_strategy_with_two_settings_is_two_entries() -> None:
    configs = compare.compose_each(["strategies=[sync,'sync optimizer.lr=1.0']"])
    assert list(configs) == ["sync", "sync optimizer.lr=1.0"]


def test_the_comparison_as_shipped_is_that_of_the_readme() -> None:
    configs = compare.compose_each([])
    assert list(configs) == ["sync", "async"]
    for config in configs.values():
        assert config.workers == 4
        assert config.slowdown == Slowdown({3: 4.0}, min_compute_seconds=0.02)
        assert config.max_steps is config.max_epochs is None
        assert config.trace


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["strategies=[]"], r"strategies is \[\]; it is a list"),
        (["strategies=async"], "strategies is 'async'; it is a list"),
        (["strategies=[sync,sync]"], "an entry twice: sync, sync"),
        (["strategies=[sync,asinc]"], "strategy is 'asinc'.*did you mean 'async'"),
        (["strategies=[sync,'async optimiser.lr=1']"], "optimiser"),
        (["strategy=async"], r"write strategies=\[sync,async\]"),
        (["max_seconds=null"], "max_seconds is null"),
    ],
)
def test_a_comparison_that_cannot_be_is_an_error(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.compose_each(arguments)


def test_the_goal_is_the_target_of_the_config() -> None:
    assert compare._goal(Target("accuracy", at_least=0.9)) == Goal("accuracy", 0.9)
    assert compare._goal(Target("loss", at_most=2.0)) == Goal("loss", 2.0, at_most=True)
    for wrong in (Target(), Target("loss"), Target("loss", at_least=1.0, at_most=2.0)):
        with pytest.raises(ConfigError, match=r"set target\.metric and one of"):
            compare._goal(wrong)


def test_a_loss_is_reached_from_above(tmp_path: Path) -> None:
    log = read_run(write_sync(tmp_path))
    goal = Goal("loss", 1.0, at_most=True)
    assert summarise("sync", log, log.evaluations, goal).seconds_to_goal == 1.0


def test_the_note_says_what_is_pretended() -> None:
    note = compare._note(Slowdown({1: 4.0, 7: 9.0}, min_compute_seconds=0.02), workers=2)
    assert "worker 1 is made 4 times slower" in note
    assert "at least 20 ms by sleeping" in note
    assert "worker 7" not in note
    assert "pretended" not in compare._note(Slowdown({}), workers=2)
    varied = compare._note(Slowdown({}, gamma_shape=4.0), workers=2)
    assert "the time of each step varies (gamma distributed, shape 4), by sleeping" in varied


def test_a_folder_with_a_run_is_not_written_to(tmp_path: Path) -> None:
    write_sync(tmp_path / "sync")
    configs = compare.compose_each([])
    with connect() as link, pytest.raises(ConfigError, match="holds a run already"):
        compare.compare(configs, Goal("accuracy", 0.9), link, tmp_path)
    assert not (tmp_path / "comparison.json").exists()


def test_missing_matplotlib_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not there
    monkeypatch.setattr(sys, "argv", ["compare", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"pip install 'scaledtrain\[examples\]'"):
        compare._main()
    assert not (tmp_path / "run").exists()
