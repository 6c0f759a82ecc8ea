"""The benchmark of recomputation: what it shows, and that its contenders compute the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import recompute as bench
from benchmarks.recompute import DEEPEST, NONE, Point, more_time, render

WHERE = {
    "started": "2026-01-01T00:00:00Z", "commit": "abc", "dirty": False, "cpu": "a CPU", "cores": 2,
    "system": "Linux x86_64", "python": "3.11", "versions": {"torch": "2.13"},
    "settings": bench.SETTINGS,
}  # fmt: skip

MIB = 2**20


def test_the_table_puts_ours_beside_each_fixed_policy() -> None:
    every = "torch, every block"
    beside = f"ours, bytes of {every}"
    points = [
        Point("mlp", NONE, 0, 1000 * MIB, []),
        # Two rounds: 1.2 / 1 and 3 / 2, where ours took 1.1 / 1 and 3.6 / 2.
        Point("mlp", every, 0, 200 * MIB, [1.2], [1.0]),
        Point("mlp", every, 1, 200 * MIB, [3.0, 3.0], [2.0, 2.0]),
        Point("mlp", beside, 0, 190 * MIB, [1.1], [1.0], 200 * MIB, 180 * MIB),
        Point("mlp", beside, 1, 190 * MIB, [3.6, 3.6], [2.0, 2.0], 200 * MIB, 180 * MIB),
        Point("mlp", "ours, 1/10", 0, 101 * MIB, [1.3], [1.0], 100 * MIB, 90 * MIB, 0.15),
        Point("mlp", "ours, 1/30", 0, 0, [], budget=33 * MIB, told="does not fit"),
    ]
    spread = more_time(points, "mlp", every)
    assert spread is not None
    assert spread == pytest.approx((0.35, 0.2, 0.5, 2))
    text = render(points, WHERE)
    assert "1000 MiB if everything is kept" in text
    # 1.1 / 1.2 is 0.92, 3.6 / 3 is 1.2
    assert (
        f"| {every} | 5.0 | +35% (+20% to +50%) | +45% (+10% to +80%) | 1.06 (0.92 to 1.20) |"
        in text
    )
    assert (
        "| ours, 1/10 | 9.9 | 100.0 | 90.0 | 101.0 | +15% (+15% to +15%) | +30% (+30% to +30%) |"
        in text
    )
    assert "| ours, 1/30 | does not fit | 33.0 | | | | |" in text
    assert (
        f"| mlp: ours / {every}, in as many bytes ≤ 1 | 1.06 (0.92 to 1.20) | **MISSED** |" in text
    )
    assert "| mlp: ours, 1/10: more time ≤ 25% | +30% (+30% to +30%) | **MISSED** |" in text
    assert "| runs that exceed their budget, of 3: 0 | 1 | **MISSED** |" in text
    # 90 planned where there were 101
    assert "at most 5% apart | 10.9% | **MISSED** |" in text


def test_the_deepest_model_counts_only_where_it_fits() -> None:
    fixed = Point(DEEPEST, "torch, every 10", 0, 255 * MIB, [30.0], budget=256 * MIB, depth=980)
    ours = Point(
        DEEPEST, "ours", 0, 250 * MIB, [40.0], [], 256 * MIB, 251 * MIB, told="", depth=1000
    )
    assert "| blocks of a GPT in 256 MiB ≥ 1,000 | 1,000 | pass |" in render([fixed, ours], WHERE)
    nothing = replace(ours, seconds=[], peak_bytes=0)
    text = render([fixed, nothing], WHERE)
    assert "| blocks of a GPT in 256 MiB ≥ 1,000 | 0 | **MISSED** |" in text
    assert "| ours | 1000 | 0.0 | does not fit |" in text


@pytest.mark.parametrize("chain", bench.CHAINS)
def test_all_contenders_compute_the_same_gradients(chain: str) -> None:
    torch.manual_seed(0)
    model, x = bench.CHAINS[chain][0](2)
    found = []
    for name, run in {NONE: bench.one_by_one, **bench.FIXED}.items():
        if name.startswith("DeepSpeed"):
            continue  # not among what the tests install
        model.run = run
        model.zero_grad()
        bench.loss_of(x[:2], model).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(all(map(torch.equal, found[0], other)) for other in found)


def test_the_readme_shows_the_newest_results() -> None:
    assert bench.main(["--check"]) == 0


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "gptt"])
