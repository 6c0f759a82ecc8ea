"""The picture of a comparison: progress, staleness, and what each worker did."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from scaledtrain.errors import ConfigError
from scaledtrain.report.runs import Evaluation, RunLog
from scaledtrain.report.summary import Goal, Summary
from scaledtrain.timeline import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PHASE_COLOURS", "draw", "require_matplotlib"]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_STRATEGY_COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
PHASE_COLOURS: dict[Phase, str] = {
    "compute": "#3B4A6B",
    "waiting": "#E9E4D8",
    "data": "#56B4E9",
    "communication": "#D55E00",
    "evaluation": "#009E73",
}
_WINDOW_SECONDS = 1.2
_NAME_LENGTH = 20


def require_matplotlib() -> None:
    """Raise a ConfigError that says what to install if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "the picture needs matplotlib, which is not installed here: "
            "pip install 'scaledtrain[examples]'"
        )


def draw(
    path: Path,
    runs: Mapping[str, RunLog],
    summaries: Sequence[Summary],
    evaluations: Mapping[str, Sequence[Evaluation]],
    goal: Goal,
    title: str,
) -> None:
    """Draw one PNG.

    Args:
        path: where it goes.
        runs: name -> what the run wrote.
        summaries: the rows of the table, in the order of ``runs``.
        evaluations: name -> those to draw.
        goal: drawn as a line over its metric.
        title: the finding, in a sentence.

    Raises:
        ConfigError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    traced = [s for s in summaries if any(w.spans for w in runs[s.name].workers)]
    n_workers = max(len(log.workers) for log in runs.values())
    strip_inches = 0.75 + 0.24 * n_workers
    height = 5.0 + (strip_inches + 0.15) * len(traced)
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08, hspace=0.04)
    figure = Figure(figsize=(11.5, height), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, 115), fontsize=11.5, fontweight="bold", x=0.012, ha="left")
    grid = figure.add_gridspec(
        1 + len(traced), 2, width_ratios=[2, 1], height_ratios=[4.2, *[strip_inches] * len(traced)]
    )
    colours = {
        s.name: _STRATEGY_COLOURS[i % len(_STRATEGY_COLOURS)] for i, s in enumerate(summaries)
    }
    _progress(figure.add_subplot(grid[0, 0]), summaries, evaluations, goal, colours)
    _staleness(figure.add_subplot(grid[0, 1]), runs, summaries, colours)
    for row, summary in enumerate(traced, start=1):
        axes = figure.add_subplot(grid[row, :])
        last = row == len(traced)
        _strip(axes, runs[summary.name], summary, colours[summary.name], legend=last)
    figure.savefig(path, dpi=150)


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _progress(
    axes: Axes,
    summaries: Sequence[Summary],
    evaluations: Mapping[str, Sequence[Evaluation]],
    goal: Goal,
    colours: Mapping[str, str],
) -> None:
    """The metric over time."""
    end = max((e[-1].seconds for e in evaluations.values() if e), default=1.0)
    axes.axhline(goal.value, color="0.35", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.text(
        1.01,
        goal.value,
        f"target\n{goal.value:g}",
        transform=axes.get_yaxis_transform(),
        fontsize=9,
        color="0.35",
        va="center",
    )
    for summary in summaries:
        chosen = evaluations[summary.name]
        label = f"{_short(summary.name)}: {summary.samples_per_second:,.0f} samples/s"
        if summary.seconds_to_goal is not None:
            label += f", target after {summary.seconds_to_goal:.1f} s"
        axes.plot(
            [e.seconds for e in chosen],
            [e.values[goal.metric] for e in chosen],
            color=colours[summary.name],
            linewidth=1.8,
            label=label,
        )
        if summary.seconds_to_goal is not None:
            hit = next(e for e in chosen if e.seconds == summary.seconds_to_goal)
            axes.plot(
                hit.seconds, hit.values[goal.metric], "o", color=colours[summary.name], zorder=3
            )
    axes.set(xlabel="seconds of training", ylabel=goal.metric, xlim=(0, end * 1.01))
    axes.set_title(f"Test {goal.metric} over time", loc="left", fontsize=11)
    if 0.5 < goal.value <= 1.0 and not goal.at_most:  # a share: leave out the steep beginning
        axes.set_ylim(goal.value - 0.45, 1.005)
    axes.grid(axis="y", color="0.92")
    axes.legend(loc="lower right", fontsize=9, frameon=False).set_in_layout(False)
    _plain(axes)


def _staleness(
    axes: Axes,
    runs: Mapping[str, RunLog],
    summaries: Sequence[Summary],
    colours: Mapping[str, str],
) -> None:
    """How stale the gradients of all workers were."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title("Staleness of gradients (mean, maximum)", loc="left", fontsize=11)
    stale = [s for s in summaries if s.staleness_mean is not None]
    width = 0.8 / max(1, len(stale))
    for i, summary in enumerate(stale):
        counts = runs[summary.name].staleness
        total = counts.total()
        values = range(max(counts) + 1)
        axes.bar(
            [value + (i - (len(stale) - 1) / 2) * width for value in values],
            [counts[value] / total for value in values],
            width=width,
            color=colours[summary.name],
            label=f"{_short(summary.name)}: {summary.staleness_mean:.2f}, {summary.staleness_max}",
        )
    fresh = [s.name for s in summaries if s.staleness_mean is None]
    for name in fresh:
        axes.plot([], [], color=colours[name], linewidth=6, label=f"{_short(name)}: always fresh")
    axes.set(xlabel="updates between pull and push", ylabel="share of gradients")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, axes.get_ylim()[1] * (1.05 + 0.08 * len(summaries)))  # room for the legend
    axes.legend(loc="upper right", fontsize=9, frameon=False).set_in_layout(False)
    _plain(axes)


def _strip(axes: Axes, log: RunLog, summary: Summary, colour: str, *, legend: bool) -> None:
    """What each worker did in a window in the middle of the run."""
    end = min(w.spans[-1].end for w in log.workers if w.spans)
    begin = max(0.0, (end - _WINDOW_SECONDS) / 2)
    width = min(_WINDOW_SECONDS, end)
    for worker in log.workers:
        shown = [s for s in worker.spans if s.end > begin and s.start < begin + width]
        for phase, phase_colour in PHASE_COLOURS.items():
            bars = [(s.start, s.end - s.start) for s in shown if s.phase == phase]
            axes.broken_barh(
                bars, (worker.rank - 0.38, 0.76), color=phase_colour, linewidth=0, zorder=2
            )
        axes.text(
            1.008,
            worker.rank,
            f"{summary.waiting_shares[worker.rank]:.0%} waiting",
            transform=axes.get_yaxis_transform(),
            fontsize=9,
            va="center",
        )
    axes.set_xlim(begin, begin + width)
    axes.set_ylim(len(log.workers) - 0.5, -0.5)
    names = [f"worker {i} ({1000 * s:.0f} ms)" for i, s in enumerate(summary.compute_seconds)]
    axes.set_yticks(range(len(names)), names)
    axes.set_title(
        f"{summary.name}: what each worker did (and its compute time per step)",
        loc="left",
        fontsize=11,
        color=colour,
    )
    _plain(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if legend:
        from matplotlib.patches import Patch

        axes.set_xlabel("seconds of training")
        axes.legend(
            handles=[Patch(color=c, label=phase) for phase, c in PHASE_COLOURS.items()],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.32),
            ncols=len(PHASE_COLOURS),
            fontsize=9,
            frameon=False,
        )
