"""Figures of a page, those in sight drawn first: a page of many opens sooner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

__all__ = ["embed"]


def embed(figures: Sequence[Any]) -> tuple[str, list[str]]:
    """What a page needs to draw figures of Bokeh.

    When a figure has been drawn the document gets an event ``figure`` whose ``detail`` are its
    models; ``figures.html`` says what else a page's own script may use.

    Args:
        figures: of a fixed height.

    Returns:
        Elements for the end of the page, and one element for each figure.
    """
    from bokeh.embed import json_item

    items = [json_item(figure, f"figure-{i}") for i, figure in enumerate(figures)]
    data = json.dumps(items, separators=(",", ":")).replace("<", "\\u003c")  # no end of the element
    places = [
        f'<div id="figure-{i}" style="min-height: {figure.height}px"></div>'
        for i, figure in enumerate(figures)
    ]
    script = (files("scaledtrain.report") / "figures.html").read_text(encoding="utf-8")
    return f'<script type="application/json" id="figures">{data}</script>\n{script}', places
