"""Where data sets lie: a local folder, or a remote one whose shards are cached here."""

from __future__ import annotations

from scaledtrain.data.sharded.storage.folder import Begun, Folder, OpenFile
from scaledtrain.data.sharded.storage.local import LocalFolder
from scaledtrain.data.sharded.storage.location import CACHE_BYTES, open_folder
from scaledtrain.data.sharded.storage.retry import Remote

__all__ = ["CACHE_BYTES", "Begun", "Folder", "LocalFolder", "OpenFile", "Remote", "open_folder"]
