"""The figures of a search, made with Bokeh: its course, what mattered, each setting alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d
from bokeh.plotting import figure
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

__all__ = ["course", "importance_bars", "known", "learning_curves", "slice_of"]

_COLOURS = {TrialState.COMPLETE: "#0072B2", TrialState.PRUNED: "#E69F00"}
_LONG = 12  # letters: longer names of choices would lie on each other on a small screen
_WORDS = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "ended early"}


def _figure(**options: Any) -> Any:
    plot = figure(
        height=300,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        outline_line_color=None,
        **options,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    return plot


def known(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that came to a value, which a drawing can hold."""
    return [
        trial
        for trial in trials
        if trial.state in _COLOURS and trial.value is not None and math.isfinite(trial.value)
    ]


def _scatter(plot: Any, trials: Sequence[FrozenTrial], x: Sequence[Any]) -> None:
    source = ColumnDataSource(
        {
            "x": list(x),
            "value": [trial.value for trial in trials],
            "trial": [trial.number for trial in trials],
            "colour": [_COLOURS[trial.state] for trial in trials],
            "ended": [_WORDS[trial.state] for trial in trials],
            "settings": ["  ".join(f"{k}={v}" for k, v in t.params.items()) for t in trials],
        }
    )
    plot.scatter("x", "value", source=source, color="colour", legend_group="ended", size=7)
    tips = [("trial", "@trial"), ("value", "@value{0.0000}"), ("settings", "@settings")]
    plot.add_tools(HoverTool(tooltips=tips))
    plot.legend.orientation = "horizontal"
    plot.legend.margin = plot.legend.padding = 2
    plot.legend.border_line_color = None
    plot.add_layout(plot.legend[0], "above")  # inside, it would lie on some


def course(trials: Sequence[FrozenTrial], metric: str, lowest: bool) -> Any:
    """Each trial's value in their order, and the best so far."""
    plot = _figure(title="course of the search", x_axis_label="trial", y_axis_label=metric)
    shown = sorted(known(trials), key=lambda trial: trial.number)
    _scatter(plot, shown, [trial.number for trial in shown])
    complete = [trial for trial in shown if trial.state == TrialState.COMPLETE]
    best: list[float] = []
    for trial in complete:
        value = float(trial.value or 0.0)
        better = min if lowest else max
        best.append(better(best[-1], value) if best else value)
    numbers = [trial.number for trial in complete]
    plot.step(numbers, best, mode="after", color="#0072B2", legend_label="best so far")
    return plot


def importance_bars(shares: Mapping[str, float], hint: str) -> Any:
    """What each setting mattered, the most at the top."""
    keys = list(shares)
    plot = _figure(title=f"what mattered{hint}", y_range=keys[::-1], x_range=Range1d(0, 1))
    plot.hbar(y=keys, right=list(shares.values()), height=0.7, color="#009E73")
    plot.xaxis.formatter = NumeralTickFormatter(format="0%")
    return plot


def learning_curves(trials: Sequence[FrozenTrial], metric: str) -> Any:
    """The metric of each trial at its evaluations."""
    plot = _figure(title="evaluations of each trial", x_axis_label="step", y_axis_label=metric)
    drawn = [
        (trial, {s: v for s, v in sorted(trial.intermediate_values.items()) if math.isfinite(v)})
        for trial in trials
        if trial.state in _COLOURS
    ]
    source = ColumnDataSource(
        {
            "steps": [list(values) for _, values in drawn],
            "values": [list(values.values()) for _, values in drawn],
            "colour": [_COLOURS[trial.state] for trial, _ in drawn],
            "trial": [trial.number for trial, _ in drawn],
        }
    )
    plot.multi_line("steps", "values", source=source, color="colour", alpha=0.6, line_width=2)
    plot.add_tools(HoverTool(tooltips=[("trial", "@trial")]))
    return plot


def slice_of(
    key: str, distribution: BaseDistribution, trials: Sequence[FrozenTrial], metric: str
) -> Any:
    """The value of all trials over one of their settings."""
    shown = [trial for trial in known(trials) if key in trial.params]
    options: dict[str, Any] = {"x_axis_label": key, "y_axis_label": metric}
    if isinstance(distribution, CategoricalDistribution):
        options["x_range"] = [str(choice) for choice in distribution.choices]
    elif getattr(distribution, "log", False):
        options["x_axis_type"] = "log"
    plot = _figure(title=key, **options)
    is_choice = isinstance(distribution, CategoricalDistribution)
    values = [trial.params[key] for trial in shown]
    _scatter(plot, shown, [str(value) for value in values] if is_choice else values)
    if is_choice and max(map(len, options["x_range"])) > _LONG:
        plot.xaxis.major_label_orientation = 0.4
    return plot
