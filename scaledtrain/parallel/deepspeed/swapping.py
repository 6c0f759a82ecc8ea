"""What DeepSpeed needs to keep tensors in files: its operator, folders, and buffers."""

from __future__ import annotations

import importlib
import os
import re
import resource
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from scaledtrain.errors import ConfigError
from scaledtrain.replica import MakeOptimizer, Updater

__all__ = ["prepare_swapping"]


_LOCKS_ANY = 1 << 14  # among a process's capabilities: CAP_IPC_LOCK


def prepare_swapping(
    zero: dict[str, Any], make_optimizer: MakeOptimizer, largest: int, files: ExitStack
) -> None:
    """Get ready for what a config says is in files, if there is anything.

    The operator is compiled by the first process of a host that needs it, while others wait.

    Args:
        zero: the config's ``zero_optimization``, in which folders become this process's own, and
            buffers as many as the optimizer needs.
        make_optimizer: makes the optimizer.
        largest: elements of the largest sub-group of parameters, at most.
        files: removes the folders when it is closed.

    Raises:
        ConfigError: the operator, a folder, the optimizer, the number of buffers or the memory for
            them will not do.
    """
    optimizer, parameters = (zero.get(name, {}) for name in ("offload_optimizer", "offload_param"))
    n_locked = 0
    if optimizer.get("device") == "nvme":
        _fit_buffers(optimizer, make_optimizer)
        n_locked += optimizer["buffer_count"] * largest
    if parameters.get("device") == "nvme":
        n_locked += parameters.get("buffer_count", 5) * parameters["buffer_size"] + largest
    if not n_locked:
        return
    _check_locked(4 * n_locked)
    _load_operator()
    for section in (optimizer, parameters):
        if section.get("device") == "nvme":
            section["nvme_path"] = _own_folder(section["nvme_path"], files)


def _check_locked(n_bytes: int) -> None:
    """DeepSpeed ends the process where it cannot lock its buffers."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    locks_any = found is not None and int(found[1], 16) & _LOCKS_ANY
    if not (locks_any or limit == resource.RLIM_INFINITY or n_bytes <= limit):
        raise ConfigError(
            f"NVMe is asked for (engine.offload), which takes up to {n_bytes} bytes of page-locked "
            f"memory for buffers, but this process may lock {limit}; raise that (ulimit -l "
            "unlimited, docker run --ulimit memlock=-1), or set a smaller sub_group_size in "
            "zero_optimization of engine.config"
        )


def _load_operator() -> None:
    operators: Any = importlib.import_module("deepspeed.ops.op_builder")
    try:
        operators.AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, ImportError, OSError, TypeError) as error:  # the last: no CUDA_HOME
        said = str(error).partition("\n")[0]
        raise ConfigError(
            f"NVMe is asked for (engine.offload), but DeepSpeed's operator async_io cannot be "
            f"compiled here ({said}); install libaio with its headers "
            "(apt-get install libaio-dev), a C++ compiler, ninja (pip install ninja), and with a "
            "GPU CUDA's toolkit, or take engine.offload=cpu"
        ) from error


def _own_folder(path: str, files: ExitStack) -> str:
    """One inside, since DeepSpeed's files have the same names in every run."""
    try:
        folder = files.enter_context(TemporaryDirectory(prefix="scaledtrain-", dir=path))
        tried = Path(folder) / "tried"
        os.close(os.open(tried, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
        tried.unlink()
    except OSError as error:
        raise ConfigError(
            f"engine.nvme_path is {path}, which cannot be used ({error}); it must be a folder in "
            "which this process may write, on a disk whose file system can go past the system's "
            "cache (O_DIRECT)"
        ) from error
    return folder


def _fit_buffers(section: dict[str, Any], make_optimizer: MakeOptimizer) -> None:
    """A sub-group's parameters, gradients and state need one each; as often as it is pipelined."""
    sets = 1 + bool(section.get("pipeline_read")) + bool(section.get("pipeline_write"))
    needed = sets * (2 + _n_states(make_optimizer))
    if section.setdefault("buffer_count", needed) < needed:
        raise ConfigError(
            f"zero_optimization.offload_optimizer.buffer_count is {section['buffer_count']}, but "
            f"this optimizer needs {needed}; set it to that, or remove it"
        )


def _n_states(make_optimizer: MakeOptimizer) -> int:
    """How many tensors the optimizer keeps of a parameter that are as large, by trying it out."""
    tried = nn.Parameter(torch.ones(2))
    optimizer = Updater([("tried", tried)], make_optimizer).optimizer

    def large() -> list[Tensor]:
        state = optimizer.state[tried].values()
        return [v for v in state if isinstance(v, Tensor) and v.shape == tried.shape]

    def updated() -> list[Tensor]:
        tried.grad = torch.ones(2)
        optimizer.step()
        return large()

    before, first, second = large(), updated(), updated()
    if before or list(map(id, first)) != list(map(id, second)):
        raise ConfigError(
            f"engine.offload is nvme, but {type(optimizer).__name__} makes its state before the "
            "first update, or anew in each, and DeepSpeed reads and writes the tensors that are "
            "there after the first; take another (AdamW, SGD), or engine.offload=cpu"
        )
    return len(first)
