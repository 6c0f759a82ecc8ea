import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import scaledtrain
from scaledtrain.errors import ClusterError, ConfigError, PeerLostError
from scaledtrain.launching import PREEMPTED, guarded
from scaledtrain.local_job import _exit_code, _summary
from tests.commands import Command
from tests.ranks import FRESH, free_port

Process = subprocess.Popen[str] | Command
TIMEOUT_SECONDS = 90.0  # for a command on a busy machine
EXIT_SECONDS = 10.0  # for what has to end at once

TRAIN = ("-m", "scaledtrain.train")
# Without --log-dir torchrun leaves a folder in the system's place for temporary files.
OPTIONS = ("--standalone", "--nproc-per-node", "2", "--log-dir", os.devnull)
TORCHRUN = ("-m", "torch.distributed.run", *OPTIONS, *TRAIN)
SIGNS = ("data=tests.tasks.signs", "data.local_batch_size=32")
ENDLESS = (*SIGNS, "max_steps=100000000", "log_every=10")

FAULTY_MODEL = """
import os
import torch

class Net(torch.nn.Linear):
    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__(in_features, out_features)
        self.is_faulty = rank == int(os.environ["RANK"])
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3 and self.is_faulty:
            raise RuntimeError(f"broken in call {self.calls}")
        return super().forward(images)
"""

STUCK_IN_A_CALL = """
from datetime import timedelta
import torch.distributed as dist
from scaledtrain.launching import guarded

def main():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    open("started", "w").write("yes")
    store.wait(["never"], timedelta(seconds=100))

guarded(main)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A working directory in which no process may be left."""
    yield tmp_path
    deadline = time.monotonic() + 3.0
    while (left := processes_in(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left


def processes_in(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is somebody else's
            if Path(os.readlink(process / "cwd")) == folder:
                found.append(int(process.name))
    return found


def environment_in(folder: Path) -> dict[str, str]:
    root = Path(scaledtrain.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{folder}"}


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment_in(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_training(folder: Path, *arguments: str, **environment: str) -> Process:
    """The same without its imports, on Linux; those of its workers are theirs."""
    if FRESH:
        return start(folder, *TRAIN, *arguments, **environment)
    given = {**environment_in(folder), **environment}
    return Command("scaledtrain.train", arguments, folder, given)


def end(command: Process, timeout_seconds: float = TIMEOUT_SECONDS) -> tuple[int, str, str]:
    """Exit code, output and what was told on stderr."""
    try:
        out, told = command.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(command.pid, signal.SIGKILL)
        command.communicate()
        raise
    assert command.returncode is not None
    return command.returncode, out, told


def wait_for(folder: Path, pattern: str, command: Process) -> None:
    """Wait until something has been written to such a file."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not any(path.stat().st_size for path in folder.glob(pattern)):
        assert command.poll() is None, end(command)
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("launcher", "strategy"), [((*TRAIN, "workers=2"), "sync"), (TORCHRUN, "async")]
)
def test_a_run_leaves_its_config_metrics_and_result(
    launcher: tuple[str, ...], strategy: str, folder: Path
) -> None:
    settings = (f"strategy={strategy}", "max_steps=6", "log_every=1", "console=false")
    code, out, told = end(start(folder, *launcher, *settings, OMP_NUM_THREADS="1"))
    assert (code, told) == (0, "")
    (run_dir,) = (folder / "runs").iterdir()
    assert run_dir.name.startswith(f"digits-mlp-{strategy}-")
    events = {"events.bin"} if strategy == "async" else set()
    assert {file.name for file in run_dir.iterdir()} == events | {
        "config.yaml",
        "metrics-rank0.jsonl",
        "metrics-rank1.jsonl",
        "result.json",
        "tensorboard",
    }
    written = json.loads((run_dir / "result.json").read_text())
    assert written["result"]["step"] == 6
    assert written["environment"]["world_size"] == 2
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("ended at step 6")
    assert str(run_dir) in lines[2]
    assert {file.name for file in folder.iterdir()} == {"runs"}


def test_an_error_on_one_rank_is_told_once_and_ends_all(folder: Path) -> None:
    (folder / "faulty.py").write_text(FAULTY_MODEL)
    settings = ("workers=2", "model=faulty.Net", "model.rank=1", *SIGNS, "console=false")
    code, out, told = end(start_training(folder, *settings))
    assert code == 1
    assert told.startswith("error on rank 1:\nTraceback")
    assert told.endswith("RuntimeError: broken in call 3\n")
    assert (told.count("Traceback"), told.count("broken in call 3"), out) == (1, 1, "")


def test_an_asynchronous_run_goes_on_without_a_worker_that_is_killed(folder: Path) -> None:
    settings = ("workers=3", "strategy=async", "max_steps=null", "max_seconds=6", "log_every=5")
    slow = "slowdown.min_compute_seconds=0.01"
    command = start_training(folder, *settings, *SIGNS, slow, "console=false")
    wait_for(folder, "runs/*/metrics-rank2.jsonl", command)
    (victim,) = [
        pid
        for pid in processes_in(folder)
        if b"\0RANK=2\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    ]
    os.kill(victim, signal.SIGKILL)
    code, out, told = end(command)
    assert code == 0
    assert out.startswith("ended at step ")
    assert "worker 2 is lost, and the other 2 go on without it" in told
    assert told.endswith("rank 2 was lost (killed by SIGKILL); the others went on to the end\n")


def test_ctrl_c_ends_every_process_and_says_so_once(folder: Path) -> None:
    command = start_training(folder, "workers=2", *ENDLESS, "console=false")
    wait_for(folder, "runs/*/metrics-rank1.jsonl", command)
    os.killpg(command.pid, signal.SIGINT)
    code, out, told = end(command, EXIT_SECONDS)
    assert (code, out) == (130, "")
    assert told.startswith("interrupted at step ")
    assert told.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_workers_end_when_their_launcher_is_killed(folder: Path) -> None:
    command = start_training(folder, "workers=2", *ENDLESS, "console=false")
    wait_for(folder, "runs/*/metrics-rank1.jsonl", command)
    command.send_signal(signal.SIGKILL)
    assert end(command, EXIT_SECONDS) == (-signal.SIGKILL, "", "")  # the fixture looks for workers


def test_a_missing_rank_and_a_port_in_use_are_told(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        lonely, homeless = (
            start_training(folder, "timeout_seconds=3", **ranks, MASTER_PORT=str(port))
            for port in (free_port(), taken.getsockname()[1])
        )
        code, _, told = end(lonely)
        assert code == 1
        assert "error on rank 0: rank 0 waited 3 s" in told
        assert "for rank 1 of 2, which did not come" in told
        code, _, told = end(homeless)
        assert code == 1
        assert told.startswith(
            f"error on rank 0: port {taken.getsockname()[1]} on 127.0.0.1 is in use"
        )
        assert told.count("\n") == 1


def test_ctrl_c_ends_a_rank_whose_main_thread_is_stuck(folder: Path) -> None:
    command = start(folder, "-c", STUCK_IN_A_CALL)
    wait_for(folder, "started", command)
    command.send_signal(signal.SIGINT)
    assert end(command, EXIT_SECONDS) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("codes", "number", "code"),
    [
        ({0: 0, 1: 0}, signal.SIGTERM, 0),  # they had made their last steps
        ({0: 0, 1: -9}, None, 0),  # the others went on without it
        ({0: 143, 1: 143}, signal.SIGTERM, 143),
        ({0: 0, 1: -15}, signal.SIGTERM, 143),
        ({0: PREEMPTED, 1: PREEMPTED}, signal.SIGTERM, PREEMPTED),
        ({0: 1, 1: 0}, None, 1),
    ],
)
def test_a_job_that_came_to_its_end_was_not_terminated(
    codes: dict[int, int], number: int | None, code: int
) -> None:
    assert _exit_code(codes, number) == code


@pytest.mark.parametrize(
    ("codes", "code", "told"),
    [
        ({0: 143, 1: 1}, 1, ""),  # rank 1 told its error
        ({0: 2, 1: -15}, 2, ""),
        ({0: 130, 1: 130}, 130, ""),
        ({0: 143, 1: -9}, 1, "error on rank 1: it ended (killed by SIGKILL)"),
        ({0: -15, 1: 77}, 1, "error on rank 1: it ended (exit code 77)"),
        ({0: 143, 1: -15}, 143, ""),  # somebody sent SIGTERM
    ],
)
def test_the_launcher_tells_what_no_worker_could(
    codes: dict[int, int], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _summary(codes) == code
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("take 3"), 2, "error: take 3\n"),
        (PeerLostError("rank 1 died"), 1, "error: rank 1 died\n"),
        (ZeroDivisionError("of mine"), 1, "ZeroDivisionError: of mine\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(7), 7, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_way_to_end_has_its_words_and_exit_code(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        guarded(main)
    assert end.value.code == code
    assert capsys.readouterr().err.endswith(told)


def test_a_bug_behind_a_stopped_server_is_what_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        raise ClusterError("the parameter server stopped") from TypeError("of mine")

    with pytest.raises(SystemExit):
        guarded(main)
    assert capsys.readouterr().err == "error:\nTypeError: of mine\n"
