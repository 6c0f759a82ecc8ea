"""The command that looks at checkpoints.

```
python -m scaledtrain.checkpoints list RUN          what there is
python -m scaledtrain.checkpoints verify RUN        read every byte; exit code 1 if one is damaged
python -m scaledtrain.checkpoints diff A B          what differs between two
python -m scaledtrain.checkpoints export RUN TO     weights as safetensors, and a model card
                                  --program         and the model as a program, by torch.export
```
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from scaledtrain.checkpoint.export import checkpoints_at, export, newest_intact, run_of
from scaledtrain.checkpoint.folder import Manifest
from scaledtrain.checkpoint.part import CheckpointReader, read_tensors
from scaledtrain.checkpoint.weights import load_weights
from scaledtrain.errors import CheckpointError, ConfigError
from scaledtrain.launching import guarded
from scaledtrain.run_dir import CONFIG

__all__ = ["main", "run"]

_SHOWN = 20
_RUN = "folder of a run, of its checkpoints, or of one of them"


def main() -> None:
    """Do what the command line says."""
    guarded(_main)


def _main() -> None:
    if code := run(sys.argv[1:]):
        raise SystemExit(code)


def run(arguments: Sequence[str]) -> int:
    """Do what these arguments say; returns the exit code.

    Args:
        arguments: as in ``sys.argv[1:]``.

    Raises:
        ConfigError: there is no checkpoint.
        CheckpointError: the one that is needed is damaged.
    """
    parser = argparse.ArgumentParser(prog="python -m scaledtrain.checkpoints", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, do: Callable[[Any], int], about: str, *names: tuple[str, str]) -> Any:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(do=do)
        for argument, text in names:
            command.add_argument(argument, type=Path, help=text)
        return command

    add("list", _list, "what there is", ("run", _RUN))
    add("verify", _verify, "read every byte, and compare checksums", ("run", _RUN))
    add("diff", _diff, "what differs between two", ("first", _RUN), ("second", _RUN))
    to = ("to", "folder for model.safetensors, MODEL_CARD.md, config.json of Hugging Face")
    exporting = add("export", _export, "write the weights as safetensors", ("run", _RUN), to)
    exporting.add_argument(
        "--program", action="store_true", help="and the model as torch.export has it, model.pt2"
    )
    parsed = parser.parse_args(arguments)
    code: int = parsed.do(parsed)
    return code


def _list(parsed: Any) -> int:
    for saved in checkpoints_at(parsed.run):
        try:
            manifest = Manifest.read(saved.path)
        except CheckpointError as error:
            print(f"{saved.path.name}  damaged: {error}")
            continue
        megabytes = sum(file.bytes for file in manifest.files.values()) / 2**20
        ranks = len(manifest.ranks)
        values = "  ".join(f"{name} {value:.4f}" for name, value in manifest.evaluation.items())
        about = f"{manifest.facts.get('model', '?')}, {manifest.facts.get('strategy', '?')}"
        size = f"{megabytes:.1f} MiB  {ranks} rank{'s' if ranks > 1 else ''}"
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved.path.stat().st_mtime))
        print(f"{saved.path.name}  {at}  {size}  {about}  {values}".rstrip())
    return 0


def _verify(parsed: Any) -> int:
    damages = [(saved, saved.damage()) for saved in checkpoints_at(parsed.run)]
    for saved, damage in damages:
        print(f"{saved.path.name}  {'intact' if damage is None else f'damaged: {damage}'}")
    return int(any(damage is not None for _, damage in damages))


def _diff(parsed: Any) -> int:
    """What differs, of each tensor the most; exit code 1 if something does, as diff's."""
    first, second = (
        CheckpointReader(newest_intact(path)) for path in (parsed.first, parsed.second)
    )
    differences = 0
    for name in sorted({*first.tensors, *second.tensors}):
        if name not in first.tensors or name not in second.tensors:
            text = f"only in the {'first' if name in first.tensors else 'second'}"
        else:
            a, b = (read_tensors(reader, [name])[name] for reader in (first, second))
            if a.shape != b.shape or a.dtype != b.dtype:
                text = f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
            elif torch.equal(a, b):
                continue
            else:
                largest = (a.double() - b.double()).abs().max().item()
                text = f"differs by at most {largest:.3g}"
        differences += 1
        print(f"{name}  {text}")
    one, other = dict(_values(first)), dict(_values(second))
    others = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    for name in others[:_SHOWN]:
        print(f"{name}  {one.get(name)} and {other.get(name)}")
    if len(others) > _SHOWN:
        print(f"... and {len(others) - _SHOWN} other values")
    print(
        f"{differences} of {len({*first.tensors, *second.tensors})} tensors and "
        f"{len(others)} of {len({*one, *other})} other values differ"
    )
    return int(differences > 0 or bool(others))


def _values(reader: CheckpointReader) -> Iterator[tuple[str, Any]]:
    """What is no tensor in the states of all ranks; generators as one value each."""
    for rank in reader.manifest.ranks:
        yield from _leaves(reader.skeleton(rank), f"rank-{rank:05d}")


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield path, node
        return
    ((kind, content),) = node.items()
    if path.endswith("/generators"):
        yield path, hashlib.sha256(json.dumps(node).encode()).hexdigest()[:12]
    elif kind in ("dict", "counter"):
        for key, value in content:
            yield from _leaves(value, f"{path}/{key}")
    elif kind in ("list", "tuple", "set"):
        for number, value in enumerate(content):
            yield from _leaves(value, f"{path}/{number}")
    elif kind == "float":
        yield path, content


def _export(parsed: Any) -> int:
    from scaledtrain.evaluate.card import CARD, write_card  # which reads what runs leave

    if (parsed.to / CARD).exists():
        raise ConfigError(f"{parsed.to / CARD} is there already; export to another folder")
    checkpoint = newest_intact(parsed.run)
    run_dir = run_of(checkpoint, parsed.run)
    for path in export(checkpoint, parsed.to):
        print(path)
    if parsed.program:
        print(_export_program(checkpoint, run_dir, parsed.to))
    print(write_card(checkpoint, parsed.to, run_dir))
    return 0


def _export_program(checkpoint: Path, run_dir: Path, to: Path) -> Path:
    """With the model, and a batch, of the config that the training command left in the run."""
    from scaledtrain.build import settle
    from scaledtrain.checkpoint.program import export_program
    from scaledtrain.run_config import load_config
    from scaledtrain.schema import make

    if not (run_dir / CONFIG).is_file():
        raise ConfigError(
            f"there is no {run_dir / 'config.yaml'}, which says how the model is made; for a run "
            "of your own script call "
            "scaledtrain.checkpoint.program.export_program(model, batch, folder)"
        )
    config, task = settle(load_config(run_dir))
    model = make(config.model)
    load_weights(model, checkpoint)
    return export_program(model, next(iter(task.train_loader(2))), to)


if __name__ == "__main__":
    main()
