"""Estimates for people to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from scaledtrain.memory.figures import MemoryEstimate, RankMemory

__all__ = ["Cell", "Report", "to_text"]

_GAP = "  "


@dataclass(frozen=True)
class Cell:
    """One way to train."""

    precision: str
    policy: str
    estimate: MemoryEstimate | None
    largest_batch: int | None
    """Samples; None: no memory was given, or it is not the chosen precision."""
    why_not: str | None
    """Why there is no estimate."""


@dataclass(frozen=True)
class Report:
    """All ways that were asked for."""

    model: str
    optimizer: str
    strategy: str
    workers: int
    mesh_shard: int
    """Ranks that have a replica, or a stage of one, together."""
    mesh_pipe: int
    """Ranks that have different stages of a replica."""
    device: str
    memory: int | None
    """Of each rank, that was given."""
    chosen: tuple[str, str]
    """Precision and policy of the config; the first precision, if its own is not asked for."""
    compiled: bool
    shards: int
    cells: Sequence[Cell]
    """By precision, then by policy."""


def to_text(report: Report) -> str:
    """Tables, and the most important in words."""
    parts = [
        _title(report),
        _between_steps(report),
        _by_policy("activations at most", _rows(report), _activations),
        _by_policy("all at most", _rows(report), _peak),
    ]
    if report.memory is not None:
        title = f"largest batch in {_bytes(report.memory)}"
        rows = [row for row in _rows(report) if row[0].precision == report.chosen[0]]
        parts.append(_by_policy(title, rows, lambda c: _number(c.largest_batch)))
    parts += [_by_block(report), *_by_rank(report), "\n".join(_words(report))]
    return "\n\n".join(parts)


def _title(report: Report) -> str:
    size = next(c.estimate.batch_size for c in report.cells if c.estimate is not None)
    workers = "1 worker" if report.workers == 1 else f"{report.workers} workers"
    if (each := report.mesh_shard * report.mesh_pipe) > 1:
        workers += f", {each} to a replica"
    return (
        f"{report.model}, {report.optimizer}, {report.strategy} of {workers}; batches of {size}, "
        f"kernels of {report.device}"
    )


def _between_steps(report: Report) -> str:
    rows = [["between steps", "parameters", "gradients", "optimizer", "strategy", "batch"]]
    for cell in _first_of_each_precision(report):
        found = cell.estimate
        if found is not None:
            most = _needs_most(found)
            n_bytes = [
                found.parameters + found.buffers,
                found.gradients,
                most.optimizer,
                most.strategy,
                found.batch,
            ]
            rows.append([cell.precision, *map(_bytes, n_bytes)])
    return _aligned(rows)


def _by_policy(title: str, rows: Sequence[Sequence[Cell]], value: Callable[[Cell], str]) -> str:
    table = [[title, *(cell.policy for cell in rows[0])]]
    table += [[cells[0].precision, *map(value, cells)] for cells in rows]
    return _aligned(table)


def _activations(cell: Cell) -> str:
    return _bytes(None if cell.estimate is None else cell.estimate.activations)


def _peak(cell: Cell) -> str:
    return _bytes(None if cell.estimate is None else cell.estimate.peak)


def _by_block(report: Report) -> str:
    """What a forward pass keeps where, in the chosen precision."""
    rows = [["kept after forward", "before", "blocks", "after"]]
    cells = [cell for cell in report.cells if cell.precision == _chosen(report).precision]
    for cell in cells:
        if cell.estimate is not None:
            kept = cell.estimate.kept
            rows.append(
                [cell.policy, _bytes(kept.before), _runs(kept.blocks) or "-", _bytes(kept.after)]
            )
    return _aligned(rows)


def _runs(sizes: Sequence[int]) -> str:
    runs = [(_bytes(size), len(list(same))) for size, same in groupby(sizes)]
    told = [size if n == 1 else f"{n} x {size}" for size, n in runs]
    return ", ".join(told if len(told) <= 6 else [*told[:5], f"... ({len(sizes)} blocks)"])


def _by_rank(report: Report) -> Iterable[str]:
    """What differs between ranks, if something does, in the chosen precision and policy."""
    found = _chosen(report).estimate
    if found is not None and len(set(found.ranks)) > 1:
        rows = [["ranks", "optimizer", "strategy", "all at most"]]
        numbered = list(enumerate(found.ranks))
        for rank, same in groupby(numbered, key=lambda pair: pair[1]):
            numbers = [number for number, _ in same]
            name = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
            rows.append([name, *map(_bytes, (rank.optimizer, rank.strategy, rank.peak))])
        yield _aligned(rows)


def _words(report: Report) -> Iterable[str]:
    cell = _chosen(report)
    if cell.estimate is not None:
        yield f"{cell.precision}, {cell.policy}: {_dominates(cell.estimate, report.mesh_shard)}"
    if report.memory is not None:
        yield from _fits(report)
    reasons = {c.why_not: c.policy for c in reversed(report.cells) if c.why_not is not None}
    yield from (f"{policy}: {reason}" for reason, policy in reasons.items())
    if any(c.estimate is not None and c.estimate.looks_at_values for c in report.cells):
        yield "The model looks at values of tensors; each was taken for 1, which may be wrong."
    if report.shards > 1:
        yield f"The server's {report.shards} shards are all counted on rank 0; each has a part."
    if report.mesh_shard > 1:
        yield (
            f"Parameters, gradients and optimizer are the largest of {report.mesh_shard} shards'; "
            "what is gathered meanwhile counts in all, not in activations."
        )
    elif cell.estimate is not None and any(rank.host for rank in cell.estimate.ranks):
        yield "What is copied to the device meanwhile counts in all, not in activations."
    if cell.estimate is not None and (host := max(rank.host for rank in cell.estimate.ranks)):
        yield (
            "Parameters, gradients, optimizer and strategy are in the host's memory, "
            f"{_bytes(host)} at most for a rank; all else is the device's."
        )
    if report.mesh_pipe > 1:
        yield (
            f"What is not told by rank is of the rank that needs most of the {report.mesh_pipe} "
            "that have stages, cut by numbers of parameters where pipeline.split does not say how; "
            "activations are those of all microbatches under way, messages included."
        )
    if report.compiled:
        yield "torch.compile is not counted: it fuses operators, and keeps what it likes."
    yield (
        "Not counted: what kernels need while they run, what the allocator rounds up, buffers "
        "between ranks."
    )


def _dominates(found: MemoryEstimate, shards: int) -> str:
    """The largest part of the peak."""
    rank = _needs_most(found)
    while_computing = rank.host or found.computing >= found.gradients + found.updating
    parts = {"the step's batches": found.batch}
    if not rank.host:
        parts |= {
            "parameters": found.parameters + found.buffers,
            "the optimizer's state": rank.optimizer,
            "what the strategy keeps": rank.strategy,
        }
    if while_computing:
        divided = shards > 1 or rank.host
        gathered = ", gradients and what is gathered" if divided else " and gradients"
        parts[f"activations{gathered}"] = found.computing
    else:
        parts["gradients"] = found.gradients
        parts["what the update takes"] = found.updating
    name, size = max(parts.items(), key=lambda part: part[1])
    return f"at the peak, {_bytes(found.peak)}, {name} take most: {_bytes(size)}."


def _fits(report: Report) -> Iterable[str]:
    """The first policy that fits, for each precision; alike ones in one line."""
    size = next(c.estimate.batch_size for c in report.cells if c.estimate is not None)
    assert report.memory is not None
    by_policy: dict[str, list[str]] = {}
    for cells in _rows(report):
        fitting = [
            c.policy for c in cells if c.estimate is not None and c.estimate.peak <= report.memory
        ]
        by_policy.setdefault(fitting[0] if fitting else "", []).append(cells[0].precision)
    for policy, precisions in by_policy.items():
        told = f"the first policy that fits is {policy}" if policy else "no policy fits"
        yield f"In {_bytes(report.memory)} with batches of {size}, {told}: {', '.join(precisions)}."


def _rows(report: Report) -> list[list[Cell]]:
    return [list(cells) for _, cells in groupby(report.cells, key=lambda cell: cell.precision)]


def _first_of_each_precision(report: Report) -> Iterable[Cell]:
    for cells in _rows(report):
        yield next((c for c in cells if c.estimate is not None), cells[0])


def _chosen(report: Report) -> Cell:
    """The config's own way, or the first of its precision."""
    cells = [c for c in report.cells if c.precision == report.chosen[0]]
    return next((c for c in cells if c.policy == report.chosen[1]), cells[0])


def _needs_most(found: MemoryEstimate) -> RankMemory:
    return max(found.ranks, key=lambda rank: rank.peak)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append(_GAP.join(cells).rstrip())
    return "\n".join(lines)


def _number(n: int | None) -> str:
    return "-" if n is None else f"{n:,}"


def _bytes(n: int | None) -> str:
    """In the largest unit of which there is one at least.

    Example:
        >>> [_bytes(n) for n in (0, 1000, 1536, 3 * 2**30, None)]
        ['0', '1000 B', '1.5 KiB', '3.0 GiB', '-']
    """
    if n is None:
        return "-"
    if n == 0:
        return "0"
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(n) >= 1024**power:
            return f"{n / 1024**power:,.1f} {unit}"
    return f"{n} B"
