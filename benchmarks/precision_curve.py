"""Where updates of 16-bit parameters are rounded away: plain bfloat16 stalls, what else does not.

python -m benchmarks.precision_curve            results/precision_curve/ and README.md
python -m benchmarks.precision_curve --quick    does it run? A few steps, nothing is stored
python -m benchmarks.precision_curve --table    write README.md's table and the picture anew
python -m benchmarks.precision_curve --check    fail if README.md is not what --table would write
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.command_line import add_count, carry_out, command_line
from benchmarks.harness import Report, provenance
from scaledtrain import Precision, Trainer
from scaledtrain.data import digits
from scaledtrain.models import MLP

PACKAGES = ("torch", "numpy", "matplotlib")
LEARNING_RATE = 2e-4
"""Of AdamW, and so about the size of an update: too small for bfloat16 numbers above 1/16."""
STEPS = 2000
CURVES = {
    "fp32": Precision("fp32"),
    "bf16-mixed": Precision("bf16-mixed"),
    "bf16-true, nearest": Precision("bf16-true", "nearest"),
    "bf16-true, stochastic": Precision("bf16-true", "stochastic"),
    "bf16-true, kahan": Precision("bf16-true", "kahan"),
    "bf16-true, master": Precision("bf16-true", "master"),
}
SETTINGS = {
    "optimizer": "AdamW",
    "learning_rate": LEARNING_RATE,
    "model": "MLP 64-64-10 on digits",
    "batch_size": 64,
    "steps": STEPS,
}


@dataclass(frozen=True)
class Curve:
    """How far one precision trained."""

    precision: str
    seed: int
    steps: list[int]
    losses: list[float]
    """Mean over all of digits' training samples."""


def train_curve(name: str, seed: int, steps: int, every: int) -> Curve:
    """An MLP on digits; a pure function of its arguments."""
    torch.manual_seed(seed)
    inputs, targets = digits("train").tensors
    everything = [(inputs, targets)]
    trainer = Trainer(
        MLP(64, [64], 10),
        F.cross_entropy,
        partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.0),
        precision=CURVES[name],
        seed=seed,
        console=False,
    )
    data = torch.utils.data.TensorDataset(inputs, targets)
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    at, losses = [], []
    for step in range(0, steps + 1, every):
        if step:
            trainer.fit(loader, max_steps=step)
        at.append(step)
        losses.append(trainer.evaluate(everything)["loss"])
    return Curve(name, seed, at, losses)


def render_curve(curves: Sequence[Curve], where: Mapping[str, Any]) -> str:
    """How far each came, in Markdown."""
    lines = [
        provenance(where),
        "",
        f"MLP 64-64-10 on digits, AdamW, lr {LEARNING_RATE:g}: loss over the training set.",
        "",
        "| precision | at first | in the middle | at the end (of each seed) |",
        "|---|--:|--:|--:|",
    ]
    for name in CURVES:
        own = [c for c in curves if c.precision == name]
        if own:
            first, middle = own[0].losses[0], own[0].losses[len(own[0].losses) // 2]
            ends = ", ".join(f"{c.losses[-1]:.4f}" for c in own)
            lines.append(f"| {name} | {first:.3f} | {middle:.4f} | {ends} |")
    return "\n".join(lines) + "\n"


def draw_curve(curves: Sequence[Curve], file: Path) -> None:
    """The curves of the first seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve in curves:
        if curve.seed == curves[0].seed:
            style = "--" if curve.precision == "fp32" else "-"
            axes.plot(curve.steps, curve.losses, style, label=curve.precision)
    axes.set_yscale("log")
    axes.set_xlabel("updates")
    axes.set_ylabel("training loss")
    axes.legend()
    figure.savefig(file, dpi=120, metadata={"Software": None})


def run_curves(seeds: int, before: Sequence[Curve], is_quick: bool) -> Iterator[Curve]:
    """Train with every precision."""
    seeds, steps, every = (1, 20, 10) if is_quick else (seeds, STEPS, 100)
    for seed in range(seeds):
        for name in CURVES:
            curve = train_curve(name, seed, steps, every)
            print(f"{name:24} seed {seed}  {curve.losses[-1]:.5f}", flush=True)
            yield curve


REPORT = Report("precision_curve", Curve, render_curve, draw_curve)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("precision_curve", __doc__, "a few steps")
    add_count(parser, "seeds", 3, "of each curve")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, partial(run_curves, options.seeds))


if __name__ == "__main__":
    sys.exit(main())
