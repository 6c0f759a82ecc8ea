"""Layers in the report page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scaledtrain.report.layers import heat_maps, read_layers
from scaledtrain.report.page import write_report
from tests.run_folders import step_record, write


def layers(step: int, **rows: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "layers", "step": step, "layers": rows}


def run(folder: Path) -> Path:
    """Two stages: the second rank's has a layer of its own, whose gradient is not finite once."""
    step = step_record(
        step=200, seconds=1.0, steps=200, samples=320, samples_per_second=320, step_seconds=0.005,
        compute=0.004, waiting=0.0,
    )  # fmt: skip
    first = [
        layers(1, a={"grad_norm": 10.0, "dead": 0.0, "units": 8.0}),
        layers(101, a={"grad_norm": 0.1, "dead": 2.0, "units": 8.0}),
        {"kind": "warning", "step": 101, "layers": ["a <ReLU>: 2 of 8"]},
    ]
    trouble = {
        "kind": "trouble", "step": 7, "in_step": 8, "what": "not finite: loss nan", "rank": 1,
        "where": "the output of b (Log)", "reaction": "skip",
    }  # fmt: skip
    second = [layers(1, b={"grad_norm": None}), trouble, layers(101, b={"grad_norm": 0.001})]
    return write(folder, [[*first, step], [*second, step]])


def test_modules_of_all_stages_are_in_one_map(tmp_path: Path) -> None:
    log = read_layers(run(tmp_path / "run"))
    assert log is not None
    assert log.modules == ["a", "b"]
    gradient, dead = heat_maps(log)
    shown = gradient.renderers[0].data_source.data
    # log10 of 10, 0.1 and 0.001; a measurement stands for the 100 steps up to the next.
    assert shown["value"] == pytest.approx([1.0, -1.0, -3.0])
    assert (shown["module"], shown["step"]) == (["a", "a", "b"], [1, 101, 101])
    assert (shown["middle"], shown["width"]) == ([51.0, 151.0, 151.0], [100, 100, 100])
    assert gradient.y_range.factors == ["b", "a"]  # the first at the top
    assert dead.renderers[0].data_source.data["value"] == [0.0, 0.25]


def test_the_page_has_them_where_there_are_any(tmp_path: Path) -> None:
    text = write_report(tmp_path / "with.html", [run(tmp_path / "run")]).read_text()
    assert "<h2>Layers</h2>" in text
    assert "step 101: a &lt;ReLU&gt;: 2 of 8" in text
    told = "step 8: not finite: loss nan, on rank 1, first in the output of b (Log) (skip)"
    assert text.index(told) < text.index("step 101:")
    assert "update / weight" not in text  # nobody measured it
    steps = run(tmp_path / "other") / "metrics-rank0.jsonl"
    steps.write_text(steps.read_text().splitlines()[-1] + "\n")
    (tmp_path / "other" / "metrics-rank1.jsonl").unlink()
    assert read_layers(tmp_path / "other") is None
    without = write_report(tmp_path / "without.html", [tmp_path / "other"]).read_text()
    assert "<h2>Layers</h2>" not in without
