import atexit
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests import ranks
from tests.fork_server import ForkServer
from tests.ranks import FRESH, RankFailed, run_ranks


@pytest.fixture(params=["forked", "fresh"])
def fresh(request: pytest.FixtureRequest) -> bool:
    if request.param == "forked" and FRESH:
        pytest.skip("ranks are not forked here")
    return request.param == "fresh"


def rank() -> int:
    return int(os.environ["RANK"])


def environment() -> tuple[dict[str, str], bool]:
    return dict(os.environ), "torch" in sys.modules


def values(offset: int) -> object:
    return {"number": rank() + offset, "array": np.full(3, rank()), "none": None}


def sum_over_ranks() -> object:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([1.0 + rank()])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return total, torch.get_num_threads()


def rank_1_raises_and_the_others_wait(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    if rank() == 1:
        raise LookupError("no such layer")
    time.sleep(60)


def all_raise_but_rank_1_first() -> None:
    time.sleep(0 if rank() == 1 else 0.02)
    raise ValueError(f"rank {rank()}")


class Unpicklable(Exception):
    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} and {two}")


def raises_what_does_not_pickle() -> None:
    raise Unpicklable("this", "that")


def rank_0_waits() -> None:
    while rank() == 0:
        time.sleep(1)


def rank_1_is_killed() -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.0)  # on a busy machine the other one begins later
    raise ConnectionError("the peer has gone")


def ends_early() -> None:
    os._exit(3)


def exits() -> None:
    sys.exit("enough")


def returns_a_function() -> object:
    return lambda: None


def leaves_a_variable() -> None:
    os.environ["NEW"] = "1"


def warns() -> None:
    warnings.warn("old name", FutureWarning, stacklevel=1)


def leaves_a_process() -> None:
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()


def ends_badly() -> None:
    atexit.register(os.abort)


def prints() -> None:
    print("to stdout")
    print("to stderr", file=sys.stderr)


def draws() -> tuple[object, ...]:
    return np.random.random(), random.random(), hash("a name"), os.getsid(0) == os.getpid()


def starts_a_grandchild(folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(folder, str(child.pid)).touch()
    time.sleep(60)


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or dead and waits for init to take notice."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


def test_returns_the_values_by_rank(fresh: bool) -> None:
    first, second = run_ranks(values, 2, 10, fresh=fresh)
    assert (first["number"], second["number"]) == (10, 11)
    assert second["array"].tolist() == [1, 1, 1]


def test_the_environment_is_that_of_torchrun(fresh: bool) -> None:
    (first, imported), (second, _) = run_ranks(environment, 2, fresh=fresh)
    assert (first["RANK"], first["LOCAL_RANK"]) == ("0", "0")
    assert (second["RANK"], second["LOCAL_RANK"]) == ("1", "1")
    assert (second["WORLD_SIZE"], second["LOCAL_WORLD_SIZE"]) == ("2", "2")
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["OMP_NUM_THREADS"] == "1"
    assert imported is not fresh


def test_output_is_captured_where_it_belongs(
    fresh: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(prints, 1, fresh=fresh)
    assert capfd.readouterr() == ("to stdout\n", "to stderr\n")


def test_processes_differ_as_fresh_ones_do(fresh: bool) -> None:
    """In random numbers, and in the order in which the names in a set come."""
    for one, other in zip(*run_ranks(draws, 2, fresh=fresh), strict=True):
        assert one != other or one is True


def test_ranks_can_meet_and_return_tensors(fresh: bool) -> None:
    (first, threads), (second, _) = run_ranks(sum_over_ranks, 2, fresh=fresh)
    assert first.item() == second.item() == 1.0 + 2.0
    assert threads == 1


def test_an_exception_comes_back_with_its_traceback_and_ends_the_other_ranks(
    tmp_path: Path, fresh: bool
) -> None:
    began = time.monotonic()
    with pytest.raises(LookupError, match="no such layer") as caught:
        run_ranks(rank_1_raises_and_the_others_wait, 3, str(tmp_path), fresh=fresh)
    assert time.monotonic() - began < 30
    assert "in rank 1 of 3" in str(caught.value.__cause__)
    assert 'raise LookupError("no such layer")' in str(caught.value.__cause__)
    assert all(has_ended(int(file.name)) for file in tmp_path.iterdir())


def test_the_exception_that_was_first_in_time_is_told(fresh: bool) -> None:
    with pytest.raises(ValueError, match="rank"):
        run_ranks(all_raise_but_rank_1_first, 2, fresh=fresh)


def test_an_exception_that_does_not_pickle_keeps_its_name_and_words(fresh: bool) -> None:
    with pytest.raises(RankFailed, match="Unpicklable: this and that"):
        run_ranks(raises_what_does_not_pickle, 1, fresh=fresh)


def test_a_timeout_names_the_ranks_that_had_not_finished_and_where_they_were(fresh: bool) -> None:
    with pytest.raises(TimeoutError, match=r"of 2 ranks, \[0\] had not finished") as caught:
        run_ranks(rank_0_waits, 2, timeout_seconds=3.0, fresh=fresh)
    assert "in rank_0_waits" in str(caught.value)


def test_a_killed_rank_is_the_cause_and_not_its_peers_errors(fresh: bool) -> None:
    with pytest.raises(RankFailed, match="rank 1 of 2 ended without returning: killed by SIGKILL"):
        run_ranks(rank_1_is_killed, 2, fresh=fresh)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (ends_early, RankFailed, "rank 0 of 1 ended without returning: exit code 3"),
        (exits, RankFailed, "SystemExit: enough"),
        (returns_a_function, Exception, "lambda"),
        (leaves_a_variable, AssertionError, "left behind: environment variable NEW"),
        (leaves_a_process, AssertionError, "left behind: process"),
        (ends_badly, RankFailed, "rank 0 of 1 ended without returning: killed by SIGABRT"),
        (warns, FutureWarning, "old name"),
    ],
)
def test_faults_that_would_be_easy_to_miss(
    function: object, error: type[Exception], words: str, fresh: bool
) -> None:
    with pytest.raises(error, match=words):
        run_ranks(function, 1, fresh=fresh)


def test_a_timeout_ends_what_the_ranks_had_started(tmp_path: Path, fresh: bool) -> None:
    with pytest.raises(TimeoutError):
        run_ranks(starts_a_grandchild, 1, str(tmp_path), timeout_seconds=1.5, fresh=fresh)
    (grandchild,) = tmp_path.iterdir()
    assert has_ended(int(grandchild.name))


def test_ranks_end_when_their_parent_is_killed(tmp_path: Path, fresh: bool) -> None:
    told, temporary = tmp_path / "told", tmp_path / "temporary"
    told.mkdir()
    temporary.mkdir()
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from tests import fork_server, ranks\n"
        f"from {__name__} import starts_a_grandchild\n"
        f"if not {fresh}: ranks._servers[0] = fork_server.ForkServer([])\n"
        f"ranks.run_ranks(starts_a_grandchild, 1, {str(told)!r}, fresh={fresh})"
    )
    # What it cannot clean up any more goes with this test's folder.
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        deadline = time.monotonic() + 30
        while not list(told.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        parent.kill()
    (grandchild,) = told.iterdir()
    assert has_ended(int(grandchild.name))


def test_a_local_function_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="Define it at the top of a module"):
        run_ranks(lambda: None, 2)


@pytest.fixture
def server() -> Iterator[ForkServer]:
    if FRESH:
        pytest.skip("ranks are not forked here")
    server = ForkServer([])
    yield server
    server.close()


def test_a_fork_server_that_was_killed_says_so_and_is_replaced(
    server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "ForkServer", partial(ForkServer, []))
    monkeypatch.setitem(ranks._servers, 0, server)
    assert ranks.fork_server(0) is server
    os.kill(server._process.pid, signal.SIGKILL)
    with pytest.raises(ConnectionError):
        server.fork({}, "")
    assert not server.is_alive()
    run_ranks(prints, 1)
    assert ranks.fork_server(0) is not server
    ranks.fork_server(0).close()


def test_an_answer_that_nobody_waited_for_is_not_taken_for_another(
    server: ForkServer, tmp_path: Path
) -> None:
    """As when the time of a test is up while it asks; here it is the exit code that it missed."""
    process = server.fork({**os.environ, "RANK": "0"}, str(tmp_path))  # there is no task
    server._socket.send(pickle.dumps((-1, ("wait", process.pid, 0))))
    assert process.wait() == 1
    process.stdin.close()
