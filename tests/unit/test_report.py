"""The report page: what it says, checked by hand; that a browser shows it, where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scaledtrain.errors import ConfigError
from scaledtrain.report.command import main
from scaledtrain.report.differences import differences, read_config
from scaledtrain.report.findings import findings, rank_rows
from scaledtrain.report.page import find_runs, write_report
from scaledtrain.report.progress import progress
from scaledtrain.report.runs import read_run
from tests.run_folders import evaluation, step_record, write


def record(compute: float, step_seconds: float, **options: Any) -> dict[str, Any]:
    """Ten steps of 32 samples, by four workers in lockstep."""
    return step_record(
        step=10,
        seconds=10 * step_seconds,
        steps=10,
        samples=320,
        samples_per_second=4 * 32 / step_seconds,
        step_seconds=step_seconds,
        compute=compute,
        waiting=step_seconds - compute,
        **options,
    )


def straggler(folder: Path) -> Path:
    """Three ranks compute for 10 ms a step, the fourth for 40 ms; all wait for it."""
    ranks = [[record(0.01, 0.04), evaluation(0.4, 0.9)]]
    ranks += [[record(0.01, 0.04)], [record(0.01, 0.04)], [record(0.04, 0.04)]]
    return write(folder, ranks)


class TestFindings:
    def test_a_straggler_is_named_with_what_it_costs(self, tmp_path: Path) -> None:
        log = read_run(straggler(tmp_path / "run"))
        # Waiting: 30 of 40 ms. Without it: (3 x 32 / 0.01 + 32 / 0.04) / (4 x 32 / 0.04) = 3.25
        assert findings(log) == [
            "Rank 3 is 4.0x slower; the others waited for 75% of their time; without waiting (an "
            "asynchronous strategy) it would be 3.2x faster."
        ]
        assert [row.slowness for row in rank_rows(log)] == [1.0, 1.0, 1.0, 4.0]

    def test_equal_ranks_and_much_communication(self, tmp_path: Path) -> None:
        line = step_record(
            step=10, seconds=1.0, steps=10, samples=320, samples_per_second=640,
            step_seconds=0.1, compute=0.06, waiting=0.02,
        )  # fmt: skip
        said = findings(read_run(write(tmp_path / "run", [[line], [line]])))
        assert said == [
            "All 2 ranks are about as fast as each other; they computed for 60% of the time and "
            "waited for 20%.",
            "20% of the time went into communication (a compression, or fewer meetings as in "
            "LocalSGD, may help).",
        ]

    def test_staleness_is_that_of_all_gradients(self, tmp_path: Path) -> None:
        lines = [record(0.04, 0.04, staleness=s) for s in ({"0": 6, "1": 4}, {"3": 10})]
        said = findings(read_run(write(tmp_path / "run", [[line] for line in lines])))
        # (4 x 1 + 10 x 3) / 20 = 1.7
        assert said[1:] == [
            "A gradient was 1.7 updates old on average when it was used, at most 3."
        ]

    def test_no_waiting_is_promised_to_a_run_that_does_not_wait(self, tmp_path: Path) -> None:
        ranks = [[record(c, 0.04, staleness={"1": 10})] for c in (0.01, 0.01, 0.04)]
        assert "without waiting" not in findings(read_run(write(tmp_path / "run", ranks)))[0]


def test_points_are_of_all_workers_together(tmp_path: Path) -> None:
    def at(step: int, loss: float, samples: int, memory: float) -> dict[str, Any]:
        line = step_record(
            step=step, seconds=float(step), steps=1, samples=samples, samples_per_second=10.0,
            step_seconds=1.0, compute=1.0, waiting=0.0,
        )  # fmt: skip
        return {**line, "loss": loss, "memory_bytes": memory}

    ranks = [[at(1, 4.0, 3, 5), at(2, 2.0, 3, 9)], [at(1, 8.0, 1, 7), at(2, 6.0, 1, 7)]]
    log = read_run(write(tmp_path / "run", ranks))
    points = progress(log)
    # (3 x 4 + 8) / 4 = 5; (3 x 2 + 6) / 4 = 3
    assert [(p.step, p.samples, p.loss, p.memory_bytes) for p in points] == [
        (1, 4, 5.0, 7.0),
        (2, 8, 3.0, 9.0),
    ]
    (one,) = progress(log, max_points=1)
    assert (one.step, one.samples, one.loss) == (2, 8, 4.0)


class TestConfigs:
    def test_what_differs_is_shown_with_its_path(self, tmp_path: Path) -> None:
        texts = [
            "run_dir: a\noptimizer: {lr: 0.1}\nseed: 0\n",
            "run_dir: b\noptimizer: {lr: 0.2}\n",
        ]
        for name, text in zip("ab", texts, strict=True):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.yaml").write_text(text)
        configs = [read_config(tmp_path / name) for name in "abc"]
        assert configs[2] == {}
        assert differences(configs) == [
            ("optimizer.lr", ["0.1", "0.2", "–"]),
            ("seed", ["0", "–", "–"]),
        ]

    @pytest.mark.parametrize("text", ["a: [", "- 1\n"])
    def test_a_broken_one_is_told(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match="config.yaml"):
            read_config(tmp_path)


class TestPage:
    def test_it_needs_no_network_and_names_cannot_break_it(self, tmp_path: Path) -> None:
        runs = [straggler(tmp_path / name) for name in ("a<script>alert(1)<&", "b", "c", "d")]
        path = write_report(tmp_path / "out" / "report.html", runs)
        text = path.read_text(encoding="utf-8")
        assert "<script>alert" not in text
        assert "a&lt;script&gt;alert(1)&lt;&amp;" in text
        assert not re.search(r"""<(script|link|img)[^>]+(src|href)=["']?http""", text)
        assert path.stat().st_size < 5 * 2**20
        assert "Rank 3 is 4.0x slower" in text
        assert [p.name for p in path.parent.iterdir()] == ["report.html"]

    def test_a_folder_of_runs_stands_for_them(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runs = [straggler(tmp_path / "compare" / name) for name in ("sync", "async")]
        assert sorted(find_runs([tmp_path / "compare", runs[0]])) == sorted(runs)
        main([str(tmp_path / "compare")])
        assert capsys.readouterr().out.strip().endswith("report.html")
        assert (tmp_path / "compare" / "report.html").exists()

    def test_what_is_no_run_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no run was given"):
            write_report(tmp_path / "report.html", [])
        with pytest.raises(ConfigError, match="not the folder of a run"):
            write_report(tmp_path / "report.html", [tmp_path])
        assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_draws_it_without_an_error(width: int, tmp_path: Path) -> None:
    runs = [straggler(tmp_path / name) for name in ("sync", "other")]
    span = ["compute", 0.0, 0.3]
    (runs[0] / "trace-rank0.jsonl").write_text(f"{span}\n".replace("'", '"'))
    with (runs[0] / "metrics-rank0.jsonl").open("a") as file:
        for step in (1, 11):
            rows = {"0": {"grad_norm": 0.1 * step, "dead": 1.0, "units": 4.0}}
            file.write(json.dumps({"kind": "layers", "step": step, "layers": rows}) + "\n")
    path = write_report(tmp_path / "report.html", runs)
    picture = tmp_path / "page.png"
    command = [
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        "--virtual-time-budget=10000", f"--window-size={width},2400", f"--screenshot={picture}",
        path.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100)
    messages = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert any("document idle" in line for line in messages)  # Bokeh has drawn
    assert not [line for line in messages if re.search("error|uncaught", line, re.IGNORECASE)]
    assert picture.stat().st_size > 20_000
