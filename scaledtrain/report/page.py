"""The report of some runs: one HTML file that needs no network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import scaledtrain
from scaledtrain.baselines.results import read_baselines
from scaledtrain.errors import ConfigError
from scaledtrain.evaluate.results import read_evaluated
from scaledtrain.report.against import against_table, levels, sentences
from scaledtrain.report.differences import differences, read_config
from scaledtrain.report.figures import embed
from scaledtrain.report.findings import SLOW, RankRow, findings, rank_rows
from scaledtrain.report.gantt import MAX_RANKS
from scaledtrain.report.layers import heat_maps, read_layers
from scaledtrain.report.picture import PHASE_COLOURS
from scaledtrain.report.progress import Point, progress
from scaledtrain.report.runs import RunLog, read_run
from scaledtrain.report.timeline_page import write_timeline_page
from scaledtrain.report.traces import find_trace
from scaledtrain.run_dir import has_run

__all__ = ["find_runs", "require_bokeh", "write_report"]

MAX_ROWS = 32
"""Ranks of a run that are shown."""
MAX_SPANS = 40_000
"""In the timeline, of all runs together: about 1.3 MB."""


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """The runs in some folders: each is one, or holds some, as that of a comparison does.

    Raises:
        ConfigError: no run is there.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        inner = sorted(path for path in folder.glob("*/") if has_run(path))
        found += inner if inner and not has_run(folder) else [folder]
    return list(dict.fromkeys(found))


def write_report(path: str | Path, folders: Sequence[str | Path]) -> Path:
    """Write the report of some runs.

    Args:
        path: of the HTML file; an old one is replaced.
        folders: of runs (``run_dir``), or folders that hold runs.

    Raises:
        ConfigError: one is no run, none is given, or Bokeh is missing.

    Example:
        ``write_report("report.html", ["runs/sync", "runs/async"])``
    """
    require_bokeh()
    if not folders:
        raise ConfigError("no run was given; give the run_dir of one or of several")
    runs = find_runs(folders)
    logs = dict(zip(_names(runs), map(read_run, runs), strict=True))
    text = _page(logs)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
    return path


def require_bokeh() -> None:
    """Raise a ConfigError that says what to install if Bokeh is missing."""
    if find_spec("bokeh") is None:
        raise ConfigError(
            "the report needs Bokeh, which is not installed here: pip install 'scaledtrain[report]'"
        )


def _names(runs: Sequence[Path]) -> list[str]:
    """What tells them apart: their folders' names, with as much before them as that takes."""
    parts = [run.resolve().parts for run in runs]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _page(logs: Mapping[str, RunLog]) -> str:
    from bokeh.resources import Resources
    from jinja2 import Template

    from scaledtrain.report import charts
    from scaledtrain.report.evaluated import section

    points = {name: progress(log) for name, log in logs.items()}
    baselines = {name: read_baselines(log.folder) for name, log in logs.items()}
    drawn = [
        charts.curves("training loss", "loss", points),
        *(
            charts.evaluation_curves(
                m, {n: log.evaluations for n, log in logs.items()}, points, levels(m, baselines)
            )
            for m in _metrics(logs)
        ),
        charts.curves("samples per second", "samples_per_second", points),
        charts.curves("peak memory of a rank, MiB", "memory_bytes", points, 2**-20),
    ]
    staleness = {name: log.staleness for name, log in logs.items()}
    if any(staleness.values()):
        drawn.append(charts.staleness_curves(staleness))
    rows = {name: rank_rows(log) for name, log in logs.items()}
    shown = {name: _most_different(of_run) for name, of_run in rows.items()}
    bars = [charts.rank_bars(of_run) for of_run in shown.values()]
    layers = {name: read_layers(log.folder) for name, log in logs.items()}
    maps = {name: heat_maps(of_run) for name, of_run in layers.items() if of_run is not None}
    inside = [figure for figures in maps.values() for figure in figures]
    evaluated = {name: read_evaluated(log.folder) for name, log in logs.items()}
    sections = {name: section(found) for name, found in evaluated.items() if found is not None}
    others = [figure for each in sections.values() for figure in each.figures]
    script, places = embed([*drawn, *bars, *inside, *others])
    left = iter(places[len(drawn) + len(bars) :])
    layer_maps = [
        {
            "name": name,
            "warnings": [] if (of_run := layers[name]) is None else of_run.warnings,
            "maps": [next(left) for _ in figures],
        }
        for name, figures in maps.items()
    ]
    evaluations = [
        {"name": name, "section": each, "figures": [next(left) for _ in each.figures]}
        for name, each in sections.items()
    ]
    configs = [read_config(log.folder) for log in logs.values()]
    template = (files("scaledtrain.report") / "report.html").read_text(encoding="utf-8")
    text: str = Template(template, autoescape=True).render(
        title=", ".join(logs) if len(logs) < 4 else f"{len(logs)} runs",
        version=scaledtrain.__version__,
        bokeh=Resources(mode="inline", components=["bokeh"]).render_js(),
        script=script,
        against=charts.AGAINST,
        slow=SLOW,
        phases=PHASE_COLOURS,
        summary=_summary(logs, points),
        progress=places[: len(drawn)],
        runs=[
            {
                "name": name,
                "folder": os.path.relpath(log.folder),
                "colour": charts.COLOURS[i % len(charts.COLOURS)],
                "findings": [*sentences(log, baselines[name]), *findings(log)],
                "against": None if (of := baselines[name]) is None else against_table(log, of),
                "ranks": shown[name],
                "left_out": len(rows[name]) - len(shown[name]),
                "bars": places[len(drawn) + i],
            }
            for i, (name, log) in enumerate(logs.items())
        ],
        layers=layer_maps,
        evaluations=evaluations,
        differences=differences(configs),
        all_configs=all(configs),
        timeline=_timeline(list(logs.values())),
    )
    return text


def _metrics(logs: Mapping[str, RunLog]) -> list[str]:
    """Of all evaluations, the loss first."""
    names = dict.fromkeys(
        name for log in logs.values() for e in log.evaluations[:1] for name in e.values
    )
    return sorted(names, key=lambda name: name != "loss")


def _most_different(rows: Sequence[RankRow]) -> list[RankRow]:
    if len(rows) <= MAX_ROWS:
        return list(rows)
    chosen = sorted(rows, key=lambda row: -abs(row.slowness - 1))[:MAX_ROWS]
    return sorted(chosen, key=lambda row: row.rank)


def _summary(logs: Mapping[str, RunLog], points: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    metrics = _metrics(logs)
    rows = []
    for name, log in logs.items():
        last = log.evaluations[-1].values if log.evaluations else {}
        end = points[name][-1]
        rows.append(
            [
                name,
                len(log.workers),
                f"{end.step:,}",
                f"{end.samples:,}",
                f"{max(end.seconds, *(e.seconds for e in log.evaluations), 0.0):.1f}",
                f"{log.samples_per_second:,.0f}",
                "–" if end.loss is None else f"{end.loss:.4f}",
                *(f"{last[m]:.4f}" if m in last else "–" for m in metrics),
            ]
        )
    columns = ["run", "ranks", "updates", "samples", "seconds", "samples/s", "training loss"]
    return {"columns": [*columns, *(f"evaluation: {m}" for m in metrics)], "rows": rows}


def _timeline(logs: Sequence[RunLog]) -> str:
    """The page of the traces, to be put into a frame; empty if no run was traced."""
    traced = [find_trace(log.folder) for log in logs if any(w.spans for w in log.workers)]
    if not traced:
        return ""
    few = [trace.only([*trace.paths][:MAX_RANKS]) for trace in traced]
    with TemporaryDirectory() as folder:
        page = Path(folder) / "timeline.html"
        write_timeline_page(page, few, max_spans=MAX_SPANS)
        return page.read_text(encoding="utf-8")
