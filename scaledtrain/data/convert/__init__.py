"""Converts data of other formats: a source says how they are read, `convert` writes shards.

convert(Images("photos", ImageDecoder(size=(64, 64))), "photos-sharded", workers=4)
"""

from __future__ import annotations

from scaledtrain.data.convert.arrays import Arrays
from scaledtrain.data.convert.classes import class_names
from scaledtrain.data.convert.converting import convert
from scaledtrain.data.convert.huggingface import HuggingFace, load_huggingface
from scaledtrain.data.convert.images import ImageDecoder, Images
from scaledtrain.data.convert.mds import Mds
from scaledtrain.data.convert.shards import Shards
from scaledtrain.data.convert.source import Source
from scaledtrain.data.convert.tables import Csv, Parquet
from scaledtrain.data.convert.text import Text
from scaledtrain.data.convert.torch_dataset import TorchDataset
from scaledtrain.data.convert.webdataset import WebDataset

__all__ = [
    "convert",
    "class_names",
    "Source",
    "Arrays",
    "Csv",
    "HuggingFace",
    "ImageDecoder",
    "Images",
    "Mds",
    "Parquet",
    "Shards",
    "Text",
    "TorchDataset",
    "WebDataset",
    "load_huggingface",
]
