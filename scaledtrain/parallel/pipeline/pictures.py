"""Who computes which microbatch when: a plan, or what was measured, drawn alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaledtrain.errors import ConfigError
from scaledtrain.parallel.pipeline.schedules import Kind
from scaledtrain.parallel.pipeline.simulate import Timed, Timetable
from scaledtrain.report.chrome import complete_event, named_event, write_events
from scaledtrain.report.picture import require_matplotlib

__all__ = ["draw_pipeline", "pipeline_text", "write_pipeline_trace"]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
_COLOURS: dict[Kind, str] = {"F": "#56B4E9", "B": "#E69F00", "I": "#E69F00", "W": "#009E73"}
_NAMES: dict[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, parameters",
}
_MAX_LABELS = 2000  # more could not be read, and take long


def pipeline_text(table: Timetable, unit: float) -> str:
    """A row for each rank, a column for each unit of time.

    ``2F0`` is the forward pass of microbatch 0 through stage 2.

    Args:
        table: what to show.
        unit: seconds in a column; what goes on where a column begins is what it shows.

    Example:
        >>> from scaledtrain.parallel.pipeline import pipeline_order, simulate
        >>> order = pipeline_order("1F1B", n_ranks=2, n_microbatches=3)
        >>> print(pipeline_text(simulate(order, {"F": 1.0, "B": 2.0}), unit=1.0))
        rank 0  0F0 0F1  .   .  0B0 0B0 0F2 0B1 0B1  .  0B2 0B2
        rank 1   .  1F0 1B0 1B0 1F1 1B1 1B1 1F2 1B2 1B2  .   .
    """
    columns = round((table.end - table.start) / unit)
    width = max(len(str(timed.action)) for own in table.ranks for timed in own)
    lines = []
    for rank, own in enumerate(table.ranks):
        cells = [_at(own, table.start + (column + 1e-3) * unit) for column in range(columns)]
        lines.append(f"rank {rank}  " + " ".join(cell.center(width) for cell in cells).rstrip())
    return "\n".join(lines)


def _at(own: Sequence[Timed], moment: float) -> str:
    return next((str(t.action) for t in own if t.start <= moment < t.end), ".")


def draw_pipeline(path: Path, tables: Sequence[Timetable]) -> None:
    """Draw timetables below each other, as a PNG: what was planned, and what was measured.

    Args:
        path: where it goes.
        tables: each from its own first action on.

    Raises:
        ConfigError: matplotlib is missing, or there is nothing to draw.
    """
    if not tables:
        raise ConfigError("no timetable was given to draw; simulate() makes one of a schedule")
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    heights = [0.8 + 0.42 * len(table.ranks) for table in tables]
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1)
    figure = Figure(figsize=(12.0, 0.5 + sum(heights)), layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, table in zip(panels, tables, strict=True):
        _draw(axes, table)
    kinds = {timed.action.kind for table in tables for own in table.ranks for timed in own}
    handles = [Patch(color=_COLOURS[k], label=name) for k, name in _NAMES.items() if k in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=130)


def _draw(axes: Any, table: Timetable) -> None:
    n_stages = 1 + max(timed.action.stage for own in table.ranks for timed in own)
    n_ranks = len(table.ranks)
    labels = sum(map(len, table.ranks)) <= _MAX_LABELS
    for rank, own in enumerate(table.ranks):
        for (kind, stage, microbatch), start, end in own:
            left, width = start - table.start, end - start
            # Later stages of a rank are lighter, so that its chunks can be told apart.
            alpha = 1.0 - 0.5 * (stage // n_ranks) / max(1, n_stages // n_ranks)
            axes.barh(rank, width, left=left, color=_COLOURS[kind], alpha=alpha, edgecolor="white")
            if labels and width > 0.008 * table.seconds:
                axes.text(left + width / 2, rank, str(microbatch), ha="center", va="center")
    axes.set_xlim(0, table.seconds)
    axes.set_ylim(n_ranks - 0.5, -0.5)
    axes.set_yticks(range(n_ranks), [f"rank {rank}" for rank in range(n_ranks)])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(
        f"{table.name}: {table.seconds:.4g} s, {table.idle_share:.1%} idle; numbers are "
        "microbatches, lighter ones are of later stages",
        loc="left",
        fontsize=11,
    )


def write_pipeline_trace(path: Path, tables: Sequence[Timetable]) -> int:
    """Write timetables for ui.perfetto.dev and chrome://tracing: a process each, a thread a rank.

    Args:
        path: a new file; an old one is replaced.
        tables: each from its own first action on.

    Returns:
        How many events there are in the file.
    """
    return write_events(path, _events(tables))


def _events(tables: Sequence[Timetable]) -> Iterator[dict[str, Any]]:
    for process, table in enumerate(tables, start=1):
        yield named_event(process, 0, "process_name", name=table.name)
        for rank, own in enumerate(table.ranks):
            yield named_event(process, rank, "thread_name", name=f"rank {rank}")
            for action, start, end in own:
                yield complete_event(
                    process,
                    rank,
                    str(action),
                    _NAMES[action.kind],
                    start - table.start,
                    end - table.start,
                    stage=action.stage,
                    microbatch=action.microbatch,
                )
