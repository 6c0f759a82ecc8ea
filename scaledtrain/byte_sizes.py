"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

from scaledtrain.errors import ConfigError

__all__ = ["parse_bytes"]

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_bytes(size: str | int, name: str) -> int:
    """How many bytes ``2147483648``, ``"512MiB"`` or ``"1.5GiB"`` are.

    Args:
        size: what was given.
        name: what it is, for the message: ``"cache_bytes"``, ``"a memory budget"``.

    Raises:
        ConfigError: it is no number of bytes.

    Example:
        >>> parse_bytes("1.5KiB", "cache_bytes"), parse_bytes(10_000, "cache_bytes")
        (1536, 10000)
    """
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])iB|B?)\s*", str(size))
    if matched is None:
        raise ConfigError(
            f"{name} of {size!r} is not understood; give bytes, as 2147483648, or with a unit: "
            '"512MiB", "2GiB"'
        )
    return int(float(matched[1]) * 2 ** _UNITS[matched[2] or ""])
