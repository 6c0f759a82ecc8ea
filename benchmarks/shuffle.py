"""How well data sorted by label are shuffled with little memory: ours and others' ways.

python -m benchmarks.shuffle                  everything; results/ and README.md
python -m benchmarks.shuffle --only block     some ways of shuffling
python -m benchmarks.shuffle --quick          does it run? One seed, two epochs, nothing is stored
python -m benchmarks.shuffle --table          write README.md's table anew
python -m benchmarks.shuffle --check          fail if README.md is not up to date

Two questions: how far the labels in a batch are from those of a random batch (an order alone,
nothing is trained), and what that does to a small network. All are functions of the seed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command_line import add_count, add_some, carry_out, command_line
from benchmarks.harness import Report, provenance
from scaledtrain.data import digits
from scaledtrain.data.sharded import Order
from scaledtrain.data.sharded.columns import Array
from scaledtrain.models import MLP

SAMPLES, CLASSES, SHARDS = 100_000, 100, 100  # whose order is looked at
DIGITS_SHARDS = 12  # of 1,437 samples, 120 in each
BLOCKS = 640  # in a data set: what ours reads in one piece
BATCH_SIZE = 32
MANY = 100  # batches, whose labels are looked at together
SHARES = (0.01, 0.1)  # of the data set that is in memory
EPOCHS, LEARNING_RATE = 20, 0.1
SEEDS = 5
PACKAGES = ("torch", "scikit-learn", "numpy")
SETTINGS = {
    "samples": SAMPLES,
    "classes": CLASSES,
    "shards": SHARDS,
    "blocks": BLOCKS,
    "batch_size": BATCH_SIZE,
    "model": "MLP 64-32-10 on digits",
    "epochs": EPOCHS,
    "learning_rate": LEARNING_RATE,
}

# --- Ways of shuffling ------------------------------------------------------------------------


class Layout(NamedTuple):
    """A data set, and how much of it may be in memory."""

    shards: list[int]
    """Samples in each, in their order."""
    buffer: int
    """Samples."""

    @property
    def samples(self) -> int:
        return sum(self.shards)


def ours(kind: Any, layout: Layout, seed: int, epoch: int) -> Array:
    block = max(1, layout.samples // BLOCKS)
    order = Order(layout.shards, block, max(1, layout.buffer // block), kind, seed)
    return order.indices(epoch, 0, layout.samples)


def from_buffer(stream: Array, size: int, first: int, draw: random.Random) -> Array:
    """A random sample of a buffer is given, and the next of the stream takes its place.

    It begins when there are ``first`` of them, and takes two for each that it gives until there are
    ``size``.
    """
    held: list[int] = []
    given: list[int] = []
    coming = iter(stream.tolist())
    for sample in coming:
        held.append(sample)
        if len(held) < size and (more := next(coming, None)) is not None:
            held.append(more)
        if len(held) >= min(first, size):
            place = draw.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            given.append(held.pop())
    draw.shuffle(held)
    return np.array(given + held)


def shuffle_buffer(layout: Layout, seed: int, epoch: int) -> Array:
    """tf.data's ``shuffle(buffer_size)`` over the files in their order."""
    draw = random.Random(seed * 1_000 + epoch)
    return from_buffer(np.arange(layout.samples), layout.buffer, layout.buffer, draw)


def parts(layout: Layout, generator: np.random.Generator) -> list[Array]:
    """The samples of each shard in their order; the shards in a random one."""
    ends = np.cumsum(layout.shards)
    order = generator.permutation(len(ends))
    return [np.arange(ends[i] - layout.shards[i], ends[i]) for i in order]


def webdataset(layout: Layout, seed: int, epoch: int) -> Array:
    """Shards in random order, then ``shuffle(buffer)``, which begins to give at 100 samples."""
    stream = np.concatenate(parts(layout, np.random.default_rng([seed, epoch])))
    return from_buffer(stream, layout.buffer, 100, random.Random(seed * 1_000 + epoch))


def py1s(layout: Layout, seed: int, epoch: int) -> Array:
    """Streaming's: shards in random order, and the samples of each."""
    generator = np.random.default_rng([seed, epoch])
    return np.concatenate([generator.permutation(part) for part in parts(layout, generator)])


def py1b(layout: Layout, seed: int, epoch: int) -> Array:
    """Streaming's: shards in random order; then each block of a buffer's size is shuffled."""
    generator = np.random.default_rng([seed, epoch])
    stream = np.concatenate(parts(layout, generator))
    edges = range(layout.buffer, len(stream), layout.buffer)
    return np.concatenate([generator.permutation(part) for part in np.split(stream, edges)])


def py1e(layout: Layout, seed: int, epoch: int) -> Array:
    """Streaming's: shards in random order, each spread over a range of about a buffer's size.

    A sample of a shard of s samples moves by up to (r - s) / 2, where r is drawn for every shard
    between 0.75 and 1.25 buffers; a shard that is larger is shuffled by itself.
    """
    generator = np.random.default_rng([seed, epoch])
    shuffled = [generator.permutation(part) for part in parts(layout, generator)]
    places, first, n = [], 0, layout.samples
    for part in shuffled:
        width = generator.integers(int(0.75 * layout.buffer), int(1.25 * layout.buffer) + 1)
        reach = max(0.0, (width - len(part)) / 2)
        low, high = max(-reach, -first), min(reach, n - first - len(part))
        places.append(first + np.arange(len(part)) + generator.uniform(low, high, len(part)))
        first += len(part)
    return np.concatenate(shuffled)[np.argsort(np.concatenate(places))]


class Way(NamedTuple):
    """One contender."""

    title: str
    order: Callable[[Layout, int, int], Array]
    """(layout, seed, epoch) -> every sample once."""
    buffered: bool = True
    """What it does depends on how much may be in memory."""


WAYS: Mapping[str, Way] = {
    "none": Way("ours, `none`", lambda *where: ours("none", *where), buffered=False),
    "full": Way("ours, `full`", lambda *where: ours("full", *where), buffered=False),
    "block": Way("ours, `block`", lambda *where: ours("block", *where)),
    "buffer": Way("shuffle buffer (tf.data)", shuffle_buffer),
    "webdataset": Way("shards, then a shuffle buffer (WebDataset)", webdataset),
    "py1s": Way("py1s (Streaming)", py1s, buffered=False),
    "py1b": Way("py1b (Streaming)", py1b),
    "py1e": Way("py1e (Streaming)", py1e),
}

# --- What is measured -------------------------------------------------------------------------


def imbalance(labels: Array, batch_size: int) -> float:
    """How far the labels of a batch are from the whole's, over what chance makes of it.

    The mean over whole batches of chi^2 = sum over classes of (count - expected)^2 / expected,
    divided by what it is for random batches, (C - 1)(n - b) / (n - 1) with n samples of C classes
    in batches of b. It is the variance of a batch's mean of anything that only the label decides,
    relative to a full shuffle: 1 as good as that, b the worst, a label for each batch.
    """
    n, shares = len(labels), np.bincount(labels) / len(labels)
    batches = n // batch_size
    cells = np.repeat(np.arange(batches), batch_size) * len(shares) + labels[: batches * batch_size]
    counts = np.bincount(cells, minlength=batches * len(shares)).reshape(batches, -1)
    expected = batch_size * shares
    chi2 = ((counts - expected) ** 2 / expected).sum(1).mean()
    return float(chi2 / ((len(shares) - 1) * (n - batch_size) / (n - 1)))


def displacement(order: Array) -> float:
    """How far a sample is from where it is stored, on average, over the size of the data set.

    1/3 for a full shuffle.
    """
    return float(np.abs(order - np.arange(len(order))).mean() / len(order))


@cache
def sorted_digits() -> tuple[Tensor, Tensor]:
    """Those to train on, sorted by label."""
    inputs, targets = digits("train").tensors
    order = targets.argsort(stable=True)
    return inputs[order], targets[order]


def train(way: str, share: float, seed: int, epochs: int) -> tuple[float, float]:
    """(mean loss on the training data, share of wrong test images) of a network at the end."""
    inputs, targets = sorted_digits()
    n = len(targets)
    shards = [len(part) for part in np.array_split(np.arange(n), DIGITS_SHARDS)]
    layout = Layout(shards, int(share * n))
    torch.manual_seed(seed)
    model = MLP(64, [32], 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for epoch in range(epochs):
        order = torch.from_numpy(WAYS[way].order(layout, seed, epoch))
        for batch in order.split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    test_inputs, test_targets = digits("test").tensors
    with torch.no_grad():
        loss = F.cross_entropy(model(inputs), targets).item()
        wrong = (model(test_inputs).argmax(1) != test_targets).double().mean().item()
    return loss, wrong


@dataclass(frozen=True)
class Run:
    """One way of shuffling with one size of its buffer."""

    way: str
    share: float
    """Of the data set that is in memory; 0 where that makes no difference."""
    seed: int
    imbalance: float
    """Of a batch."""
    drift: float
    """The imbalance of many batches together."""
    displacement: float
    train_loss: float
    test_error: float


def measure(way: str, share: float, seed: int, epochs: int = EPOCHS) -> Run:
    """A pure function of its arguments."""
    layout = Layout([SAMPLES // SHARDS] * SHARDS, int(share * SAMPLES))
    order = WAYS[way].order(layout, seed, 0)
    labels = np.arange(SAMPLES) // (SAMPLES // CLASSES)
    mixed, drift = (imbalance(labels[order], n * BATCH_SIZE) for n in (1, MANY))
    moved = displacement(order)
    return Run(way, share, seed, mixed, drift, moved, *train(way, share, seed, epochs))


# --- What it shows ----------------------------------------------------------------------------


def render(runs: Sequence[Run], where: Mapping[str, Any]) -> str:
    """The table, in Markdown."""
    lines = [
        provenance(where),
        "",
        f"| | in memory | imbalance of a batch | of {MANY} batches | displacement | training loss "
        "| test error, % |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for way, share in plan(list(WAYS)):
        own = [run for run in runs if (run.way, run.share) == (way, share)]
        if own:
            memory = f"{share:.0%}" if share else ""
            lines.append(
                f"| {WAYS[way].title} | {memory} "
                f"| {_mean([r.imbalance for r in own], 2)} "
                f"| {_mean([r.drift for r in own], 1)} "
                f"| {_mean([r.displacement for r in own], 3)} "
                f"| {_mean([r.train_loss for r in own], 3)} "
                f"| {_mean([100 * r.test_error for r in own], 1)} |"
            )
    counts = {sum((r.way, r.share) == (w, s) for r in runs) for w, s in plan(list(WAYS))} - {0}
    seeds = " to ".join(map(str, dict.fromkeys([min(counts), max(counts)])))
    lines += ["", f"Means over {seeds} seeds ± their standard error."]
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float], digits_shown: int) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits_shown}f} ± {error:.{digits_shown}f}"


REPORT = Report("shuffle", Run, render)


# --- The command ------------------------------------------------------------------------------


def plan(ways: Sequence[str]) -> list[tuple[str, float]]:
    """(way, share in memory) of each row."""
    return [(w, share) for w in ways for share in (SHARES if WAYS[w].buffered else (0.0,))]


def runs(
    rows: Sequence[tuple[str, float]], seeds: int, before: Sequence[Run], is_quick: bool
) -> Iterator[Run]:
    """Those that are not stored yet, seed by seed."""
    stored = {(run.way, run.share, run.seed) for run in before}
    for seed in range(1 if is_quick else seeds):
        for row in rows:
            if (*row, seed) not in stored:
                yield measure(*row, seed, epochs=2 if is_quick else EPOCHS)
        print(f"seed {seed}", flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("shuffle", __doc__, "one seed, two epochs")
    add_some(parser, "only", list(WAYS))
    add_count(parser, "seeds", SEEDS, "how many")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    torch.set_num_threads(1)
    measure_all = partial(runs, plan(options.only), options.seeds)
    return carry_out(options, REPORT, PACKAGES, SETTINGS, measure_all)


if __name__ == "__main__":
    sys.exit(main())
