"""What a process does with memory that tensors leave free."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from scaledtrain.allocator import keep_freed_memory
from scaledtrain import Trainer

{before}
x = torch.ones(2**18)  # 1 MiB

def step():  # all of it is freed at the heap's end
    kept = [x + 1 for _ in range(256)]
    return kept[-1]

for _ in range(3):
    step()
start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start) / 5)
"""
PAGES = 256 * 2**20 // os.sysconf("SC_PAGE_SIZE")  # 65536 of 4 KiB: what a step touches
TRAINER = """
with Trainer(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss,
             lambda p: torch.optim.SGD(p, lr=0.1), console=False): pass
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's")


def faults(before: str, **environment: str) -> float:
    """Pages that the operating system had to bring in a step."""
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(chosen)}
    ran = subprocess.run(
        [sys.executable, "-c", STEPS.format(before=before)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return float(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("before", ["assert keep_freed_memory()", TRAINER])
def test_a_step_takes_the_memory_that_the_last_one_left(before: str) -> None:
    assert faults(before) < PAGES / 100


# What glibc does by itself hangs on what happens to lie at the heap's end. With these settings each
# tensor is mapped and unmapped by itself.
@pytest.mark.parametrize(
    "chosen",
    [
        {"MALLOC_TRIM_THRESHOLD_": "100000"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
)
def test_what_the_user_has_chosen_stays(chosen: dict[str, str]) -> None:
    assert faults("assert not keep_freed_memory()" + TRAINER, **chosen) > PAGES / 2


def test_variables_about_something_else_choose_nothing() -> None:
    assert faults("assert keep_freed_memory()", MALLOC_ARENA_MAX="2") < PAGES / 100
