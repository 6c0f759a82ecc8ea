"""The log of a server's events: what is written is read, however the file ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaledtrain.comm.serving.event_log import MAGIC, EventLog, begun_at, read_events
from scaledtrain.errors import ConfigError
from scaledtrain.server.operations import Kind, Operation

EVENTS = [
    (Operation(Kind.PULL, 3), False, -1),
    (Operation(Kind.PUSH, 3, 2**40), True, 17),
    (Operation(Kind.PUSH, 0, 5), False, 2),
    (Operation(Kind.LIMIT, -1, -1), False, -1),
]


def write(path: Path) -> None:
    log = EventLog(path)
    for operation, accepted, staleness in EVENTS:
        log.add(operation, accepted, staleness)
    log.close()


def test_events_come_back_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.bin"
    write(path)
    events = list(read_events(path))
    assert [(e.operation, e.accepted, e.staleness) for e in events] == EVENTS
    seconds = [e.seconds for e in events]
    assert seconds == sorted(seconds)
    assert path.stat().st_size == 32 * (1 + len(EVENTS))


def test_a_log_says_when_it_was_begun(tmp_path: Path) -> None:
    path = tmp_path / "events.bin"
    before = time.perf_counter()
    write(path)
    assert before <= begun_at(path) <= time.perf_counter()
    assert begun_at(path) + max(e.seconds for e in read_events(path)) <= time.perf_counter()


@pytest.mark.parametrize("cut", [1, 17, 31])
def test_a_last_event_that_was_cut_off_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.bin"
    write(path)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [e.operation for e in read_events(path)] == [o for o, *_ in EVENTS[:-1]]


def test_a_damaged_event_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.bin"
    write(path)
    content = bytearray(path.read_bytes())
    content[32 * 2 + 8] ^= 1  # in the second event
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="event 2 of .* is damaged"):
        list(read_events(path))


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.bin"
    path.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="is no event log"):
        list(read_events(path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        EventLog(tmp_path / "file" / "events.bin")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_whatever_follows_the_beginning_is_an_event_or_an_error(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "events.bin"
    path.write_bytes(MAGIC + bytes(8) + content)
    try:
        events = list(read_events(path))
    except ConfigError:
        return
    assert len(events) == len(content) // 32
