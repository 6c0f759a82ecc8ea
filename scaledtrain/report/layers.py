"""The layers of a run in its report: heat maps over its steps, and what was told meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from scaledtrain.report.lines import parse_lines
from scaledtrain.run_dir import metrics_files

__all__ = ["LayersLog", "heat_maps", "read_layers"]

MAX_STEPS = 120
"""Measurements of a run that are shown."""


@dataclass(frozen=True)
class LayersLog:
    """What a `scaledtrain.layers.LayerWatch` has written, and a `scaledtrain.watch.Watch` told."""

    rows: Mapping[int, Mapping[str, Mapping[str, float | None]]]
    """Step -> module -> what was measured."""
    warnings: Sequence[tuple[int, str]]
    """Step, and what was told."""

    @property
    def modules(self) -> list[str]:
        """In the model's order."""
        return list(dict.fromkeys(name for rows in self.rows.values() for name in rows))


def read_layers(folder: Path) -> LayersLog | None:
    """What the ranks of a run wrote of its layers, stage by stage; None: nothing."""
    rows: dict[int, dict[str, Mapping[str, float | None]]] = {}
    warnings: list[tuple[int, str]] = []
    for path in metrics_files(folder).values():
        for kind, step, layers in parse_lines(path, _parse):
            if kind == "layers":
                rows.setdefault(step, {}).update(layers)
            elif kind == "warning":
                warnings += [(step, text) for text in layers]
    return LayersLog(dict(sorted(rows.items())), sorted(warnings)) if rows or warnings else None


def _parse(line: dict[str, Any]) -> tuple[str, int, Any]:
    if line["kind"] == "trouble":  # of a watch: NaN, or a spike of the loss
        began = f", first in {line['where']}" if line["where"] else ""
        text = f"{line['what']}, on rank {line['rank']}{began} ({line['reaction']})"
        return "warning", int(line["in_step"]), [text]
    return line["kind"], int(line["step"]), line.get("layers")


def _log10(row: Mapping[str, float | None], name: str) -> float | None:
    value = row.get(name)
    return math.log10(value) if value else None  # of 0 there is none


def _dead(row: Mapping[str, float | None]) -> float | None:
    dead, units = row.get("dead"), row.get("units")
    return None if dead is None or not units else dead / units


_SHOWN: Mapping[str, Callable[[Mapping[str, float | None]], float | None]] = {
    "gradient: log10 of its norm": lambda row: _log10(row, "grad_norm"),
    "update / weight: log10": lambda row: _log10(row, "update_ratio"),
    "dead units: share": _dead,
}


def heat_maps(log: LayersLog) -> list[Any]:
    """A Bokeh figure for each quantity that there is: a line for each module, steps to the right.

    Args:
        log: of a run.
    """
    steps = list(log.rows)
    steps = steps[:: math.ceil(len(steps) / MAX_STEPS)] if steps else []
    found = []
    for title, value_of in _SHOWN.items():
        cells = [
            (step, module, value)
            for step in steps
            for module, row in log.rows[step].items()
            if (value := value_of(row)) is not None
        ]
        if cells:
            found.append(_heat_map(title, cells, log.modules, steps))
    return found


def _heat_map(
    title: str,
    cells: Sequence[tuple[int, str, float]],
    modules: Sequence[str],
    measured: Sequence[int],
) -> Any:
    from bokeh.models import ColumnDataSource, HoverTool
    from bokeh.palettes import Viridis256
    from bokeh.plotting import figure
    from bokeh.transform import linear_cmap

    steps, names, values = map(list, zip(*cells, strict=True))
    shown = [name for name in modules if name in set(names)]
    gaps = [after - before for before, after in pairwise(measured)]
    widths = dict(zip(measured, [*gaps, gaps[-1] if gaps else 1], strict=True))
    low, high = min(values), max(values)
    plot = figure(
        title=title,
        y_range=shown[::-1],
        x_axis_label="updates",
        height=110 + 16 * len(shown),
        sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.grid.visible = False
    source = ColumnDataSource(
        {
            "step": steps,
            "module": names,
            "value": values,
            "middle": [step + widths[step] / 2 for step in steps],
            "width": [widths[step] for step in steps],
        }
    )
    drawn = plot.rect(
        "middle",
        "module",
        "width",
        1,
        source=source,
        fill_color=linear_cmap("value", Viridis256, low, high if high > low else low + 1.0),
        line_color=None,
    )
    plot.add_layout(drawn.construct_color_bar(width=8, background_fill_alpha=0), "right")
    tooltips = [("module", "@module"), ("update", "@step"), (title, "@value{0.000}")]
    plot.add_tools(HoverTool(tooltips=tooltips))
    return plot
