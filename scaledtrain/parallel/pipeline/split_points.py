"""Where a model is cut into stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from scaledtrain.errors import ConfigError

__all__ = ["Cut", "given_cut"]


@dataclass(frozen=True)
class Cut:
    """How many consecutive parts each stage has.

    Args:
        counts: of parts, stage by stage.

    Raises:
        ConfigError: a stage has none.

    Example:
        >>> cut = Cut((2, 3))
        >>> len(cut), cut.parts_of(1), cut.n_parts
        (2, range(2, 5), 5)
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise ConfigError(
                f"stages of {list(self.counts)} parts: each stage needs at least one; take fewer "
                "stages, or other split points"
            )

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def n_parts(self) -> int:
        """Parts of all stages."""
        return sum(self.counts)

    def parts_of(self, stage: int) -> range:
        """Indices of a stage's parts."""
        ends = list(accumulate(self.counts))
        return range(ends[stage] - self.counts[stage], ends[stage])


def given_cut(names: Sequence[str], split_points: Sequence[str | int], n_stages: int) -> Cut:
    """A cut as the user wants it.

    Args:
        names: of all parts.
        split_points: names of the parts with which the second stage begins, the third and so on; or
            how many parts each stage has.
        n_stages: there are to be.

    Raises:
        ConfigError: a name is no part's, or they are not in order, or not as many as there are
            stages; the counts are not those of all parts.

    Example:
        >>> names = ["embedding", "blocks.0", "blocks.1", "blocks.2", "head"]
        >>> given_cut(names, ["blocks.2"], 2) == given_cut(names, [3, 2], 2) == Cut((3, 2))
        True
    """
    counts = [point for point in split_points if isinstance(point, int)]
    points = [point for point in split_points if isinstance(point, str)]
    if not points and counts:
        if len(counts) != n_stages or sum(counts) != len(names):
            raise ConfigError(
                f"split points {counts} say how many parts each of {len(counts)} stages has, "
                f"{sum(counts)} together; there are to be {n_stages} stages, of {len(names)} parts "
                f"together: {', '.join(names)}"
            )
        return Cut(tuple(counts))
    unknown = [point for point in points if point not in names]
    if unknown:
        raise ConfigError(
            f"split point {unknown[0]!r} is no part of the model; a stage can begin with "
            f"{', '.join(names[1:])}"
        )
    starts = [0, *(list(names).index(point) for point in points), len(names)]
    if counts or len(points) != n_stages - 1 or any(a >= b for a, b in pairwise(starts)):
        raise ConfigError(
            f"split points {list(split_points)} should name the parts with which the second stage "
            f"begins, the third and so on, in order, {n_stages - 1} in all; a stage can begin with "
            f"{', '.join(names[1:])}"
        )
    return Cut(tuple(b - a for a, b in pairwise(starts)))
