import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from tests.leaks import SHARED_MEMORY, Leak, nothing_left_behind

SLEEPER = [sys.executable, "-c", "import time; time.sleep(30)"]


def test_a_process_is_a_leak_and_is_ended() -> None:
    with pytest.raises(Leak, match="process .* import time"), nothing_left_behind(0.1):
        process = subprocess.Popen(SLEEPER)
    assert process.wait(5) == -9


def test_a_thread_is_a_leak_even_if_it_is_a_daemon() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, daemon=True, name="listener")
    with pytest.raises(Leak, match="thread listener"), nothing_left_behind(0.1):
        thread.start()
    stop.set()
    thread.join()


def test_what_ends_within_the_grace_period_is_no_leak() -> None:
    with nothing_left_behind():
        threading.Thread(target=time.sleep, args=(0.1,)).start()
        process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()


def test_a_writer_of_tensorboard_has_to_be_closed(tmp_path: Path) -> None:
    with pytest.raises(Leak, match="_AsyncWriterThread"), nothing_left_behind(0.1):
        writer = SummaryWriter(str(tmp_path))
    with nothing_left_behind(0.1):
        writer.close()


def test_a_changed_variable_is_a_leak_and_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD", "1")
    with pytest.raises(Leak) as caught, nothing_left_behind():
        os.environ["OLD"] = "2"
        os.environ["NEW"] = "3"
    assert "variable NEW (None became '3')" in str(caught.value)
    assert "variable OLD ('1' became '2')" in str(caught.value)
    assert os.environ["OLD"] == "1"
    assert "NEW" not in os.environ


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm here")
def test_a_file_in_shared_memory_is_a_leak_unless_another_process_uses_it() -> None:
    file = SHARED_MEMORY / f"scaledtrain-test-{os.getpid()}"
    with pytest.raises(Leak, match=file.name), nothing_left_behind(0.1):
        file.touch()
    file.unlink()
    code = "input(); file = open(sys.argv[1], 'w'); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; {code}", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin
        assert other.stdout
        with nothing_left_behind(0.1):
            print(file=other.stdin, flush=True)
            other.stdout.readline()
        file.unlink()
        print(file=other.stdin, flush=True)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm here")
def test_a_semaphore_of_another_process_is_no_leak_of_this_one() -> None:
    code = (
        "import multiprocessing; input(); "
        "s = multiprocessing.get_context('spawn').Semaphore(); print(s._semlock.name); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin
        assert other.stdout
        with nothing_left_behind(0.1):
            print(file=other.stdin, flush=True)
            name = other.stdout.readline().strip().removeprefix("/")
            assert (SHARED_MEMORY / f"sem.{name}").exists()
        print(file=other.stdin, flush=True)


def test_a_process_group_is_a_leak_and_is_destroyed(tmp_path: Path) -> None:
    with pytest.raises(Leak, match=r"torch\.distributed"), nothing_left_behind():
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    assert not dist.is_initialized()


def test_an_exception_is_not_hidden_by_what_it_left() -> None:
    with pytest.raises(KeyError), nothing_left_behind():
        os.environ["NEW"] = "1"
        raise KeyError("the real fault")
    del os.environ["NEW"]
