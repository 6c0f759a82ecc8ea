"""The benchmark of recomputation: what it shows, and that its contenders compute the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks import recompute as bench
from benchmarks.recompute import NONE, Point, extra, render

WHERE = {
    "started": "2026-01-01T00:00:00Z", "commit": "abc", "dirty": False, "cpu": "a CPU", "cores": 2,
    "system": "Linux x86_64", "python": "3.11", "versions": {"torch": "2.13"},
    "settings": bench.SETTINGS,
}  # fmt: skip


def test_the_table_puts_ours_beside_each_fixed_policy() -> None:
    every = "torch, every block"
    points = [
        # Two rounds: 1.2 / 1 and 1.5 / 1; keeping everything was measured twice in the first.
        Point("mlp", NONE, 0, 1000 * 2**20, [1.0, 1.0]),
        Point("mlp", NONE, 0, 1000 * 2**20, [1.0]),
        Point("mlp", every, 0, 200 * 2**20, [1.2]),
        Point("mlp", NONE, 1, 1000 * 2**20, [2.0]),
        Point("mlp", every, 1, 200 * 2**20, [3.0]),
        Point("mlp", f"ours, bytes of {every}", 0, 190 * 2**20, [1.1], 200 * 2**20),
        Point("mlp", "ours, 1/10", 0, 101 * 2**20, [1.3], 100 * 2**20),
        Point("mlp", "ours, 1/30", 0, 0, [], 33 * 2**20, "does not fit"),
    ]
    spread = extra(points, "mlp", every)
    assert spread is not None
    assert spread == pytest.approx((0.35, 0.2, 0.5, 2))
    text = render(points, WHERE)
    assert "1000 MiB if everything is kept" in text
    assert f"| {every} | 5.0 | +35% (+20% to +50%) | +10% (+10% to +10%) |" in text
    assert "| ours, 1/10 | 9.9 | +30% (+30% to +30%) | |" in text
    assert "| ours, 1/30 | does not fit |  | |" in text
    assert "Of 2 runs with a budget 1 needed more bytes than that." in text


@pytest.mark.parametrize("chain", bench.CHAINS)
def test_all_contenders_compute_the_same_gradients(chain: str) -> None:
    torch.manual_seed(0)
    model, x = bench.CHAINS[chain][0](2)
    found = []
    for name, run in bench.FIXED.items():
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
