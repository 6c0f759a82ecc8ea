"""What a result has to be told with: versions, machine, job, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import scaledtrain
from scaledtrain.comm.protocols import Link

__all__ = ["environment"]


def environment(link: Link) -> dict[str, Any]:
    """Where a run is made."""
    device = torch.cuda.get_device_name(link.device) if link.device.type == "cuda" else "cpu"
    return {
        "command": sys.argv,
        "commit": commit(),
        "scaledtrain": scaledtrain.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "world_size": link.group.size,
        "transport": link.transport,
    }


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if name:
            return name[1]
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this file is in; None if it is in none, or git is missing.

    Files that differ from the commit are told: ``3f2c... with changes``.
    """
    root = Path(__file__).resolve().parents[1]
    try:
        top, head = _git(root, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    if Path(top).resolve() != root:  # installed somewhere inside another repository
        return None
    return f"{head} with changes" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
