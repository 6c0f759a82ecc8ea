"""Progress bars, where a person can see them."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(total: int, unit: str) -> tqdm[Any]:
    """A bar on stderr that leaves nothing behind; without a terminal, nothing."""
    return tqdm(
        total=total, unit=unit, dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty()
    )
