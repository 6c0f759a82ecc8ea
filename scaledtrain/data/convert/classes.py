"""The names of the classes of a data set, in a file beside its shards."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from scaledtrain.data.sharded.files import write_whole
from scaledtrain.data.sharded.manifest import load_json
from scaledtrain.errors import DataError

__all__ = ["class_names", "save_class_names"]

CLASSES = "classes.json"


def class_names(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The names of the classes of a data set that a converter wrote.

    Args:
        folder: of the data set.

    Returns:
        Column -> the names of its classes 0, 1, ...; of columns that have classes with names.

    Raises:
        DataError: the file is damaged.

    Example:
        ``class_names("photos-sharded")["label"][3]`` is what label 3 is called.
    """
    path = Path(folder) / CLASSES
    try:
        found = load_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; convert the data again") from error
    if not isinstance(found, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in found.values()
    ):
        raise DataError(f"{path} holds no names of classes; convert the data again")
    return found


def save_class_names(folder: Path, classes: Mapping[str, Sequence[str]]) -> None:
    """Write the names, or delete those of another data set that was in the folder."""
    path = folder / CLASSES
    if classes:
        told = {column: list(names) for column, names in classes.items()}
        text = json.dumps(told, ensure_ascii=False, indent=1).encode()
        try:
            write_whole(path, [memoryview(text)])
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error}") from error
    else:
        path.unlink(missing_ok=True)
