"""What holds for every test: it computes with one thread and leaves nothing behind."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before the first import of torch
os.environ["MPLBACKEND"] = "agg"

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leaks import Leak, nothing_left_behind

if "torch" in sys.modules:  # a plugin of pytest was faster
    sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    try:
        with nothing_left_behind():
            yield
    except Leak as leak:
        pytest.fail(str(leak), pytrace=False)


def pytest_configure(config: pytest.Config) -> None:
    """Where there is a GPU, only what is marked ``gpu`` computes on it, and only if asked for."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Few files have tests of such a kind: the others need not be imported to know it."""
    kind = config.getoption("markexpr")
    if kind in ("alone", "gpu") and collection_path.match("test_*.py"):
        return f"mark.{kind}" not in collection_path.read_text() or None
    return None


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # else each collection, of which there are many, would go through all modules


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and -m gpu"))
