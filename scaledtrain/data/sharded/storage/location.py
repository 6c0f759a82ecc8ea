"""From what a user gives as the place of a data set to the folder there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from scaledtrain.byte_sizes import parse_bytes
from scaledtrain.data.sharded.storage.cache import Cache, default_folder
from scaledtrain.data.sharded.storage.folder import Folder
from scaledtrain.data.sharded.storage.local import LocalFolder
from scaledtrain.data.sharded.storage.remote import RemoteFolder
from scaledtrain.data.sharded.storage.retry import Remote
from scaledtrain.errors import ConfigError

__all__ = ["CACHE_BYTES", "open_folder"]

CACHE_BYTES = "10GiB"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")


def open_folder(
    location: str | os.PathLike[str],
    remote: Remote | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: str | int = CACHE_BYTES,
) -> Folder:
    """The folder at a path or URL; nothing is read yet.

    Args:
        location: a path, ``file://...``, which is the same, or any other URL that fsspec knows.
        remote: how a URL is reached.
        cache: folder for copies of a URL's shards; None: in the user's cache folder.
        cache_bytes: how many bytes of copies it may hold.

    Raises:
        ConfigError: the URL needs a package that is not installed, is of no kind that is known, or
            is a file's of another host.

    Example:
        >>> str(open_folder("file:///data/a%20b")), str(open_folder("relative/folder"))
        ('/data/a b', 'relative/folder')
    """
    text = os.fspath(location)
    if not _URL.match(text):
        return LocalFolder(Path(text))
    if text.startswith("file://"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(
                f"{text} names a host, {parts.netloc!r}; files of this one are at file:///, with "
                "three slashes and the whole path"
            )
        return LocalFolder(Path(unquote(parts.path)))
    copies = Cache(
        default_folder() if cache is None else Path(cache), parse_bytes(cache_bytes, "cache_bytes")
    )
    return RemoteFolder(text, remote or Remote(), copies)
