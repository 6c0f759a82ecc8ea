"""``write``: makes a sharded data set of data in another format."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaledtrain.data.commands.output import add_output, names, write
from scaledtrain.data.convert import (
    Arrays,
    Csv,
    HuggingFace,
    ImageDecoder,
    Images,
    Mds,
    Parquet,
    Source,
    Text,
    TorchDataset,
    WebDataset,
    load_huggingface,
)
from scaledtrain.data.convert.source import load_object
from scaledtrain.errors import ConfigError

__all__ = ["add"]

Parsed = argparse.Namespace
Parser = argparse.ArgumentParser


class _Format(NamedTuple):
    help: str
    add_options: Callable[[Parser], None]
    source: Callable[[Parsed], Source]


def add(commands: Any) -> None:
    """Add the command, with one of its own for each format."""
    parser = commands.add_parser("write", help="make a sharded data set of other data")
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, chosen in FORMATS.items():
        of_format = formats.add_parser(name, help=chosen.help, description=chosen.help)
        chosen.add_options(of_format)
        add_output(of_format)
        of_format.set_defaults(
            run=lambda parsed: write(FORMATS[parsed.format].source(parsed), parsed)
        )


def _add_arrays(parser: Parser) -> None:
    parser.add_argument(
        "input",
        nargs="+",
        metavar="[COLUMN=]FILE",
        help="a .npy file for each column, called as the file unless said; or one .npz file",
    )


def _arrays(parsed: Parsed) -> Source:
    if len(parsed.input) == 1 and parsed.input[0].endswith(".npz"):
        return Arrays(parsed.input[0])
    arrays = {}
    for given in parsed.input:
        column, equals, file = given.partition("=")
        if not equals or Path(given).exists():
            column, file = Path(given).stem, given
        if column in arrays:
            raise ConfigError(f"two files are for column {column!r}; name one: COLUMN={file}")
        arrays[column] = file
    return Arrays(arrays)


def _add_csv(parser: Parser) -> None:
    _add_paths(parser, "*.csv")
    _add_columns(parser)
    _add_categories(parser)
    parser.add_argument(
        "--dtypes", type=names, default=[], metavar="COLUMN=DTYPE,...", help="float32, string, ..."
    )
    parser.add_argument("--delimiter", default=",", help="between values (default: a comma)")


def _csv(parsed: Parsed) -> Source:
    dtypes = dict(_assignment(given, "--dtypes") for given in parsed.dtypes)
    return Csv(
        parsed.input,
        columns=parsed.columns,
        dtypes=dtypes,
        categories=_categories(parsed),
        delimiter=parsed.delimiter,
        pattern=parsed.pattern,
    )


def _add_parquet(parser: Parser) -> None:
    _add_paths(parser, "*.parquet")
    _add_columns(parser)
    _add_categories(parser)


def _parquet(parsed: Parsed) -> Source:
    return Parquet(
        parsed.input,
        columns=parsed.columns,
        categories=_categories(parsed),
        pattern=parsed.pattern,
    )


def _add_images(parser: Parser) -> None:
    parser.add_argument("input", metavar="FOLDER", help="of the sub-folders, one for each class")
    _add_decoder(parser)


def _images(parsed: Parsed) -> Source:
    return Images(parsed.input, _decoder(parsed))


def _add_text(parser: Parser) -> None:
    _add_paths(parser, "*.txt")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens in a sample")
    parser.add_argument("--tokenizer", metavar="MODULE:NAME", help="a function text -> tokens")
    parser.add_argument("--end-of-document", type=int, metavar="TOKEN", help="behind each document")
    parser.add_argument("--documents", choices=("file", "line"), default="file", help="what is one")
    parser.add_argument("--dtype", help="of the tokens (default: uint8; of a tokenizer's, uint16)")


def _text(parsed: Parsed) -> Source:
    return Text(
        parsed.input,
        parsed.sequence_length,
        tokenizer=parsed.tokenizer,
        end_of_document=parsed.end_of_document,
        documents=parsed.documents,
        dtype=parsed.dtype,
        pattern=parsed.pattern,
    )


def _add_huggingface(parser: Parser) -> None:
    parser.add_argument("input", metavar="NAME", help="on the hub, or a folder that was saved")
    parser.add_argument("--split", default="train", help="(default: train)")
    parser.add_argument("--config", help="which configuration of the data set")
    _add_columns(parser)
    _add_categories(parser)


def _huggingface(parsed: Parsed) -> Source:
    return HuggingFace(
        load_huggingface(parsed.input, parsed.split, parsed.config),
        columns=parsed.columns,
        categories=_categories(parsed),
    )


def _add_torch(parser: Parser) -> None:
    parser.add_argument(
        "input", metavar="MODULE:NAME", help="a Dataset, or a function that makes one"
    )
    parser.add_argument(
        "--names", type=names, metavar="COLUMN,...", help="of the values of a sample"
    )
    _add_ragged(parser)


def _torch(parsed: Parsed) -> Source:
    found = load_object(parsed.input)
    dataset = found() if callable(found) else found
    return TorchDataset(dataset, names=parsed.names, ragged=parsed.ragged)


def _add_mds(parser: Parser) -> None:
    parser.add_argument("input", metavar="FOLDER", help="with the index.json")
    _add_columns(parser)
    _add_ragged(parser)
    _add_decoder(parser)


def _mds(parsed: Parsed) -> Source:
    return Mds(parsed.input, columns=parsed.columns, ragged=parsed.ragged, decoder=_decoder(parsed))


def _add_webdataset(parser: Parser) -> None:
    _add_paths(parser, "*.tar*")
    _add_columns(parser)
    _add_ragged(parser)
    _add_decoder(parser)


def _webdataset(parsed: Parsed) -> Source:
    return WebDataset(
        parsed.input,
        columns=parsed.columns,
        ragged=parsed.ragged,
        decoder=_decoder(parsed),
        pattern=parsed.pattern,
    )


def _add_paths(parser: Parser, pattern: str) -> None:
    parser.add_argument("input", nargs="+", metavar="PATH", help="files, and folders of them")
    parser.add_argument(
        "--pattern", default=pattern, help=f"which files of a folder (default: {pattern})"
    )


def _add_columns(parser: Parser) -> None:
    parser.add_argument(
        "--columns", type=names, metavar="COLUMN,...", help="which to read (default: all)"
    )


def _add_ragged(parser: Parser) -> None:
    parser.add_argument(
        "--ragged", type=names, default=[], metavar="COLUMN,...", help="of different lengths"
    )


def _add_categories(parser: Parser) -> None:
    parser.add_argument(
        "--categories",
        action="append",
        default=[],
        metavar="COLUMN=VALUE,...",
        help="values of a column of text, which become the numbers 0, 1, ...",
    )


def _categories(parsed: Parsed) -> dict[str, Sequence[str]]:
    pairs = [_assignment(given, "--categories") for given in parsed.categories]
    return {column: names(values) for column, values in pairs}


def _add_decoder(parser: Parser) -> None:
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="to resize images to"
    )
    parser.add_argument("--mode", choices=("RGB", "L"), default="RGB", help="(default: RGB)")
    parser.add_argument("--encoded", action="store_true", help="keep the bytes of image files")


def _decoder(parsed: Parsed) -> ImageDecoder | None:
    if parsed.encoded:
        if parsed.size is not None:
            raise ConfigError("--encoded keeps images as they are, --size resizes; give one")
        return None
    return ImageDecoder(parsed.size and tuple(parsed.size), parsed.mode)


def _assignment(given: str, option: str) -> tuple[str, str]:
    column, equals, value = given.partition("=")
    if not (column and equals and value):
        raise ConfigError(f"{option} got {given!r}; write COLUMN=...")
    return column, value


FORMATS = {
    "arrays": _Format(".npy or .npz files of NumPy", _add_arrays, _arrays),
    "csv": _Format("CSV files", _add_csv, _csv),
    "parquet": _Format("Parquet files", _add_parquet, _parquet),
    "images": _Format("images, a sub-folder for each class", _add_images, _images),
    "text": _Format("text files, as bytes or tokens", _add_text, _text),
    "huggingface": _Format("a data set of Hugging Face", _add_huggingface, _huggingface),
    "torch": _Format("any Dataset of torch", _add_torch, _torch),
    "mds": _Format("shards of MosaicML Streaming", _add_mds, _mds),
    "webdataset": _Format("tar archives of WebDataset", _add_webdataset, _webdataset),
}
