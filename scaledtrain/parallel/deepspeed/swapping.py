"""What DeepSpeed needs to keep tensors in files: its operator, folders, and buffers."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from scaledtrain.errors import ConfigError
from scaledtrain.replica import MakeOptimizer, Updater

__all__ = ["prepare_swapping"]


_MIB = 1 << 20
_COMPILED_WITHIN = timedelta(minutes=30)  # of a core that has other work, too
_LOCK_WHEN_USED = 1  # MLOCK_ONFAULT
_USUAL_BUFFERS = 5  # of parameters: DeepSpeed's own default


def prepare_swapping(
    config: dict[str, Any],
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    group: ProcessGroup,
    files: ExitStack,
) -> None:
    """Get ready for what a config says is in files, if there is anything. Collective.

    The operator is compiled by the first process of a host that needs it, while others wait.

    Args:
        config: in which folders become this process's own, and buffers as many as are needed.
        model: whole.
        make_optimizer: makes the optimizer.
        group: the ranks that will divide the model.
        files: removes the folders when it is closed.

    Raises:
        ConfigError: on any of the ranks the operator, a folder, the optimizer, the number of
            buffers or the memory for them will not do.
    """
    zero = config["zero_optimization"]
    sections = {name: zero.get(name, {}) for name in ("offload_optimizer", "offload_param")}
    swapped = {name: own for name, own in sections.items() if own.get("device") == "nvme"}
    if not swapped:
        return
    with _alike(group):
        _check_host(config)
        _check_locked(_bytes_of_buffers(config, swapped, model, make_optimizer, group.size()))
        folders: dict[str, str] = {}
        for own in swapped.values():
            path = own["nvme_path"]
            own["nvme_path"] = folders[path] = folders.get(path) or _own_folder(path, files)
        _load_operator()


@contextmanager
def _alike(group: ProcessGroup) -> Iterator[None]:
    """What is an error on one rank is one on all. Collective."""
    if group.size() == 1:
        yield
        return
    # They are all there are. While one host compiles, others wait longer than in their own group.
    waiting = dist.new_group(timeout=_COMPILED_WITHIN, backend="gloo")
    try:
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        said: list[str | None] = [None] * group.size()
        dist.all_gather_object(said, None if own is None else str(own), waiting)
    finally:
        dist.destroy_process_group(waiting)
    if own is not None:
        raise own
    for rank, message in enumerate(said):
        if message is not None:
            raise ConfigError(f"rank {rank} cannot take part: {message}")


def _check_host(config: dict[str, Any]) -> None:
    if sys.platform != "linux":
        raise ConfigError(
            f"NVMe is asked for (engine.offload), which needs Linux, but this is {sys.platform}; "
            "take engine.offload=cpu"
        )
    if (config.get("aio") or {}).get("use_gds"):
        raise ConfigError(
            "aio.use_gds is true in engine.config, but updates are made on the host here, from "
            "buffers in its memory; remove it"
        )


def _bytes_of_buffers(
    config: dict[str, Any],
    swapped: dict[str, dict[str, Any]],
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    ranks: int,
) -> int:
    """At most; as many buffers as are needed are in the sections then."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parts = [-(-p.numel() // ranks) for _, p in named]
    sub_group_size = _whole_number(config["zero_optimization"], "sub_group_size", 10**9)
    largest = min(sum(parts), sub_group_size + max(parts))
    n_bytes = 0
    for name, section in swapped.items():
        if name == "offload_optimizer":
            # Of parameters, gradients and state of a sub-group; as often as it is pipelined.
            sets = 1 + bool(section.get("pipeline_read")) + bool(section.get("pipeline_write"))
            needed = sets * (2 + _n_states([own for own, _ in named], make_optimizer))
            n_bytes += 4 * largest * _fit_buffers(section, name, needed, needed)
        else:
            threshold = max(_MIB, _whole_number(config.get("aio") or {}, "block_size", _MIB))
            needed = _whole_at_once(model, set(_in_files(model, ranks, threshold)))
            count = _fit_buffers(section, name, needed, max(_USUAL_BUFFERS, needed))
            of_buffers = count * _whole_number(section, "buffer_size", 0)
            n_bytes += named[0][1].element_size() * (of_buffers + largest)
    return n_bytes


def _whole_number(section: dict[str, Any], name: str, default: int) -> int:
    """As a file has it, in which 1e9 is one as well; it is in the section then."""
    value = section.get(name, default)
    if not (isinstance(value, int | float) and value >= 0 and float(value).is_integer()):
        raise ConfigError(
            f"{name} is {value!r} in engine.config; it is a whole number, 0 or more: set it to "
            "one, or remove it"
        )
    section[name] = int(value)
    return int(value)


def _check_locked(n_bytes: int) -> None:
    """DeepSpeed ends the process where it cannot lock its buffers."""
    if not _can_lock(n_bytes):
        raise ConfigError(
            f"NVMe is asked for (engine.offload), which takes up to {n_bytes} bytes of page-locked "
            "memory for buffers, more than this process may lock now; raise that (ulimit -l "
            "unlimited, docker run --ulimit memlock=-1), or set a smaller sub_group_size in "
            "zero_optimization of engine.config"
        )


def _can_lock(n_bytes: int) -> bool:
    """Ask the kernel, which alone knows limits and rights; memory that is not used takes none."""
    libc = ctypes.CDLL(None)
    try:
        with mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            start = ctypes.c_char.from_buffer(memory)
            size, address = ctypes.c_size_t(n_bytes), ctypes.c_void_p(ctypes.addressof(start))
            failed = libc.mlock2(address, size, _LOCK_WHEN_USED)
            del start  # the memory is not given back before
    except OSError:  # there is not so much of it
        return False
    return not failed


def _load_operator() -> None:
    operators: Any = importlib.import_module("deepspeed.ops.op_builder")
    try:
        operators.AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # of a compiler, of what runs it, or of what is compiled
        said = str(error).partition("\n")[0]
        compiling: Any = importlib.import_module("torch.utils.cpp_extension")
        if torch.cuda.is_available() and compiling.CUDA_HOME is None:
            said = "CUDA_HOME is not set, and no toolkit of CUDA is found"
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


def _fit_buffers(section: dict[str, Any], name: str, needed: int, usual: int) -> int:
    """As many as a file says; without its word, as many as usual."""
    count = _whole_number(section, "buffer_count", usual)
    if count < needed:
        raise ConfigError(
            f"zero_optimization.{name}.buffer_count is {count}, but this model and optimizer need "
            f"{needed}; set it to that, or remove it"
        )
    return count


def _in_files(model: nn.Module, ranks: int, threshold: int) -> Iterator[nn.Parameter]:
    """Parameters of which each rank has so many bytes, or more; others stay in memory."""
    for parameter in model.parameters():
        if -(-parameter.numel() // ranks) * parameter.element_size() >= threshold:
            yield parameter


def _whole_at_once(module: nn.Module, counted: set[nn.Parameter]) -> int:
    """How many of the parameters are whole while a module computes, at most.

    They are its own, those in its lists, and those of the modules around it.
    """
    lists = [m for m in module.children() if isinstance(m, nn.ParameterList | nn.ParameterDict)]
    own = {p for m in (module, *lists) for p in m.parameters(recurse=False)}
    inside = [_whole_at_once(m, counted) for m in module.children() if m not in lists]
    return len(own & counted) + max(inside, default=0)


def _n_states(names: list[str], make_optimizer: MakeOptimizer) -> int:
    """How many tensors the optimizer keeps of a parameter that are as large, by trying it out."""
    tried = [(name, nn.Parameter(torch.ones(2))) for name in names]
    try:
        optimizer = Updater(tried, make_optimizer).optimizer

        def large() -> list[list[Tensor]]:
            states = [optimizer.state[p].values() for _, p in tried]
            return [[v for v in s if isinstance(v, Tensor) and v.shape == (2,)] for s in states]

        def updated() -> list[list[Tensor]]:
            for _, parameter in tried:
                parameter.grad = torch.ones(2)
            optimizer.step()
            return large()

        before, first, second = large(), updated(), updated()
    except Exception as error:
        raise ConfigError(
            "engine.offload is nvme, for which the optimizer is tried out on two elements of each "
            f"parameter, but that fails ({type(error).__name__}: {error}); take one that needs no "
            "more of them, or engine.offload=cpu"
        ) from error
    changed = [list(map(id, now)) for now in first] != [list(map(id, now)) for now in second]
    if any(before) or changed:
        raise ConfigError(
            f"engine.offload is nvme, but {type(optimizer).__name__} makes its state before the "
            "first update, or anew in each, and DeepSpeed reads and writes the tensors that are "
            "there after the first; take another (AdamW, SGD), or engine.offload=cpu"
        )
    return max(map(len, first))
