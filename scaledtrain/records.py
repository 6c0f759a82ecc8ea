"""The files that a run's records go into. A disk that is full ends no training."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scaledtrain.disk import replace_file
from scaledtrain.run_dir import file_of_rank

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

__all__ = ["Records", "write_file"]

_logger = logging.getLogger(__name__)

_INTERVALS = 30  # of a histogram


class Records:
    """Adds JSON lines, and events for TensorBoard, to the files of one rank.

    No file is kept open, as there may be thousands of ranks, and nothing is left half-written. What
    cannot be written is left out, which is told once.

    Args:
        run_dir: their folder; None: nothing is written.
        rank: this one.
        tensorboard: whether it writes events to ``run_dir/tensorboard``.

    Raises:
        OSError: there cannot be such files.
    """

    def __init__(self, run_dir: Path | None, rank: int, tensorboard: bool) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._is_told = False
        self._events: Path | None = None
        if run_dir is None:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path("metrics").open("a").close()
        if tensorboard:
            (run_dir / "tensorboard").mkdir(exist_ok=True)
            self._events = _new_event_file(run_dir / "tensorboard")
            self._add_event(file_version="brain.Event:2")

    def append(self, what: str, rows: Sequence[Any]) -> None:
        """Add a line for each row to the file of that name."""
        if self._run_dir is not None and rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            self._append(self._path(what), text.encode())

    @property
    def draws(self) -> bool:
        """Whether there is anybody to show something to."""
        return self._events is not None

    def show(
        self,
        prefix: str,
        step: int,
        values: Mapping[str, float],
        histograms: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Give TensorBoard some scalars, and values to draw the distribution of."""
        if self._events is not None and (values or histograms):
            from tensorboard.compat.proto.summary_pb2 import Summary

            shown = [Summary.Value(tag=f"{prefix}/{k}", simple_value=v) for k, v in values.items()]
            drawn = {name: _histogram(tensor) for name, tensor in histograms.items()}
            shown += [Summary.Value(tag=f"{prefix}/{k}", histo=h) for k, h in drawn.items()]
            self._add_event(step=step, summary=Summary(value=shown))

    def forget_after(self, step: int) -> None:
        """Remove the records of later steps, which will be made again."""
        if self._events is not None:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            begin = SessionLog(status=SessionLog.START)  # TensorBoard drops what is from here on
            self._add_event(step=step + 1, session_log=begin)
        if self._run_dir is not None:
            with self._path("metrics").open("rb+") as file:
                end = 0
                for line in file:
                    if not _is_of(line, step):
                        break
                    end += len(line)
                file.truncate(end)

    def _path(self, what: str) -> Path:
        assert self._run_dir is not None
        return file_of_rank(self._run_dir, what, self._rank)

    def _add_event(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        assert self._events is not None
        self._append(self._events, _framed(Event(wall_time=time.time(), **fields)))

    def _append(self, path: Path, content: bytes) -> None:
        try:
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    rest = memoryview(content)
                    while rest:  # a raw file may take less than it is given
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            if not self._is_told:
                _logger.warning(
                    "rank %d cannot write its records: %s; training goes on, and so will they when "
                    "there is room again",
                    self._rank,
                    error,
                )
            self._is_told = True


def _new_event_file(folder: Path) -> Path:
    """As TensorBoard names them: by the second, in whose order it reads them."""
    stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    number = 0
    while (path := folder / f"{stem}.{number}").exists():
        number += 1
    return path


def _histogram(values: Tensor) -> HistogramProto:
    """Of the finite ones, in intervals of equal length."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    finite = values[values.isfinite()].double()
    if not len(finite):
        return HistogramProto(bucket_limit=[0.0], bucket=[0.0])
    counts, edges = torch.histogram(finite, _INTERVALS)
    return HistogramProto(
        min=float(finite.min()),
        max=float(finite.max()),
        num=len(finite),
        sum=float(finite.sum()),
        sum_squares=float(finite.square().sum()),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )


def _framed(event: Event) -> bytes:
    """With its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    RecordWriter(content).write(event.SerializeToString())
    return content.getvalue()


def _is_of(line: bytes, last_step: int) -> bool:
    """Whether a record is whole, and of this step or an earlier one."""
    try:
        return bool(json.loads(line)["step"] <= last_step)
    except ValueError:  # cut off by a crash
        return False


def write_file(path: Path, text: str) -> None:
    """Write a file, or leave it as it was: on a full disk, which is told, and ends nothing."""
    try:
        replace_file(path, text.encode())
    except OSError as error:
        _logger.warning("%s cannot be written: %s; training goes on", path, error)
