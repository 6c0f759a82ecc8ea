"""A run's records on a disk that is full: real limits of the kernel, so that writes fall short."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scaledtrain.comm.serving.event_log import EventLog, read_events
from scaledtrain.records import Records, write_file
from scaledtrain.server.operations import Kind, Operation
from tests.checkpoints import fit, steps


@contextmanager
def no_file_above(n_bytes: int) -> Iterator[None]:
    """A write that would make a file longer is cut short, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_does_not_fit_is_left_out_whole_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(tmp_path, 0, tensorboard=True)
    rows = [{"step": step, "text": "x" * 80} for step in range(1, 9)]
    with caplog.at_level(logging.WARNING), no_file_above(250):  # of lines of 100 bytes: two
        for row in rows:
            records.append("metrics", [row])
            records.show("train", row["step"], {"loss": 1.0})
    records.append("metrics", [{"step": 9}])  # there is room again
    records.show("train", 9, {"loss": 0.5})
    lines = (tmp_path / "metrics-rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 9]
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    steps = [event.step for event in shown.Scalars("train/loss")]
    assert (steps[0], steps[-1]) == (1, 9)
    assert len(steps) < 9
    assert [record.message[:36] for record in caplog.records] == [
        "rank 0 cannot write its records: [Er"
    ]


def test_a_run_goes_on_while_nothing_can_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(tmp_path / "whole", log_every=1)
    with no_file_above(1200):  # the checkpoints do not fit, nor all records
        assert fit(tmp_path / "full", log_every=1) == whole
    assert "rank 0 cannot write its records: [Errno 27] File too large" in caplog.text
    assert "could not be written to" in caplog.text
    assert steps(tmp_path / "full") == []
    assert fit(tmp_path / "full", log_every=1, resume="auto") == whole


def test_records_of_later_steps_are_forgotten_also_on_a_full_disk(tmp_path: Path) -> None:
    records = Records(tmp_path, 3, tensorboard=False)
    records.append("metrics", [{"step": step} for step in range(1, 5)])
    path = tmp_path / "metrics-rank3.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 5, "lo')  # cut off by a crash
    with no_file_above(0):
        records.forget_after(3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.yaml"
    write_file(path, "old")
    with no_file_above(5):
        write_file(path, "much longer")
    assert path.read_text() == "old"
    assert "config.yaml cannot be written" in caplog.text
    assert list(tmp_path.iterdir()) == [path]


def test_an_event_log_ends_where_it_does_not_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """32 bytes of head, 32 of each event: the third is cut off."""
    path = tmp_path / "events.bin"
    log = EventLog(path)
    pushes = [Operation(Kind.PUSH, 0, version) for version in range(5)]
    with no_file_above(32 + 2 * 32 + 10):
        for push in pushes:
            log.add(push)
    log.add(Operation(Kind.PUSH, 0, 9))  # after a gap it would be worth nothing
    log.close()
    assert [event.operation for event in read_events(path)] == pushes[:2]
    assert caplog.text.count("the event log ends here") == 1
