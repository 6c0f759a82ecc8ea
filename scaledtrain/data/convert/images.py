"""Folders of images, a class in each sub-folder; and how an image becomes an array."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, final

import numpy as np

from scaledtrain.data.convert.source import Batch, Source, Spans, names_and_sizes
from scaledtrain.data.sharded import Column
from scaledtrain.data.sharded.columns import Array
from scaledtrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["AS_IT_IS", "IMAGE_SUFFIXES", "ImageDecoder", "Images"]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
IMAGES_PER_PART = 64  # at most


@dataclass(frozen=True)
class ImageDecoder:
    """Makes arrays of images, with Pillow.

    Args:
        size: height and width to which an image is resized (bilinear, with antialiasing; its
            aspect ratio is not kept); None: as it is, so that all must have one size.
        mode: ``"RGB"`` or ``"L"`` (grey); an image of another mode is converted.

    Raises:
        ConfigError: there is no such mode, the size is none, or (when called) there is no Pillow.
    """

    size: tuple[int, int] | None = None
    mode: Literal["RGB", "L"] = "RGB"

    def __post_init__(self) -> None:
        if self.mode not in ("RGB", "L"):
            raise ConfigError(f"mode is {self.mode!r}; it is 'RGB' or 'L'")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ConfigError(f"size is {self.size}; it is (height, width), both >= 1")

    def __call__(self, encoded: bytes, name: str) -> Array:
        """Decode an image.

        Args:
            encoded: a JPEG, PNG, ... file.
            name: what messages call it.

        Returns:
            uint8 ``[channels, height, width]``.

        Raises:
            ConfigError: its pixels have more than 8 bits.
            DataError: it is damaged, or no image.
        """
        Image = _pillow()
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                return self.to_array(image)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{name} cannot be decoded as an image: {error}; repair it or take it away"
            ) from error

    def to_array(self, image: Image.Image) -> Array:
        """The same of an image of Pillow's.

        Raises:
            ConfigError: its pixels have more than 8 bits.
        """
        Image = _pillow()
        if image.mode[0] in "IF":  # Pillow would cut off everything above 255
            raise ConfigError(
                f"an image has pixels of more than 8 bits (mode {image.mode}), which do not go "
                "into uint8; write it as an array (.npy)"
            )
        converted = image.convert(self.mode)
        if self.size is not None and converted.size != self.size[::-1]:
            converted = converted.resize(self.size[::-1], Image.Resampling.BILINEAR)
        pixels = np.asarray(converted)
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


AS_IT_IS = ImageDecoder()


@final
class Images(Source):
    """Images in folders: ``folder/cat/1.jpg`` is of class ``cat``.

    Classes are the sub-folders, numbered from 0 by name; an image may lie deeper. Samples come
    class by class: train with ``shuffle="block"`` or ``"full"``. Columns are ``image`` (uint8
    ``[channels, height, width]``, or ragged: the bytes of the file) and ``label`` (int64); what the
    classes are called is told by `class_names`.

    Args:
        folder: of the sub-folders.
        decoder: makes the arrays; None: keep the bytes of the files, which takes a tenth of the
            space, and decode when training.

    Raises:
        ConfigError: there are no sub-folders, one has no image, or images lie beside them.
        DataError: (when read) one is damaged.
    """

    def __init__(self, folder: str | Path, decoder: ImageDecoder | None = ImageDecoder()) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ConfigError(f"{root} is no folder; give the one with a sub-folder for each class")
        names = sorted(path.name for path in root.iterdir() if path.is_dir())
        if not names or any(map(_is_image, root.iterdir())):
            raise ConfigError(
                f"{root} has {'images beside its' if names else 'no'} sub-folders; put the images "
                "of each class into a sub-folder, which has the name of the class"
            )
        self.classes = {"label": names}
        self._files: list[tuple[Path, int]] = []
        for label, name in enumerate(names):
            inside = sorted(filter(_is_image, (root / name).rglob("*")))
            if not inside:
                raise ConfigError(
                    f"{root / name} has no image ({', '.join(sorted(IMAGE_SUFFIXES))}); a "
                    "sub-folder is a class"
                )
            self._files += [(file, label) for file in inside]
        self._decoder = decoder
        first = self._image(self._files[0][0]) if decoder is not None else b""
        ragged = isinstance(first, bytes)
        self.columns = {
            "image": Column("uint8", () if isinstance(first, bytes) else first.shape, ragged),
            "label": Column("int64"),
        }
        per_part = Spans.of_bytes(len(self._files), self.columns["image"].nbytes).per_part
        self._spans = Spans(len(self._files), min(per_part, IMAGES_PER_PART))
        self.parts = self._spans.parts
        files = names_and_sizes(file for file, _ in self._files)
        self.identity = f"images {decoder} {names} {files}"

    def read(self, part: int) -> Iterator[Batch]:
        """Some images, decoded, and their labels."""
        span = self._spans.span(part)
        chosen = self._files[span.start : span.stop]
        images = [self._image(file) for file, _ in chosen]
        if self._decoder is not None:
            for (file, _), image in zip(chosen, images, strict=True):
                self._check_shape(file, image)
            images = np.stack(images)  # type: ignore[assignment]
        yield {"image": images, "label": np.array([label for _, label in chosen])}

    def _image(self, file: Path) -> bytes | Array:
        try:
            encoded = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        return encoded if self._decoder is None else self._decoder(encoded, str(file))

    def _check_shape(self, file: Path, image: bytes | Array) -> None:
        expected = self.columns["image"].shape
        if isinstance(image, np.ndarray) and image.shape != expected:
            raise ConfigError(
                f"{file} is {image.shape[1]} x {image.shape[2]} pixels, but the first image "
                f"{expected[1]} x {expected[2]}; give a size, to which all are resized, or keep "
                "the images encoded"
            )


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            "images are decoded with Pillow, which cannot be imported here: "
            "pip install 'scaledtrain[data]'"
        ) from error
    return Image


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
