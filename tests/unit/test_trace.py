"""Timelines of runs: what is read, how clocks are set, and what the three files hold."""

from __future__ import annotations

import json
import re
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from scaledtrain.comm.serving.event_log import EventLog
from scaledtrain.errors import ConfigError
from scaledtrain.parallel.pipeline import planned_and_measured
from scaledtrain.report.chrome import trace_events, write_chrome_trace
from scaledtrain.report.gantt import draw_gantt, readable_window
from scaledtrain.report.picture import PHASE_COLOURS
from scaledtrain.report.timeline_page import write_timeline_page
from scaledtrain.report.traces import Window, find_trace, flatten, read_spans
from scaledtrain.server.operations import Kind, Operation
from scaledtrain.timeline import Span
from scaledtrain.trace import TraceConfig, main, show

ALL_FILES = ("trace.json", "gantt.png", "timeline.html")


def config(**given: Any) -> TraceConfig:
    empty = {"ranks": None, "from_seconds": None, "to_seconds": None, "out_dir": None}
    return TraceConfig(**{**empty, "files": ALL_FILES, **given})


def write_rank(folder: Path, rank: int, lines: list[list[Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trace-rank{rank}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_events(folder: Path, begin: float, events: list[tuple[Operation, float, bool, int]]):
    """An event log with times of one's choice, in the bytes that `EventLog` writes."""
    import zlib

    log = EventLog(folder / "events.bin")
    log.close()
    head = (folder / "events.bin").read_bytes()[:24] + struct.pack("<d", begin)
    records = b""
    for (kind, worker, version), seconds, accepted, staleness in events:
        record = struct.pack("<BBHiiqd", kind, accepted, 0, worker, staleness, version, seconds)
        records += record + struct.pack("<I", zlib.crc32(record))
    (folder / "events.bin").write_bytes(head + records)


def write_async(folder: Path) -> Path:
    """Two ranks of one host; rank 1 began 0.5 s later, the server's log 2 s before rank 0."""
    write_rank(
        folder,
        0,
        [
            ["begin", 100.0, "a"],
            ["waiting", 0.0, 0.25],
            ["communication", 0.5, 0.75],
            ["compute", 0.25, 1.0],
        ],
    )
    write_rank(folder, 1, [["begin", 100.5, "a"], ["compute", 0.0, 2.0]])
    write_events(
        folder,
        98.0,
        [
            (Operation(Kind.PULL, 0), 2.125, False, -1),
            (Operation(Kind.PUSH, 0, 0), 3.0, True, 0),
            (Operation(Kind.PUSH, 1, 0), 4.5, False, 1),
            (Operation(Kind.REMOVE, 1, 0), 4.75, False, -1),
        ],
    )
    return folder


def test_chrome_events_of_a_run_written_by_hand(tmp_path: Path) -> None:
    """Rank 1 is shifted by 100.5 - 100 = 0.5 s, events by 98 - 100 = -2 s; microseconds."""
    folder = write_async(tmp_path / "run")
    path = tmp_path / "trace.json"
    count = write_chrome_trace(path, [find_trace(folder)])
    place, other = {"pid": 1, "tid": 0}, {"pid": 1, "tid": 1}
    phase, server = {"cat": "phase", "ph": "X"}, {"cat": "server", "ph": "i", "s": "t"}
    used = {"version": 0, "staleness": 0, "accepted": True}
    late = {"version": 0, "staleness": 1, "accepted": False}
    counter = {"name": "staleness", "cat": "server", "ph": "C"}
    expected = [
        {"name": "process_name", "ph": "M", **place, "args": {"name": "run"}},
        {"name": "process_sort_index", "ph": "M", **place, "args": {"sort_index": 1}},
        {"name": "thread_name", "ph": "M", **place, "args": {"name": "rank 0"}},
        {"name": "thread_sort_index", "ph": "M", **place, "args": {"sort_index": 0}},
        {"name": "waiting", **phase, "ts": 0.0, "dur": 250000.0, **place},
        {"name": "communication", **phase, "ts": 500000.0, "dur": 250000.0, **place},
        {"name": "compute", **phase, "ts": 250000.0, "dur": 750000.0, **place},
        {"name": "thread_name", "ph": "M", **other, "args": {"name": "rank 1"}},
        {"name": "thread_sort_index", "ph": "M", **other, "args": {"sort_index": 1}},
        {"name": "compute", **phase, "ts": 500000.0, "dur": 2000000.0, **other},
        {"name": "push", **server, "ts": 1000000.0, **place, "args": used},
        {**counter, "ts": 1000000.0, **place, "args": {"staleness": 0}},
        {"name": "push", **server, "ts": 2500000.0, **other, "args": late},
        {**counter, "ts": 2500000.0, **other, "args": {"staleness": 1}},
        {"name": "leaves", **server, "ts": 2750000.0, **other, "args": {}},
    ]
    assert json.loads(path.read_text()) == {"displayTimeUnit": "ms", "traceEvents": expected}
    assert count == len(expected)


def test_a_window_and_a_choice_of_ranks_leave_the_rest_out(tmp_path: Path) -> None:
    trace = find_trace(write_async(tmp_path / "run"))
    events = list(trace_events([trace.only([1])], Window(2.55, 3.0)))
    # Rank 1 computed from 0.5 to 2.5; after that it only left, at 2.75.
    assert [e["name"] for e in events if e["ph"] != "M"] == ["leaves"]
    events = list(trace_events([trace.only([0])], Window(0.6, 0.7)))
    assert [e["name"] for e in events if e["ph"] == "X"] == ["communication", "compute"]
    with pytest.raises(ConfigError, match="no trace of rank 2, 7; it has those of 2 ranks, 0 to 1"):
        trace.only([0, 2, 7])


def test_ranks_of_other_hosts_are_taken_to_begin_together(tmp_path: Path) -> None:
    write_rank(tmp_path, 0, [["begin", 100.0, "a"], ["compute", 0.0, 1.0]])
    write_rank(tmp_path, 1, [["begin", 7.0, "b"], ["compute", 0.25, 1.0]])
    assert list(find_trace(tmp_path).spans(1)) == [Span("compute", 0.25, 1.0)]


def test_a_resumed_run_goes_on_where_the_clock_says(tmp_path: Path) -> None:
    first = [["begin", 10.0, "a"], ["compute", 0.0, 1.0]]
    path = write_rank(tmp_path, 0, [*first, ["begin", 15.0, "a"], ["compute", 0.5, 1.0]])
    assert list(read_spans(path)) == [Span("compute", 0.0, 1.0), Span("compute", 5.5, 6.0)]


def test_a_run_without_a_server_has_no_arrivals_and_needs_no_beginnings(tmp_path: Path) -> None:
    write_rank(tmp_path, 3, [["compute", 0.0, 1.0], ["waiting", 1.0, 1.5]])
    trace = find_trace(tmp_path)
    assert list(trace.arrivals()) == []
    assert list(trace.spans(3)) == [Span("compute", 0.0, 1.0), Span("waiting", 1.0, 1.5)]


def test_a_line_cut_off_at_the_end_is_left_out_one_elsewhere_is_named(tmp_path: Path) -> None:
    path = write_rank(tmp_path, 0, [["compute", 0.0, 1.0], ["waiting", 1.0, 1.5]])
    whole = path.read_text()
    path.write_text(whole[:-4])
    assert list(read_spans(path)) == [Span("compute", 0.0, 1.0)]
    path.write_text('["sleep", 0, 1]\n' + whole)
    with pytest.raises(ConfigError, match=r"rank0.jsonl, line 1 is not .* unknown phase 'sleep'"):
        list(read_spans(path))


def test_without_a_trace_the_error_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run with trace=true"):
        find_trace(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        find_trace(tmp_path / "none")
    write_async(tmp_path / "inner")
    with pytest.raises(ConfigError, match=r"holds no trace itself, but these do: .*inner; give"):
        find_trace(tmp_path)


def test_flat_spans_are_the_innermost_at_any_moment() -> None:
    """Compute 0-10 holds communication 2-6, which holds waiting 3-4; then data 10-11."""
    spans = [
        Span("waiting", 3, 4),
        Span("communication", 2, 6),
        Span("compute", 0, 10),
        Span("data", 10, 11),
    ]
    flat = [
        ("compute", 0, 2),
        ("communication", 2, 3),
        ("waiting", 3, 4),
        ("communication", 4, 6),
        ("compute", 6, 10),
        ("data", 10, 11),
    ]
    assert flatten(spans) == flat
    assert sum(end - start for _, start, end in flatten(spans)) == 11
    assert flatten(spans, Window(3.5, 5.5)) == [("waiting", 3.5, 4), ("communication", 4, 5.5)]


def test_spans_of_two_threads_that_overlap_count_once() -> None:
    assert flatten([Span("compute", 0, 2), Span("communication", 1, 3)]) == [
        ("compute", 0, 2),
        ("communication", 2, 3),
    ]


def test_the_chrome_trace_of_a_long_run_is_streamed(tmp_path: Path) -> None:
    """20,000 spans make a file of 2 MB, of which no tenth is ever in memory."""
    lines = [["compute", i / 10, (i + 1) / 10] for i in range(20_000)]
    write_rank(tmp_path, 0, lines)
    trace = find_trace(tmp_path)
    tracemalloc.start()
    write_chrome_trace(tmp_path / "trace.json", [trace])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "trace.json").stat().st_size > 1_700_000
    assert peak < 170_000


def page_data(path: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_holds_flat_spans_and_pushes(tmp_path: Path) -> None:
    path = tmp_path / "timeline.html"
    write_timeline_page(path, [find_trace(write_async(tmp_path / "run"))])
    data = page_data(path)
    assert data["phases"] == ["data", "compute", "communication", "waiting", "evaluation"]
    assert (data["start"], data["end"]) == (0.0, 2.5)
    assert [row["name"] for row in data["rows"]] == ["rank 0", "rank 1"]
    # waiting 0-0.25, compute 0.25-0.5, communication 0.5-0.75, compute 0.75-1
    assert data["rows"][0]["spans"] == [3, 0, 0.25, 1, 0.25, 0.5, 2, 0.5, 0.75, 1, 0.75, 1]
    assert data["rows"][1]["spans"] == [1, 0.5, 2.5]
    assert data["arrivals"] == [[1, 0, "push", 0, 0, True], [2.5, 1, "push", 0, 1, False]]
    assert data["about"] == "0 to 2.5 seconds since the run began."


def test_a_page_holds_only_so_much_and_says_so(tmp_path: Path) -> None:
    for rank in (0, 1):
        write_rank(tmp_path, rank, [["compute", i, i + 1 - rank / 2] for i in range(10)])
    path = tmp_path / "timeline.html"
    # 8 spans on 2 ranks are 4 each: rank 0 is known until 4 s, when rank 1 has 4, too.
    shown = write_timeline_page(path, [find_trace(tmp_path)], max_spans=8)
    assert shown == Window(0.0, 4.0)
    data = page_data(path)
    assert data["rows"][0]["spans"][-3:] == [1, 3, 4]
    assert "as much as fits into a page" in data["about"]


def test_names_cannot_inject_markup(tmp_path: Path) -> None:
    name = "<!--<img onerror=alert(1)> & $DATA"
    path = tmp_path / "timeline.html"
    write_timeline_page(path, [find_trace(write_async(tmp_path / name))])
    text = path.read_text(encoding="utf-8")
    assert "<img" not in text
    assert "<!--" not in text
    assert page_data(path)["title"] == f"Timeline of {name}"
    assert text.count("</script>") == 2


def test_the_page_needs_no_network_and_has_the_colours_of_the_pictures(tmp_path: Path) -> None:
    path = tmp_path / "timeline.html"
    write_timeline_page(path, [find_trace(write_async(tmp_path / "run"))])
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|@import|<link", text)
    light = text[: text.index("@media")]
    assert {p: re.search(rf"--{p}: (#\w+);", light)[1] for p in PHASE_COLOURS} == PHASE_COLOURS  # type: ignore[index]


def test_the_picture_shows_a_readable_part_of_the_middle(tmp_path: Path) -> None:
    """1,000 spans of 0.1 s: those around second 50, 40 on both sides of it."""
    write_rank(tmp_path, 0, [["compute", i / 10, (i + 1) / 10] for i in range(1000)])
    write_rank(tmp_path, 1, [["compute", i, i + 1] for i in range(100)])
    trace = find_trace(tmp_path)
    assert readable_window(trace, None, None) == pytest.approx((46.0, 54.0))
    assert readable_window(trace, 20.0, None) == pytest.approx((20.0, 28.0))
    assert readable_window(trace, None, 3.0) == (0.0, 3.0)
    assert readable_window(trace, 1.0, 3.0) == (1.0, 3.0)


def test_the_picture_is_a_png_and_needs_no_spans(tmp_path: Path) -> None:
    whole, empty = write_async(tmp_path / "run"), tmp_path / "empty"
    write_rank(empty, 0, [])
    traces = [find_trace(whole), find_trace(empty)]
    windows = [readable_window(trace, None, None) for trace in traces]
    assert windows == [(0.0, 1.0), (0.0, 1.0)]
    draw_gantt(tmp_path / "gantt.png", traces, windows)
    assert (tmp_path / "gantt.png").read_bytes().startswith(b"\x89PNG")


def test_files_go_where_all_runs_lie(tmp_path: Path) -> None:
    runs = [write_async(tmp_path / name) for name in ("sync", "async")]
    assert show(runs[:1], config()) == [tmp_path / "sync" / name for name in ALL_FILES]
    assert show(runs, config(files=["trace.json"])) == [tmp_path / "trace.json"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {1: "sync", 2: "async"}
    assert show(runs, config(files=[], out_dir=str(tmp_path / "new"))) == []


def test_of_many_ranks_pages_show_64_unless_told_and_the_trace_all(tmp_path: Path) -> None:
    for rank in range(70):
        write_rank(tmp_path, rank, [["compute", 0, 1]])
    show([tmp_path], config(files=["trace.json", "timeline.html"]))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["tid"] for e in events} == set(range(70))
    data = page_data(tmp_path / "timeline.html")
    assert [row["rank"] for row in data["rows"]] == list(range(64))
    assert "64 of the 70 ranks" in data["about"]
    show([tmp_path], config(files=["timeline.html"], ranks=[69, 5]))
    rows = page_data(tmp_path / "timeline.html")["rows"]
    assert [row["rank"] for row in rows] == [5, 69]


def test_what_cannot_be_shown_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="to_seconds is 1, which is not after from_seconds, 2"):
        config(from_seconds=2.0, to_seconds=1.0)
    with pytest.raises(ConfigError, match="nothing to show"):
        config(ranks=[])
    with pytest.raises(ConfigError, match="no run was given"):
        show([], config())
    monkeypatch.setattr("scaledtrain.report.picture.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'scaledtrain\[examples\]'"):
        show([write_async(tmp_path)], config())
    assert show([tmp_path], config(files=["trace.json"])) == [tmp_path / "trace.json"]


def test_the_command_takes_runs_and_keys_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_async(tmp_path / "async-lr=0.1")
    monkeypatch.setattr(sys, "argv", ["x", "ranks=[1]", "async-lr=0.1", "files=[trace.json]"])
    main()
    assert capsys.readouterr().out == "async-lr=0.1/trace.json\n"
    events = json.loads((tmp_path / "async-lr=0.1" / "trace.json").read_text())["traceEvents"]
    assert [e["dur"] for e in events if e["ph"] == "X"] == [2000000.0]
    monkeypatch.setattr(sys, "argv", ["x", "rank=[1]", "async-lr=0.1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no key 'rank' (did you mean 'ranks'?)" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    main()
    assert "scaledtrain trace RUN [RUN ...]" in capsys.readouterr().out


def write_stages(folder: Path) -> Path:
    """1F1B on two ranks, two microbatches, three steps; forwards take 1 s, backwards 2 s.

    Rank 1 has its first forward 0.5 s late in the second step and 1 s late in the third.
    """
    own: list[list[list[Any]]] = [[["begin", 0.0, "a"]], [["begin", 0.0, "a"]]]
    for step, late in enumerate((0.0, 0.5, 1.0)):
        t = 20.0 * step
        first = [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 4 + late, 6 + late)]
        second = [("1F0", 1, 2), ("1B0", 2, 4), ("1F1", 4, 5), ("1B1", 5, 7)]
        own[0] += [[n, t + s, t + e] for n, s, e in (*first, ("0B1", 7 + late, 9 + late))]
        own[1] += [[n, t + s + late, t + e + late] for n, s, e in second]
        own[0].append(["compute", t, t + 10])
    for rank, rows in enumerate(own):
        write_rank(folder, rank, rows)
    return folder


def test_a_pipeline_is_drawn_as_planned_and_as_measured(tmp_path: Path) -> None:
    """A plan of (2 + 1) x 3 = 9 s, of which 6 are computed; the last step takes 10."""
    trace = find_trace(write_stages(tmp_path / "run"))
    planned, measured = planned_and_measured(trace)
    assert str(planned.ranks[0][2].action) == "0B0"
    assert (planned.seconds, planned.idle_share) == (9.0, pytest.approx(1 / 3))
    assert (measured.seconds, measured.idle_share) == (10.0, pytest.approx(0.4))
    assert planned_and_measured(trace, Window(0.0, 10.0))[1].seconds == 9.0
    assert list(trace.spans(0)) == [Span("compute", t, t + 10) for t in (0.0, 20.0, 40.0)]
    assert {e["name"] for e in trace_events([trace], Window(1.5, 3.0)) if e["ph"] == "X"} == {
        "compute", "0F1", "1F0", "1B0",
    }  # fmt: skip
    (path,) = show([tmp_path / "run"], config(files=["pipeline.png"]))
    assert path.read_bytes()[:4] == b"\x89PNG"
    for ranks, window in (([1], Window()), ([0, 1], Window(1.0, 19.0))):
        with pytest.raises(ConfigError, match="no whole step of a pipeline"):
            planned_and_measured(trace.only(ranks), window)


def test_of_an_endless_schedule_some_microbatches_are_drawn(tmp_path: Path) -> None:
    """20 microbatches of one stage, F 1 s and B 2 s: the middle twelve, 4 to 15."""
    rows = [["begin", 0.0, "a"]]
    for i in range(20):
        rows += [[f"0F{i}", 3.0 * i, 3.0 * i + 1], [f"0B{i}", 3.0 * i + 1, 3.0 * i + 3]]
    write_rank(tmp_path, 0, rows)
    _, measured = planned_and_measured(find_trace(tmp_path))
    assert [t.action.microbatch for t in measured.ranks[0]] == [i // 2 for i in range(8, 32)]
    assert (measured.start, measured.end) == (12.0, 48.0)
