"""The picture of an ablation: what is lost without each component, with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scaledtrain.ablate.interval import Interval
from scaledtrain.ablate.results import Effect

__all__ = ["draw"]

_CLEAR, _UNCLEAR = "#0072B2", "#8A8F99"


def draw(path: Path, found: Sequence[Effect], metric: str) -> None:
    """Draw one PNG: a panel each for quality, speed and memory; grey: not distinguishable.

    Args:
        path: where it goes.
        found: at least one.
        metric: what quality is.
    """
    from matplotlib.figure import Figure

    titles = [f"change of {metric}", "change of samples/s, %", "change of peak memory, MiB"]
    panels: list[list[Interval | None]] = [
        [effect.quality for effect in found],
        [effect.speed for effect in found],
        [effect.memory for effect in found],
    ]
    figure = Figure(figsize=(11, 1.4 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for panel, title, intervals in zip(axes, titles, panels, strict=True):
        panel.axvline(0.0, color="black", linewidth=0.8)
        for row, interval in enumerate(intervals):
            if interval is None:
                continue
            colour = _UNCLEAR if interval.holds_zero else _CLEAR
            if interval.half_width < float("inf"):
                bar = interval.half_width
                panel.errorbar(interval.mean, row, xerr=bar, fmt="o", color=colour, capsize=3)
            else:
                panel.plot(interval.mean, row, "o", color=colour, fillstyle="none")
        panel.set_xlabel(title)
        panel.grid(axis="x", alpha=0.3)
    names = [f"without {effect.without}" for effect in found]
    axes[0].set_yticks(range(len(found)), names)
    axes[0].invert_yaxis()
    seeds = max(effect.seeds for effect in found)
    figure.suptitle(f"Differences over the same {seeds} seeds, 95 % t-intervals", fontsize=10)
    figure.savefig(path, dpi=150)
