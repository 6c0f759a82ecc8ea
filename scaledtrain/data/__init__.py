"""Datasets that need no download."""

from __future__ import annotations

from scaledtrain.data.digits import digits
from scaledtrain.data.stdlib_text import StdlibText, stdlib_text

__all__ = [
    "StdlibText",
    "digits",
    "stdlib_text",
]
