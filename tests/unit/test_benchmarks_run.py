"""One way to run all benchmarks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.harness import README, RESULTS


def test_every_benchmark_has_a_question_and_a_place_in_the_readme() -> None:
    questions = run.questions()
    text = README.read_text(encoding="utf-8")
    for name, question in questions.items():
        assert question.endswith((".", "?")), name
        assert f"<!-- {name}:begin -->" in text
        assert f"python -m benchmarks.{name}" in text
    assert {"overhead", "faults", "layouts"} < set(questions)
    assert not {"run", "harness", "command_line", "workers", "fault_run"} & set(questions)


def test_a_benchmark_is_a_module_with_a_main(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text('"""How fast?\n\nMore."""\ndef main(): ...\n')
    (tmp_path / "other.py").write_text('"""Shared."""\nmain = None\n')
    assert run.questions(tmp_path) == {"one": "How fast?"}


def test_all_are_run_whatever_fails(capfd: pytest.CaptureFixture[str]) -> None:
    codes = {  # of a shell, which starts at once however busy the machine is
        "fails": "echo a; echo no such luck >&2; exit 1",
        "hangs": "sleep 1000; true",  # a process of its own, which has to end, too
        "works": "echo said",
    }
    commands = {name: ["sh", "-c", code] for name, code in codes.items()}
    failed = run.run_all(commands, {name: f"Is it {name}?" for name in codes}, limit_seconds=2)
    assert failed == ["fails", "hangs"]
    said = capfd.readouterr().out
    assert "fails              Is it fails?" in said
    assert "FAILED with status 1\n    a\n    no such luck" in said
    assert "s: FAILED: longer than 2 s" in said
    assert "said" not in said
    assert "1 of 3 ran" in said
    assert "failed: fails, hangs" in said


def test_what_runs_ends_with_the_command(tmp_path: Path) -> None:
    """As `timeout` ends it: the benchmark is in a session of its own."""
    code = (
        "from benchmarks import run\n"
        "run.questions = lambda: {'hangs': 'Does it?'}\n"
        "run.python_module = lambda *_: ['sh', '-c', 'echo $$ > new; mv new pid; sleep 99']\n"
        "run.ROOT = __import__('pathlib').Path.cwd()\n"
        "run.main(['--all'])"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(run.ROOT)}
    )
    try:
        end = time.monotonic() + 20
        while not (tmp_path / "pid").exists() and time.monotonic() < end:
            time.sleep(0.02)
        pid = int((tmp_path / "pid").read_text())
        command.terminate()
        assert command.wait(20) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        command.kill()
        command.wait()


def test_all_tables_are_those_of_the_newest_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--check"]) == 0, capsys.readouterr().out


def test_a_folder_of_results_belongs_to_a_benchmark_or_to_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    for folder in RESULTS.iterdir():
        assert folder.name in run.questions() or f"results/{folder.name}" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["overheads"], "there is no benchmark 'overheads'; there are: data, faults"),
        (["--list", "--quick"], "--quick and --minutes go with --all"),
        (["--all", "--minutes", "0"], "--minutes 0: it is a whole number"),
        ([], "one of the arguments --all --list --check --table is required"),
    ],
)
def test_a_wrong_command_is_explained(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert text in capsys.readouterr().err


def test_the_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(run.questions())
