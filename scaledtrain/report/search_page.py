"""The page about a search: its course, what mattered, each setting, the table of its trials."""

from __future__ import annotations

import os
from collections import Counter
from importlib.resources import files
from pathlib import Path

import scaledtrain
from scaledtrain.disk import replace_file
from scaledtrain.report.figures import embed
from scaledtrain.report.page import require_bokeh
from scaledtrain.tune.settings import ASKED, Asked, require_optuna

__all__ = ["is_search", "write_search_report"]


def is_search(folder: str | Path) -> bool:
    """Whether `scaledtrain.tune` made this folder."""
    return (Path(folder) / ASKED).exists()


def write_search_report(path: str | Path, folder: str | Path) -> Path:
    """Write the page about a search, which may be under way.

    Args:
        path: of the HTML file; an old one is replaced.
        folder: of the search.

    Raises:
        ConfigError: it holds no search, or Bokeh or Optuna are missing.
    """
    require_bokeh()
    require_optuna()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, _page(Path(folder)).encode())
    return path


def _page(folder: Path) -> str:
    from bokeh.resources import Resources
    from jinja2 import Template

    from scaledtrain.report import search_charts as charts
    from scaledtrain.tune.results import (
        LEAST,
        best_first,
        hint_of,
        how_it_ended,
        importances,
        number,
        rows,
    )
    from scaledtrain.tune.search import run_dir_of
    from scaledtrain.tune.study import open_study

    tuning = Asked.load(folder).tuning
    metric, study = str(tuning.metric), open_study(folder, tuning)
    trials, shares = best_first(study), importances(study)
    distributions = {k: d for trial in trials for k, d in trial.distributions.items()}
    overview, slices = [], []
    if charts.known(trials):
        overview = [
            charts.course(trials, metric, tuning.best_is == "lowest"),
            charts.learning_curves(trials, metric),
            *([charts.importance_bars(shares, hint_of(study))] if shares else []),
        ]
        keys = [*shares, *(key for key in distributions if key not in shares)]
        slices = [charts.slice_of(key, distributions[key], trials, metric) for key in keys]
    drawn = [*overview, *slices]
    script, places = embed(drawn)
    head, cells = rows(study, metric)
    counts = Counter(how_it_ended(trial).partition(",")[0] for trial in trials)
    best = trials[0] if counts["complete"] else None
    template = (files("scaledtrain.report") / "search.html").read_text(encoding="utf-8")
    text: str = Template(template, autoescape=True).render(
        title=folder.resolve().name,
        version=scaledtrain.__version__,
        bokeh=Resources(mode="inline", components=["bokeh"]).render_js(),
        script=script,
        metric=metric,
        counts=f"trials: {', '.join(f'{n} {word}' for word, n in counts.items()) or 'none yet'}",
        best=best
        and {
            "number": best.number,
            "value": number(float(best.value or 0.0)),
            "settings": " ".join(f"{key}={value}" for key, value in best.params.items()),
            "folder": os.path.relpath(run_dir_of(folder, best.number)),
        },
        overview=places[: len(overview)],
        slices=places[len(overview) :],
        too_few=None if shares else LEAST,
        head=head,
        rows=cells,
        folder=os.path.relpath(folder),
    )
    return text
